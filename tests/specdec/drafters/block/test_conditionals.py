"""Trees and drawn chains follow the tokens that were drafted; the distribution that comes out is the target's."""

from functools import cache

import pytest
import torch

import specdec
from specdec import TokenTree
from specdec.drafters.block import state as module
from specdec.drafters.block.dense import block_places, slot_logits
from specdec.drafters.block.drafter import BlockDrafter
from specdec.drafters.block.growth import Growth
from specdec.drafters.block.state import BlockState, below
from specdec.drafters.model import ModelDraftSession
from specdec.requests.batch import Batch
from tests.families import build, ragged_prompts
from tests.learned import dflash, dflash2, domino, dspark, features_of, fitted_block
from tests.matrix import at_each_run
from tests.specdec.generation.test_generators import p_value

TREE = TokenTree((None, 0, 0, 1, 1, 2, 3, 5))


@cache
def target_model():
    return build("llama")


@pytest.fixture
def nodes(monkeypatch):
    """Of each proposal: the rows' texts, of each level the tokens and their parents, and all logits."""
    seen, catch_up, run = [], BlockState.catch_up, BlockState.run

    def begin(state, batch):
        texts = [batch.rows.tokens[row.slot, : row.length].clone() for row in batch.members]
        first = catch_up(state, batch)
        seen.append((texts, [], [first[:, None]]))
        return first

    def note(state, batch, tokens, tree=None, above=None):
        found = run(state, batch, tokens, tree, above)
        seen[-1][1].append((tokens.clone(), above.expand(len(tokens), -1)))
        seen[-1][2].append(found.clone())
        return found

    monkeypatch.setattr(BlockState, "catch_up", begin)
    monkeypatch.setattr(BlockState, "run", note)
    return seen


@torch.no_grad()
def require_conditionals(network, nodes):
    """The logits at each node are those of a fresh network given the tokens down to it -> how many were compared."""
    compared = 0
    for texts, levels, logits in nodes:
        for row, text in enumerate(texts):
            last = torch.tensor([len(text) - 1])
            places = block_places(network, features_of(network, target_model(), text), text, last)
            paths = [[int(text[-1])]]
            for (tokens, above), found in zip(levels, logits[1:], strict=True):
                pairs = zip(tokens[row].tolist(), above[row].tolist(), strict=True)
                new = [[*paths[parent], token] for token, parent in pairs]
                for path, ours in zip(new, found[row], strict=True):
                    anew = network.over_target(slot_logits(network, places, torch.tensor([path]))[0, -1])
                    torch.testing.assert_close(ours, anew, atol=1e-4, rtol=0)
                    compared += 1
                paths = new
    return compared


@pytest.mark.covering
@pytest.mark.parametrize("shape", [dict(tree=TREE), dict(dynamic=(7, 3, 2))], ids=["tree", "dynamic tree"])
@pytest.mark.parametrize("from_anchor", [False, True])
@pytest.mark.parametrize("markov", ["none", "vanilla", "gated", "rnn", "domino"])
def test_logits_at_a_node_follow_the_tokens_down_to_it(markov, from_anchor, shape, nodes):
    heads = dict(from_anchor=from_anchor, markov=markov, markov_rank=0 if markov == "none" else 8)
    heads |= dict(memory_size=12, plain_slots=1) if markov == "domino" else {}
    network = fitted_block(target_model(), windows=(3,), causal=(True,), **heads)
    generator = specdec.SpeculativeGenerator(target_model(), BlockDrafter(network, **shape), mode="eager")
    generator.generate(*ragged_prompts(2), max_new_tokens=8)
    assert require_conditionals(network, nodes) > 20


@pytest.mark.parametrize("shape", [dict(tree=TREE), dict(dynamic=(7, 3, 2))], ids=["tree", "dynamic tree"])
def test_a_selector_follows_the_tokens_too(shape, nodes):
    """Of its candidates; other tokens are never drafted."""
    shape = dict(tree=TokenTree((None, 0, 0, 1, 1, 2, 3))) if "tree" in shape else shape
    drafter = dflash2(target_model(), **shape)
    specdec.SpeculativeGenerator(target_model(), drafter, mode="eager").generate(*ragged_prompts(2), max_new_tokens=8)
    assert require_conditionals(drafter.model, nodes) > 20
    assert all((found.isfinite().sum(-1) == 12).all() for _, _, levels in nodes for found in levels)


def test_marginals_instead_of_conditionals_are_caught(nodes, monkeypatch):
    network = dspark(target_model()).model
    follow = BlockState.conditional
    monkeypatch.setattr(BlockState, "conditional", lambda state, level, *given: follow(state, level, given[0] * 0))
    generator = specdec.SpeculativeGenerator(target_model(), BlockDrafter(network, tree=TREE), mode="eager")
    generator.generate(*ragged_prompts(2), max_new_tokens=8)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        require_conditionals(network, nodes)


@pytest.mark.parametrize("markov", ["none", "vanilla", "gated"])
def test_slots_give_the_logits_of_runs_and_of_some_tokens_alone(markov, monkeypatch):
    """What trees grow from: over the drafter's own tokens, those of one pass, also where some are wanted alone."""
    heads = dict(from_anchor=True, markov=markov, markov_rank=0 if markov == "none" else 8)
    network, checked, catch_up = fitted_block(target_model(), **heads), [], BlockState.catch_up

    def check(state, batch):
        first = catch_up(state, batch)
        unary, roots = state.slots(batch), batch.last_tokens()
        assert unary.shape == (batch.size, 4, len(state.ids))
        after = state.conditional(0, roots)
        torch.testing.assert_close(first, network.over_target(after)[:, 0], atol=1e-5, rtol=0)
        tokens, among = roots.repeat(1, 3) % 90 + torch.arange(3), unary[:, 2].topk(5).indices
        whole, some = state.conditional(2, tokens), state.conditional(2, tokens, among)
        assert whole.shape[1] == (1 if markov == "none" else 3)
        torch.testing.assert_close(some, whole.gather(2, among[:, None].expand(-1, whole.shape[1], -1)))
        checked.append(batch.size)
        return first

    monkeypatch.setattr(BlockState, "catch_up", check)
    specdec.SpeculativeGenerator(target_model(), BlockDrafter(network), mode="eager").generate(
        *ragged_prompts(2), max_new_tokens=8
    )
    assert checked


@pytest.fixture
def grown(monkeypatch):
    """Of each best-first tree, as `nodes`: what its last search over the block's conditionals asked for and got."""
    seen, slots, conditional = [], BlockState.slots, BlockState.conditional

    def begin(state, batch):
        seen.append(([batch.rows.tokens[row.slot, : row.length].clone() for row in batch.members], [], []))
        return slots(state, batch)

    def note(state, level, tokens, among=None, above=None):
        found = conditional(state, level, tokens, among, above)
        _, levels, logits = seen[-1]
        if level == 0:
            levels.clear(), logits.clear()
        else:
            levels[level - 1 :] = [(tokens.clone(), above.clone())]
        of_target = state.network.over_target(found).expand(-1, tokens.shape[1], -1)
        logits[level:] = [of_target.clone()]
        return found

    monkeypatch.setattr(BlockState, "slots", begin)
    monkeypatch.setattr(BlockState, "conditional", note)
    return seen


RECURRENT = dict(
    rnn=dict(markov="rnn", markov_rank=8),
    domino=dict(markov="domino", markov_rank=8, memory_size=12, plain_slots=1),
)


@pytest.mark.parametrize("sampling", [{}, dict(do_sample=True, seed=2)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_best_first_trees_follow_all_tokens_down_to_a_node(kind, sampling, grown):
    drafter = BlockDrafter(fitted_block(target_model(), **RECURRENT[kind]), growth=Growth(9, 3, children=4))
    generator = specdec.SpeculativeGenerator(target_model(), drafter, mode="eager")
    out = generator.generate(*ragged_prompts(2), max_new_tokens=6, **sampling)
    assert require_conditionals(drafter.model, grown) > 40 and out.stats.pooled.tokens_per_round > 1


@pytest.mark.parametrize("kind", RECURRENT)
def test_the_state_of_another_parent_is_caught(kind, grown, monkeypatch):
    monkeypatch.setattr(module, "below", lambda memory, above: below(memory, above * 0))
    drafter = BlockDrafter(fitted_block(target_model(), **RECURRENT[kind]), growth=Growth(9, 3, children=4))
    out = specdec.SpeculativeGenerator(target_model(), drafter, mode="eager").generate(
        *ragged_prompts(2), max_new_tokens=6
    )
    plain = specdec.AutoregressiveGenerator(target_model(), mode="eager").generate(*ragged_prompts(2), max_new_tokens=6)
    assert out.sequences.equal(plain.sequences), "the text is the target's own, whatever is drafted"
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        require_conditionals(drafter.model, grown)


def test_a_head_with_a_state_needs_the_nodes_above(monkeypatch):
    network, catch_up = fitted_block(target_model(), **RECURRENT["rnn"]), BlockState.catch_up

    def check(state, batch):
        first, last = catch_up(state, batch), batch.last_tokens()
        torch.testing.assert_close(network.over_target(state.conditional(0, last))[:, 0], first)
        with pytest.raises(ValueError, match="head 'rnn' depends on all tokens before: level 1 needs the nodes above"):
            state.conditional(1, last)
        return first

    monkeypatch.setattr(BlockState, "catch_up", check)
    specdec.SpeculativeGenerator(target_model(), BlockDrafter(network), mode="eager").generate(
        *ragged_prompts(2), max_new_tokens=4
    )


MAKERS = {"DFlash": dflash, "DSpark": dspark, "DFlash2": dflash2}
DRAWN = {"chain": dict(num_tokens=2), "tree": dict(tree=TokenTree((None, 0, 0, 1)))}
SAMPLING = {"1": dict(temperature=1.0), "0.7": dict(temperature=0.7)}


@pytest.mark.covering
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("shape", DRAWN)
@pytest.mark.parametrize("kind", MAKERS)
def test_drawn_tokens_keep_the_targets_distribution(kind, shape, sampling):
    drafter = lambda target, draft: MAKERS[kind](target, **DRAWN[shape])
    assert p_value(drafter=drafter, layers=2, rows=2000, calls=1, mode="eager", **SAMPLING[sampling]) > 1e-3


@pytest.mark.parametrize(
    ("shape", "sampling"), [(dict(num_tokens=3), "1"), (dict(growth=Growth(6, 3, children=3)), "0.7")],
    ids=["chain", "best-first tree"],
)  # fmt: skip
def test_tokens_drawn_after_whole_paths_keep_the_targets_distribution(shape, sampling):
    drafter = lambda target, draft: domino(target, **shape)
    assert p_value(drafter=drafter, layers=2, rows=1500, calls=1, mode="eager", **SAMPLING[sampling]) > 1e-3


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_chain_ends_before_the_first_token_that_the_drafter_doubts(mode, monkeypatch):
    """A row may have no draft at all; what is said of a token does not change with that token."""
    network, held, checked = dspark(target_model()).model, [], []
    end, draft = BlockState.end_proposal, ModelDraftSession._draft

    def keep(state, batch):
        held.append(state._hidden)
        end(state, batch)

    def check(session, batch, tree):
        made = draft(session, batch, tree)
        hidden = held[-1]

        def read():
            sure = network.accepted(hidden, made.tokens[:, :-1]).sigmoid() >= 0.5
            assert torch.equal(made.valid[:, 1:].long(), sure.long().cumprod(1))
            checked.extend(made.valid[:, 1:].sum(1).tolist())

        at_each_run(read)
        return made

    monkeypatch.setattr(BlockState, "end_proposal", keep)
    monkeypatch.setattr(ModelDraftSession, "_draft", check)
    prompts = ragged_prompts(4, longest=30)
    out = specdec.SpeculativeGenerator(target_model(), BlockDrafter(network, confidence=0.5), mode=mode).generate(
        *prompts, max_new_tokens=40
    )
    plain = specdec.AutoregressiveGenerator(target_model(), mode="eager").generate(*prompts, max_new_tokens=40)
    assert out.sequences.equal(plain.sequences)
    assert 0 in checked and len({*checked}) > 2, "chains of many lengths"


@pytest.mark.parametrize("confidence", [0.3, 0.5, 0.6])
def test_a_chain_cut_by_confidence_keeps_the_targets_distribution(confidence):
    drafter = lambda target, draft: dspark(target, 2, confidence=confidence)
    assert p_value(drafter=drafter, layers=2, rows=2000, calls=1, mode="eager") > 1e-3


def tell_marginals(monkeypatch):
    """Tokens are drawn given the one before, and q is told as if they were not."""
    draft = ModelDraftSession._draft

    def marginal(session, batch: Batch, tree):
        made, state = draft(session, batch, tree), session.states[0]
        unary = state.network.over_target(session.marginals[:, : made.probs.shape[1]])
        made.probs.copy_(unary.softmax(-1))
        return made

    catch_up = BlockState.catch_up
    monkeypatch.setattr(ModelDraftSession, "marginals", None, raising=False)

    def keep(state, batch):
        first = catch_up(state, batch)
        monkeypatch.setattr(ModelDraftSession, "marginals", state._unary)
        return first

    monkeypatch.setattr(BlockState, "catch_up", keep)
    monkeypatch.setattr(ModelDraftSession, "_draft", marginal)


def test_marginals_reported_as_conditionals_are_caught(monkeypatch):
    tell_marginals(monkeypatch)
    strong = lambda target, draft: loud_dspark(target)
    assert p_value(drafter=strong, layers=2, rows=2000, calls=1, mode="eager") < 1e-6


def loud_dspark(target):
    """A drafter whose Markov head says a lot."""
    model = target.model if isinstance(target, specdec.ModelRunner) else target
    network = fitted_block(model, from_anchor=True, markov="vanilla", markov_rank=8, confidence="none", softcap=4.0)
    torch.nn.init.normal_(network.markov_head.markov_w2.weight, std=1.0, generator=torch.Generator().manual_seed(1))
    return BlockDrafter(network, 2)
