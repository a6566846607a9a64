"""Verifies a draft on the device and packs the outcome into one tensor, so the host synchronises once per round."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor

from specdec.acceptance import Acceptance, AcceptanceRule, greedy
from specdec.acceptance.base import reads_unwritten
from specdec.acceptance.greedy import accept_likely
from specdec.requests.batch import Batch, no_finite_score
from specdec.requests.rows import Row
from specdec.rounds.packing import pack, passed_nodes
from specdec.sampling.draws import highest, peak, totals_of
from specdec.sampling.processors import may_follow
from specdec.trees.draft import Draft
from specdec.trees.tree import TokenTree


@dataclass(frozen=True, slots=True)
class RowResult:
    """The outcome of a round for one row.

    path: the accepted nodes.
    emitted: their tokens, and the next one.
    levels: how many nodes were drafted at each depth from 1 on.
    children, ranks: per node of the path, from the root on, its number of children and its place among its siblings.
    """

    path: list[int]
    emitted: list[int]
    levels: Sequence[int]
    children: Sequence[int]
    ranks: Sequence[int]


@dataclass(frozen=True, slots=True)
class ResultLayout:
    """The layout of a round's packed outcome, the same whenever a captured round is launched.

    tree: the one that all rows were given (None: rows differ).
    """

    tree: TokenTree | None
    cuts: tuple[int, ...]
    faults: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Whether nothing was drafted for any row: the round brings one token each, `token_of`."""
        return self.tree is not None and self.tree.size == 1 and len(self.cuts) == 5

    @property
    def most_emitted(self) -> int:
        """The most tokens that a round may add to a row."""
        return self.cuts[3] - self.cuts[2]

    def token_of(self, packed: list[int], row: Row) -> int:
        """The token of `row` in a plain round; raises ValueError as `read` does."""
        flags = packed[self.cuts[3] :]
        if any(flags):
            self._raise_fault(flags, row)
        return packed[self.cuts[2]]

    def read(self, packed: list[int], row: Row) -> RowResult:
        """The outcome of `row`; raises ValueError for one with a reported fault."""
        _, on_path, emitted, flags, end, *_ = self.cuts
        if any(packed[flags:end]):
            self._raise_fault(packed[flags:end], row)
        count = packed[0]
        path = packed[on_path : on_path + count]
        if self.tree is not None and end == self.cuts[-1]:
            shape = _shape_along(self.tree, path)
        else:
            shape = [packed[a:b] for a, b in pairwise(self.cuts[4:])]
        return RowResult(path, packed[emitted : emitted + count + 1], *shape)

    def _raise_fault(self, flags: Sequence[int], row: Row) -> NoReturn:
        what = next(what for what, flag in zip(self.faults, flags, strict=True) if flag)
        raise ValueError(f"{what} in row {row.number} after {row.length} tokens")


def require_fit(batch: Batch, draft: Draft, max_tokens: int) -> None:
    """Raise TypeError or ValueError for what is no draft of these rows; `max_tokens`: nodes that it may have."""
    if not isinstance(draft, Draft):
        raise TypeError(f"a drafter's propose must return a specdec.Draft, got a {type(draft).__name__}")
    if len(draft.tokens) != batch.size:
        raise ValueError(f"the draft has tokens for {len(draft.tokens)} rows, the batch has {batch.size}")
    if draft.tree.size - 1 > max_tokens:
        raise ValueError(f"the draft has {draft.tree.size - 1} tokens, but max_tokens of its drafter is {max_tokens}")


def checked(batch: Batch, draft: Draft) -> Draft:
    """Clamp the draft to valid tokens and trees, and report as faults what was not valid, and broken distributions."""
    size = batch.rows.target.vocab_size
    if not batch.captured:  # a captured round is one that has been seen eagerly
        wrong_root = draft.tokens[:, :1] != batch.last_tokens()
        batch.report_fault(wrong_root.any(1), "node 0 of the draft is not the last accepted token")
    tokens = draft.tokens.clamp(0, size - 1)
    batch.report_fault(
        tokens != draft.tokens, f"the drafter proposed a token outside the target's vocabulary of {size}"
    )
    totals = None
    if draft.probs is not None:
        if draft.probs.shape[2] != size:
            raise ValueError(
                f"the draft's distributions are over {draft.probs.shape[2]} tokens, the target's over {size}"
            )
        totals, least = totals_of(draft.probs)
        batch.report_fault(
            ~(((totals - 1).abs() < 1e-3) & (least >= 0)).all(1),
            "the drafter's probabilities are negative, NaN or do not sum to 1",
        )
    if draft.tree.static is None:
        batch.report_fault(
            draft.tree.broken(),
            "the drafter's parents are not a tree: each must be an earlier node that exists, no deeper than it says",
        )
    return replace(draft, tokens=tokens, totals=totals)


def verify(batch: Batch, rule: AcceptanceRule, draft: Draft, logits: Tensor,
           features: Tensor | None) -> tuple[Acceptance, Tensor, Tensor, ResultLayout]:  # fmt: skip
    """Apply `rule` to `logits [A, N, V]` and keep the features of each row's accepted nodes.

    Returns the verdict, the emitted tokens `[A, E + 1]`, the packed outcome `[A, W]` and its layout. Does not wait for
    the device."""
    processors, scores = batch.rows.processors, logits
    if rule is greedy and not processors.change_scores:  # one pass over the logits
        largest, likely = peak(logits)
        verdict, at_nodes = accept_likely(draft, likely), None
    else:
        largest = highest(logits)
        lazily = reads_unwritten(rule) and not {"scores", "logits"} & {*batch.wanted}
        unwritten = batch.unwritten(logits) if lazily else None
        if unwritten is None:
            scores = _processed(batch, draft, logits)
            if rule is greedy:
                found, likely = peak(scores)
                verdict = accept_likely(draft, likely)
            else:
                found, verdict = None, _require_verdict(rule(draft, scores, batch.noise()))
            at_nodes = batch.highest_known(largest)
        else:
            verdict, at_nodes = rule(draft, unwritten, batch.noise()), unwritten.largest()  # type: ignore[arg-type]
    batch.report_logits(largest, "target")
    if features is not None:
        _keep(batch, features, verdict)
    for name in batch.wanted:
        of_all = scores if name == "scores" else logits
        passed = passed_nodes(verdict)[..., None].expand(-1, -1, of_all.shape[2])
        on_path = of_all.gather(1, passed).float()
        if name == "logprobs":
            tokens = verdict.emitted(draft).clamp(0, of_all.shape[2] - 1)  # beyond the path may lie anything
            on_path = on_path.gather(2, tokens[..., None])[..., 0] - on_path.logsumexp(2)
        batch.outputs[name] = on_path
    if processors.change_scores:
        if processors.need_prefix:  # any node of the path may lack a finite score, and its argmax be drafted
            found = highest(scores) if found is None else found
            on_path = found.gather(1, passed_nodes(verdict)).masked_fill(_beyond(batch, draft, verdict), 0.0)
        elif at_nodes is not None:
            on_path = _at_end(at_nodes[..., None], verdict)
        else:
            on_path = highest(_at_end(scores, verdict))[:, None]
        batch.report_fault(on_path, no_finite_score("target"))
    emitted = verdict.emitted(draft)
    packed, cuts, faults = pack(batch.faults, draft, verdict, emitted)
    return verdict, emitted, packed, ResultLayout(draft.tree.static, cuts, faults)


def _keep(batch: Batch, features: Tensor, verdict: Acceptance) -> None:
    """Let the rows keep `features [A, N, W]` of the root and the accepted nodes, or of the last one of these."""
    if batch.rows.feature_room == 1:
        batch.rows.keep_features(_at_end(features, verdict)[:, None], batch.index)
    else:
        batch.rows.keep_features(features, batch.index, verdict.counts, verdict.path)


def _require_verdict(verdict) -> Acceptance:
    """Raise TypeError for what a rule must not return."""
    if not isinstance(verdict, Acceptance) or verdict.next_tokens.ndim != 1:
        shape = list(verdict.next_tokens.shape) if isinstance(verdict, Acceptance) else type(verdict).__name__
        raise TypeError(f"an acceptance rule must return an Acceptance with next_tokens [B], got {shape}")
    return verdict


def _at_end(x: Tensor, verdict: Acceptance) -> Tensor:
    """`x [A, N, X]` at the last accepted node of each row, `[A, X]`."""
    if x.shape[1] == 1:
        return x[:, 0]
    end = passed_nodes(verdict).gather(1, verdict.counts[:, None])
    return x.gather(1, end[..., None].expand(-1, -1, x.shape[2]))[:, 0]


def _beyond(batch: Batch, draft: Draft, verdict: Acceptance) -> Tensor:
    """`[A, E + 1]` bool: nodes of the path at or past a row's limit or behind an end token; the row is cut before."""
    passed = passed_nodes(verdict)
    place = torch.arange(passed.shape[1], device=passed.device)
    ends = (draft.tokens.gather(1, passed)[..., None] == batch.ends[:, None]).any(-1) & (place > 0)
    return (place >= batch.room[:, None]) | (ends.cumsum(1) > 0)


def _processed(batch: Batch, draft: Draft, logits: Tensor) -> Tensor:
    """Process each node's logits with the node's own prefix -> scores `[A, N, V]`."""
    if batch.rows.processors.node_by_node:
        return _processed_by_prefix(batch, draft, logits)

    def paths() -> tuple[Tensor, Tensor]:
        tables = draft.tables
        along = tables.path.expand(batch.size, -1, -1)
        return draft.tokens.gather(1, along.flatten(1)).view(along.shape), tables.depth

    return batch.scores(logits, paths)


def _processed_by_prefix(batch: Batch, draft: Draft, logits: Tensor) -> Tensor:
    """The same for processors that run node by node, parents before children.

    They run only after texts that plain decoding might reach. Elsewhere (below a node that is absent, forbidden
    by the scores at its parent or an end token, or at a row's limit) the logits stay as they are, since no such node is
    accepted or kept. Waits for the device once per level."""
    processors, static, rows = batch.rows.processors, draft.tree.static, batch.members
    scores = logits.clone() if logits.dtype == torch.float64 else logits.float().clone()
    trees = (
        [static] * len(rows)
        if static is not None  # else nodes that a row lacks are children of the root, but not `valid`
        else [TokenTree((None, *above[1:])) for above in draft.tables.parent.tolist()]
    )
    valid = None if static is not None and draft.valid is None else draft.tables.valid.tolist()
    path = lambda a, node: draft.tokens[a, list(trees[a].path(node))]
    room = [row.limit - row.length for row in rows]
    reached: list[set[int]] = [set() for _ in rows]
    for depth in range(draft.max_depth + 1):
        inside = [a for a, tree in enumerate(trees) if depth < min(room[a], len(tree.levels))]
        at = [(a, n) for a in inside for n in trees[a].levels[depth] if valid is None or valid[a][n]]
        at = [(a, n) for a, n in at if n == 0 or trees[a].above[n] in reached[a]]
        if depth and at:
            row, node, parent = torch.tensor([(a, n, trees[a].above[n]) for a, n in at], device=scores.device).unbind(1)
            token = draft.tokens[row, node]
            follows = may_follow(token, scores[row, parent, token], batch.ends[row]).tolist()
            at = [place for place, follow in zip(at, follows, strict=True) if follow]
        if not at:
            break
        for a, n in at:
            reached[a].add(n)
        row, node = torch.tensor(at, device=scores.device).unbind(1)
        prefix = lambda m, at=at: batch.prefix(at[m][0], path(*at[m]))
        scores[row, node] = processors(scores[row, node], [rows[a].number for a, _ in at], prefix)
    return scores


def _shape_along(tree: TokenTree, path: Sequence[int]) -> list[list[int]]:
    """The same for one row of a tree that all rows have."""
    if tree.size == 1:
        return [[], [0], [0]]
    nodes, levels = (0, *path), [*map(len, tree.levels[1:])]
    return [levels, [len(tree.children[node]) for node in nodes], [tree.ranks[node] for node in nodes]]
