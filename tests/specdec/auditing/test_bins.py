"""The chi-square of tokens in bins: uniform p-values for right draws, and what it says that it finds it finds."""

import pytest
import torch
from scipy.stats import chi2, kstest, ncx2

from specdec.auditing.bins import LEAST, POWER, compare
from specdec.auditing.chi_square import critical, detectable, tail


@pytest.mark.parametrize("freedom", [1, 7, 64])
@pytest.mark.parametrize("noncentrality", [0.0, 1e-9, 3.0, 700.0])
def test_tails_are_scipys(freedom, noncentrality):
    for x in (0.0, 0.5, 3.0, 40.0, 500.0, 900.0):
        expected = ncx2.sf(x, freedom, noncentrality) if noncentrality else chi2.sf(x, freedom)
        assert tail(x, freedom, noncentrality) == pytest.approx(float(expected), rel=1e-6, abs=1e-12)
    assert critical(1e-6, freedom) == pytest.approx(float(chi2.isf(1e-6, freedom)))
    needed = detectable(1e-5, POWER, freedom)
    assert ncx2.sf(critical(1e-5, freedom), freedom, needed) == pytest.approx(POWER, abs=1e-6)


TEXTS, BINS, ROWS = 40, 9, 1500


def problem(seed):
    """Distributions after texts, some of them frequent, and a draw from them for each row."""
    draws = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(TEXTS, BINS, generator=draws)).softmax(-1).sort(-1, descending=True).values
    texts = (torch.rand(ROWS, generator=draws) ** 4 * TEXTS).long()
    return p.double(), texts, torch.multinomial(p[texts], 1, generator=draws)[:, 0], draws


def test_right_draws_have_uniform_p_values():
    values = []
    for seed in range(300):
        p, texts, bins, _ = problem(seed)
        found = compare(bins, texts, torch.stack([p, p]))
        assert found.rows == ROWS and found.freedom >= BINS - 1 and found.rounding == 0
        values.append(found.p_value)
    assert kstest(values, "uniform").pvalue > 0.01 and min(values) > 1e-4


def test_a_detectable_variation_is_found_as_often_as_it_says():
    """In the worst direction for chi-square: half of the mass goes up and half goes down in proportion."""
    p = torch.tensor([[0.3, 0.25, 0.25, 0.2]], dtype=torch.float64)
    texts, zero = torch.zeros(4000, dtype=torch.int64), torch.zeros(4000, dtype=torch.int64)
    draws, level = torch.Generator().manual_seed(0), 1e-3
    variation = compare(zero, texts, torch.stack([p, p])).detectable(level)
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    moved = p[0] + variation * sign * torch.tensor([0.3 / 0.55, 0.25 / 0.55, 0.25 / 0.45, 0.2 / 0.45]).double()
    found = 0
    for _ in range(200):
        bins = torch.multinomial(moved, 4000, replacement=True, generator=draws)
        found += compare(bins, texts, torch.stack([p, p])).p_value < level
    assert 0.84 < found / 200 <= 1.0


def test_bins_that_expect_few_draws_are_joined_and_a_sure_token_leaves_nothing():
    p = torch.tensor([[0.90, 0.06, 0.02, 0.01, 0.01]], dtype=torch.float64)
    texts = torch.zeros(200, dtype=torch.int64)
    found = compare(torch.zeros_like(texts), texts, torch.stack([p, p]))
    assert LEAST == 10 and found.freedom == 1, "0.06 with what is below, against 0.9"
    sure = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    found = compare(torch.zeros_like(texts), texts, torch.stack([sure, sure]))
    assert found.freedom == 0 and found.p_value == 1 and found.detectable(1e-4) is None


def test_what_two_readings_differ_by_is_no_fault():
    """Draws from the second reading, which a test against the first alone would find."""
    p, texts, _, draws = problem(0)
    other = (p.log() + 0.3 * torch.randn(BINS, generator=draws).double()).softmax(-1)
    bins = torch.multinomial(other[texts], 1, generator=draws)[:, 0]
    assert compare(bins, texts, torch.stack([p, p])).p_value < 1e-3
    allowed = compare(bins, texts, torch.stack([p, other]))
    assert allowed.rounding > 0 and allowed.p_value > 0.05
