"""Records of a call's rounds: its tokens, and the numbers from which its statistics follow."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.acceptance import AcceptanceRule
from specdec.drafters import DraftSession, SuffixMemory
from specdec.model.features import Features
from specdec.model.round_runner import RoundRunner
from specdec.planning.policy import Policy, Shape
from specdec.report.stats import RoundStats
from specdec.requests.batch import Batch
from specdec.requests.request import Request
from specdec.requests.rows import Row, Rows
from specdec.rounds.verify import ResultLayout, RowResult
from specdec.sampling.processors import name_of


@dataclass(slots=True)
class Record:
    """One row's new tokens and, per round, what was proposed, accepted and emitted, and how long it took.

    logprobs: of each new token, where they are wanted.
    outputs: per other name in `Request.outputs` and round, `[n, V]` of the n tokens kept.
    """

    new_tokens: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ranks: list[tuple[tuple[int, int | None], ...]] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    uncut: list[tuple[int, int, int]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def stats(self, step_seconds: float | None) -> RoundStats:
        """The record as statistics, with the seconds of a plain step."""
        names = ("proposed", "accepted", "emitted", "seconds", "depths", "ranks", "uncut")
        numbers = {name: tuple(getattr(self, name)) for name in names}
        return RoundStats(**numbers, shapes=tuple(shape.name for shape in self.shapes), step_seconds=step_seconds)


@dataclass(slots=True)
class Call:
    """The state that all rounds of one `generate` call share.

    rows: replaced by a smaller `Rows` when half of them have ended.
    records: of each row.
    emit: called after each round with its rows, whose `new_tokens` are those of the round.
    features: the hidden states that the drafter reads.
    memories: what remembers the answers of rows that have ended.
    most_new: tokens that draft models may lack after the last round with a draft.
    excluded: seconds spent on timing and capturing rather than decoding.
    fallback_reason: why rounds are not captured (None: they are).
    """

    rows: Rows
    request: Request
    rule: AcceptanceRule
    policy: Policy
    records: Mapping[Row, Record]
    emit: Callable[[Sequence[Row]], None] | None = None
    session: DraftSession | None = None
    features: Features | None = None
    memories: tuple[SuffixMemory, ...] = ()
    most_new: int = 1
    excluded: float = 0.0
    fallback_reason: str | None = None

    @property
    def runners(self) -> list[RoundRunner]:
        """The target's runner and those of all draft models."""
        return [self.rows.target, *(state.runner for state in (self.session.states if self.session else ()))]


Failed = Callable[[Sequence[Row], Exception], None]


def record_round(call: Call, rows: Sequence[Row], layout: ResultLayout, packed: Sequence[list[int]],
                 failed: Failed | None = None) -> list[Sequence[int] | None]:  # fmt: skip
    """Append each row's kept tokens to its record, and return the accepted paths.

    failed: called with a row whose outcome a fault or a stopping criterion broke, which gets no path and ends (None:
        the exception is raised, before any row's length has changed)."""
    paths: list[Sequence[int] | None] = []
    plain, records = layout.is_plain, call.records
    for row, values in zip(rows, packed, strict=True):
        try:
            if plain and not row.criteria and row.length < row.limit:
                paths.append(_keep_one(records[row], row, layout.token_of(values, row)))
            else:
                paths.append(_keep(call.rows, records[row], row, layout.read(values, row)))
        except Exception as error:
            if failed is None:
                raise
            row.new_tokens, row.ended = [], True
            paths.append(None)
            failed([row], error)
    for row in rows:
        row.length += len(row.new_tokens)
    if call.emit is not None:
        call.emit(rows)
    return paths


def record_outputs(call: Call, batch: Batch) -> None:
    """Keep what is wanted of the tokens that the last round appended: logprobs as numbers, scores and logits."""
    for name, values in batch.outputs.items():
        if name == "logprobs":
            for row, numbers in zip(batch.members, values.tolist(), strict=True):
                call.records[row].logprobs += numbers[: len(row.new_tokens)]
            continue
        for row, of_row in zip(batch.members, values, strict=True):
            call.records[row].outputs.setdefault(name, []).append(of_row[: len(row.new_tokens)].clone())


def _keep_one(record: Record, row: Row, token: int) -> Sequence[int]:
    """`_keep` for the one token of a plain round of a row below its limit without criteria, since there are so many."""
    row.new_tokens, row.ended = [token], token in row.ends or row.length + 1 == row.limit
    record.new_tokens.append(token)
    record.proposed.append(0)
    record.depths.append(0)
    record.accepted.append(0)
    record.emitted.append(1)
    record.ranks.append(())
    record.uncut.append((0, 0, 0))
    return ()


def _keep(rows: Rows, record: Record, row: Row, result: RowResult) -> Sequence[int]:
    """Cut a round's tokens at the limit, an end-of-text token or a stopping criterion, and record the round.

    Returns the accepted path."""
    levels, budget = result.levels, row.limit - row.length
    deepest = min(len(levels) - levels.count(0), budget)
    kept = result.emitted[:budget]
    stop = None
    if not row.ends.isdisjoint(kept):
        stop = next(i for i, token in enumerate(kept) if token in row.ends)
    if row.criteria:
        text = rows.tokens[row.slot, : row.length + len(kept)]
        text = text if row.padding is None else torch.cat([row.padding, text])
        for i in range(len(kept) if stop is None else stop + 1):
            ids = text[None, : len(text) - len(kept) + i + 1]
            if rows.target.ranks.decided(any(_stops(criterion, ids) for criterion in row.criteria)):
                stop = i
                break
    if stop is not None:
        kept = kept[: stop + 1]
        deepest = min(deepest, len(kept))  # positions after the stop were not tested
    row.ended = stop is not None or len(kept) == budget
    record.proposed.append(sum(levels[:deepest]))
    record.depths.append(deepest)
    record.accepted.append(min(len(result.path), deepest))
    record.emitted.append(len(kept))
    record.new_tokens += kept
    row.new_tokens, count = kept, len(result.path)
    passed = zip(result.children[: count + 1], [*result.ranks[1 : count + 1], None], strict=True)
    record.ranks.append(tuple((n, rank) for n, rank in passed if n))
    record.uncut.append((sum(levels), len(levels) - levels.count(0), count))
    return result.path


def _stops(criterion: Callable, ids: Tensor) -> bool:
    try:
        stops = criterion(ids, None)
    except Exception as error:
        raise RuntimeError(
            f"the stopping criterion {name_of(criterion)} raised {type(error).__name__} after {ids.shape[1]} tokens: "
            f"{error}. A criterion is called for one row at a time, input_ids [1, L], without scores (None)"
        ) from error
    if stops is None:
        raise ValueError(f"the stopping criterion {name_of(criterion)} must return booleans, got None")
    return bool(torch.as_tensor(stops).any())


def end_round(call: Call, rows: Sequence[Row], shape: Shape, seconds: float | None,
              usual: bool = True) -> None:  # fmt: skip
    """Record the round's shape and time, and release rows that have ended.

    The policy learns from `usual` times only, not from that of a round that captured a graph, say."""
    records = [call.records[row] for row in rows]
    for record in records:
        record.shapes.append(shape)
        if seconds is not None:
            record.seconds.append(seconds)
    if rows:
        tokens = sum([len(row.new_tokens) for row in rows]) / len(rows)
        ranks = [record.ranks[-1] for record in records]
        call.policy.observe(shape, seconds if usual else None, ranks, tokens)
    release(call, [row for row in rows if row.ended])


def release(call: Call, rows: Sequence[Row]) -> None:
    """Free the sequences of `rows` in all caches; what those that have ended said is remembered, if that is wanted."""
    rows = [row for row in rows if row.sequence >= 0]
    if call.session is not None and rows:
        call.session.release(rows)
    for row in rows:
        for memory in call.memories if row.ended else ():
            memory.add(call.records[row].new_tokens)
        call.rows.target.cache.free(row.sequence)
        row.sequence = -1
