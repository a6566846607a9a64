"""The target's own weights, rounded, draft in its cache: what is read there, what stays there, and when they change."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from attention import PagedKVCache
from scripts.generate_bench.peers import cache_argument
from specdec.model.fusion.quantised.packed_linear import PackedLinear
from specdec.model.fusion.quantised.rounding import round_to_nearest
from specdec.model.quantised_copy import QuantisedCopy
from tests.attention.hf.test_twin import state_of
from tests.families import build, ragged_prompts
from tests.matrix import TREE, require_free
from tests.quantised_models import model_of
from tests.specdec.generation import test_generators
from tests.specdec.generation.test_generators import p_value

PROMPT = torch.tensor([[5, 6, 7, 50, 9, 11, 3, 80]])


def drafter_of(model, **options):
    return specdec.QuantisedSelfDrafter(model, **{"num_tokens": 3, "group": 16} | options)


# the copy


def test_a_copy_shares_all_but_the_weights_that_it_rounds_and_leaves_the_model_alone():
    model = build("llama")
    before, logits = state_of(model), model(PROMPT).logits
    copied = QuantisedCopy(model, group=16)
    rounded = {name: layer for name, layer in copied.model.named_modules() if isinstance(layer, PackedLinear)}
    assert len(rounded) == 3 * 7 and set(copied.kept) == {"lm_head"} and "output_layer=True" in copied.kept["lm_head"]
    for name, layer in rounded.items():
        expected = round_to_nearest(model.get_submodule(name).weight, 4, 16).dequantise(torch.float32)
        assert layer.packed.dequantise(torch.float32).equal(expected) and not expected.equal(
            model.get_submodule(name).weight
        )
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in copied.model.parameters())
    assert copied.nbytes == sum(layer.values.nbytes + layer.scales.nbytes for layer in rounded.values())
    assert state_of(model) == before and model(PROMPT).logits.equal(logits)
    assert not torch.allclose(copied.model(PROMPT).logits, logits, atol=1e-2)
    whole = QuantisedCopy(model, bits=8, output_layer=True)
    assert not whole.kept and isinstance(whole.model.lm_head, PackedLinear)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gpt_neox", "phi"])
def test_layers_that_stay_as_they_are_are_listed_with_the_reason(family):
    """Experts are no `nn.Linear`; embeddings are not meant to be rounded. What is said to stay is what stays."""
    model = build(family)
    copied = QuantisedCopy(model, bits=8)
    stays = {
        name
        for name, module in copied.model.named_modules()
        if not isinstance(module, torch.nn.Embedding) and any(p.ndim > 1 for p in module.parameters(recurse=False))
    }
    assert stays == set(copied.kept)
    assert family not in ("mixtral", "gpt_oss") or any("not an nn.Linear" in why for why in copied.kept.values())


@pytest.mark.parametrize("kind", ["compressed int4", "gptq", "int8"])
def test_layers_that_are_quantised_already_stay_and_say_so(kind):
    model = model_of(kind)
    model(PROMPT)  # in which some formats unpack their numbers
    with pytest.raises(ValueError, match=r"proj \(\d+\): it is quantised already \("):
        QuantisedCopy(model)
    if kind == "compressed int4":
        return  # which wraps the forward of the layers beside them too
    copied = QuantisedCopy(model, bits=8, output_layer=True)
    assert copied.model.model.layers[0].mlp.up_proj is model.model.layers[0].mlp.up_proj
    assert isinstance(copied.model.lm_head, PackedLinear) and "lm_head" not in copied.kept
    assert "quantised already" in copied.kept["model.layers.1.self_attn.q_proj"]


def test_widths_that_groups_do_not_fill_stay_in_16_bits_and_explain_says_so():
    pair = specdec.load_tiny_pair()
    with pytest.raises(ValueError, match=r"mlp\.down_proj \(20\): its 432 inner positions do not divide into .* 128"):
        specdec.QuantisedSelfDrafter(pair.target)
    drafter = specdec.QuantisedSelfDrafter(pair.target, group=32)
    told = specdec.SpeculativeGenerator(pair.target, drafter).explain()
    assert "not rounded to 4 bits:\nmodel.layers.*.mlp.down_proj (20): its 432 inner positions do not divide" in told
    assert "PackedLinear" in told.split("\n\n")[1]


def test_what_makes_no_drafter_is_refused():
    model = build("llama")
    for options, told in (({"bits": 3}, "bits=3"), ({"group": 24}, "got 24"), ({"group": 128}, "can be rounded")):
        with pytest.raises(ValueError, match=told):
            drafter_of(model, **options)
    with pytest.raises(ValueError, match=r"can be rounded to 4 bits(.|\n)*Conv1D"):
        drafter_of(build("gpt2"))
    with pytest.raises(ValueError, match="not the generator's target"):
        specdec.SpeculativeGenerator(build("llama"), drafter_of(model))


# the cache


def contents(cache, sequence, length):
    """Keys and values `[2, layers, length, G, D]` of the first tokens of a sequence."""
    slots = cache.slots(sequence, range(length))
    return torch.stack([
        torch.stack([of_layer[slots] for of_layer in held]) for held in (cache.key_slots, cache.value_slots)
    ])  # fmt: skip


def plain_contents(model, tokens):
    """The same as plain decoding leaves them: a prompt at once, then token by token."""
    runner = specdec.ModelRunner(model, mode="eager")
    runner.reserve([len(tokens)])
    sequence = runner.cache.add()
    runner.forward([sequence], tokens[: PROMPT.shape[1]], [min(len(tokens), PROMPT.shape[1])])
    for token in tokens[PROMPT.shape[1] :]:
        runner.forward([sequence], token[None], [1])
    return contents(runner.cache, sequence, len(tokens))


@pytest.mark.parametrize("options", [{}, {"tree": TREE}], ids=["chain", "tree"])
def test_after_each_round_the_pages_hold_the_targets_keys_and_values(options, monkeypatch):
    """Also those of the root, which the draft writes first; compared when the next round begins, in eager rounds."""
    model = build("llama")
    drafter, seen = drafter_of(model, **options), []
    generator = specdec.SpeculativeGenerator(model, drafter, mode="eager")
    start = drafter.start

    def watching(rows, max_tokens):
        session = start(rows, max_tokens)
        propose, cache = session.propose, rows.target.cache

        def propose_after_a_look(batch, tree=None):
            for row in batch.members:
                held = cache.length(row.sequence)
                seen.append((rows.tokens[row.slot, :held].clone(), contents(cache, row.sequence, held), row.length))
            return propose(batch, tree)

        session.propose = propose_after_a_look
        return session

    monkeypatch.setattr(drafter, "start", watching)
    out = generator.generate(PROMPT, max_new_tokens=24)
    assert 0 < out.stats.pooled.acceptance_rate < 1 and len(seen) > 4
    for tokens, held, length in seen[1:]:
        assert len(tokens) == length - 1
        torch.testing.assert_close(held, plain_contents(model, tokens), rtol=1e-4, atol=1e-5)
    assert drafter.runner.cache is generator.target.cache and drafter.runner.borrows_cache
    assert out.sequences.equal(specdec.AutoregressiveGenerator(model).generate(PROMPT, max_new_tokens=24).sequences)


@pytest.mark.parametrize("mode", ["graph", "auto"])
@pytest.mark.parametrize("options", [{}, {"tree": TREE}], ids=["chain", "tree"])
def test_after_captured_rounds_too(options, mode, monkeypatch):
    """Looked at when the sequence is given back."""
    model, held = build("llama"), []
    model.generation_config.eos_token_id = None
    generator = specdec.SpeculativeGenerator(model, drafter_of(model, **options), mode=mode)
    free = PagedKVCache.free
    length = PROMPT.shape[1] + 24

    def look(cache, sequence):
        held.append(contents(cache, sequence, length - 1))
        free(cache, sequence)

    monkeypatch.setattr(PagedKVCache, "free", look)
    out = generator.generate(PROMPT, max_new_tokens=24)
    assert out.stats.host is None and 0 < out.stats.pooled.acceptance_rate < 1, "captured"
    text = out.sequences[0, : length - 1]
    torch.testing.assert_close(held[0], plain_contents(model, text), rtol=1e-4, atol=1e-5)
    require_free(generator)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_drafts_read_the_targets_keys_and_values():
    """By transformers' own cache: filled by the target, then read by the copy; its own prefill gives something else."""
    model, q = build("llama"), []
    model.generation_config.eos_token_id = None
    drafter = drafter_of(model, num_tokens=1, output_layer=True)

    def rule(draft, scores, noise):
        q.append(draft.probs[0, 0])
        return specdec.lossless(draft, scores, noise)

    generator = specdec.SpeculativeGenerator(model, drafter, rule=rule, mode="eager")
    out = generator.generate(PROMPT, max_new_tokens=12, do_sample=True, seed=1)
    length, text = PROMPT.shape[1], out.sequences
    assert len(q) == len(out.stats.rows[0].emitted) > 5
    for distribution, emitted in zip(q, out.stats.rows[0].emitted, strict=True):
        with torch.no_grad():
            filled = model(text[:, : length - 1], use_cache=True)
            given = {cache_argument(model): getattr(filled, "cache", None) or filled.past_key_values}
            wanted = drafter.copy.model(text[:, length - 1 : length], **given).logits[0, -1].softmax(-1)
            own = drafter.copy.model(text[:, :length]).logits[0, -1].softmax(-1)
        torch.testing.assert_close(distribution, wanted, rtol=1e-3, atol=1e-5)
        assert (distribution - own).abs().max() > 1e-3
        length += emitted


def test_no_prompt_runs_through_the_rounded_weights():
    model, widest = build("llama"), []
    drafter = drafter_of(model)
    layer = drafter.copy.model.model.layers[0].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _, given: widest.append(given[0].shape[-2]))
    ids, mask = ragged_prompts(4)
    specdec.SpeculativeGenerator(model, drafter).generate(ids, mask, max_new_tokens=8)
    handle.remove()
    assert max(widest) == 4, "one token of each of the four rows"


# the distribution


def wide_model(seed, layers=1):
    """`small_model`, wide enough for groups of 16 in all layers."""
    config = LlamaConfig(
        vocab_size=test_generators.SMALL, hidden_size=32, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(60)
    return model


@pytest.mark.parametrize("options", [{"num_tokens": 2}, {"tree": specdec.TokenTree.from_widths((2, 1))}], ids=str)
def test_samples_have_the_targets_distribution_with_all_layers_in_four_bits(options, monkeypatch):
    monkeypatch.setattr(test_generators, "small_model", wide_model)
    drafter = lambda target, draft: specdec.QuantisedSelfDrafter(target, group=16, output_layer=True, **options)
    assert p_value(drafter=drafter, layers=2, rows=2000, calls=1) > 1e-3


# weights that change


@pytest.mark.parametrize("mode", ["eager", "auto"])
def test_weights_that_are_trained_are_rounded_anew(mode):
    """In captured rounds too: the next call drafts as a new drafter would."""
    model = build("llama")
    generator = specdec.SpeculativeGenerator(model, drafter_of(model), mode=mode)
    generator.generate(PROMPT, max_new_tokens=12)
    layers = [model.model.layers[1].mlp.up_proj, model.model.layers[2].self_attn.q_proj]
    optimiser = torch.optim.SGD([layer.weight for layer in layers], 5.0)
    model(PROMPT, labels=PROMPT).loss.backward()
    optimiser.step()
    out = generator.generate(PROMPT, max_new_tokens=12)
    for layer, name in zip(layers, ("layers.1.mlp.up_proj", "layers.2.self_attn.q_proj"), strict=True):
        packed = generator.drafter.copy.model.model.get_submodule(name).packed
        assert packed.dequantise(torch.float32).equal(round_to_nearest(layer.weight, 4, 16).dequantise(torch.float32))
    anew = specdec.SpeculativeGenerator(model, drafter_of(model), mode=mode).generate(PROMPT, max_new_tokens=12)
    assert out.sequences.equal(anew.sequences) and out.stats.rows[0].emitted == anew.stats.rows[0].emitted


def test_modules_that_are_exchanged_are_refused():
    model = build("llama")
    generator = specdec.SpeculativeGenerator(model, drafter_of(model))
    layer = model.model.layers[0].mlp
    own, layer.up_proj = layer.up_proj, torch.nn.Linear(32, 64, bias=False)
    with pytest.raises(ValueError, match="modules of LlamaForCausalLM were exchanged"):
        generator.generate(PROMPT, max_new_tokens=4)
    require_free(generator)
    layer.up_proj = own
    assert generator.generate(PROMPT, max_new_tokens=4).lengths.tolist() == [4]
