"""Block drafters in rounds: in each, all slots are those of a fresh drafter over the same text, and text is exact."""

from functools import cache

import pytest
import torch

import specdec
from specdec import TokenTree
from specdec.cuda_graph import HostCopy
from specdec.drafters.block.dense import block_places, slot_logits
from specdec.drafters.block.module import BlockModel
from specdec.drafters.block.state import BlockState
from specdec.drafters.block.steps import BlockSteps
from specdec.engine import lane
from specdec.model.features import Features
from specdec.planning.policy import PLAIN, shape_of
from specdec.requests.rows import Rows
from specdec.rounds import captured
from tests.families import build, ragged_prompts
from tests.learned import dflash, dspark, features_of
from tests.matrix import TREE, at_each_run, require_free
from tests.specdec.engine.forced import by_rounds, force, make_room
from tests.specdec.engine.test_engine import PAGE, prompts_of, require_empty

MAKERS = {"DFlash": dflash, "DSpark": dspark}
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
        at_each_run(lambda: given.append((network, *(x.clone() for x in (rows.tokens[index], rows.lengths[index],
                                                                          rows.alive[index], unary, first)))))  # fmt: skip
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


@pytest.mark.parametrize("markov", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("from_anchor", [False, True])
def test_conditionals_follow_the_drafted_tokens(markov, from_anchor, monkeypatch):
    """Of trees that branch, the logits at each node are those of a fresh drafter given the tokens down to it."""
    from tests.learned import fitted_block

    network = fitted_block(target_model(), from_anchor=from_anchor, markov=markov, markov_rank=8, confidence="markov",
                           windows=(3,), causal=(True,))  # fmt: skip
    seen, catch_up, run = [], BlockState.catch_up, BlockState.run

    def begin(state, batch):
        texts = [batch.rows.tokens[row.slot, : row.length].clone() for row in batch.members]
        seen.append((texts, [], [catch_up(state, batch)[:, None]]))
        return seen[-1][2][0][:, 0]

    def note(state, batch, tokens, tree=None, above=None):
        seen[-1][1].append((tokens.clone(), above.expand(len(tokens), -1)))
        seen[-1][2].append(run(state, batch, tokens, tree, above))
        return seen[-1][2][-1]

    monkeypatch.setattr(BlockState, "catch_up", begin)
    monkeypatch.setattr(BlockState, "run", note)
    tree = TokenTree((None, 0, 0, 1, 1, 2, 3, 5))
    from specdec.drafters.block.drafter import BlockDrafter

    generate(BlockDrafter(network, tree=tree), "eager", 2)
    compared = 0
    for texts, levels, logits in seen[:6]:
        for row, text in enumerate(texts):
            places = block_places(
                network, features_of(network, target_model(), text), text, torch.tensor([len(text) - 1])
            )
            paths = [[int(text[-1])]]
            for (tokens, above), found in zip(levels, logits[1:], strict=True):
                new = [[*paths[parent], token] for token, parent in zip(tokens[row].tolist(), above[row].tolist(),
                                                                        strict=True)]  # fmt: skip
                for path, ours in zip(new, found[row], strict=True):
                    anew = network.over_target(slot_logits(network, places, torch.tensor([path]))[0, -1])
                    # slot_logits wants the tokens before all slots: those of the path's own length are enough
                    torch.testing.assert_close(ours, anew, atol=1e-4, rtol=0)
                    compared += 1
                paths += new
    assert compared > 20


def test_one_pass_a_round(monkeypatch):
    passes, block = [], BlockSteps.block

    def count(steps, tokens, held, queries):
        passes.append(tokens.shape)
        return block(steps, tokens, held, queries)

    monkeypatch.setattr(BlockSteps, "block", count)
    out = generate(dspark(target_model(), dynamic=(7, 3, 2)), "eager", 1)
    assert len(passes) == sum(proposed > 0 for proposed in out.stats.rows[0].proposed) and {*passes} == {(1, 4)}
