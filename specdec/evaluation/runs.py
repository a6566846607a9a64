"""One prompt decoded by one method, as the tables count it and as result files keep it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from specdec.report.round_json import rounds_from_json, rounds_to_json
from specdec.report.stats import RoundStats, pool
from specdec.report.text_by_round import Piece

ALL = "all"  # kinds of prompts together
KEPT = (
    "model", "task", "kind", "prompt", "turn", "method", "temperature", "batch", "repeat", "group", "prompt_tokens",
    "new_tokens", "digest", "seconds", "reused",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt in one call of one method.

    prompt: its number among those of its kind, or its id in a file.
    new_tokens: how many there are.
    digest: of the new tokens; equal ones belong to equal texts.
    seconds: of the whole call, which all rows of a batch share; prefill included.
    rounds: None for transformers' methods.
    reused: see `methods.Decoded`; of the whole call.
    model, task, turn, batch: of the target, the file, the conversation, and rows of the call.
    group: which prompts of the task ran together.
    tokens: the new ones; result files do not keep them.
    pieces: the text by rounds, see `pieces_by_round`; kept of the first prompt of each kind alone.
    """

    method: str
    kind: str
    temperature: float
    prompt: int | str
    repeat: int
    new_tokens: int
    digest: str
    seconds: float
    rounds: RoundStats | None = None
    reused: int = 0
    model: str = ""
    task: str = ""
    turn: int = 0
    batch: int = 1
    group: str = ""
    prompt_tokens: int = 0
    tokens: tuple[int, ...] = ()
    pieces: tuple[Piece, ...] = ()

    @property
    def call(self) -> tuple:
        """What rows of one call have in common, and the calls of all methods that ran side by side."""
        return self.model, self.task, self.temperature, self.batch, self.repeat, self.group, self.turn

    @property
    def cluster(self) -> tuple:
        """The prompts that were decoded, again in every repeat and turn: what intervals resample."""
        return self.model, self.task, self.batch, self.group


def said_of(temperature: float) -> str:
    """A temperature in words, for titles."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def digest_of(tokens: Sequence[int]) -> str:
    """A short name of a text."""
    return hashlib.sha256(repr(tuple(tokens)).encode()).hexdigest()[:16]


def record_of(run: Run) -> dict[str, Any]:
    """A run for a result file."""
    stats = run.rounds
    found = {name: getattr(run, name) for name in KEPT} | {"seconds": round(run.seconds, 6)}
    return found | {
        "rounds": stats and stats.rounds, "tokens_per_round": stats and stats.tokens_per_round,
        "acceptance_rate": stats and stats.acceptance_rate, "of_rounds": stats and rounds_to_json(stats),
    } | ({"pieces": run.pieces} if run.pieces else {})  # fmt: skip


def run_of(record: Mapping[str, Any]) -> Run:
    """The run that `record_of` wrote. Raises ValueError for a record that lacks fields."""
    missing = [name for name in KEPT if name not in record]
    if missing:
        raise ValueError(f"a record lacks {', '.join(missing)}: it is not one of an evaluation")
    known = {field.name for field in fields(Run)} & record.keys() - {"rounds", "pieces"}
    rounds, pieces = record.get("of_rounds"), tuple((drafted, own) for drafted, own in record.get("pieces", ()))
    return Run(**{name: record[name] for name in known}, rounds=rounds and rounds_from_json(rounds), pieces=pieces)


def chosen(runs: Sequence[Run], method: str, kind: str, temperature: float) -> list[Run]:
    """The runs of one line of a table."""
    return [r for r in runs if r.method == method and r.temperature == temperature and kind in (r.kind, ALL)]


def pooled(runs: Sequence[Run]) -> RoundStats:
    """All rounds as one; no rounds for transformers' methods."""
    return pool(rounds_of(runs))


def rounds_of(runs: Sequence[Run]) -> list[RoundStats]:
    """The rounds of every request; none of transformers' methods."""
    return [run.rounds for run in runs if run.rounds]


def calls(runs: Sequence[Run]) -> dict[tuple, tuple[int, float]]:
    """New tokens and seconds of each call of one method."""
    found: dict[tuple, tuple[int, float]] = {}
    for run in runs:
        found[run.call] = found.get(run.call, (0, 0.0))[0] + run.new_tokens, run.seconds
    return found


def throughput(runs: Sequence[Run]) -> float:
    """New tokens a second of one method, all tokens over all seconds."""
    of_calls = calls(runs).values()
    return sum(tokens for tokens, _ in of_calls) / sum(seconds for _, seconds in of_calls)
