"""The signature that all acceptance rules share, and the two ways down a tree: all nodes at once, or one depth after
the other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specdec.sampling.noise import RoundNoise
from specdec.trees.draft import Draft


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The verdict on a draft: `counts [B]` accepted nodes, `path [B, E]` those nodes from depth 1 on (zeros behind),
    `next_tokens [B]`.

    `said [B, E + 1]` is what `emitted` gives, where that is known already.
    """

    counts: Tensor
    path: Tensor
    next_tokens: Tensor
    said: Tensor | None = None

    @classmethod
    def at(cls, draft: Draft, end: Tensor, next_tokens: Tensor) -> "Acceptance":
        """The verdict that accepts the path down to node `end [B]`."""
        tables, row = draft.tables, torch.arange(len(end), device=end.device)
        of_row = row if tables.depth.shape[0] > 1 else 0
        return cls(tables.depth[of_row, end], tables.path[of_row, end], next_tokens)

    @classmethod
    def of_nothing(cls, draft: Draft, next_tokens: Tensor) -> "Acceptance":
        """The verdict on a draft of the root alone."""
        return cls(torch.zeros_like(next_tokens), draft.tokens[:, :0], next_tokens)

    def emitted(self, draft: Draft) -> Tensor:
        """`[B, E + 1]`: the accepted tokens, then the next token; what stands behind it has no meaning."""
        if self.said is not None:
            return self.said
        if draft.tree.size == 1:
            return self.next_tokens[:, None]
        accepted = draft.tokens.gather(1, self.path)
        place = torch.arange(accepted.shape[1] + 1, device=accepted.device)
        padded = torch.nn.functional.pad(accepted, (0, 1))
        return torch.where(place == self.counts[:, None], self.next_tokens[:, None], padded)


class AcceptanceRule(Protocol):
    """`rule(draft, scores [B, N, V], noise) -> Acceptance`; `scores[b, n]` are the target's processed logits after node
    n.

    A rule that changes the target's distribution has an attribute `lossless` that is False.
    """

    def __call__(self, draft: Draft, scores: Tensor, noise: RoundNoise) -> Acceptance:
        """The verdict on `draft`."""


def is_lossless(rule: AcceptanceRule) -> bool:
    """Whether `rule` keeps the target's distribution: it says otherwise itself, with an attribute `lossless`."""
    return getattr(rule, "lossless", True)


def deepest(draft: Draft, right: Tensor, likelihood: Tensor | None = None) -> Tensor:
    """`[B]`: the deepest node that is `right [B, N]` together with all its ancestors; the root is right by definition.

    Of several, the one with the largest `likelihood [B, N]`, or else the first.
    """
    tables = draft.tables
    right = right & tables.valid
    right = right | (torch.arange(right.shape[1], device=right.device) == 0)
    on_path = (right[:, None] | ~tables.sees).all(-1) & tables.valid
    depth = torch.where(on_path, tables.depth, -1)
    if likelihood is None:
        return depth.argmax(1)
    at_bottom = depth == depth.amax(1, keepdim=True)
    return torch.where(at_bottom, likelihood, float("-inf")).argmax(1)


def descend(draft: Draft, choose: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Walk down from the root in all rows at once -> (the node where each row stops `[B]`, what `choose` said there).

    `choose(node [B], depth)` gives the child to go to (0: stop here) and what the row keeps if it stops. Rows that have
    stopped are asked again and their answer is thrown away: nothing here waits for the device."""
    node = torch.zeros(draft.tokens.shape[0], dtype=torch.int64, device=draft.tokens.device)
    going, kept = torch.ones_like(node, dtype=torch.bool), None
    for depth in range(draft.max_depth + 1):
        child, offer = choose(node, depth)
        kept = offer if kept is None else torch.where(going.view(-1, *[1] * (offer.ndim - 1)), offer, kept)
        going = going & (child != 0)
        node = torch.where(going, child, node)
    return node, kept
