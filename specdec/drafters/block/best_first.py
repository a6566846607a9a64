"""The likeliest nodes of all that a block's slots predict, found level by level on the device: a tree for each row.

A node's value is the product of the draft's probabilities along its path. A child's never exceeds its parent's, so the
N nodes of the largest values form a tree, which a search with a heap would find node by node. Here each level keeps its
N best nodes: whichever of all levels are the best N are among them, with their parents. Nothing but the conditionals of
a level's best nodes is computed, and those of a block need no pass of a model (`slots.SlotState`). Sources: Li et al.
2024 (EAGLE-2), section 4, for the value; DDTree (arXiv 2604.12989) for trees out of one block."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attention.dispatch import resolve
from specdec.drafters.block.growth import Growth
from specdec.drafters.block.scoring import SlotScores
from specdec.drafters.grown import best_tree
from specdec.requests.batch import Batch
from specdec.sampling.draws import top
from specdec.sampling.processors import may_follow
from specdec.trees.draft import Draft


@dataclass(slots=True)
class Found:
    """The nodes found so far, level by level from the root on, and those of the last level that get children.

    tokens, values, parents: a tensor for each level, see `drafters.grown`.
    nodes, value, place `[A, n]`: of those that get children the tokens, the values and the places in the lists (a
        number: the first of places that follow each other).
    above `[A, n]`: which of the `nodes` of the level before they are children of (None: they are the roots).
    path `[A, n, d]`: the tokens down to them, and going `[A, n]`: after which a text can go on (None: after all), where
        processors look at the text.
    """

    scores: SlotScores
    tokens: list[Tensor]
    values: list[Tensor]
    parents: list[Tensor]
    nodes: Tensor
    value: Tensor
    place: Tensor | int
    path: Tensor
    going: Tensor | None = None
    above: Tensor | None = None
    size: int = field(default=1)

    @classmethod
    def roots(cls, scores: SlotScores) -> "Found":
        """The last tokens of the rows."""
        root, precise = scores.batch.last_tokens(), torch.promote_types(scores.first.dtype, torch.float32)
        value, path = torch.zeros(root.shape, dtype=precise, device=root.device), root.new_zeros(len(root), 1, 0)
        return cls(scores, [root], [value + float("inf")], [torch.full_like(root, -1)], root, value, 0, path)

    def level(self) -> Tensor:
        """The scores of the children of `nodes`, `[A, n or 1, X]`."""
        return self.scores(len(self.tokens) - 1, self.nodes, self.above, self.path.contiguous, self.going)

    def likeliest(self, count: int) -> tuple[Tensor, Tensor]:
        """See `SlotScores.likeliest`, of the children of `nodes`."""
        level = len(self.tokens) - 1
        return self.scores.likeliest(level, self.nodes, self.above, self.path.contiguous, self.going, count)

    def add(self, tokens: Tensor, values: Tensor, above: Tensor, chosen: Tensor | int) -> None:
        """Add a level's nodes `[A, m]`, of which those at places `chosen [A, n]` get children (a number: the first).

        above: which of `nodes` each is a child of."""
        take = lambda x: x[:, :chosen] if isinstance(chosen, int) else x.gather(1, chosen)
        self.tokens.append(tokens)
        self.values.append(values)
        self.parents.append(above + self.place if isinstance(self.place, int) else self.place.gather(1, above))
        self.nodes, self.value, self.above = take(tokens), take(values), take(above)
        self.place = self.size if isinstance(chosen, int) else self.size + chosen
        self.size += tokens.shape[1]
        if self.scores.by_name:
            before = self.above[..., None].expand(-1, -1, self.path.shape[2])
            self.path = torch.cat([self.path.gather(1, before), self.nodes[..., None]], 2)
            self.going = may_follow(self.nodes, self.value, self.scores.batch.ends[:, None])

    def lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, values and parents of all, `[A, C]`."""
        return torch.cat(self.tokens, 1), torch.cat(self.values, 1), torch.cat(self.parents, 1)


MOST_SORTED = 4096  # candidates of a level that the kernel sorts


def best_children(found: Found, likely: Tensor, columns: Tensor, keep: int, deepest: Tensor,
                  impl: str | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The `keep` best children of a level's nodes: tokens, values and which node is the parent, `[A, keep]`.

    likely `[A, n or 1, C]`: the log-probabilities of C children of each node, and `columns` of the scores.
    deepest `[A]`: rows of no more levels than are there have no children: their values are -inf."""
    value, level, (among, ids) = found.value, len(found.tokens) - 1, found.scores.names(len(found.tokens) - 1)
    children = likely.shape[2]

    def fallback_reason() -> str | None:
        if likely.dtype != torch.float32 or value.dtype != torch.float32:
            return f"it takes float32 values, got {value.dtype} and {likely.dtype}"
        count = value.shape[1] * children
        return f"it sorts up to {MOST_SORTED} candidates, got {count}" if count > MOST_SORTED else None

    if resolve(impl, value.device, fallback_reason) == "triton":
        from specdec.drafters.block.level_kernel import launch_level

        return launch_level(value, likely, columns, keep, deepest, level, among, ids)
    candidates = value[..., None] + likely
    values, chosen = top(candidates.flatten(1), keep)
    columns = columns.expand(candidates.shape).flatten(1).gather(1, chosen)
    values = values.masked_fill((deepest <= level)[:, None], float("-inf"))
    return found.scores.tokens(level, columns), values, chosen // children


def search(scores: SlotScores, growth: Growth, deepest: Tensor | None = None) -> Found:
    """The N best nodes of each level; those below level `deepest [A]` of a row (None: K) have the value -inf."""
    found = Found.roots(scores)
    deepest = torch.full_like(found.nodes[:, 0], growth.depth) if deepest is None else deepest
    for _ in range(growth.depth):
        likely, columns = found.likeliest(growth.most_children)
        keep = min(growth.num_tokens, found.nodes.shape[1] * likely.shape[2])
        found.add(*best_children(found, likely, columns, keep, deepest), growth.most_expanded)
    return found


def best_first(batch: Batch, scores: SlotScores, growth: Growth, deepest: Tensor | None = None) -> Draft:
    """The tree of the N best nodes of every row, up to `deepest [A]` levels (None: K), in the order of their values.

    Node n is the n-th best, so that the first n nodes are the tree of n. Waits for nothing."""
    found = search(scores, growth, deepest)
    tokens, values, parents = found.lists()
    batch.report_fault(values.isnan(), "the draft model produced NaN or infinite logits")
    size, most = growth.num_tokens + 1, growth.most_children
    return best_tree(tokens, values, parents, size, growth.depth, most, by_value=True)
