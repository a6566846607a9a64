"""Rows whose text is longer than a draft model can read, or too short, go on without drafts beside those with some."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attention.gpu import to_device
from specdec.requests.batch import Batch
from specdec.requests.rows import Row
from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeBatch
from specdec.trees.tree import TokenTree


def any_within(rows: Sequence[Row], max_length: int | None) -> bool:
    """Whether the text of any row has at most `max_length` tokens (None: no limit)."""
    return max_length is None or any(row.length <= max_length for row in rows)


def propose_within(batch: Batch, max_length: int | None, propose: Callable[[Batch], Draft], least: int = 1) -> Draft:
    """`propose`'s draft of the rows whose text has `least` to `max_length` tokens (None: all); others have no nodes.

    In an eager round `propose` sees these rows only and is not called without any. A captured round, whose lengths the
    host does not know, drafts all rows and drops what long ones got; none is shorter than `DraftSession.min_length`."""
    if batch.captured:
        if max_length is None or batch.rows.tokens.shape[1] <= max_length:  # no row can become too long
            return propose(batch)
        return _without(propose(batch), batch.rows.lengths > max_length)
    places = [i for i, row in enumerate(batch.members) if row.length >= least and any_within([row], max_length)]
    if len(places) == batch.size:
        return propose(batch)
    if not places:
        return Draft(TokenTree.chain(0), batch.last_tokens())
    short = Batch(batch.rows, [batch.members[i] for i in places])
    draft, index = propose(short), to_device(torch.tensor(places), batch.rows.tokens.device)
    for about, what in short.faults:
        batch.report_fault(_spread(about, index, batch.size, 0), what)
    return _of_all(draft, index, batch)


def _without(draft: Draft, dropped: Tensor) -> Draft:
    """`draft` without any node below the root in the rows `dropped [A]`."""
    if isinstance(draft.tree, TreeBatch):
        return replace(draft, tree=replace(draft.tree, parents=draft.tree.parents.where(~dropped[:, None], -1)))
    below = torch.arange(draft.tree.size, device=dropped.device) > 0
    there = ~(dropped[:, None] & below)
    return replace(draft, valid=there if draft.valid is None else there & draft.valid)


def _of_all(draft: Draft, index: Tensor, batch: Batch) -> Draft:
    """`draft`, whose rows are the rows `index` of `batch`, with all rows of `batch`, of which the others lack nodes."""
    count, size = batch.size, draft.tree.size
    tokens = batch.last_tokens().repeat(1, size).index_copy_(0, index, draft.tokens)
    q = draft.probs  # uniform where no token was drawn: a distribution, as everywhere
    probs = None if q is None else _spread(q, index, count, 1 / q.shape[-1])
    if isinstance(draft.tree, TreeBatch):
        parents = _spread(draft.tree.parents, index, count, -1)
        return Draft(replace(draft.tree, parents=parents), tokens, probs, draft.distinct)
    valid = torch.ones_like(draft.tokens, dtype=torch.bool) if draft.valid is None else draft.valid
    valid = _spread(valid, index, count, False)
    valid[:, 0] = True
    return Draft(draft.tree, tokens, probs, draft.distinct, valid)


def _spread(x: Tensor, index: Tensor, count: int, fill: float) -> Tensor:
    """`[count, …]`: `x` at the rows `index`, `fill` elsewhere."""
    return x.new_full((count, *x.shape[1:]), fill).index_copy_(0, index, x)
