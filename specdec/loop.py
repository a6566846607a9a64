"""The decoding loop: propose -> verify -> accept -> commit, for any drafter and any acceptance rule.

Plain autoregressive decoding is the same loop with a draft of no tokens, so both share every line that could differ by mistake.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.acceptance import AcceptanceRule
from specdec.draft import Draft
from specdec.drafters import DraftContext, Drafter, DraftSession
from specdec.request import Request
from specdec.runner import ModelRunner
from specdec.stats import GenerationStats, RoundStats
from specdec.tree import TokenTree


@dataclass(slots=True)
class _Row:
    """The record of one sequence: its new tokens and, per round, what was proposed, accepted, emitted, and how long it took."""

    new_tokens: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ended: bool = False

    def stats(self, step_seconds: float | None) -> RoundStats:
        return RoundStats(tuple(self.proposed), tuple(self.accepted), tuple(self.emitted), tuple(self.seconds), step_seconds)


@dataclass(frozen=True, slots=True)
class Decoded:
    """`rows[i]`: the new tokens of row i; `stats` of the call."""

    rows: list[list[int]]
    stats: GenerationStats


@torch.inference_mode()
def decode(target: ModelRunner, drafter: Drafter | None, rule: AcceptanceRule, request: Request, emit: Callable[[list[list[int]]], None] | None = None,
           step_seconds: Callable[[tuple[int, int], Callable[[], None]], float] | None = None) -> Decoded:  # fmt: skip
    """Run `request` to its end.

    `emit` hears, per round, the new tokens of every row. `step_seconds(size, step)` may time plain steps; `size` is the number of live
    rows and the binary magnitude of the longest. Without a drafter a round is a step.

    Whatever happens, all pages taken here are given back.
    """
    context = _context(target, request)
    records = [_Row() for _ in request.prompts]
    slack = 1 + (drafter.max_tokens if drafter is not None else 0)
    target.reserve([limit + slack for limit in request.limits])
    sequences = {row: target.cache.add() for row in range(len(records))}
    session, step, first_ended = None, None, None
    try:
        began = time.perf_counter()
        session = drafter.start(context) if drafter is not None else None
        _prefill_long_prompts(context, sequences)
        while active := [row for row in sequences if not records[row].ended]:
            started = time.perf_counter()
            _round(context, session, rule, active, sequences, records, request, emit)
            now = time.perf_counter()
            for row in active:
                context.rounds[row] += 1
                if first_ended is not None:  # the first round holds the prefill, so it is no measure of a round
                    records[row].seconds.append(now - started)
            _release(target, session, sequences, [row for row in active if records[row].ended])
            if first_ended is None:
                first_ended = now
                if step_seconds is not None and sequences:
                    step = step_seconds((len(sequences), max(context.lengths).bit_length()), lambda: _plain_step(context, sequences))
                decoding = time.perf_counter()
        ended = time.perf_counter()
    finally:
        _release(target, session, sequences, list(sequences))
    if drafter is None:
        seconds = [s for record in records for s in record.seconds]
        step = sum(seconds) / len(seconds) if seconds else None
    stats = GenerationStats(tuple(record.stats(step) for record in records), first_ended - began, ended - decoding, sum(len(r.new_tokens) for r in records))
    return Decoded([record.new_tokens for record in records], stats)


def _context(target: ModelRunner, request: Request) -> DraftContext:
    tokens = torch.zeros(len(request.prompts), max(request.limits), dtype=torch.int64, device=target.device)
    for row, prompt in enumerate(request.prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = [len(prompt) for prompt in request.prompts]
    return DraftContext(target, tokens, lengths, request.limits, [0] * len(lengths), request.processors, request.do_sample, request.seed)


def _prefill_long_prompts(context: DraftContext, sequences: dict[int, int]) -> None:
    """Put all but the last chunk of each long prompt into the cache; the last goes through with the first draft."""
    target, chunk = context.target, context.target.PREFILL_CHUNK
    long = [row for row in sequences if context.lengths[row] > chunk]
    if long:
        target.extend([sequences[row] for row in long], [context.tokens[row, : (context.lengths[row] - 1) // chunk * chunk] for row in long])


def _round(context: DraftContext, session: DraftSession | None, rule: AcceptanceRule, active: list[int], sequences: dict[int, int], records: list[_Row],
           request: Request, emit) -> None:  # fmt: skip
    """One propose -> verify -> accept -> commit cycle of the active rows. In a row's first round its prompt goes through with the draft."""
    cache, live = context.target.cache, [sequences[row] for row in active]
    # drafts keep their full size at the end of a row: a shorter one would let a row's noise depend on its neighbours' budgets
    draft = session.propose(active) if session is not None else Draft(TokenTree.chain(0), context.last_tokens(active))
    starts = [context.lengths[row] - 1 for row in active]  # where node 0 lies
    unseen = [context.tokens[row, cache.length(sequence) : start] for row, sequence, start in zip(active, live, starts, strict=True)]
    logits = _verify(context.target, live, unseen, draft)
    accepted, paths = _accept(context, rule, draft, logits, active, records, request, emit)
    cache.commit(live, starts, [(0, *path) for path in paths])
    if session is not None:
        session.commit(active, accepted)


def _verify(target: ModelRunner, live: list[int], unseen: list[Tensor], draft: Draft) -> Tensor:
    """Logits `[A, N, V]` after every node, from one forward over the draft and the accepted tokens `unseen [n]` before it."""
    size = draft.tree.size
    counts = [len(tokens) + size for tokens in unseen]
    if max(counts) == size:
        out = target.forward(live, draft.tokens.flatten(), counts, tree=draft.tree)
    else:
        packed = torch.cat([piece for tokens, nodes in zip(unseen, draft.tokens, strict=True) for piece in (tokens, nodes)])
        ends = torch.tensor(counts).cumsum(0)[:, None]
        keep = (ends - size + torch.arange(size)).flatten().to(packed.device, non_blocking=True)
        out = target.forward(live, packed, counts, tree=draft.tree, keep=keep)
    return out.logits.unflatten(0, (len(live), size))


def _accept(context: DraftContext, rule: AcceptanceRule, draft: Draft, logits: Tensor, active: Sequence[int], records: list[_Row], request: Request,
            emit) -> tuple[list[int], list[Sequence[int]]]:  # fmt: skip
    """Apply the rule to `logits [A, N, V]`, append what stays to each row, and return accepted counts and paths. The round's only wait."""
    context.complain(~logits.amax((1, 2)).isfinite(), "the target model produced NaN or infinite logits")
    scores = _processed(context, draft, logits, active)
    verdict = rule(draft, scores, context.noise(active))
    ends = torch.nn.functional.pad(verdict.path, (1, 0)).gather(1, verdict.counts[:, None])  # the node that the next token follows
    last = scores[torch.arange(len(active), device=ends.device), ends[:, 0]]
    context.complain(~last.amax(-1).isfinite(), "the logits processors (or the temperature) left the target model no finite score")
    complaints, context.complaints = context.complaints, []
    bad = torch.stack([flag for flag, _ in complaints], 1).long()
    depth = verdict.path.shape[1]
    answer = torch.cat([verdict.counts[:, None], verdict.path, verdict.emitted(draft), bad], 1).tolist()
    accepted, paths, news = [], [], [[] for _ in records]
    for row, values in zip(active, answer, strict=True):
        count, path, emitted, flags = values[0], values[1 : depth + 1], values[depth + 1 : 2 * depth + 2], values[2 * depth + 2 :]
        for (_, what), flag in zip(complaints, flags, strict=True):
            if flag:
                raise ValueError(f"{what} in row {row} after {context.lengths[row]} tokens")
        news[row] = _keep(context, request, records[row], row, emitted[: count + 1], draft.tree, count)
        accepted.append(count)
        paths.append(path[:count])
    _store(context, active, news)
    if emit is not None:
        emit(news)
    return accepted, paths


def _processed(context: DraftContext, draft: Draft, logits: Tensor, active: Sequence[int]) -> Tensor:
    """Scores `[A, N, V]`: each node's logits through the processors, with the node's own prefix."""
    size = draft.tree.size

    def prefix(m):
        a, node = divmod(m, size)
        known = context.tokens[active[a], : context.lengths[active[a]]]
        return torch.cat([known, draft.tokens[a, list(draft.tree.path(node))]])[None]

    rows = [row for row in active for _ in range(size)]
    return context.processors(logits.flatten(0, 1), rows, prefix).unflatten(0, (len(active), size))


def _keep(context: DraftContext, request: Request, record: _Row, row: int, emitted: list[int], tree: TokenTree, count: int) -> list[int]:
    """Cut a round's tokens at the budget, an end-of-text token or a stopping criterion, and write the row's record."""
    budget = context.limits[row] - context.lengths[row]
    proposed = min(max(tree.depths), budget)
    kept = emitted[:budget]
    stop = next((i for i, token in enumerate(kept) if token in request.eos), None)
    if request.criteria:
        for i in range(len(kept) if stop is None else stop + 1):
            ids = torch.cat([context.tokens[row, : context.lengths[row]], context.tokens.new_tensor(kept[: i + 1])])[None]
            if any(bool(torch.as_tensor(criterion(ids, None)).any()) for criterion in request.criteria):
                stop = i
                break
    if stop is not None:
        kept = kept[: stop + 1]
        proposed = min(proposed, len(kept))  # positions behind the stop were never put to the test
    record.ended = stop is not None or len(kept) == budget
    record.proposed.append(proposed)
    record.accepted.append(min(count, proposed))
    record.emitted.append(len(kept))
    record.new_tokens += kept
    return kept


def _store(context: DraftContext, active: Sequence[int], news: list[list[int]]) -> None:
    rows = [row for row in active for _ in news[row]]
    columns = [context.lengths[row] + i for row in active for i in range(len(news[row]))]
    where = torch.tensor([rows, columns, [token for row in active for token in news[row]]]).to(context.tokens.device, non_blocking=True)
    context.tokens[where[0], where[1]] = where[2]
    for row in active:
        context.lengths[row] += len(news[row])


def _plain_step(context: DraftContext, sequences: dict[int, int]) -> None:
    """One autoregressive step of all rows whose result is thrown away: what a round is compared with."""
    cache, live = context.target.cache, list(sequences.values())
    logits = context.target.forward(live, context.last_tokens(sequences)[:, 0], [1] * len(live)).logits
    logits.argmax(-1).tolist()
    for sequence in live:
        cache.truncate(sequence, cache.length(sequence) - 1)


def _release(target: ModelRunner, session: DraftSession | None, sequences: dict[int, int], rows: Sequence[int]) -> None:
    if session is not None and rows:
        session.release(rows)
    for row in rows:
        target.cache.free(sequences.pop(row))
