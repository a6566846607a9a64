"""Rounds of a request as JSON and back, so that every figure of a result can be drawn again."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from specdec.report.stats import RoundStats


def rounds_to_json(rounds: RoundStats) -> dict[str, Any]:
    """The fields of `rounds`; what follows from others is left out, as are ranks of chains.

    >>> one = RoundStats(proposed=(4, 4), accepted=(4, 1), emitted=(5, 2), seconds=(0.25,), shapes=("own", "own"))
    >>> rounds_to_json(one)["shapes"], "depths" in rounds_to_json(one)
    ([['own', 2]], False)
    >>> rounds_from_json(rounds_to_json(one)) == one
    True
    """
    found: dict[str, Any] = {name: list(getattr(rounds, name)) for name in ("proposed", "accepted", "emitted")}
    found["seconds"] = [round(seconds, 6) for seconds in rounds.seconds]
    if rounds.step_seconds is not None:
        found["step_seconds"] = rounds.step_seconds
    if rounds.depths != rounds.proposed:
        found["depths"] = list(rounds.depths)
    if rounds.uncut != tuple(zip(rounds.proposed, rounds.depths, rounds.accepted, strict=True)):
        found["uncut"] = [list(one) for one in rounds.uncut]
    if any(children > 1 for passed in rounds.ranks for children, _ in passed):
        found["ranks"] = [[list(one) for one in passed] for passed in rounds.ranks]
    if rounds.shapes:
        found["shapes"] = [[name, len(list(group))] for name, group in groupby(rounds.shapes)]
    return found


def rounds_from_json(found: Mapping[str, Any]) -> RoundStats:
    """The inverse of `rounds_to_json`, but for ranks of chains."""
    of_nodes = {name: tuple(found[name]) for name in ("proposed", "accepted", "emitted", "seconds")}
    return RoundStats(
        **of_nodes,
        step_seconds=found.get("step_seconds"),
        depths=tuple(found.get("depths", ())),
        ranks=tuple(tuple((children, accepted) for children, accepted in passed) for passed in found.get("ranks", ())),
        shapes=tuple(name for name, count in found.get("shapes", ()) for _ in range(count)),
        uncut=tuple((nodes, levels, accepted) for nodes, levels, accepted in found.get("uncut", ())),
    )
