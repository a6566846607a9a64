"""Scales and caps between the output layer and the logits are found by what a model does, whatever its config calls
them.
"""

import pytest
import torch
import transformers as tf
from torch import nn

import specdec
from medusa import MedusaGenerator, MedusaHeads, TrainingSettings, train_medusa
from medusa.logits import LogitMap, measure
from medusa.losses import head_loss
from specdec.training.data import Rows
from tests.families import VOCAB, build, ragged_prompts

_SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=160, bos_token_id=0, eos_token_id=2, pad_token_id=1,
)  # fmt: skip
SCALED = {
    "divides": (lambda: tf.GraniteConfig(**_SMALL, logits_scaling=6.0), LogitMap(1 / 6)),
    "multiplies": (lambda: tf.CohereConfig(**_SMALL, logit_scale=0.0625), LogitMap(0.0625)),
    "caps": (lambda: tf.Gemma2Config(**_SMALL, head_dim=16, final_logit_softcapping=5.0), LogitMap(1.0, 5.0)),
    "nothing": (lambda: tf.LlamaConfig(**_SMALL), LogitMap()),
}


def scaled(kind: str, dtype=torch.float32):
    """A random model of that kind, whose logits are spread out so that a cap bends them."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(SCALED[kind][0]()).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=1.0)
        model.get_output_embeddings().weight[2] = 0.0  # seldom the end of a text
    return model.to(dtype)


@pytest.mark.seam
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SCALED)
def test_scale_and_cap_are_measured_in_every_dtype(kind, dtype):
    found, expected = measure(scaled(kind, dtype))[0], SCALED[kind][1]
    assert found.cap == expected.cap and found.scale == pytest.approx(expected.scale, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"output": "shared"}, {"output": "low_rank", "rank": 4}], ids=str)
@pytest.mark.parametrize("kind", SCALED)
def test_untrained_heads_have_the_models_probabilities(kind, options, tmp_path):
    """Those of the model's own forward, also after saving."""
    model, read = scaled(kind), []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        expected = model(torch.arange(3, 12)[None]).logits.log_softmax(-1)
    hook.remove()
    MedusaHeads.for_model(model, 2, **options).save_pretrained(tmp_path)
    heads = MedusaHeads.from_pretrained(tmp_path)
    with torch.no_grad():
        for logits in heads(read[0], model.get_output_embeddings()):
            torch.testing.assert_close(logits.log_softmax(-1), expected)


@pytest.mark.parametrize("output", ["own", "shared"])
@pytest.mark.parametrize("kind", SCALED)
def test_a_head_learns_on_scaled_and_capped_logits(kind, output):
    """The loss, and its gradient, are those of the probabilities that the model itself would give."""
    model, scale, cap = scaled(kind), SCALED[kind][1].scale, SCALED[kind][1].cap
    heads, lm_head = MedusaHeads.for_model(model, 1, output=output), model.get_output_embeddings()
    with torch.no_grad():
        heads.heads[0][0].linear.weight.normal_(std=0.3)
    hidden, labels = torch.randn(2, 9, 32), torch.randint(3, VOCAB, (2, 9))
    loss = head_loss(heads, 0, hidden, labels, lm_head, chunk=4)
    block = heads.heads[0][0].linear
    state = hidden[:, :-2] + nn.functional.silu(block(hidden[:, :-2]))
    logits = (heads.heads[0][1] if output == "own" else lm_head)(state) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 2:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(*(torch.autograd.grad(x, block.parameters()) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("kind", ["divides", "caps"])
def test_heads_of_such_models_train_and_decode_exactly(kind, mode, tmp_path):
    model = scaled(kind)
    heads = MedusaHeads.for_model(model, 2)
    tokens = torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0)).int()
    rows = Rows(tokens, tokens, torch.zeros_like(tokens))
    records = train_medusa(
        model, heads, rows, tmp_path, TrainingSettings(12, 2, 2, lr=1e-2, log_every=1), progress=False
    )
    assert records[-1]["head_0_loss"] < records[0]["head_0_loss"]
    ids, mask = ragged_prompts(3)
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16)
    runner = specdec.ModelRunner(model, fuse=False)
    runner.mode = mode
    out = MedusaGenerator(runner, heads).generate(ids, mask, max_new_tokens=16)
    assert out.sequences.equal(expected)


@pytest.mark.parametrize(("change", "said"), [
    (lambda logits: logits.clamp(-10, 10), "more to the results of its output layer than scale and cap"),
    (lambda logits: logits + torch.arange(VOCAB) / VOCAB, "more to the results of its output layer than scale and cap"),
    (lambda logits: logits.log_softmax(-1), "more to the results of its output layer than scale and cap"),
    (lambda logits: -logits, "more to the results of its output layer than scale and cap"),
    (lambda logits: logits[..., :50], r"makes logits \[1, 3, 50\] of its output layer's results \[\[1, 3, 97\]\]"),
])  # fmt: skip
def test_what_is_neither_a_scale_nor_a_cap_is_an_error(change, said):
    class Odd(tf.LlamaForCausalLM):
        def forward(self, *arguments, **keywords):
            output = super().forward(*arguments, **keywords)
            output.logits = change(output.logits)
            return output

    with pytest.raises(ValueError, match=f"Odd .*{said}"):
        MedusaHeads.for_model(Odd(tf.LlamaConfig(**_SMALL)).eval(), 2)


def test_a_model_without_an_output_layer_is_an_error():
    with pytest.raises(ValueError, match="LlamaModel has no output layer"):
        MedusaHeads.for_model(tf.LlamaModel(tf.LlamaConfig(**_SMALL)), 2)


def test_measuring_leaves_the_model_alone():
    """Its output layer, which other threads may be using, is never replaced or hooked, and no weight changes."""
    model = build("gemma2")
    layer, before = model.lm_head, {name: weight.clone() for name, weight in model.state_dict().items()}
    inside = []
    model.model.norm.register_forward_hook(lambda *_: inside.append((model.lm_head, dict(layer._forward_pre_hooks))))
    measure(model)
    assert inside == [(layer, {})] and model.lm_head is layer and "forward" not in vars(layer)
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())
