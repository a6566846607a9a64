"""What the first rank drafts and accepts, followed by all ranks of a model whose weights are split.

Ranks compute the same numbers as long as their machines are alike; where one differs in a last bit, its text must not
part from the others', with whom it computes every forward."""

from dataclasses import replace

import torch
from torch import Tensor

from specdec.acceptance import Acceptance
from specdec.model.parallel import Ranks
from specdec.rounds.verify import ResultLayout
from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeBatch


def followed_draft(ranks: Ranks, draft: Draft) -> Draft:
    """The first rank's draft; each rank keeps its own distributions, since only the first one's verdict counts."""
    if not ranks.several or draft.tree.size == 1:
        return draft
    parts = [draft.tokens]
    if isinstance(draft.tree, TreeBatch):
        parts.append(draft.tree.parents)
    if draft.valid is not None:
        parts.append(draft.valid.long())
    tokens, *others = ranks.follow(torch.stack(parts)).unbind()
    if isinstance(draft.tree, TreeBatch):
        return replace(draft, tokens=tokens, tree=replace(draft.tree, parents=others[0]))
    return replace(draft, tokens=tokens, valid=others[0].bool() if others else None)


def followed_outcome(ranks: Ranks, verdict: Acceptance, emitted: Tensor, packed: Tensor,
                     layout: ResultLayout) -> tuple[Acceptance, Tensor, Tensor, ResultLayout]:  # fmt: skip
    """What `verify` returns, as the first rank has it: the packed outcome `[A, W]` holds all of it."""
    if ranks.several:
        packed = ranks.follow(packed)
        counts, path, emitted = packed[:, 0], packed[:, slice(*layout.cuts[1:3])], packed[:, slice(*layout.cuts[2:4])]
        verdict = Acceptance(counts, path, emitted.gather(1, counts[:, None])[:, 0], emitted)
    return verdict, emitted, packed, layout
