"""The signature of all acceptance rules, and the two ways down a tree: all nodes at once, or depth by depth."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specdec.sampling.noise import RoundNoise
from specdec.trees.draft import Draft


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The outcome of a rule.

    counts [B]: number of accepted nodes
    path [B, E]: these nodes from depth 1 on, padded with zeros
    next_tokens [B]: the token after them
    known [B, E + 1]: the result of `emitted`, where a kernel has computed it already
    """

    counts: Tensor
    path: Tensor
    next_tokens: Tensor
    known: Tensor | None = None

    @classmethod
    def at(cls, draft: Draft, end: Tensor, next_tokens: Tensor) -> "Acceptance":
        """Accept the path down to node `end [B]`."""
        depth, path = draft.tables.depth, draft.tables.path
        if len(depth) == 1:
            return cls(depth[0].index_select(0, end), path[0].index_select(0, end), next_tokens)
        place = end[:, None, None].expand(-1, 1, path.shape[2])
        return cls(depth.gather(1, end[:, None])[:, 0], path.gather(1, place)[:, 0], next_tokens)

    @classmethod
    def of_nothing(cls, draft: Draft, next_tokens: Tensor) -> "Acceptance":
        """The outcome for a draft of the root alone."""
        return cls(torch.zeros_like(next_tokens), draft.tokens[:, :0], next_tokens)

    def emitted(self, draft: Draft) -> Tensor:
        """`[B, E + 1]`: the accepted tokens, then the next token; later values have no meaning."""
        if self.known is not None:
            return self.known
        if draft.tree.size == 1:
            return self.next_tokens[:, None]
        accepted = draft.tokens.gather(1, self.path)
        place = torch.arange(accepted.shape[1] + 1, device=accepted.device)
        padded = torch.nn.functional.pad(accepted, (0, 1))
        return torch.where(place == self.counts[:, None], self.next_tokens[:, None], padded)


class AcceptanceRule(Protocol):
    """`rule(draft, scores [B, N, V], noise) -> Acceptance`; `scores[b, n]`: the target's processed logits after node n.

    Rules that are `lossless` and built in may get scores that are not written out (`specdec.sampling.warped.Warped`). A
    rule that changes the target's distribution has an attribute `lossless` that is False.
    """

    def __call__(self, draft: Draft, scores: Tensor, noise: RoundNoise) -> Acceptance:
        """Decide which nodes of `draft` to accept."""


def is_lossless(rule: AcceptanceRule) -> bool:
    """Whether `rule` keeps the target's distribution: yes, unless it has an attribute `lossless` that is False."""
    return getattr(rule, "lossless", True)


def is_built_in(rule: AcceptanceRule) -> bool:
    """Whether `rule` is one of this library's, which are functions of tensors and nothing else."""
    module = (rule if inspect.isfunction(rule) else type(rule)).__module__ or ""
    return f"{module}.".startswith("specdec.acceptance.")


def reads_unwritten(rule: AcceptanceRule) -> bool:
    """Whether `rule` takes scores that are not written out."""
    return inspect.isfunction(rule) and is_built_in(rule) and rule.__name__ != "greedy"


def deepest(draft: Draft, right: Tensor, likelihood: Tensor | None = None) -> Tensor:
    """`[B]`: the deepest node that is `right [B, N]` together with all its ancestors; the root always is.

    Of several, the one with the largest `likelihood [B, N]`, or else the first."""
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
    """Walk down from the root in all rows at once -> (the node `[B]` where each row stops, its `offer` there).

    `choose(node [B], depth)` returns the child to go to (0: stop here) and an offer, which is returned for the rows
    that stop. It is called for stopped rows too, with the result ignored, so that nothing waits for the device."""
    node = torch.zeros(draft.tokens.shape[0], dtype=torch.int64, device=draft.tokens.device)
    going = torch.ones_like(node, dtype=torch.bool)
    child, kept = choose(node, 0)
    for depth in range(1, draft.max_depth + 1):
        going = going & (child != 0)
        node = torch.where(going, child, node)
        child, offer = choose(node, depth)
        kept = torch.where(going.view(-1, *[1] * (offer.ndim - 1)), offer, kept)
    return torch.where(going & (child != 0), child, node), kept
