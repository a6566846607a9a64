"""Best-first trees on block drafters' networks: the text is the target's own, every round, captured or not."""

import pytest

import specdec
from specdec.drafters.block.growth import Growth
from tests.families import build, ragged_prompts
from tests.learned import dflash, domino, dspark
from tests.matrix import require_free
from tests.specdec.drafters.block.test_drafter import own_text
from tests.specdec.rounds.test_captured import generators, same

MAKERS = {"DFlash": dflash, "DSpark": dspark}
every_kind = pytest.mark.parametrize("kind", MAKERS)


def growth_of(kind, nodes, **options):
    slots = MAKERS[kind](build("llama")).model.config.num_slots
    return Growth(nodes, slots, **options)


@pytest.mark.covering
@pytest.mark.parametrize("nodes", [16, 64, 256])
@pytest.mark.parametrize("batch", [1, 8])
@every_kind
def test_greedy_text_is_the_targets_own(kind, batch, nodes):
    growth = growth_of(kind, nodes, children=16, width=64, candidates=40)
    generator = specdec.SpeculativeGenerator(build("llama"), MAKERS[kind](build("llama"), growth=growth), mode="eager")
    out = generator.generate(*ragged_prompts(batch, longest=30), max_new_tokens=24)
    assert out.sequences.equal(own_text(batch).sequences)
    assert out.stats.pooled.tokens_per_round > 1
    require_free(generator)


@pytest.mark.covering
@pytest.mark.parametrize("options", [{}, dict(do_sample=True, seed=1, temperature=0.7)])
@every_kind
def test_captured_rounds_are_the_eager_ones(kind, options):
    host, device = generators(lambda runner: MAKERS[kind](runner, growth=growth_of(kind, 12, children=4)))
    prompts = ragged_prompts(3)
    same(host.generate(*prompts, max_new_tokens=16, **options), device.generate(*prompts, max_new_tokens=16, **options))


def test_captured_rounds_of_a_head_with_a_state_are_the_eager_ones():
    host, device = generators(lambda runner: domino(runner, growth=Growth(9, 3, children=4)))
    prompts, options = ragged_prompts(2), dict(max_new_tokens=10, do_sample=True, seed=1, temperature=0.7)
    same(host.generate(*prompts, **options), device.generate(*prompts, **options))


@every_kind
def test_larger_trees_bring_no_fewer_tokens(kind):
    tokens = []
    for nodes in (4, 64):
        drafter = MAKERS[kind](build("llama"), growth=growth_of(kind, nodes))
        generator = specdec.SpeculativeGenerator(build("llama"), drafter, mode="eager")
        out = generator.generate(*ragged_prompts(4), max_new_tokens=40)
        tokens.append(out.stats.pooled.tokens_per_round)
    assert tokens[1] >= tokens[0] > 1


def test_shapes_that_do_not_go_together_are_refused():
    target = build("llama")
    with pytest.raises(ValueError, match="growth goes without"):
        dspark(target, 2, growth=Growth(8, 2))
    with pytest.raises(ValueError, match="depth 99"):
        dspark(target, growth=Growth(8, 99))
