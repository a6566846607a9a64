"""The decoding loop: propose -> verify -> accept -> commit, for any drafter and any acceptance rule.

Plain autoregressive decoding is the same loop with a draft of no tokens, so both share every line that could differ by mistake.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from specdec.acceptance import AcceptanceRule
from specdec.autotune import PLAIN, Policy, Shape, shape_of
from specdec.draft import Draft
from specdec.drafters import DraftContext, Drafter, DraftSession
from specdec.request import Request
from specdec.runner import ModelRunner
from specdec.stats import GenerationStats, RoundStats
from specdec.tree import TokenTree, TreeBatch


@dataclass(slots=True)
class _Row:
    """The record of one sequence: its new tokens and, per round, what was proposed, accepted, emitted, and how long it took."""

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
        lists = {name: tuple(getattr(self, name)) for name in ("proposed", "accepted", "emitted", "seconds", "depths", "ranks", "shapes")}
        return RoundStats(**lists, step_seconds=step_seconds)


@dataclass(frozen=True, slots=True)
class Decoded:
    """`rows[i]`: the new tokens of row i; `stats` of the call."""

    rows: list[list[int]]
    stats: GenerationStats


@torch.inference_mode()
def decode(target: ModelRunner, drafter: Drafter | None, rule: AcceptanceRule, request: Request, policy: Policy,
           emit: Callable[[list[list[int]]], None] | None = None,
           step_seconds: Callable[[tuple[int, int], Callable[[], None]], float] | None = None) -> Decoded:  # fmt: skip
    """Run `request` to its end.

    `policy` says what each round proposes. `emit` hears, per round, the new tokens of every row. `step_seconds(size, step)` may time plain
    steps; `size` is the number of live rows and the binary magnitude of the longest. Without a drafter a round is a step.

    Whatever happens, all pages taken here are given back.
    """
    context = _context(target, request)
    records = [_Row() for _ in request.prompts]
    room = 1 + max(policy.max_tokens, getattr(drafter, "target_tokens", 0))
    target.reserve([limit + room for limit in request.limits])
    sequences = context.sequences
    sequences.update({row: target.cache.add() for row in range(len(records))})
    session, step, first_ended = None, None, None
    try:
        began = time.perf_counter()
        session = drafter.start(context, policy.max_tokens) if drafter is not None else None
        _prefill_long_prompts(context, sequences)
        while active := [row for row in sequences if not records[row].ended]:
            started = time.perf_counter()
            shape = policy.next()
            shape = _round(context, session, rule, active, records, request, shape, emit)
            now = time.perf_counter()
            for row in active:
                context.rounds[row] += 1
                if first_ended is not None:  # the first round holds the prefill, so it is no measure of a round
                    records[row].seconds.append(now - started)
            policy.hear(shape, now - started if first_ended is not None else None, [records[row].ranks[-1] for row in active],
                        sum(records[row].emitted[-1] for row in active) / len(active))  # fmt: skip
            _release(target, session, sequences, [row for row in active if records[row].ended])
            if first_ended is None:
                first_ended = now
                if step_seconds is not None and sequences:
                    step = step_seconds((len(sequences), max(context.lengths).bit_length()), lambda: _plain_step(context, sequences))
                decoding = time.perf_counter()
        ended = time.perf_counter()
    finally:
        _release(target, session, sequences, list(sequences))
    if step is None:  # rounds without a draft are steps
        seconds = [s for record in records for s, shape in zip(record.seconds, record.shapes[1:], strict=False) if shape == PLAIN.name]
        step = sum(seconds) / len(seconds) if seconds else policy.step_seconds
    stats = GenerationStats(tuple(record.stats(step) for record in records), first_ended - began, ended - decoding, sum(len(r.new_tokens) for r in records),
                            getattr(rule, "lossless", True))  # fmt: skip
    return Decoded([record.new_tokens for record in records], stats)


def _context(target: ModelRunner, request: Request) -> DraftContext:
    tokens = torch.zeros(len(request.prompts), max(request.limits), dtype=torch.int64, device=target.device)
    for row, prompt in enumerate(request.prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = [len(prompt) for prompt in request.prompts]
    return DraftContext(target, tokens, lengths, request.limits, [0] * len(lengths), request.processors, request.do_sample, request.seed, {},
                        [[] for _ in lengths])  # fmt: skip


def _prefill_long_prompts(context: DraftContext, sequences: dict[int, int]) -> None:
    """Put all but the last chunk of each long prompt into the cache; the last goes through with the first draft."""
    target, chunk = context.target, context.target.PREFILL_CHUNK
    long = [row for row in sequences if context.lengths[row] > chunk]
    if long:
        target.extend([sequences[row] for row in long], [context.tokens[row, : (context.lengths[row] - 1) // chunk * chunk] for row in long])


def _round(context: DraftContext, session: DraftSession | None, rule: AcceptanceRule, active: list[int], records: list[_Row], request: Request,
           shape: Shape, emit) -> Shape:  # fmt: skip
    """One propose -> verify -> accept -> commit cycle of the active rows -> what was drafted. A row's prompt goes through with its first draft."""
    cache, live = context.target.cache, [context.sequences[row] for row in active]
    # drafts keep their full size at the end of a row: a shorter one would let a row's noise depend on its neighbours' budgets
    if session is None or shape == PLAIN:
        draft, shape = Draft(TokenTree.chain(0), context.last_tokens(active)), PLAIN
    else:
        draft = _checked(context, session.propose(active, shape.tree))
        if isinstance(draft.tree, TokenTree) and (shape.tree is not None or draft.tree.size == 1):
            shape = shape_of(draft.tree)  # which may be less than was asked for
    starts = [context.lengths[row] - 1 for row in active]  # where node 0 lies
    unseen = [context.tokens[row, cache.length(sequence) : start] for row, sequence, start in zip(active, live, starts, strict=True)]
    logits, hidden = _verify(context.target, live, unseen, draft, context.wants_hidden)
    paths = _accept(context, rule, draft, logits, hidden, active, records, request, emit)
    for row in active:
        records[row].shapes.append(shape.name)
    cache.commit(live, starts, [(0, *path) for path in paths])
    if shape != PLAIN:
        session.commit(active, paths)
    return shape


def _checked(context: DraftContext, draft: Draft) -> Draft:
    """The draft with every token inside the vocabulary; what was not, and a broken distribution, is complained about."""
    size = context.target.vocab_size
    context.complain(((draft.tokens < 0) | (draft.tokens >= size)).any(1), f"the drafter proposed a token outside the target's vocabulary of {size}")
    if draft.probs is not None:
        if draft.probs.shape[2] != size:
            raise ValueError(f"the draft's distributions are over {draft.probs.shape[2]} tokens, the target's over {size}")
        off = (draft.probs.sum(-1) - 1).abs()
        context.complain(~(off < 1e-3).all(1) | (draft.probs < 0).any(2).any(1), "the drafter's probabilities are negative, NaN or do not sum to 1")
    tree = draft.tree
    if isinstance(tree, TreeBatch):
        context.complain(tree.broken(), "the drafter's parents are not a tree: each must be an earlier node that exists, no deeper than it says")
        tree = tree.repaired()
    return replace(draft, tree=tree, tokens=draft.tokens.clamp(0, size - 1))


def _verify(target: ModelRunner, live: list[int], unseen: list[Tensor], draft: Draft, hidden: bool) -> tuple[Tensor, Tensor | None]:
    """Logits `[A, N, V]` after every node (and hidden states `[A, N, H]`), from one forward over the draft and the tokens `unseen [n]` before it."""
    size = draft.tree.size
    counts = [len(tokens) + size for tokens in unseen]
    if max(counts) == size:
        out = target.forward(live, draft.tokens.flatten(), counts, tree=draft.tree, hidden=hidden)
    else:
        packed = torch.cat([piece for tokens, nodes in zip(unseen, draft.tokens, strict=True) for piece in (tokens, nodes)])
        ends = torch.tensor(counts).cumsum(0)[:, None]
        keep = (ends - size + torch.arange(size)).flatten().to(packed.device, non_blocking=True)
        out = target.forward(live, packed, counts, tree=draft.tree, keep=keep, hidden=hidden)
    return tuple(None if x is None else x.unflatten(0, (len(live), size)) for x in (out.logits, out.hidden))


def _accept(context: DraftContext, rule: AcceptanceRule, draft: Draft, logits: Tensor, hidden: Tensor | None, active: Sequence[int], records: list[_Row],
            request: Request, emit) -> list[Sequence[int]]:  # fmt: skip
    """Apply the rule to `logits [A, N, V]`, append what stays to each row, and return the accepted paths. The round's only wait."""
    context.complain(~logits.amax((1, 2)).isfinite(), "the target model produced NaN or infinite logits")
    scores = _processed(context, draft, logits, active)
    verdict = rule(draft, scores, context.noise(active))
    nodes = torch.nn.functional.pad(verdict.path, (1, 0))  # the root, then the accepted nodes
    ends = torch.arange(len(active), device=nodes.device), nodes.gather(1, verdict.counts[:, None])[:, 0]
    last = scores[ends]
    if hidden is not None:
        _keep_hidden(context, hidden[ends], active)
    context.complain(~last.amax(-1).isfinite(), "the logits processors (or the temperature) left the target model no finite score")
    complaints, context.complaints = context.complaints, []
    bad = torch.stack([flag for flag, _ in complaints], 1).long()
    depth = verdict.path.shape[1]
    widths = (verdict.counts[:, None], verdict.path, verdict.emitted(draft), bad, *_shape_of_rows(draft, nodes))
    cuts = [0]
    for part in widths:
        cuts.append(cuts[-1] + part.shape[1])
    answer = torch.cat(widths, 1).tolist()
    paths: list[Sequence[int]] = []
    context.news = [[] for _ in records]
    for row, values in zip(active, answer, strict=True):
        (count,), path, emitted, flags, *shape = (values[a:b] for a, b in zip(cuts, cuts[1:], strict=False))
        for (_, what), flag in zip(complaints, flags, strict=True):
            if flag:
                raise ValueError(f"{what} in row {row} after {context.lengths[row]} tokens")
        levels, children, ranks = shape or _static_shape(draft.tree, path[:count])
        context.news[row] = _keep(context, request, records[row], row, emitted[: count + 1], levels, count)
        passed = zip(children[: count + 1], [*ranks[1 : count + 1], None][: count + 1], strict=True)
        records[row].ranks.append(tuple((n, rank) for n, rank in passed if n) if depth else ())
        paths.append(path[:count])
    _store(context, active, context.news)
    if emit is not None:
        emit(context.news)
    return paths


def _keep_hidden(context: DraftContext, hidden: Tensor, active: Sequence[int]) -> None:
    if context.hidden is None:
        context.hidden = hidden.new_zeros(len(context.lengths), hidden.shape[1])
    context.hidden[torch.tensor(active).to(hidden.device, non_blocking=True)] = hidden


def _shape_of_rows(draft: Draft, nodes: Tensor) -> tuple[Tensor, ...]:
    """For drafts whose rows differ: nodes at each depth `[A, E]`, and along `nodes [A, E + 1]` the number of children and each one's rank."""
    if isinstance(draft.tree, TokenTree) and draft.valid is None:
        return ()
    tables, (count, size) = draft.tables, draft.tokens.shape
    valid, depth, parent = (x.expand(count, size) for x in (tables.valid, tables.depth, tables.parent))
    place = torch.arange(size, device=nodes.device)
    is_child = (parent[:, None, :] == place[:, None]) & (valid & (place > 0))[:, None, :]  # [A, parent, child]
    levels = ((depth[..., None] == torch.arange(1, draft.max_depth + 1, device=nodes.device)) & valid[..., None]).sum(1)
    rank = (is_child.cumsum(2) * is_child).sum(1) - 1
    return levels, is_child.sum(2).gather(1, nodes), rank.gather(1, nodes)


def _static_shape(tree: TokenTree, path: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """The same for one row of a tree that all rows have."""
    nodes = (0, *path)
    return [len(level) for level in tree.levels[1:]], [len(tree.children[node]) for node in nodes], [tree.ranks[node] for node in nodes]


def _processed(context: DraftContext, draft: Draft, logits: Tensor, active: Sequence[int]) -> Tensor:
    """Scores `[A, N, V]`: each node's logits through the processors, with the node's own prefix."""
    size = draft.tree.size
    if isinstance(draft.tree, TokenTree):
        path = lambda a, node: list(draft.tree.path(node))  # noqa: E731
    elif context.processors.need_prefix:  # processors in Python wait for the device anyway
        depths, paths = draft.tables.depth.tolist(), draft.tables.path.tolist()
        path = lambda a, node: paths[a][node][: depths[a][node]]  # noqa: E731

    def prefix(m):
        a, node = divmod(m, size)
        known = context.tokens[active[a], : context.lengths[active[a]]]
        return torch.cat([known, draft.tokens[a, path(a, node)]])[None]

    rows = [row for row in active for _ in range(size)]
    return context.processors(logits.flatten(0, 1), rows, prefix).unflatten(0, (len(active), size))


def _keep(context: DraftContext, request: Request, record: _Row, row: int, emitted: list[int], levels: Sequence[int], count: int) -> list[int]:
    """Cut a round's tokens at the budget, an end-of-text token or a stopping criterion, and write the row's record.

    `levels`: drafted nodes at each depth from 1 on.
    """
    budget = context.limits[row] - context.lengths[row]
    deepest = min(sum(n > 0 for n in levels), budget)
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
        deepest = min(deepest, len(kept))  # positions behind the stop were never put to the test
    record.ended = stop is not None or len(kept) == budget
    record.proposed.append(sum(levels[:deepest]))
    record.depths.append(deepest)
    record.accepted.append(min(count, deepest))
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
