"""The kernels that grow trees against PyTorch: on a GPU or in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch

from attention.dispatch import triton_available
from specdec.drafters.block.best_first import Found, best_children
from specdec.drafters.block.children import likeliest_among
from specdec.drafters.block.scoring import SlotScores
from specdec.drafters.block.slots import Factors
from specdec.sampling.draws import top_log_probs
from tests.attention.devices import DEVICE

pytestmark = pytest.mark.skipif(not triton_available(torch.device(DEVICE)), reason="needs triton")
INF = float("inf")


def level_of(rows, nodes, children, shared, seed, ids=False, among=False):
    """What `best_children` reads of a level, with equal values and absent nodes."""
    draws = torch.Generator().manual_seed(seed)
    value = -torch.rand(rows, nodes, generator=draws).mul(4).round()
    value[:, (nodes + 1) // 2 :: 3] = -INF
    likely = -torch.rand(rows, 1 if shared else nodes, children, generator=draws).mul(4).round()
    likely = likely.sort(2, descending=True).values
    columns = torch.randint(0, 50, likely.shape, generator=draws)
    names = torch.randint(0, 80, (rows, 3, 50), generator=draws) if among else None
    own = torch.randint(0, 999, (80,), generator=draws) if ids else None
    value, likely, columns, names, own = (
        None if x is None else x.to(DEVICE) for x in (value, likely, columns, names, own)
    )
    scores = SlotScores(None, SimpleNamespace(ids=own), names, False, likely, False)
    found = Found(scores, [columns] * 2, [], [], torch.zeros_like(value), value, 0, value)
    return found, likely, columns


@pytest.mark.covering
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("nodes", "children", "keep"), [(1, 16, 16), (1, 1, 1), (5, 3, 9), (7, 5, 35)])
def test_a_levels_best_children(nodes, children, keep, shared):
    compare_best_children(nodes, children, keep, shared, ((False, False), (True, False), (True, True)))


def test_the_best_children_of_many_nodes():
    """Half a thousand candidates, which the interpreter takes long to sort."""
    compare_best_children(32, 16, 64, False, ((True, True),))


def compare_best_children(nodes, children, keep, shared, names):
    for ids, among in names:
        found, likely, columns = level_of(4, nodes, children, shared, nodes, ids, among)
        deepest = torch.tensor([9, 1, 2, 0], device=DEVICE)
        ours, theirs = (best_children(found, likely, columns, keep, deepest, impl) for impl in ("triton", "reference"))
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.shape == (4, keep) and mine.equal(other)
        assert not theirs[1][1].isfinite().any() and theirs[1][0].isfinite().any()


def test_values_that_are_not_numbers_come_first():
    found, likely, columns = level_of(2, 3, 4, False, 1)
    likely[1, 2, 1] = float("nan")
    deepest = torch.full((2,), 9, device=DEVICE)
    ours, theirs = (best_children(found, likely, columns, 5, deepest, impl) for impl in ("triton", "reference"))
    assert ours[1].isnan().equal(theirs[1].isnan()) and (ours[1].isnan().sum(1).tolist() == [0, 1])
    assert ours[0].equal(theirs[0])


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "count"), [(1, 1), (40, 5), (300, 16), (17_000, 3)])
def test_log_probabilities_of_the_likeliest_tokens(size, count, dtype):
    scores = (3 * torch.randn(2, 3, size, generator=torch.Generator().manual_seed(size))).to(dtype)
    scores[0, 1, : size // 2] = -INF
    scores[1, 2] = -INF
    scores[1, 0, size // 3] = float("nan") if size > 1 else 0.0
    ours, theirs = (top_log_probs(scores.to(DEVICE), count, impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(ours[0], theirs[0], atol=2e-6, rtol=2e-6, equal_nan=True)
    sound = ~theirs[0].isnan()  # tokens of rows with NaN, which are reported, mean nothing
    assert ours[1][sound].equal(theirs[1][sound]) and (theirs[0].nan_to_num(-1) <= 0).all()
    exact = scores[0].double().log_softmax(-1).topk(count).values
    torch.testing.assert_close(theirs[0][0].double().cpu(), exact, atol=1e-5, rtol=1e-5)


def factors_of(rows, nodes, columns, rank, dtype, seed=0):
    """Factors of 500 draft tokens, and the `columns` that are compared: rows do not lie in one piece."""
    draws = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draws).to(dtype).to(DEVICE)
    own, index = normal(rows, 2, 500), torch.randint(0, 900, (rows, nodes), generator=draws)
    among = torch.stack([torch.randperm(500, generator=draws)[:columns] for _ in range(rows)])
    return Factors(own[:, 1], normal(900, rank), index.to(DEVICE), normal(500, rank)), among.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("nodes", "columns", "rank", "count"), [(1, 1, 1, 1), (3, 40, 70, 5), (2, 256, 256, 16)])
def test_the_likeliest_among_some_tokens(nodes, columns, rank, count, dtype):
    factors, among = factors_of(2, nodes, columns, rank, dtype)
    factors.own[0, among[0, : columns // 2]] = -INF
    ours, places = likeliest_among(factors, among, count, "triton")
    exact = Factors(factors.own.double(), factors.vectors.double(), factors.chosen, factors.weight.double())
    theirs, wanted = likeliest_among(exact, among, count, "reference")
    torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=2e-5)
    sure = (theirs.diff(dim=2).abs() > 1e-4).all(2) & theirs.isfinite().all(2)
    assert places[sure].equal(wanted[sure]) and (count == 1 or columns < 256 or sure.any())


def test_the_likeliest_of_broken_logits_are_not_numbers():
    for broken in (float("nan"), INF):
        factors, among = factors_of(2, 2, 20, 3, torch.float32)
        factors.own[1, among[1, 3]] = broken
        ours, theirs = (likeliest_among(factors, among, 4, impl)[0] for impl in ("triton", "reference"))
        assert ours.isnan().equal(theirs.isnan()) and ours.isnan().any(2).any(1).tolist() == [False, True]
