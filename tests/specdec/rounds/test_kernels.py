"""What a round does besides running models: the kernels against PyTorch, on a GPU or in Triton's interpreter."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.dispatch import triton_available
from attention.paged.device_batch import place_tokens
from specdec.acceptance.greedy import accept_likely
from specdec.requests.rows import append_reference
from specdec.sampling.draws import best, highest, peak, top
from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeBatch
from specdec.trees.tree import TokenTree
from tests.attention.devices import DEVICE

pytestmark = pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")
whole = lambda values, dtype=torch.int64: torch.tensor(values, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("size, dtype", [
    (1, torch.float16), *product([7, 2048], [torch.float32, torch.float16]), (2049, torch.float16),
    (16384, torch.float16), (16385, torch.float32), (50257, torch.float16),
])  # fmt: skip
def test_the_best_score_and_its_place(size, dtype):
    """Ties go to the first; rows that do not lie in one piece; nothing but -inf.

    Both dtypes meet one block and several; sizes around each number of blocks meet one of them."""
    across = 2 if size > 16384 else 4
    scores = torch.randint(0, 9, (3, across, size), generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    scores[2, 1] = float("-inf")
    for rows in (scores, scores.transpose(0, 1), scores[:, ::2]):
        expected = rows == rows.amax(-1, keepdim=True)
        assert best(rows, impl="triton").equal(expected.long().argmax(-1)) and highest(rows, impl="triton").equal(
            rows.amax(-1).float()
        )
        for impl in ("triton", "reference"):
            largest, first = peak(rows, impl=impl)
            assert largest.float().equal(rows.amax(-1).float()) and first.equal(expected.long().argmax(-1))


@pytest.mark.parametrize("place", [0, 1, 2500, 4999])
@pytest.mark.parametrize("size", [5000, 20000])
def test_nan_comes_before_everything(place, size):
    scores = torch.randn(2, size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scores[1, place] = scores[1, 4999] = float("nan")
    scores[0, place] = float("inf")
    assert best(scores, impl="triton").tolist() == [place, place]
    assert float(highest(scores, impl="triton")[0]) == float("inf") and bool(highest(scores, impl="triton")[1].isnan())


@pytest.mark.covering
@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize("size", [16, 2048, 5000, 20000])
def test_the_largest_scores_in_order(size, count):
    """No place twice, also among many of equal value and where nearly all are -inf; the best of them lie in several
    parts.
    """
    scores = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scores[0, 1] = scores[0, 1].round()
    scores[1, 2, 2:] = float("-inf")
    values, places = top(scores, count, impl="triton")
    expected, order = scores.sort(dim=-1, descending=True, stable=True)
    assert values.equal(expected[..., :count]) and places.equal(order[..., :count])
    values, places = top(scores, count, impl="reference")
    assert values.equal(expected[..., :count]) and places.equal(order[..., :count])


def test_scores_in_float64_are_not_rounded():
    close = whole([[1.0, 1.0 + 1e-15]], torch.float64)
    assert best(close).tolist() == [1]
    with pytest.raises(ValueError, match="float32"):
        best(close, impl="triton")
    with pytest.raises(ValueError, match="up to 16, got 17"):
        top(torch.zeros(1, 20, device=DEVICE), 17, impl="triton")


@st.composite
def rounds(draw):
    """What a round of one to five rows said, and where they stood."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    of_rows = lambda values: [draw(values) for _ in range(rows)]
    lengths = of_rows(st.integers(1, 20))
    limits = [length + draw(st.integers(0, 12)) for length in lengths]
    emitted = [[draw(st.integers(0, 6)) for _ in range(width)] for _ in range(rows)]
    return (
        lengths,
        limits,
        of_rows(st.booleans()),
        emitted,
        of_rows(st.integers(0, width - 1)),
        draw(st.sets(st.integers(0, 6))),
    )


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(rounds())
def test_texts_grow_and_end(state):
    """The kernel against PyTorch, and both against one row after the other in plain Python."""
    from specdec.requests.append_kernel import launch_append

    lengths, limits, alive, emitted, counts, ends = state
    found = []
    for append in (append_reference, launch_append):
        tokens = whole([[100 * row + column for column in range(48)] for row in range(len(lengths))])
        tensors = [tokens, whole(lengths), whole(limits), whole(alive, torch.bool)]
        append(*tensors, whole(emitted), whole(counts), whole([[*sorted(ends), -1]] * len(lengths)))
        found.append([x.tolist() for x in tensors])
    assert found[0] == found[1]
    for row, (tokens, length, limit, lives) in enumerate(zip(*found[0], strict=True)):
        said = emitted[row][: counts[row] + 1][: limits[row] - lengths[row]]
        stop = next((i for i, token in enumerate(said) if token in ends), None)
        said = (said if stop is None else said[: stop + 1]) if alive[row] else []
        untouched = [100 * row + column for column in range(48)]
        assert tokens == untouched[: lengths[row]] + said + untouched[lengths[row] + len(said) :]
        assert (length, limit) == (lengths[row] + len(said), limits[row])
        assert lives == (alive[row] and stop is None and length < limit)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(-9, 30), st.booleans()), min_size=1, max_size=6), st.integers(1, 9))
def test_tokens_find_their_slots(rows, count):
    """Also rows that begin before position 0, as short texts and padding do."""
    found = []
    for impl in ("reference", "triton"):
        lengths, alive = whole([length for length, _ in rows]), whole([lives for _, lives in rows], torch.bool)
        table = whole([[1000 * row + 3 * place for place in range(40)] for row in range(len(rows))])
        found.append([x.tolist() for x in place_tokens(lengths, alive, table, count, impl=impl)] + [lengths.tolist()])
    assert found[0] == found[1]
    kv_lengths, before, positions, slots, after = found[0]
    assert before == [row * count for row in range(len(rows) + 1)]
    places = [length + i for length, _ in rows for i in range(count)]
    assert after == [length + count for length, _ in rows]
    # what has ended is not read any more, however long it was
    assert kv_lengths == [max(n, count) if alive else count for n, (_, alive) in zip(after, rows, strict=True)]
    assert positions == [max(0, place) for place in places]
    lives = [(row, alive) for row, (_, alive) in enumerate(rows) for _ in range(count)]
    assert slots == [
        1000 * row + 3 * place if alive and place >= 0 else -1
        for place, (row, alive) in zip(places, lives, strict=True)
    ]


@st.composite
def drafts(draw):
    """Chains, trees, trees that lack nodes in some rows, and trees of every row's own; few different tokens, so that
    paths are long.
    """
    rows, size = draw(st.integers(1, 4)), draw(st.integers(2, 12))
    tokens, likely = (whole([[draw(st.integers(0, 1)) for _ in range(size)] for _ in range(rows)]) for _ in range(2))
    kind = draw(st.sampled_from(["chain", "tree", "lacking", "own"]))
    parents = [[-1, *(draw(st.integers(0, node - 1)) for node in range(1, size))] for _ in range(rows)]
    if kind == "own":
        for row in parents[1:]:
            row[-1] = draw(st.sampled_from([-1, row[-1]]))
        return Draft(TreeBatch(whole(parents), size - 1, size - 1), tokens), likely
    tree = TokenTree.chain(size - 1) if kind == "chain" else TokenTree((None, *parents[0][1:])).by_level()
    valid = torch.ones(rows, size + 3, dtype=torch.bool, device=DEVICE)[:, :size]
    if kind == "lacking":
        for row in range(rows):
            for node in range(1, size):
                valid[row, node] = bool(valid[row, tree.parents[node]]) and draw(st.booleans())
    return Draft(tree, tokens, valid=valid if kind == "lacking" else None), likely


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(drafts())
def test_greedy_paths(drawn):
    draft, likely = drawn
    ours, theirs = (accept_likely(draft, likely, impl) for impl in ("triton", "reference"))
    assert (
        ours.counts.equal(theirs.counts) and ours.path.equal(theirs.path) and ours.next_tokens.equal(theirs.next_tokens)
    )
    for row, count in enumerate(ours.counts.tolist()):
        assert ours.emitted(draft)[row, : count + 1].equal(theirs.emitted(draft)[row, : count + 1])
