"""What stays of the rounds of a call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.acceptance import AcceptanceRule
from specdec.drafters import DraftSession
from specdec.model.runner import ModelRunner
from specdec.planning.policy import Policy, Shape
from specdec.report.stats import RoundStats
from specdec.requests.request import Request
from specdec.requests.rows import DraftContext
from specdec.rounds.verify import ResultLayout
from specdec.sampling.processors import name_of


@dataclass(slots=True)
class _Row:
    """The record of one sequence: its new tokens and, per round, what was proposed, accepted, emitted, and how long it
    took.
    """

    new_tokens: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ranks: list[tuple[tuple[int, int | None], ...]] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    ended: bool = False

    def stats(self, step_seconds: float | None) -> RoundStats:
        lists = {
            name: tuple(getattr(self, name))
            for name in ("proposed", "accepted", "emitted", "seconds", "depths", "ranks", "shapes")
        }
        return RoundStats(**lists, step_seconds=step_seconds)


@dataclass(slots=True)
class _Call:
    """What all rounds of one `generate` call share.

    `excluded`: seconds that went into timing and recording rather than decoding; `fallback_reason`: why the host takes
    part in every round."""

    context: DraftContext
    request: Request
    rule: AcceptanceRule
    policy: Policy
    records: list[_Row]
    emit: Callable[[list[list[int]]], None] | None
    session: DraftSession | None = None
    excluded: float = 0.0
    fallback_reason: str | None = None

    @property
    def runners(self) -> list[ModelRunner]:
        """The target's, and that of a draft model that may run without the host."""
        state = getattr(self.session, "state", None)
        return [self.context.target] if state is None else [self.context.target, state.runner]

    @property
    def active(self) -> list[int]:
        """The rows that have not ended."""
        return [row for row in self.context.sequences if not self.records[row].ended]


def _end_round(call: _Call, rows: Sequence[int], shape: Shape, seconds: float | None, recorded: bool = False) -> None:
    """Write down when and with what a round of `rows` went, and let go of the rows that have ended. Nobody learns from
    one that `recorded`.
    """
    for row in rows:
        call.context.rounds[row] += 1
        call.records[row].shapes.append(shape.name)
        if seconds is not None:
            call.records[row].seconds.append(seconds)
    if rows:
        tokens = sum(call.records[row].emitted[-1] for row in rows) / len(rows)
        call.policy.observe(shape, None if recorded else seconds, [call.records[row].ranks[-1] for row in rows], tokens)
    _release(call, [row for row in rows if call.records[row].ended])


def _hear(
    call: _Call, rows: Sequence[int], layout: ResultLayout, answer: Sequence[Sequence[int]], write: bool = True
) -> list[list[int]]:
    """Append to each row what stays of its round, with `write` to `context.tokens` too, and return the accepted
    paths.
    """
    context, paths = call.context, []
    context.new_tokens = [[] for _ in call.records]
    for row, heard in zip(rows, layout.read(answer, rows, context.lengths), strict=True):
        record, count = call.records[row], len(heard.path)
        context.new_tokens[row] = _keep(context, call.request, record, row, heard.emitted, heard.levels, count)
        passed = zip(heard.children[: count + 1], [*heard.ranks[1 : count + 1], None], strict=True)
        record.ranks.append(tuple((n, rank) for n, rank in passed if n) if layout.tree.max_depth else ())
        paths.append(heard.path)
    if write:
        _store(context, rows, context.new_tokens)
    for row in rows:
        context.lengths[row] += len(context.new_tokens[row])
    if call.emit is not None:
        call.emit(context.new_tokens)
    return paths


def _keep(
    context: DraftContext,
    request: Request,
    record: _Row,
    row: int,
    emitted: list[int],
    levels: Sequence[int],
    count: int,
) -> list[int]:
    """Cut a round's tokens at the budget, an end-of-text token or a stopping criterion, and write the row's record.

    `levels`: drafted nodes at each depth from 1 on.
    """
    budget = context.limits[row] - context.lengths[row]
    deepest = min(sum(n > 0 for n in levels), budget)
    kept = emitted[:budget]
    stop = next((i for i, token in enumerate(kept) if token in request.eos), None)
    if request.criteria:
        for i in range(len(kept) if stop is None else stop + 1):
            ids = torch.cat(
                [
                    request.padding[row],
                    context.tokens[row, : context.lengths[row]],
                    context.tokens.new_tensor(kept[: i + 1]),
                ]
            )[None]
            if any(_says_stop(criterion, ids) for criterion in request.criteria):
                stop = i
                break
    if stop is not None:
        kept = kept[: stop + 1]
        deepest = min(deepest, len(kept))  # positions behind the stop were never put to the test
    record.ended = stop is not None or len(kept) == budget
    record.proposed.append(sum(levels[:deepest]))
    record.depths.append(deepest)
    record.accepted.append(min(count, deepest))
    record.emitted.append(len(kept))
    record.new_tokens += kept
    return kept


def _says_stop(criterion: Callable, ids: Tensor) -> bool:
    try:
        said = criterion(ids, None)
    except Exception as error:
        raise RuntimeError(
            f"the stopping criterion {name_of(criterion)} raised {type(error).__name__} after {ids.shape[1]} "
            f"tokens: {error}. A criterion is asked "
            "about one row at a time, input_ids [1, L], and gets no scores (None)"
        ) from error
    if said is None:
        raise ValueError(f"the stopping criterion {name_of(criterion)} must return booleans, got None")
    return bool(torch.as_tensor(said).any())


def _store(context: DraftContext, active: Sequence[int], new_tokens: list[list[int]]) -> None:
    rows = [row for row in active for _ in new_tokens[row]]
    columns = [context.lengths[row] + i for row in active for i in range(len(new_tokens[row]))]
    where = torch.tensor([rows, columns, [token for row in active for token in new_tokens[row]]]).to(
        context.tokens.device, non_blocking=True
    )
    context.tokens[where[0], where[1]] = where[2]


def _release(call: _Call, rows: Sequence[int]) -> None:
    if call.session is not None and rows:
        call.session.release(rows)
    for row in rows:
        call.context.target.cache.free(call.context.sequences.pop(row))
