import pytest

from specdec.planning.theory import expected_speedup, expected_tokens_per_round

# draft cost, alpha, best draft length, its speedup: optima of Leviathan et al. 2023, theorem 3.8, found independently
# of this code
OPTIMA = [
    (0.05, 0.5, 3, 1.63),
    (0.05, 0.6, 4, 1.92),
    (0.05, 0.7, 6, 2.35),
    (0.05, 0.8, 8, 3.09),
    (0.05, 0.9, 13, 4.67),
    (0.2, 0.5, 2, 1.25),
    (0.2, 0.6, 2, 1.40),
    (0.2, 0.7, 3, 1.58),
    (0.2, 0.8, 4, 1.87),
    (0.2, 0.9, 7, 2.37),
]


@pytest.mark.parametrize(("cost", "alpha", "length", "speedup"), OPTIMA)
def test_best_draft_length_and_its_speedup(cost, alpha, length, speedup):
    best = expected_speedup(alpha, length, cost)
    assert best == pytest.approx(
        max(expected_speedup(alpha, n, cost) for n in range(1, 60))
    )  # two lengths may tie: 1 and 2 at cost .2, alpha .5
    assert best > expected_speedup(alpha, length + 1, cost)
    assert round(best, 2) == pytest.approx(speedup)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.93, 0.999999])
@pytest.mark.parametrize("length", [0, 1, 4, 20])
def test_tokens_per_round_equal_the_closed_form(alpha, length):
    assert expected_tokens_per_round(alpha, length) == pytest.approx(
        (1 - alpha ** (length + 1)) / (1 - alpha), rel=1e-8
    )


@pytest.mark.parametrize("length", [0, 1, 7])
def test_limits_of_alpha(length):
    assert expected_tokens_per_round(0, length) == 1
    assert expected_tokens_per_round(1, length) == length + 1
    assert expected_speedup(0, length, 0.1) == pytest.approx(1 / (1 + 0.1 * length))
    assert expected_speedup(1, length, 0.1, 1.5) == pytest.approx((length + 1) / (1.5 + 0.1 * length))


def test_a_free_draft_gains_the_tokens_per_round_and_a_dearer_verification_divides_it():
    assert expected_speedup(0.8, 5, 0) == expected_tokens_per_round(0.8, 5)
    assert expected_speedup(0.8, 5, 0, 2) == expected_tokens_per_round(0.8, 5) / 2


@pytest.mark.parametrize(("alpha", "length"), [(-0.1, 3), (1.1, 3), (float("nan"), 3), (0.5, -1)])
def test_impossible_alpha_or_length_is_refused_and_named(alpha, length):
    with pytest.raises(ValueError, match=f"got {alpha} and {length}"):
        expected_tokens_per_round(alpha, length)
    with pytest.raises(ValueError, match=f"got {alpha} and {length}"):
        expected_speedup(alpha, length, 0.1)


@pytest.mark.parametrize(("draft_cost", "verify_cost"), [(-0.1, 1), (0.1, 0), (0.1, -1)])
def test_impossible_costs_are_refused_and_named(draft_cost, verify_cost):
    with pytest.raises(ValueError, match=f"got {draft_cost} and {verify_cost}"):
        expected_speedup(0.8, 3, draft_cost, verify_cost)
