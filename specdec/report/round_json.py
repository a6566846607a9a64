"""Rounds of a request as JSON and back, so that every figure of a result can be drawn again.

Lists are texts with blanks between entries, since indented JSON would take a line for each of many thousand numbers."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from specdec.report.stats import RoundStats

NUMBERS = ("proposed", "accepted", "emitted")


def rounds_to_json(rounds: RoundStats) -> dict[str, Any]:
    """The fields of `rounds`; what follows from others is left out, as are ranks of chains.

    proposed, accepted, emitted, depths: an integer a round.
    seconds: microseconds.
    uncut: "nodes/levels/accepted" a round.
    ranks: "children:rank,…" a round, the rank a dash where no child was accepted.
    shapes: [name, how many rounds in a row].

    >>> one = RoundStats(proposed=(4, 4), accepted=(4, 1), emitted=(5, 2), seconds=(0.25,), shapes=("own", "own"))
    >>> rounds_to_json(one)
    {'proposed': '4 4', 'accepted': '4 1', 'emitted': '5 2', 'seconds': '250000', 'shapes': [['own', 2]]}
    >>> rounds_from_json(rounds_to_json(one)) == one
    True
    """
    found: dict[str, Any] = {name: _joined(getattr(rounds, name)) for name in NUMBERS}
    found["seconds"] = _joined(round(1e6 * seconds) for seconds in rounds.seconds)
    if rounds.step_seconds is not None:
        found["step_seconds"] = rounds.step_seconds
    if rounds.depths != rounds.proposed:
        found["depths"] = _joined(rounds.depths)
    if rounds.uncut != tuple(zip(rounds.proposed, rounds.depths, rounds.accepted, strict=True)):
        found["uncut"] = _joined("/".join(map(str, one)) for one in rounds.uncut)
    if any(children > 1 for passed in rounds.ranks for children, _ in passed):
        found["ranks"] = _joined(
            ",".join(f"{children}:{'-' if rank is None else rank}" for children, rank in passed)
            for passed in rounds.ranks
        )
    if rounds.shapes:
        found["shapes"] = [[name, len(list(group))] for name, group in groupby(rounds.shapes)]
    return found


def rounds_from_json(found: Mapping[str, Any]) -> RoundStats:
    """The inverse of `rounds_to_json`, but for ranks of chains."""
    numbers = lambda name: tuple(map(int, found.get(name, "").split()))
    return RoundStats(
        numbers("proposed"),
        numbers("accepted"),
        numbers("emitted"),
        seconds=tuple(micro / 1e6 for micro in numbers("seconds")),
        step_seconds=found.get("step_seconds"),
        depths=numbers("depths"),
        ranks=tuple(_ranks(passed) for passed in found["ranks"].split(" ")) if "ranks" in found else (),
        shapes=tuple(name for name, count in found.get("shapes", ()) for _ in range(count)),
        uncut=tuple(_triple(one) for one in found.get("uncut", "").split()),
    )


def _joined(entries) -> str:
    return " ".join(map(str, entries))


def _triple(text: str) -> tuple[int, int, int]:
    nodes, levels, accepted = map(int, text.split("/"))
    return nodes, levels, accepted


def _ranks(text: str) -> tuple[tuple[int, int | None], ...]:
    """The ranks of a round; none where nothing was drafted."""
    pairs = [pair.split(":") for pair in text.split(",") if pair]
    return tuple((int(children), None if rank == "-" else int(rank)) for children, rank in pairs)
