"""Trees that grow level by level: the kernels against PyTorch, and what a tree of the best candidates is."""

import pytest
import torch

from specdec.drafters.expansion import Expansion
from specdec.drafters.grown import best_tree
from specdec.sampling.draws import MAX_TOP, top_log_probs
from specdec.sampling.warped import Warped
from tests.attention.devices import DEVICE


def grow(root, tables, depth, width, size, impl, ids=None):
    """The draft and all that was run; level n reads `tables[n]`, log-probabilities and tokens `[A, P, W]`."""
    tree, seen = Expansion(root, depth, width, ids, impl), []
    for table in tables:
        values, tokens = table[0][..., :width], table[1][..., :width]
        chosen = tree.expand(values, tokens)
        if chosen is not None:
            seen += [chosen.tokens, chosen.above, tree.run.value, tree.run.candidate, tree.run.place]
            seen += [tree.run.depths, tree.run.words]
    return tree.best(size), seen


@pytest.mark.parametrize(
    ("depth", "width", "size", "rows"), [(1, 3, 3, 2), (4, 3, 12, 3), (6, 10, 61, 2), (8, 9, 64, 1)]
)
def test_kernels_grow_the_trees_of_the_reference(depth, width, size, rows):
    """With many ties, absent children and a faulty row; ancestor bits of more than one word."""
    generator = torch.Generator().manual_seed(depth)
    tables = []
    for level in range(depth):
        shape = rows, 1 if level == 0 else width, width
        values = -(torch.randint(0, 4, shape, generator=generator) / 3.0)
        values = values.sort(-1, descending=True).values.masked_fill(
            torch.rand(shape, generator=generator) < 0.1, -torch.inf
        )
        tables.append((values.to(DEVICE), torch.randint(0, 99, shape, generator=generator).to(DEVICE)))
    root = torch.arange(rows, device=DEVICE)[:, None]
    ids = None if depth == 4 else torch.randperm(1000, generator=generator)[:99].to(DEVICE)
    (ours, ran), (theirs, expected) = (
        grow(root, tables, depth, width, size, impl, ids) for impl in ("triton", "reference")
    )
    for mine, wanted in zip(ran, expected, strict=True):
        assert mine.equal(wanted)
    assert ours.tokens.equal(theirs.tokens) and ours.tree.parents.equal(theirs.tree.parents)
    ours.tree.check()


@pytest.mark.parametrize(("rows", "count", "size"), [(1, 1, 1), (2, 5, 9), (3, 40, 17), (2, 131, 64)])
@pytest.mark.parametrize("by_value", [True, False])
def test_the_best_nodes_are_chosen_in_one_launch(rows, count, size, by_value):
    """Of lists in which children come after their parents and are never better; with ties and absent nodes."""
    generator = torch.Generator().manual_seed(count)
    parents, values = torch.full((rows, count), -1), torch.full((rows, count), torch.inf)
    for node in range(1, count):
        parents[:, node] = torch.randint(0, node, (rows,), generator=generator)
        above = values.gather(1, parents[:, node, None])[:, 0].clamp(max=0)
        values[:, node] = above - torch.randint(0, 3, (rows,), generator=generator) / 2
        values[torch.rand(rows, generator=generator) < 0.1, node] = -torch.inf
    tokens = torch.randint(0, 99, (rows, count), generator=generator)
    given = tokens.to(DEVICE), values.to(DEVICE), parents.to(DEVICE), size, 64, 64, by_value
    ours, theirs = (best_tree(*given, impl) for impl in ("triton", "reference"))
    assert ours.tokens.equal(theirs.tokens) and ours.tree.parents.equal(theirs.tree.parents)
    ours.tree.check()


def test_a_faulty_row_leaves_other_rows_alone():
    """NaN, which a report ends the row for, leads to no place outside of the row's own."""
    values, tokens = torch.zeros(2, 1, 3, device=DEVICE), torch.arange(6, device=DEVICE).view(2, 1, 3)
    values[0] = torch.nan
    tables = [(values, tokens), (values.expand(-1, 3, -1), tokens.expand(-1, 3, -1))]
    draft, _ = grow(torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), tables, 2, 3, 5, "triton")
    assert draft.tree.parents[0].tolist() == [-1] * 5 and draft.tree.parents[1].tolist() == [-1, 0, 0, 0, 1]


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [7, 2048, 5000])
def test_likely_tokens_by_the_kernel(size, dtype):
    count = min(size, MAX_TOP)
    logits = (3 * torch.randn(2, 3, size, generator=torch.Generator().manual_seed(size))).to(dtype).to(DEVICE)
    logits[0, 0, ::2] = -torch.inf
    values, tokens = top_log_probs(logits, count, "triton")
    wanted, places = top_log_probs(logits, count, "reference")
    exact = logits.double().log_softmax(-1)
    assert tokens.equal(places) and values.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(values, wanted)
    torch.testing.assert_close(values, exact.gather(-1, tokens).float())
    heat = torch.tensor([0.5, 0.7, 1.0, 1.3, 2.0, 4.0], device=DEVICE)
    warm = top_log_probs(Warped(logits, heat), count, "triton")
    torch.testing.assert_close(warm[0], top_log_probs(logits.float() / heat.view(2, 3, 1), count, "reference")[0])


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_likely_tokens_of_rows_without_a_distribution(impl):
    """NaN for NaN and infinity; -inf where no token is left, which is a fault of logits and no fault of processors."""
    logits = torch.zeros(4, 5000, device=DEVICE)
    logits[0, 4000], logits[1, 7], logits[2], logits[3, 1:] = torch.nan, torch.inf, -torch.inf, -torch.inf
    values, tokens = top_log_probs(logits, 2, impl)
    assert values[:2].isnan().all() and values[2].tolist() == [-torch.inf] * 2
    assert values[3].tolist() == [0, -torch.inf] and tokens[3, 0] == 0
