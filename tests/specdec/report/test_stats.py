import json

import pytest
from scipy.stats import binomtest, norm

from specdec.report.stats import GenerationStats, RoundStats, pool, wilson_interval

# four rounds of a γ = 3 drafter; the last one was cut to one drafted token by the row's budget
CUT = RoundStats(
    proposed=(3, 3, 3, 1), accepted=(3, 1, 0, 1), emitted=(4, 2, 1, 2), seconds=(0.2, 0.1, 0.1, 0.2), step_seconds=0.1
)
PLAIN = RoundStats(proposed=(0, 0), accepted=(0, 0), emitted=(1, 1), seconds=(0.1, 0.3), step_seconds=0.4)
EMPTY = RoundStats((), (), (), ())


def test_every_metric_by_hand():
    assert CUT.rounds == 4
    assert CUT.tokens_per_round == 9 / 4
    assert CUT.accepted_per_round == 5 / 4
    assert CUT.acceptance_rate == 5 / 10
    assert CUT.round_seconds == pytest.approx(0.15)
    assert CUT.overhead == pytest.approx(1.5)
    assert CUT.speedup == pytest.approx(2.25 / 1.5)


def test_acceptance_by_position_counts_only_rounds_that_put_the_position_to_the_test():
    assert [CUT.trials(i) for i in (1, 2, 3, 4)] == [(3, 4), (1, 2), (1, 1), (0, 0)]
    assert CUT.conditional_acceptance == (3 / 4, 1 / 2, 1 / 1)
    assert CUT.marginal_acceptance == (3 / 4, 1 / 3, 1 / 3)


def test_a_position_that_was_never_reached_has_no_conditional_rate():
    stats = RoundStats(proposed=(2, 2), accepted=(0, 0), emitted=(1, 1), seconds=(1.0, 1.0))
    assert stats.conditional_acceptance == (0.0, None)
    assert stats.marginal_acceptance == (0.0, 0.0)


def test_autoregressive_rounds_have_one_token_each_and_no_acceptance_rate():
    assert PLAIN.tokens_per_round == 1.0 and PLAIN.accepted_per_round == 0.0 and PLAIN.acceptance_rate is None
    assert PLAIN.conditional_acceptance == PLAIN.marginal_acceptance == ()
    assert PLAIN.overhead == pytest.approx(0.5) and PLAIN.speedup == pytest.approx(2.0)


def test_without_a_measured_step_there_is_no_overhead_and_no_speedup():
    stats = RoundStats(CUT.proposed, CUT.accepted, CUT.emitted, CUT.seconds)
    assert stats.round_seconds == pytest.approx(0.15) and stats.overhead is None and stats.speedup is None


def test_without_rounds_every_metric_is_none_or_empty():
    expected = dict.fromkeys(CUT.as_dict()) | {
        "rounds": 0,
        "conditional_acceptance": (),
        "marginal_acceptance": (),
        "rank_acceptance": (),
        "shapes": {},
    }
    assert EMPTY.as_dict() == expected
    assert pool([]).as_dict() == pool([EMPTY]).as_dict() == expected


def test_pooled_rates_are_ratios_of_sums():
    pooled = pool([CUT, PLAIN, EMPTY])
    assert pooled.rounds == 6
    assert pooled.tokens_per_round == 11 / 6  # not the mean of 9/4 and 1
    assert pooled.accepted_per_round == 5 / 6
    assert pooled.acceptance_rate == 5 / 10
    assert pooled.conditional_acceptance == CUT.conditional_acceptance
    assert pooled.step_seconds == pytest.approx((4 * 0.1 + 2 * 0.4) / 6)
    assert pooled.round_seconds == pytest.approx(1.0 / 6)
    assert pooled.speedup == pytest.approx(11 / 6 / ((1.0 / 6) / 0.2))


def test_pooled_conditional_rates_are_not_means_of_rates():
    lucky = RoundStats((1,), (1,), (2,), (0.1,))
    pooled = pool([CUT, lucky])
    assert pooled.conditional_acceptance == (4 / 5, 1 / 2, 1 / 1)
    assert pooled.step_seconds == pytest.approx(CUT.step_seconds)  # rows without a measured step have no say


def test_generation_stats_pool_their_rows_and_go_to_json():
    stats = GenerationStats((CUT, PLAIN), prefill_seconds=0.5, decode_seconds=1.5, new_tokens=13)
    assert stats.pooled == pool([CUT, PLAIN])
    assert stats.tokens_per_second == 6.5
    written = json.loads(json.dumps(stats.as_dict()))
    assert written["pooled"]["tokens_per_round"] == 11 / 6 and written["rows"][0]["conditional_acceptance"] == [
        0.75,
        0.5,
        1.0,
    ]
    assert {"prefill_seconds", "decode_seconds", "new_tokens", "tokens_per_second"} < set(written)


@pytest.mark.parametrize(
    ("successes", "trials"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 10), (1, 1000), (431, 977), (99_990, 100_000)]
)
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_wilson_interval_equals_scipy(successes, trials, confidence):
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, trials, norm.ppf(0.5 + confidence / 2)) == pytest.approx(
        (interval.low, interval.high), abs=1e-12
    )
    if confidence == 0.95:
        assert wilson_interval(successes, trials) == pytest.approx((interval.low, interval.high), abs=1e-4)


def test_wilson_interval_without_trials_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)
