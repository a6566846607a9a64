"""Packs the outcome of a round into one tensor, which the host reads at once."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from attention.dispatch import resolve
from specdec.acceptance import Acceptance
from specdec.trees.draft import Draft

Faults = Sequence[tuple[Tensor, str]]
"""See `Batch.report_fault`."""


def pack(faults: Faults, draft: Draft, verdict: Acceptance, emitted: Tensor, impl: str | None = None
         ) -> tuple[Tensor, tuple[int, ...], tuple[str, ...]]:  # fmt: skip
    """The packed outcome `[A, W]`, where its parts begin and end, and the messages of its faults.

    The parts: how many nodes are accepted, these `[A, E]`, the emitted tokens `[A, E + 1]`, whether there is each
    fault; for drafts whose rows differ then `RowResult.levels [A, E]`, `children` and `ranks [A, E + 1]`."""
    whats, deepest = tuple(dict.fromkeys(what for _, what in faults)), verdict.path.shape[1]
    differ = draft.tree.static is None or draft.valid is not None
    shape = (draft.max_depth, emitted.shape[1], emitted.shape[1]) if differ else ()
    cuts = tuple(accumulate((1, deepest, emitted.shape[1], len(whats), *shape), initial=0))
    if resolve(impl, emitted.device) == "triton":
        from specdec.rounds.packing_kernel import launch_pack

        groups = [whats.index(what) for _, what in faults]
        tables = draft.tables if differ else None
        return launch_pack([about for about, _ in faults], groups, verdict, emitted, tables, cuts[-1]), cuts, whats
    broken = torch.stack(list(_merged(faults).values()), 1).long()
    parts = verdict.counts[:, None], verdict.path, emitted, broken, *(_shape_of_rows(draft, verdict) if differ else ())
    return torch.cat(parts, 1), cuts, whats


def _merged(faults: Faults) -> dict[str, Tensor]:
    """Message -> the broken rows `[A]`, in the order of the first report; all numbers are tested in one operation."""
    numbers: dict[str, list[Tensor]] = {}
    flags: dict[str, list[Tensor]] = {}
    for about, what in faults:
        kind = flags if about.dtype == torch.bool else numbers
        kind.setdefault(what, []).append(about if about.ndim == 2 else about[:, None])
    if numbers:
        all_numbers = torch.cat([about for each in numbers.values() for about in each], 1)
        widths = [sum(about.shape[1] for about in each) for each in numbers.values()]
        broken = all_numbers - all_numbers != 0  # inf - inf is NaN
        flags |= {what: [wrong] for what, wrong in zip(numbers, broken.split(widths, 1), strict=True)}
    in_order = {what: flags[what] for _, what in faults}
    return {what: (some[0] if len(some) == 1 else torch.cat(some, 1)).any(1) for what, some in in_order.items()}


def passed_nodes(verdict: Acceptance) -> Tensor:
    """`[A, E + 1]`: the root, then the accepted nodes."""
    return torch.nn.functional.pad(verdict.path, (1, 0))


def _shape_of_rows(draft: Draft, verdict: Acceptance) -> tuple[Tensor, ...]:
    """`RowResult.levels [A, E]`, `children` and `ranks [A, E + 1]` of drafts whose rows differ."""
    nodes, tables, (count, size) = passed_nodes(verdict), draft.tables, draft.tokens.shape
    valid, depth, parent = (x.expand(count, size) for x in (tables.valid, tables.depth, tables.parent))
    place = torch.arange(size, device=nodes.device)
    is_child = (parent[:, None, :] == place[:, None]) & (valid & (place > 0))[:, None, :]  # [A, parent, child]
    levels = ((depth[..., None] == torch.arange(1, draft.max_depth + 1, device=nodes.device)) & valid[..., None]).sum(1)
    rank = (is_child.cumsum(2) * is_child).sum(1) - 1
    return levels, is_child.sum(2).gather(1, nodes), rank.gather(1, nodes)
