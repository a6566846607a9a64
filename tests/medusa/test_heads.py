"""Medusa heads: exactly the model at the start, nothing shared between heads, and files that say what is wrong with
them.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medusa.config import MedusaConfig
from medusa.drafter import MedusaGenerator
from medusa.files import LEGACY, WEIGHTS
from medusa.heads import MedusaHeads
from medusa.logits import LogitMap
from medusa.losses import head_loss, model_loss
from specdec.model.fusion.projections import fuse_projections
from specdec.model.fusion.quantised.packed_linear import PackedLinear
from specdec.model.fusion.quantised.rounding import round_to_nearest
from tests.families import CONFIGS, OUTPUT_BIAS, VOCAB, build, ragged_prompts

CONFIG = dict(num_heads=3, num_layers=2, hidden_size=8, vocab_size=20)
VARIANTS = [{}, {"output": "shared"}, {"output": "low_rank", "rank": 4}, {"bias": True}]


def trained(biased: bool = False, **options) -> tuple[MedusaHeads, nn.Linear]:
    """Heads that a few random steps have moved, and an output layer, with a bias where the heads have one."""
    torch.manual_seed(0)
    lm_head = nn.Linear(8, 20, bias=biased or options.get("bias", False))
    heads = MedusaHeads(MedusaConfig(**CONFIG | options), lm_head)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return heads, lm_head


@pytest.mark.parametrize("options", VARIANTS[:3], ids=str)
@pytest.mark.parametrize("family", sorted(CONFIGS | OUTPUT_BIAS))
def test_untrained_heads_repeat_the_models_logits_exactly(family, options):
    model = build(family)
    heads = MedusaHeads.for_model(model, 3, 2, **options)
    assert heads.config.bias == (family in OUTPUT_BIAS and not options)
    lm_head, read = model.get_output_embeddings(), []
    hook = lm_head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        expected = model(torch.randint(3, VOCAB, (4, 5))).logits
        hook.remove()
        logits = heads(read[0], lm_head)
        assert all(torch.equal(heads.logits(head, read[0], lm_head), expected) for head in range(3))
    assert logits.shape == (3, 4, 5, model.config.vocab_size)
    torch.testing.assert_close(logits, expected.expand_as(logits))  # a product of more rows may round otherwise


@pytest.mark.parametrize("options", VARIANTS[:3], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_heads_of_an_output_layer_without_a_weight(options, bias):
    """As quantised layers are that keep packed numbers only: heads start as it, learn, and draft for it."""
    model = build("llama")
    model.generation_config.eos_token_id = None
    full, own_bias = model.lm_head, nn.Parameter(0.1 * torch.randn(model.config.vocab_size)) if bias else None
    model.lm_head = PackedLinear(round_to_nearest(full.weight, 8, full.in_features), own_bias)
    rounded = model.lm_head.packed.dequantise(torch.float32)
    heads = MedusaHeads.for_model(model, 2, **options)
    states = torch.randn(6, full.in_features)
    for head in range(2):
        torch.testing.assert_close(heads.logits(head, states, model.lm_head), model.lm_head(states))
        if not options:
            torch.testing.assert_close(heads.heads[head][-1].weight, rounded, rtol=0, atol=1e-6 if bias else 0)
    assert not torch.allclose(model.lm_head(states), full(states), atol=1e-4)
    labels = torch.arange(6)[None] + 3
    loss = head_loss(heads, 0, states[None], labels, model.lm_head) + model_loss(model.lm_head, states[None], labels)
    loss.backward()
    assert heads.heads[0][0].linear.weight.grad.norm() > 0
    ids, mask = ragged_prompts(2)
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=1)
    assert MedusaGenerator(model, heads).generate(ids, mask, max_new_tokens=12).sequences.equal(expected)


def test_an_output_layer_of_unknown_size_is_named():
    model = build("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="output layer, a Sequential, has no weight, and out_features and in_features"):
        MedusaHeads.for_model(model, 2)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_no_weight_is_shared_between_heads_or_blocks(options):
    heads = MedusaHeads(MedusaConfig(**CONFIG, **options), nn.Linear(8, 20, bias="bias" in options))
    places = [parameter.data_ptr() for parameter in heads.parameters()]
    assert len(set(places)) == len(places)
    blocks = [block for head in heads.heads for block in head]
    assert len({id(block) for block in blocks}) == len(blocks)


@pytest.mark.parametrize("bias", [False, True])
def test_logits_and_gradients_equal_a_plain_writing(bias):
    heads, _ = trained(bias=bias)
    states = torch.randn(6, 8, requires_grad=True)
    plain = []
    for head in heads.heads:
        h = states
        for block in list(head)[:2]:
            z = h @ block.linear.weight.T + block.linear.bias
            h = h + z * torch.sigmoid(z)
        plain.append(h @ head[2].weight.T + (head[2].bias if bias else 0))
    target = torch.randn(3, 6, 20)
    ours = torch.autograd.grad((heads(states) * target).sum(), [states, *heads.parameters()])
    theirs = torch.autograd.grad((torch.stack(plain) * target).sum(), [states, *heads.parameters()])
    torch.testing.assert_close(heads(states), torch.stack(plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_joined_twin_says_the_same_from_the_same_weights(options, layers, tmp_path):
    heads, lm_head = trained(**options | {"num_layers": layers})
    before, states, shapes = {name: p.clone() for name, p in heads.named_parameters()}, torch.randn(4, 5, 8), []

    def product(x, weight, bias):
        shapes.append(tuple(weight.shape))
        return nn.functional.linear(x, weight, bias)

    with torch.no_grad():
        expected, twin = heads(states, lm_head), fuse_projections(heads, product)
        torch.testing.assert_close(twin(states, lm_head), expected)
    assert shapes[0] == (3 * 8, 8) and shapes.count((8, 8)) == 3 * (layers - 1)
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in heads.parameters()]
    assert all(p.equal(before[name]) for name, p in heads.named_parameters())
    with torch.no_grad():
        for some in (heads, twin):  # the first heads alone
            torch.testing.assert_close(some(states, lm_head, 2), expected[:2])
    heads.save_pretrained(tmp_path)  # although the first blocks lie in one piece of memory now
    assert MedusaHeads.from_pretrained(tmp_path)(states, lm_head).equal(expected)


@pytest.mark.parametrize("hooked", [lambda head: head[0], lambda head: head[0].linear], ids=["block", "product"])
def test_blocks_that_do_more_than_multiply_are_not_joined(hooked):
    heads, _ = trained()
    seen = []
    hooked(heads.heads[1]).register_forward_hook(lambda *_: seen.append(True))
    states = torch.randn(2, 8)
    assert fuse_projections(heads, nn.functional.linear)(states).equal(heads(states)) and len(seen) == 2


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_saved_heads_come_back_as_they_were(options, tmp_path):
    heads, lm_head = trained(**options, logit_scale=0.25, logit_cap=3.0, base_weights={"a.weight": "0.5 -1e-05"})
    heads.save_pretrained(tmp_path, card="# Heads")
    back = MedusaHeads.from_pretrained(tmp_path)
    states = torch.randn(5, 8)
    assert back.config == heads.config and torch.equal(back(states, lm_head), heads(states, lm_head))
    assert (tmp_path / "README.md").read_text() == "# Heads" and MedusaHeads.from_pretrained(
        tmp_path, torch.float16
    ).heads[0][0].linear.weight.dtype == torch.float16


@pytest.mark.parametrize("output", ["own", "shared", "low_rank"])
def test_heads_of_an_output_layer_with_a_bias_add_it_once(output):
    """Training asks head by head, decoding for all of them at once."""
    heads, lm_head = trained(biased=True, output=output, rank=4 if output == "low_rank" else None, bias=output == "own")
    states = torch.randn(5, 8)
    with torch.no_grad():
        blocks = [heads.state(head, states) for head in range(3)]
        own = {
            "own": lambda head, x: x @ head[-1].weight.T + head[-1].bias,
            "shared": lambda _, x: lm_head(x),
            "low_rank": lambda head, x: lm_head(x) + x @ head[-1].down.weight.T @ head[-1].up.weight.T,
        }[output]
        expected = torch.stack([own(head, state) for head, state in zip(heads.heads, blocks, strict=True)])
        torch.testing.assert_close(torch.stack([heads.logits(head, states, lm_head) for head in range(3)]), expected)
        torch.testing.assert_close(heads(states, lm_head), expected)
        lm_head.bias.add_(1.0)  # what belongs to the model is read there
        assert heads(states, lm_head).allclose(expected + (output != "own"))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_logits_are_scaled_and_capped_in_training_and_in_decoding(options):
    heads, lm_head = trained(**options, logit_scale=4.0, logit_cap=1.5)
    plain, states = trained(**options)[0], torch.randn(5, 8)
    with torch.no_grad():
        results = plain(states, lm_head)
        expected = 1.5 * torch.tanh(4 * results / 1.5)
        assert (expected.abs() > 1.4).any() and (expected - 4 * results).abs().max() > 1
        torch.testing.assert_close(heads(states, lm_head), expected)
        torch.testing.assert_close(torch.stack([heads.logits(head, states, lm_head) for head in range(3)]), expected)
        torch.testing.assert_close(fuse_projections(heads, nn.functional.linear)(states, lm_head), expected)


def test_an_output_layer_that_does_more_than_multiply_is_not_copied():
    """An output layer with a scale for each token: the layer itself can be shared, a copy of its weight is another."""

    class ScaledPerToken(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * (1 + torch.arange(self.out_features))

    model = build("llama")
    layer = ScaledPerToken(32, VOCAB, bias=False)
    model.set_output_embeddings(layer)
    with pytest.raises(
        ValueError, match=r"ScaledPerToken, the output layer of LlamaForCausalLM, does more than multiply"
    ):
        MedusaHeads.for_model(model, 2)
    states = torch.randn(4, 32)
    assert MedusaHeads.for_model(model, 2, output="shared").logits(1, states, layer).equal(layer(states))


def test_heads_saved_before_they_could_have_a_bias_or_a_scale_are_read(tmp_path):
    heads, lm_head = trained()
    heads.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("bias", "logit_scale", "logit_cap", "base_weights"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    states = torch.randn(5, 8)
    back = MedusaHeads.from_pretrained(tmp_path)
    assert back(states, lm_head).equal(heads(states, lm_head)) and back.logit_map == LogitMap(1.0, None)


@pytest.mark.parametrize(("change", "said"), [
    (lambda w: w.pop("1.0.linear.bias"), "lack weights: 1.0.linear.bias"),
    (lambda w: w.update({"1.7.weight": torch.zeros(1)}), "have unknown weights: 1.7.weight"),
    (lambda w: w.update({"1.0.linear.bias": torch.zeros(3)}), r"weight 1.0.linear.bias .* is \[3\], its config "
                                                              r"asks for \[8\]"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_named(change, said, tmp_path):
    trained()[0].save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    change(weights)
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=said):
        MedusaHeads.from_pretrained(tmp_path)


def test_a_pickle_that_runs_code_is_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("evil",)

    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 1, "medusa_num_layers": 1}))
    torch.save({"0.0.linear.weight": Evil()}, tmp_path / LEGACY)
    with pytest.raises(Exception, match="weights_only|Unsupported"):
        MedusaHeads.from_pretrained(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        MedusaHeads.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="has none of medusa_lm_head.safetensors, medusa_lm_head.pt, model"):
        MedusaHeads.from_pretrained(tmp_path)
    save_file({"0.0.linear.weight": torch.zeros(2, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="medusa_num_heads, medusa_num_layers"):
        MedusaHeads.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_heads": 0},
        {"num_layers": -1},
        {"output": "other"},
        {"rank": 3},
        {"output": "low_rank"},
        {"output": "low_rank", "rank": 9},
        {"format": 2},
        {"bias": True, "output": "shared"},
        {"logit_scale": 0.0},
        {"logit_scale": float("inf")},
        {"logit_cap": -3.0},
    ],
)
def test_a_config_that_cannot_be_is_refused(bad):
    value = [*bad.values()][-1 if "bias" in bad else 0]
    with pytest.raises(ValueError, match=re.escape(str(value)) if bad != {"output": "low_rank"} else "rank"):
        MedusaConfig(**{**CONFIG, **bad})


def test_an_output_layer_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\[20, 9\]"):
        MedusaHeads(MedusaConfig(**CONFIG), nn.Linear(9, 20, bias=False))
    for bias, said in ((False, "a bias, the heads have bias=False"), (True, "no bias, the heads have bias=True")):
        with pytest.raises(ValueError, match=said):
            MedusaHeads(MedusaConfig(**CONFIG, bias=bias), nn.Linear(8, 20, bias=not bias))
    with pytest.raises(ValueError, match="output layer"):
        trained(output="shared")[0](torch.zeros(1, 8))
