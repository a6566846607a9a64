"""Best-first trees in rounds: the text is the target's own, eager and captured, greedy and sampled."""

import pytest
from transformers.generation import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

import specdec
from specdec.drafters.block.growth import Growth
from specdec.drafters.block.session import BestFirstSession
from specdec.trees.tensors import TreeBatch
from specdec.trees.tree import TokenTree
from tests.block_tables import TableDrafter, random_state, stub_batch
from tests.families import build, ragged_prompts
from tests.specdec.drafters.test_every_drafter import own_text
from tests.specdec.generation.test_generators import p_value
from tests.specdec.rounds.test_captured import generators, same

GROWTHS = {
    16: Growth(16, 4), 64: Growth(64, 5, candidates=32), 256: Growth(256, 5, 64, 16, 32), "fast": Growth.fast(24, 4),
}  # fmt: skip


@pytest.mark.parametrize(("size", "batch"), [(16, 1), (16, 4), (64, 4), (256, 1), ("fast", 4)])
@pytest.mark.parametrize("marginal", [False, True])
def test_greedy_text_is_the_targets_own(size, batch, marginal):
    drafter = TableDrafter(build("llama"), GROWTHS[size], marginal=marginal)
    generator = specdec.SpeculativeGenerator(build("llama"), drafter, mode="eager")
    out = generator.generate(*ragged_prompts(batch), max_new_tokens=24)
    assert out.sequences.equal(own_text("llama", batch))
    assert out.stats.pooled.acceptance_rate > 0, "some drafts are right"
    steps = sum(len(row.emitted) for row in out.stats.rows)
    assert drafter.state.passes <= steps, "one pass a round"


@pytest.mark.covering
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3, "temperature": 0.7, "top_p": 0.9}])
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("growth", [Growth(12, 3, children=4), Growth(12, 4, 4, 3, 16)], ids=["exact", "few"])
def test_captured_rounds_are_the_eager_ones(growth, sample, options):
    host, device = generators(lambda runner: TableDrafter(runner.model, growth, sample))
    prompts = ragged_prompts(3)
    mine = host.generate(*prompts, max_new_tokens=14, **options)
    same(mine, device.generate(*prompts, max_new_tokens=14, **options))
    assert mine.stats.pooled.tokens_per_round > 1


@pytest.mark.covering
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("marginal", [False, True])
def test_samples_have_the_targets_distribution(marginal, sample, temperature):
    drafter = lambda target, draft: TableDrafter(draft, Growth(6, 3, children=3), sample, marginal)
    assert p_value(drafter=drafter, calls=1, rows=1500, temperature=temperature) > 1e-3


def test_samples_with_processors_that_look_at_the_text_have_the_targets_distribution():
    drafter = lambda target, draft: TableDrafter(draft, Growth(6, 3, children=3, candidates=3))
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    assert p_value(drafter=drafter, calls=1, rows=1000, logits_processor=processors) > 1e-3


def test_deterministic_trees_change_no_sample():
    """A seed gives one text, whatever tree is drafted, or none."""
    target, prompts = build("llama"), ragged_prompts(3)
    options = dict(max_new_tokens=12, do_sample=True, seed=4, temperature=0.8)
    drafters = [
        None,
        *(TableDrafter(target, growth, sample=False) for growth in (Growth(9, 3), Growth(20, 4, 4, 2, 8))),
    ]
    plain, *texts = [
        (specdec.SpeculativeGenerator(target, drafter, mode="eager") if drafter else
         specdec.AutoregressiveGenerator(target, mode="eager")).generate(*prompts, **options).sequences
        for drafter in drafters
    ]  # fmt: skip
    assert all(text.equal(plain) for text in texts)


def test_processors_shape_the_tree_and_forbid_its_tokens():
    """What the processors forbid is not drafted, whichever columns the scores have."""
    target = build("llama")
    generator = specdec.SpeculativeGenerator(target, TableDrafter(target, Growth(12, 3, candidates=8)), mode="eager")
    options = dict(max_new_tokens=10, bad_words_ids=[[token] for token in range(10, 60)])
    out = generator.generate(*ragged_prompts(2), **options)
    plain = specdec.AutoregressiveGenerator(target, mode="eager").generate(*ragged_prompts(2), **options)
    assert out.sequences.equal(plain.sequences)


def test_a_tree_of_the_size_that_is_asked_for():
    options = dict(vocabulary=20, captured=True)
    session = BestFirstSession(random_state(4, 20, seed=1), Growth(30, 4))
    large = session.propose(stub_batch([3, 4], **options))
    for size in (1, 7, 30):
        small = session.propose(stub_batch([3, 4], nodes=size, **options))
        assert isinstance(small.tree, TreeBatch) and small.tree.size == size + 1
        assert small.tokens.equal(large.tokens[:, : size + 1]), "the first nodes of the large tree"
        assert small.tree.parents.equal(large.tree.parents[:, : size + 1])
    with pytest.raises(ValueError, match="parents"):
        session.propose(stub_batch([3, 4], **options), TokenTree.chain(3))


def test_sampled_conditionals_are_accepted_more_often_than_marginals():
    """Which are drawn as if the token before made no difference."""
    target, prompts = build("llama"), ragged_prompts(4)
    rates = []
    for marginal in (False, True):
        drafter = TableDrafter(target, Growth(12, 4, children=4), True, marginal, noise=0.1)
        generator = specdec.SpeculativeGenerator(target, drafter, mode="eager")
        out = generator.generate(*prompts, max_new_tokens=40, do_sample=True, seed=0)
        rates.append(out.stats.pooled.tokens_per_round)
    assert rates[0] > rates[1]


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_shapes_of_auto_are_sizes(mode):
    drafter = TableDrafter(build("llama"), Growth(64, 4, candidates=32))
    runner = specdec.ModelRunner(build("llama"), mode="eager")
    runner.mode = mode
    generator = specdec.SpeculativeGenerator(runner, drafter, tree="auto")
    for _ in range(3):
        out = generator.generate(*ragged_prompts(4), max_new_tokens=24)
        assert out.sequences.equal(own_text("llama", 4))
        shapes = {shape for row in out.stats.rows for shape in row.shapes}
    assert shapes <= {"plain", "grown 7", "grown 15", "grown 31", "grown 63", "grown 64"}
