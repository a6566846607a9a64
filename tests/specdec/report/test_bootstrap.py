"""Intervals of ratios of sums include the truth about as often as they say."""

import numpy as np
import pytest

from specdec.report.bootstrap import ratio_interval


def test_too_few_prompts_have_no_interval():
    assert ratio_interval([[1.0, 2.0]], [[1.0, 1.0]]) is None
    assert ratio_interval([[1.0, 2.0, 3.0]], [[0.0, 0.0, 0.0]]) is None


@pytest.mark.parametrize("count", [5, 24])
def test_the_truth_lies_inside_about_as_often_as_the_level_says(count):
    numbers, inside = np.random.default_rng(1), 0
    for _ in range(200):
        below = numbers.lognormal(0, 0.2, count)
        above = 2 * below * numbers.lognormal(-0.02, 0.2, count)
        found = ratio_interval([above], [below])
        inside += found.low <= 2 <= found.high
    assert 0.9 <= inside / 200 <= 1.0


def test_products_of_ratios_are_paired():
    """What varies alike above and below does not widen an interval."""
    many = [1.0, 5.0, 2.0, 9.0]
    found = ratio_interval([many, [3.0] * 4], [many, [1.0] * 4])
    assert found.value == pytest.approx(3.0) and found.high - found.low < 1e-9
