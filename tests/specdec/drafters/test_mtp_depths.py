"""One MTP module a depth: logits of every level against a dense computation and transformers' own, never stale."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import specdec
from specdec.drafters import feature_state
from specdec.drafters.check import check_drafter
from specdec.drafters.mtp.drafter import MtpDrafter, load_modules, make_mtp
from specdec.drafters.mtp.state import ModulesState
from specdec.trees.tree import TokenTree
from tests.families import build
from tests.learned import deep_mtp, mtp_modules, outputs_of_modules
from tests.matrix import at_each_run
from tests.specdec.drafters.test_mtp import LAYERS, ORACLE, needs_steps, states_of, write
from tests.specdec.engine.forced import make_room
from tests.specdec.engine.test_engine import model_of
from tests.specdec.engine.test_own_caches import engine_of

TEXT = [5, 9, 13, 7, 3, 11, 40, 21, 8, 60, 2, 33]


def deep_checkpoint(folder, family="deepseek_v3", count=3):
    """A checkpoint of `count` modules, each with weights of its own."""
    write(family, folder)
    weights = load_file(folder / "model.safetensors")
    for depth in range(1, count):
        other = write(family, folder / f"of_{depth}", seed=depth)
        for name, value in load_file(other / "model.safetensors").items():
            if name.startswith(f"model.layers.{LAYERS}."):
                weights[name.replace(f"layers.{LAYERS}.", f"layers.{LAYERS + depth}.")] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": count}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def heard(monkeypatch):
    """The logits of every level of proposals: texts of all rows, tokens drafted so far, their parents, and logits."""
    found, catch_up, run = [], ModulesState.catch_up, ModulesState.run

    def note(batch, tokens, above, logits):
        def noted():
            lengths = [row.length for row in batch.members] or batch.rows.lengths.tolist()
            slots = [row.slot for row in batch.members] or range(len(lengths))
            texts = [batch.rows.tokens[slot, :n].tolist() for slot, n in zip(slots, lengths, strict=True)]
            found.append((texts, tokens.clone(), above.clone(), logits.clone()))

        at_each_run(noted) if batch.captured else noted()
        return logits

    def first(state, batch):
        logits = catch_up(state, batch)
        note(batch, state._tokens, state._above, logits[:, None])
        return logits

    def deeper(state, batch, tokens, tree=None, above=None):
        logits = run(state, batch, tokens, tree, above)
        return note(batch, state._tokens, state._above, logits)

    monkeypatch.setattr(ModulesState, "catch_up", first)
    monkeypatch.setattr(ModulesState, "run", deeper)
    return found


def worst(found, modules) -> float:
    """The largest difference of any heard logit from a dense computation over the text and the path to its node."""
    modules = [*modules]
    model, largest = modules[0].model, 0.0
    for texts, tokens, above, logits in found:
        for row, text in enumerate(texts):
            for place in range(logits.shape[1]):
                path, node = [], tokens.shape[1] and tokens.shape[1] - logits.shape[1] + place + 1
                while node:
                    path, node = [int(tokens[row, node - 1]), *path], int(above[row, node - 1])
                whole = torch.tensor([[*text, *path]])
                states = states_of(model, whole[:, : len(text) - 1])
                given = outputs_of_modules(modules[: len(path) + 1], whole, states)[-1][0, -1]
                wanted = modules[len(path)].network.get_output_embeddings()(given)
                largest = max(largest, float((wanted - logits[row, place]).abs().max()))
    return largest


SHAPES = {
    "chain": {},
    "tree": {"tree": TokenTree.from_widths((2, 2, 1))},
    "dynamic tree": {"dynamic": (6, 3, 2)},
    "two levels of three": {"num_tokens": 2},
}


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_logits_of_every_level_and_round_are_those_of_a_dense_computation(name, monkeypatch):
    """In double precision, over rounds that accept several tokens, some or none, from texts of two tokens on."""
    model = build("llama").double()
    found, drafter = heard(monkeypatch), deep_mtp(model, **SHAPES[name])
    ids, mask = torch.tensor([TEXT[:7], [1] * 5 + TEXT[:2]]), torch.ones(2, 7, dtype=torch.int64)
    mask[1, :5] = 0
    out = specdec.SpeculativeGenerator(model, drafter, mode="eager").generate(ids, mask, max_new_tokens=14)
    plain = specdec.AutoregressiveGenerator(model, mode="eager").generate(ids, mask, max_new_tokens=14)
    assert out.sequences.equal(plain.sequences) and len({*out.stats.pooled.accepted}) > 1
    assert {len(text) for texts, *_ in found for text in texts} >= {4, 8} and len(found) > 10
    assert min(len(text) for texts, *_ in found for text in texts) > len(drafter.runner.source.depths)
    assert worst(found, mtp_modules(model)) < 1e-9


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_captured_rounds_give_the_same_logits(name, monkeypatch):
    """After the two forwards that capture, whose texts are no rows'."""
    model, found = build("llama").double(), heard(monkeypatch)
    generator = specdec.SpeculativeGenerator(model, deep_mtp(model, **SHAPES[name]), mode="graph")
    generator.generate(torch.tensor([TEXT]), max_new_tokens=20)
    levels = max(tokens.shape[1] for _, tokens, _, _ in found)
    first = next(i for i, (_, tokens, *_) in enumerate(found) if tokens.shape[1] == levels) + 1
    assert len(found) > first + 6 and worst(found[first:], mtp_modules(model)) < 1e-5  # recorded norms are in float32


@pytest.mark.parametrize("shared", [True, False])
def test_prefixes_and_preemption_leave_nothing_stale(shared, monkeypatch):
    """Requests whose prompt begins as another one's, or one that comes back after it had to make room."""
    model, base = model_of(), [10 + (i * i + i // 7) % 83 for i in range(40)]
    found, engine = heard(monkeypatch), engine_of(deep_mtp(model))
    for prompt in ([*base, 20, 21], [*base, 30], base[:37], base) if shared else (base,):
        handle = engine.submit(prompt, max_new_tokens=14, eos_token_id=[])
        while not shared and len(handle.tokens) < 6:
            engine.step()
        if not shared:
            make_room(engine, handle)
        list(engine.run())
        assert handle.error is None and handle.preemptions == (not shared)
    assert engine.stats()["saved_tokens"] > 0 and len(found) > 10
    with torch.inference_mode():
        assert worst(found, mtp_modules(model)) < 1e-4


@pytest.mark.parametrize("planted", ["last steps keep what was drafted", "states of the module above"])
@torch.inference_mode()
def test_stale_states_are_caught(planted, monkeypatch):
    model = build("llama").double()
    found, drafter = heard(monkeypatch), deep_mtp(model)
    if planted == "last steps keep what was drafted":
        tokens = feature_state.FeatureState._tokens

        def stale(state, rows, row, start, count):
            found = tokens(state, rows, row, start, count)
            found[:1, 2:] = (found[:1, 2:] + 1) % model.config.vocab_size  # of the first step that runs again
            return found

        monkeypatch.setattr(feature_state.FeatureState, "_tokens", stale)
    else:
        run_text = feature_state.FeatureState.run_text

        def shifted(state, batch, ahead=None, last=1):
            output, hidden = run_text(state, batch, ahead, last)
            return output, hidden.roll(1, 2)

        monkeypatch.setattr(feature_state.FeatureState, "run_text", shifted)
    specdec.SpeculativeGenerator(model, drafter, mode="eager").generate(torch.tensor([TEXT]), max_new_tokens=14)
    assert worst(found, mtp_modules(model)) > 1e-3


@needs_steps
@torch.inference_mode()
def test_drafts_are_those_of_transformers_own_modules(tmp_path):
    """From one file: logits of every level of the first proposal, and text and acceptance of chains."""
    from transformers.cache_utils import MtpCache

    model = specdec.load_model(deep_checkpoint(tmp_path))
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[3-9].*"]
    model.config.num_mtp_layers = 3
    theirs = ORACLE.from_pretrained(model).eval()
    ids = torch.randint(2, 23, (1, 12), generator=torch.Generator().manual_seed(2))
    states = states_of(model, ids)[:, :-1]
    cache, places = MtpCache(config=model.config.get_mtp_config()), torch.arange(1, 12)[None]
    tokens, wanted, _ = theirs(ids[:, 1:], states, None, places, cache)
    drafter = make_mtp(specdec.ModelRunner(model, mode="eager"), None)
    assert "3 MTP modules, one a depth, of 3" in drafter.describe() and drafter.traits.max_tokens == 3
    modules, whole = load_modules(model), torch.cat([ids, tokens], 1)
    for depth in range(3):
        given = outputs_of_modules(modules[: depth + 1], whole[:, : 12 + depth], states)[-1][0, -1]
        logits = modules[depth].network.get_output_embeddings()(given)
        torch.testing.assert_close(logits, wanted[0, depth], atol=1e-4, rtol=0)
    for mode in ("eager", "graph"):
        generator = specdec.SpeculativeGenerator(model, drafter, mode=mode)
        plain = specdec.AutoregressiveGenerator(model).generate(ids, max_new_tokens=20)
        assert generator.generate(ids, max_new_tokens=20).sequences.equal(plain.sequences)


def test_shapes_that_the_modules_cannot_draft_are_refused():
    model = build("llama")
    with pytest.raises(ValueError, match=r"3 MTP modules, one a depth, .* a draft of 4 levels; .* \(number=0\)"):
        deep_mtp(model, 4)
    with pytest.raises(ValueError, match="a draft of 5 levels"):
        deep_mtp(model, dynamic=(9, 5, 3))
    with pytest.raises(ValueError, match="one MTP module, got 3"):
        check_drafter(deep_mtp(model), model, [TEXT])
    assert MtpDrafter(mtp_modules(model)[1], 5).traits.max_tokens == 5  # a single one is repeated
