"""Verifies a draft on the device and packs the outcome into one tensor, so the host synchronises once per round."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.acceptance import Acceptance, AcceptanceRule, greedy
from specdec.acceptance.greedy import accept_likely
from specdec.requests.batch import Batch, no_finite_score
from specdec.requests.rows import Row
from specdec.sampling.draws import highest, peak
from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeBatch
from specdec.trees.tree import TokenTree


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row's round: `path` of accepted nodes, `emitted` tokens (one more), nodes drafted at each depth from 1 on
    (`levels`), and along the path, root included, each node's number of children and (`ranks`) which of its siblings it
    is."""

    path: list[int]
    emitted: list[int]
    levels: Sequence[int]
    children: Sequence[int]
    ranks: Sequence[int]


@dataclass(frozen=True, slots=True)
class ResultLayout:
    """What the columns of a round's answer mean; it stays the same when the round is run again."""

    tree: TokenTree | TreeBatch
    cuts: tuple[int, ...]
    faults: tuple[str, ...]

    def read(self, answer: Sequence[Sequence[int]], rows: Sequence[Row]) -> Iterator[RowResult]:
        """What happened to each of `rows`, whose columns are `answer[i]`; raises ValueError for a row with a reported
        fault."""
        for row, values in zip(rows, answer, strict=True):
            (count,), path, emitted, flags, *shape = (
                values[a:b] for a, b in zip(self.cuts, self.cuts[1:], strict=False)
            )
            for what, flag in zip(self.faults, flags, strict=True):
                if flag:
                    raise ValueError(f"{what} in row {row.number} after {row.length} tokens")
            path = path[:count]
            yield RowResult(path, emitted[: count + 1], *(shape or _shape_along(self.tree, path)))


def checked(batch: Batch, draft: Draft) -> Draft:
    """The draft with every token inside the vocabulary; what was not, and a broken distribution, is complained
    about.
    """
    size = batch.rows.target.vocab_size
    tokens = draft.tokens.clamp(0, size - 1)
    batch.report_fault(
        (tokens != draft.tokens).any(1), f"the drafter proposed a token outside the target's vocabulary of {size}"
    )
    if draft.probs is not None:
        if draft.probs.shape[2] != size:
            raise ValueError(
                f"the draft's distributions are over {draft.probs.shape[2]} tokens, the target's over {size}"
            )
        off = (draft.probs.sum(-1) - 1).abs()
        batch.report_fault(
            ~(off < 1e-3).all(1) | (draft.probs < 0).any(2).any(1),
            "the drafter's probabilities are negative, NaN or do not sum to 1",
        )
    tree = draft.tree
    if isinstance(tree, TreeBatch):
        batch.report_fault(
            tree.broken(),
            "the drafter's parents are not a tree: each must be an earlier node that exists, no deeper than it says",
        )
        tree = tree.repaired()
    return replace(draft, tree=tree, tokens=tokens)


def verify(
    batch: Batch, rule: AcceptanceRule, draft: Draft, logits: Tensor, features: Tensor | None
) -> tuple[Acceptance, Tensor, Tensor, ResultLayout]:
    """Apply `rule` to `logits [A, N, V]` -> (verdict, emitted tokens `[A, E + 1]`, the answer `[A, W]`, its layout).
    Waits for nothing.
    """
    processors = batch.rows.processors
    if rule is greedy and not processors.change_scores:  # one look at the logits is enough
        largest, likely = peak(logits)
        verdict = accept_likely(draft, likely)
    else:
        largest, scores = highest(logits), _processed(batch, draft, logits)
        verdict = rule(draft, scores, None if rule is greedy else batch.noise())
    batch.report_fault(largest, "the target model produced NaN or infinite logits")
    if features is not None:
        batch.rows.keep_features(_at_end(features, verdict), batch.index)
    if processors.change_scores:
        # the argmax of scores that are all -inf may be in the draft: look at the whole path where processors forbid
        # tokens by the text
        on_path = (
            highest(scores).gather(1, _passed(verdict))
            if processors.need_prefix
            else highest(_at_end(scores, verdict))[:, None]
        )
        batch.report_fault(on_path, no_finite_score("target"))
    faults = _settled(batch.faults)
    bad, emitted = torch.stack(list(faults.values()), 1).long(), verdict.emitted(draft)
    parts = (verdict.counts[:, None], verdict.path, emitted, bad, *_shape_of_rows(draft, verdict))
    cuts = [0]
    for part in parts:
        cuts.append(cuts[-1] + part.shape[1])
    return verdict, emitted, torch.cat(parts, 1), ResultLayout(draft.tree, tuple(cuts), tuple(faults))


def _settled(faults: Sequence[tuple[Tensor, str]]) -> dict[str, Tensor]:
    """Which rows `[A]` each complaint is about; numbers of the same complaint are looked at together."""
    numbers, flags = {}, {}
    for about, what in faults:
        (flags if about.dtype == torch.bool else numbers).setdefault(what, []).append(
            about if about.ndim == 2 else about[:, None]
        )
    if numbers:
        all_numbers = torch.cat([about for each in numbers.values() for about in each], 1)
        widths = [sum(about.shape[1] for about in each) for each in numbers.values()]
        broken = all_numbers - all_numbers != 0  # inf - inf is NaN
        flags |= {what: [wrong] for what, wrong in zip(numbers, broken.split(widths, 1), strict=True)}
    each = {what: flags[what] for _, what in faults}  # what went wrong first is heard first
    return {what: (some[0] if len(some) == 1 else torch.cat(some, 1)).any(1) for what, some in each.items()}


def _passed(verdict: Acceptance) -> Tensor:
    """`[A, E + 1]`: the root, then the accepted nodes."""
    return torch.nn.functional.pad(verdict.path, (1, 0))


def _at_end(x: Tensor, verdict: Acceptance) -> Tensor:
    """`x [A, N, X]` at the last accepted node of each row, `[A, X]`."""
    return (
        x[:, 0]
        if x.shape[1] == 1
        else x[torch.arange(len(x), device=x.device), _passed(verdict).gather(1, verdict.counts[:, None])[:, 0]]
    )


def _processed(batch: Batch, draft: Draft, logits: Tensor) -> Tensor:
    """Scores `[A, N, V]`: each node's logits through the processors, with the node's own prefix."""
    if batch.rows.processors.need_prefix:
        return _processed_by_prefix(batch, draft, logits)
    return batch.scores(logits)


def _processed_by_prefix(batch: Batch, draft: Draft, logits: Tensor) -> Tensor:
    """The same, parents before their children, asking the processors only about texts that plain decoding might meet.

    Where it cannot get to (behind a node that is absent, forbidden by the scores at its parent or the end of the text,
    or at a row's limit) the logits stay as they are: no rule accepts what leads there, or nothing of it is kept. Waits
    for the device once a level."""
    processors, tree, rows = batch.rows.processors, draft.tree, batch.members
    scores = logits.clone() if logits.dtype == torch.float64 else logits.float().clone()
    if isinstance(tree, TokenTree):
        levels, parents = tree.levels, [[0, *tree.parents[1:]]] * len(rows)
        paths = [[tree.path(node) for node in range(tree.size)]] * len(rows)
        valid = None if draft.valid is None else draft.valid.tolist()
    else:
        depths, valid, parents = (x.tolist() for x in (draft.tables.depth, draft.tables.valid, draft.tables.parent))
        paths = [
            [path[:depth] for path, depth in zip(*row, strict=True)]
            for row in zip(draft.tables.path.tolist(), depths, strict=True)
        ]
        levels = [range(tree.size)] * (tree.max_depth + 1)
    path = lambda a, node: draft.tokens[a, list(paths[a][node])]
    room, reached = [row.limit - row.length for row in rows], [set() for _ in rows]
    for depth, level in enumerate(levels):
        at = [
            (a, n)
            for a in range(len(rows))
            for n in level
            if len(paths[a][n]) == depth < room[a]
            and (valid is None or valid[a][n])
            and (n == 0 or parents[a][n] in reached[a])
        ]
        if depth and at:
            row, node, parent = torch.tensor([(a, n, parents[a][n]) for a, n in at], device=scores.device).unbind(1)
            token = draft.tokens[row, node]
            follows = processors.may_follow(token, scores[row, parent, token]).tolist()
            at = [place for place, follow in zip(at, follows, strict=True) if follow]
        if not at:
            break
        for a, n in at:
            reached[a].add(n)

        row, node = torch.tensor(at, device=scores.device).unbind(1)
        scores[row, node] = processors(
            scores[row, node], [rows[a].number for a, _ in at], lambda m, at=at: batch.prefix(*at[m], path)
        )
    return scores


def _shape_of_rows(draft: Draft, verdict: Acceptance) -> tuple[Tensor, ...]:
    """For drafts whose rows differ: nodes at each depth `[A, E]`, and along the accepted path, root included, the
    number of children and the rank.
    """
    if isinstance(draft.tree, TokenTree) and draft.valid is None:
        return ()
    nodes, tables, (count, size) = _passed(verdict), draft.tables, draft.tokens.shape
    valid, depth, parent = (x.expand(count, size) for x in (tables.valid, tables.depth, tables.parent))
    place = torch.arange(size, device=nodes.device)
    is_child = (parent[:, None, :] == place[:, None]) & (valid & (place > 0))[:, None, :]  # [A, parent, child]
    levels = ((depth[..., None] == torch.arange(1, draft.max_depth + 1, device=nodes.device)) & valid[..., None]).sum(1)
    rank = (is_child.cumsum(2) * is_child).sum(1) - 1
    return levels, is_child.sum(2).gather(1, nodes), rank.gather(1, nodes)


def _shape_along(tree: TokenTree, path: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """The same for one row of a tree that all rows have."""
    if tree.size == 1:
        return [], [0], [0]
    nodes = (0, *path)
    return (
        [len(level) for level in tree.levels[1:]],
        [len(tree.children[node]) for node in nodes],
        [tree.ranks[node] for node in nodes],
    )
