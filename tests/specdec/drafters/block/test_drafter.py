"""Block drafters in rounds: in each, all slots are those of a fresh drafter over the same text, and text is exact."""

from dataclasses import replace
from functools import cache

import pytest
import torch

import specdec
from specdec import TokenTree
from specdec.cuda_graph import HostCopy
from specdec.drafters.block import steps as blocks
from specdec.drafters.block.dense import block_places, slot_logits
from specdec.drafters.block.drafter import BlockDrafter
from specdec.drafters.block.module import BlockModel
from specdec.drafters.block.state import BlockState
from specdec.drafters.block.steps import BlockSteps
from specdec.drafters.network.rotation import Rotation
from specdec.engine import lane
from specdec.model.features import Features
from specdec.planning.policy import PLAIN, shape_of
from specdec.requests.rows import Rows
from specdec.rounds import captured
from tests.families import build, ragged_prompts
from tests.learned import dflash, dflash2, domino, dspark, features_of
from tests.matrix import at_each_run, require_free
from tests.specdec.engine.forced import by_rounds, force, make_room
from tests.specdec.engine.test_engine import PAGE, prompts_of, require_empty

MAKERS = {"DFlash": dflash, "DSpark": dspark, "DFlash2": dflash2, "Domino": domino}
SHAPES = {"chain": {}, "tree": dict(tree=TokenTree((None, 0, 0, 1, 1, 3))), "dynamic tree": dict(dynamic=(7, 3, 2))}
COUNT = 24
every_kind = pytest.mark.parametrize("kind", MAKERS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


@cache
def target_model():
    return build("llama")


@cache
def plain():
    return specdec.AutoregressiveGenerator(target_model(), mode="eager")


@cache
def own_text(batch):
    return plain().generate(*ragged_prompts(batch, longest=30), max_new_tokens=COUNT)


@pytest.fixture
def heard(monkeypatch):
    """Of each proposal, also in each replay of a captured one: texts, lengths, which rows are alive, slots' logits."""
    given, catch_up = [], BlockState.catch_up

    def note(state, batch):
        first, rows = catch_up(state, batch), batch.rows
        index = torch.arange(rows.size) if batch.index is None else batch.index
        unary, network = state._unary, state.network
        of_rows = rows.tokens, rows.lengths, rows.alive
        at_each_run(lambda: given.append((network, *(x[index] for x in of_rows), unary.clone(), first.clone())))
        return first

    monkeypatch.setattr(BlockState, "catch_up", note)
    return given


@torch.no_grad()
def require_fresh(heard, texts):
    """All slots are those of the network over the target's features of the text so far, which begins one of `texts`.

    Returns how many blocks were compared."""
    compared, known = 0, {}
    for network, tokens, lengths, alive, unary, first in heard:
        for text, length, lives, ours, beginning in zip(tokens, lengths.tolist(), alive.tolist(), unary, first,
                                                        strict=True):  # fmt: skip
            if not lives:
                continue
            whole = next(x for x in texts if x[:length].equal(text[:length]))
            if (id(network), id(whole)) not in known:
                anchors = torch.arange(1, len(whole))
                places = block_places(network, features_of(network, target_model(), whole), whole, anchors)
                before = whole[anchors, None].expand(-1, network.config.num_slots)
                known[id(network), id(whole)] = (
                    network.logits(network.slots(places)),
                    slot_logits(network, places, before),
                )
            anew, after = known[id(network), id(whole)]
            torch.testing.assert_close(ours, anew[length - 2], atol=1e-4, rtol=0)
            torch.testing.assert_close(beginning, network.over_target(after[length - 2, 0]), atol=1e-4, rtol=0)
            compared += 1
    return compared


def generate(drafter, mode, batch=8, **options):
    generator = specdec.SpeculativeGenerator(target_model(), drafter, mode=mode)
    out = generator.generate(*ragged_prompts(batch, longest=30), max_new_tokens=COUNT, **options)
    require_free(generator)
    return out


def texts_of(out, batch=8):
    mask = ragged_prompts(batch, longest=30)[1]
    return [row[30 - int(given.sum()) :] for row, given in zip(out.sequences, mask, strict=True)]


@pytest.mark.covering
@pytest.mark.parametrize("mode", ["eager", "graph", "compile"])
@every_shape
@every_kind
def test_greedy_text_and_every_rounds_slots(kind, shape, mode, heard):
    """The text is the target's own; ragged rows accept some drafts and reject others wholly."""
    out = generate(MAKERS[kind](target_model(), **SHAPES[shape]), mode)
    assert out.sequences.equal(own_text(8).sequences)
    assert 0 < out.stats.pooled.acceptance_rate < 1
    counted = sum(proposed > 0 for row in out.stats.rows for proposed in row.proposed)
    assert require_fresh(heard, texts_of(out)) >= counted > 40
    alone = generate(MAKERS[kind](target_model(), **SHAPES[shape]), mode, 1)
    assert alone.sequences.equal(own_text(1).sequences)


def test_one_pass_a_round(monkeypatch):
    passes, block = [], BlockSteps.block

    def count(steps, tokens, held, queries):
        passes.append(tokens.shape)
        return block(steps, tokens, held, queries)

    monkeypatch.setattr(BlockSteps, "block", count)
    out = generate(dspark(target_model(), dynamic=(7, 3, 2)), "eager", 1)
    assert len(passes) == sum(proposed > 0 for proposed in out.stats.rows[0].proposed) and {*passes} == {(1, 4)}


def engine_of(drafter, mode, pages=200, **options):
    runner = specdec.ModelRunner(target_model(), page_size=PAGE, mode=mode)
    drafter.validate(runner)
    memory = pages * (runner.page_format.bytes + drafter.runner.page_format.bytes)
    return specdec.Engine(runner, drafter, memory=memory, **{"max_tokens_per_step": 48, "tree": None} | options)


@pytest.fixture(params=[1, 2], ids=["read at once", "read one round late"])
def in_flight(request, monkeypatch):
    monkeypatch.setattr(lane, "rounds_in_flight", lambda rows: request.param)
    monkeypatch.setattr(captured, "HostCopy", lambda outcome: HostCopy(outcome.clone()))
    return request.param


def require_texts(handles):
    """Each request got the target's own text -> the texts."""
    for handle in handles:
        assert handle.error is None
        ids = torch.tensor([[*handle.prompt]])
        own = plain().generate(ids, max_new_tokens=len(handle.tokens), eos_token_id=[]).sequences
        assert own[0, ids.shape[1] :].tolist() == handle.tokens
    return [torch.tensor([*handle.prompt, *handle.tokens]) for handle in handles]


@pytest.mark.covering
@pytest.mark.parametrize(("pages", "in_flight"), [(200, 1), (36, 2)], indirect=["in_flight"])
@every_kind
def test_prefixes_from_the_cache_and_preempted_rows(kind, pages, heard, in_flight):
    """Texts that begin alike share blocks of both caches; with few pages some are computed again."""
    engine, prompts = engine_of(MAKERS[kind](target_model()), "graph", pages), prompts_of(10)
    handles = [engine.submit(prompt, max_new_tokens=16, eos_token_id=[]) for prompt in prompts]
    while not engine.idle:
        engine.step()
        assert all(group.captures for group in engine._groups)
    assert require_fresh(heard, require_texts(handles)) > 60
    assert engine.stats()["saved_tokens"] > 0 and engine._groups._captured._rounds.count > 0
    assert pages == 200 or sum(handle.preemptions for handle in handles) > 0
    require_empty(engine)


@pytest.mark.covering
@every_kind
def test_captured_rounds_with_and_without_drafts(kind, heard, in_flight):
    """Rounds of plain steps between those with drafts, and requests that make room between them."""
    engine, prompts = engine_of(MAKERS[kind](target_model()), "graph", tree="auto"), prompts_of(4)
    its, rounds = engine.drafter.traits.tree, []
    length, choose = by_rounds(engine, lambda handle: (0, 3, 0, 0, 0, 3), lambda handle: shape_of(its))
    turns = iter([3, 0, 0, 0, 3, 3, 0] * 20)

    def chosen(row, shapes):
        if row is not None:
            return choose(row, shapes)
        rounds.append(next(turns))
        return PLAIN if rounds[-1] == 0 else shape_of(its)

    force(engine, chosen)
    handles = [engine.submit(prompt, max_new_tokens=COUNT, eos_token_id=[]) for prompt in prompts]
    while not engine.idle:
        engine.step()
        if len(rounds) == 12:
            make_room(engine, engine._scheduler.running[0])
    assert require_fresh(heard, require_texts(handles)) > 20 and {0, 3} == {*rounds}
    require_empty(engine)


def test_prompts_in_chunks(heard, monkeypatch):
    """Of long prompts the drafter gets the features chunk by chunk, before the first round."""
    monkeypatch.setattr(specdec.ModelRunner, "PREFILL_CHUNK", 7)
    monkeypatch.setattr(specdec.ModelRunner, "PREFILL_TOKENS", 20)
    out = generate(dspark(target_model()), "eager")
    assert out.sequences.equal(own_text(8).sequences)
    assert require_fresh(heard, texts_of(out)) > 40


def moved_context(monkeypatch):
    """The context is one token off: its keys are turned as if they were a place further."""
    keep = BlockModel.keep_context
    monkeypatch.setattr(BlockModel, "keep_context", lambda model, x, positions, to: keep(model, x, positions + 1, to))


def anchor_in_context(monkeypatch):
    """The anchor's own token is in the context too, with features that are not its own, which do not exist yet."""
    run = BlockState._pass

    def one_more(state, batch, tokens):
        sequences = state._context.sequences(batch.members)
        state.runner.forward(sequences, tokens[:, 0], batch.features, True, [1] * len(sequences))
        return run(state, batch, tokens)

    monkeypatch.setattr(BlockState, "_pass", one_more)


def another_token(monkeypatch):
    """Rounds keep the features of the tokens before."""
    keep = Rows.keep_features
    monkeypatch.setattr(Rows, "keep_features", lambda rows, x, *others: keep(rows, x.roll(1, 1), *others))


def another_layer(monkeypatch):
    """The features are those of the layers before."""
    right = BlockSteps.traits.fget
    before = lambda features: Features(tuple(max(0, layer - 1) for layer in features.layers), "prompt")
    off = lambda steps: replace(right(steps), features=before(right(steps).features))
    monkeypatch.setattr(BlockSteps, "traits", property(off))


def kept_block(monkeypatch):
    """Keys and values of a block stay in the context."""
    truncate = BlockState.truncate

    def keeps(state, rows, lengths):
        truncate(state, rows, [max(length, row.length) for row, length in zip(rows, lengths, strict=True)])

    monkeypatch.setattr(BlockState, "truncate", keeps)


def causal_everywhere(monkeypatch):
    """Places of a block see only those before them, also in layers where they see all."""
    block = BlockSteps.block

    def one_way(steps, tokens, held, queries):
        words = blocks.block_words(tokens.shape[1], tokens.device)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "block_words", lambda size, device: (words[1], words[1]))
            return block(steps, tokens, held, queries)

    monkeypatch.setattr(BlockSteps, "block", one_way)


PLANTS = [moved_context, anchor_in_context, another_token, another_layer, kept_block, causal_everywhere]


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bugs_are_caught(plant, heard, monkeypatch):
    dspark(target_model())  # fitted before
    with monkeypatch.context() as patch:
        plant(patch)
        out = generate(dspark(target_model()), "eager")
    assert out.sequences.equal(own_text(8).sequences), "the text is the target's own, whatever is drafted"
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        require_fresh(heard, texts_of(out))


def test_drafters_that_do_not_fit_are_refused():
    network, runner = dspark(target_model()).model, specdec.ModelRunner(target_model())
    last = target_model().config.num_hidden_layers
    for config, match in (
        (dict(target_layers=(0, last)), f"state after the last of {last} layers"),
        (dict(target_layers=(0, last + 1)), f"states that a target of {last} layers does not have"),
        (dict(hidden_size=64, rotation=Rotation(16)), r"width 64 \(hidden_size\), the target's have 32"),
    ):
        other = BlockModel(replace(network.config, **config), network.draft_tokens)
        with pytest.raises(ValueError, match=match):
            BlockDrafter(other).validate(runner)
    with pytest.raises(ValueError, match="got a draft of depth 5"):
        BlockDrafter(network, 5)
    with pytest.raises(ValueError, match="got a draft of depth 6"):
        BlockDrafter(network, dynamic=(9, 6, 3))
    with pytest.raises(ValueError, match="a chain and a confidence head, got 0.5, a tree and the head 'markov'"):
        BlockDrafter(network, tree=TokenTree((None, 0, 0)), confidence=0.5)
    with pytest.raises(ValueError, match="got 0.5, a chain and the head 'none'"):
        dflash(target_model(), confidence=0.5)
    with pytest.raises(ValueError, match="got 1.5, a chain"):
        BlockDrafter(network, confidence=1.5)
    with pytest.raises(ValueError, match="beside which there are no 2 sinks"):
        dflash(target_model(), window=9, sinks=2)
    with pytest.raises(ValueError, match="has no confidence head"):
        dflash(target_model()).model.accepted(torch.zeros(1, 32), torch.zeros(1, dtype=torch.int64))


def test_windows_sinks_and_pages_of_eight_bits():
    """The drafter sees less or less exactly; the text stays the target's own."""
    for options in (dict(window=5, sinks=2), dict(kv_dtype="int8")):
        drafter = dspark(target_model(), **options)
        out = generate(drafter, "eager", 4)
        assert out.sequences.equal(plain().generate(*ragged_prompts(4, longest=30), max_new_tokens=COUNT).sequences)
        assert out.stats.pooled.acceptance_rate > 0
