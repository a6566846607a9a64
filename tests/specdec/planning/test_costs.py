from math import isfinite

import pytest

from attention import OutOfPages
from specdec.model.runner import ModelRunner
from specdec.planning.costs import measure_costs
from tests.families import build
from tests.learned import eagle3


def assert_nothing_taken(*runners):
    for runner in runners:
        assert runner.cache.sequences == () and runner.cache.free_pages == runner.cache.num_pages


@pytest.mark.parametrize("reads", ["tokens", "features"])
@pytest.mark.parametrize("length", [1, 4])
def test_costs_are_positive_and_finite_and_leave_no_pages_taken(length, reads):
    target = ModelRunner(build("llama"))
    draft = ModelRunner(build("gpt2", seed=1)) if reads == "tokens" else eagle3(target).runner
    costs = measure_costs(target, draft, (length + 1,), context=20, repeats=2)
    assert all(isfinite(value) and value > 0 for value in (costs.step_seconds, costs.draft, *costs.verify))
    assert costs.sizes == (1, length + 1) and costs.verify[0] == 1 and costs.verify_at(length + 1) == costs.verify[1]
    assert_nothing_taken(target, draft)
    measure_costs(target, draft, (length + 3,), context=40, repeats=1, rows=2)  # again, with more room
    assert_nothing_taken(target, draft)


def test_a_failure_leaves_no_pages_taken_either():
    target, draft = ModelRunner(build("llama")), ModelRunner(build("llama", seed=1), page_size=4, num_pages=2)
    with pytest.raises(OutOfPages):
        measure_costs(target, draft, (3,), context=20, repeats=1)
    assert_nothing_taken(target, draft)
