"""Rounds survive JSON, those of trees and those that were cut too."""

import json

import pytest

from specdec.report.round_json import rounds_from_json, rounds_to_json
from specdec.report.stats import RoundStats

CHAINS = RoundStats(proposed=(3, 0, 2), accepted=(3, 0, 1), emitted=(4, 1, 1), seconds=(0.002, 0.0015),
                    step_seconds=0.001, shapes=("own", "plain", "own"),
                    uncut=((3, 3, 3), (0, 0, 0), (3, 3, 2)))  # fmt: skip
TREES = RoundStats(proposed=(7, 0), accepted=(1, 0), emitted=(2, 1), seconds=(0.004,), depths=(3, 0),
                   ranks=(((4, 1), (2, None)), ()), uncut=((7, 3, 1), (0, 0, 0)))  # fmt: skip


@pytest.mark.parametrize("rounds", [CHAINS, TREES, RoundStats((), (), (), ())])
def test_rounds_survive_json(rounds):
    written = json.loads(json.dumps(rounds_to_json(rounds)))
    assert rounds_from_json(written) == rounds
    assert not any(isinstance(value, list) for name, value in written.items() if name != "shapes")
