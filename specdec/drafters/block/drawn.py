"""Trees of drawn tokens: each row's own shape, children drawn without replacement from the block's conditionals.

The shape follows the draft's probabilities, and no node goes once it is drawn:

1. How many nodes each level has follows from the text alone: as many as the best-first tree of the likeliest tokens
   has there.
2. Level by level, before any child of a level is drawn, its number of nodes is shared out among the parents, the
   likeliest of those drawn: each best pair of (parent, rank) by the parent's value times the parent's probability of
   its token of that rank gives the parent a child. This reads tokens down to the parents and their distributions.
3. Each parent's children are drawn one after the other from its distribution without the ones before; those that were
   shared out are the draft, all of them and in this order. Places in the tree are given afterwards and drop nothing.

Why the output is exact. Take a node at which the walk of `tree_distinct` arrives. Whether it arrives depends on tokens
down to the node and on their rejected siblings, on target probabilities and acceptance noise. The node's number of
children, by 1 and 2, depends on the text and on tokens of levels down to the node's. The random numbers that draw its
children take part in none of this: each is used once, and independent of all others. So given all that led there, the
children are draws without replacement from the q that the draft carries, and however many there are, the multi-branch
rule gives the target's token exactly (Chen et al. 2024, Sequoia; Jeon et al. 2024). It would not if a drawn child could
be dropped for what it is: given that it stayed, it would be no draw from q any more."""

import torch
from torch import Tensor

from specdec.drafters.block.best_first import Found, search
from specdec.drafters.block.growth import Growth
from specdec.drafters.block.scoring import SlotScores
from specdec.drafters.grown import best_places, tree_of
from specdec.requests.batch import Batch
from specdec.sampling.draws import sample_distinct, top, top_log_probs
from specdec.sampling.noise import Stream
from specdec.trees.draft import Draft

MOST_DRAWS = 16  # children of a node, drawn one after the other


def drawn_tree(batch: Batch, scores: SlotScores, growth: Growth) -> Draft:
    """A tree of at most N drawn nodes for every row, and the distributions that its children were drawn from."""
    sizes = level_sizes(search(scores, growth), growth)
    found, size = Found.roots(scores.whole()), batch.rows.target.vocab_size
    draws = min(growth.most_children, MOST_DRAWS, size)
    expanded = [1] + [growth.most_expanded] * (growth.depth - 1)
    uniform = batch.noise().uniform(Stream.DRAFT, sum(expanded) * draws)
    known = Distributions(batch.size, min(growth.num_tokens, sum(expanded)), size, found.value)
    for level in range(growth.depth):
        count, first = found.nodes.shape[1], sum(expanded[:level]) * draws
        numbers = uniform[:, first : first + count * draws].unflatten(1, (count, draws))
        of_level = found.level().expand(-1, count, -1)
        counts = shared_out(found.value, of_level, sizes[:, level], draws)
        tokens, q, taken = draw_children(of_level, numbers, counts)
        known.add(q, taken.any(2))
        gained = q.gather(2, tokens).log().clamp(max=0).to(found.value.dtype)
        values = torch.where(taken, found.value[..., None] + gained, float("-inf")).flatten(1)
        # a level has at most N, so that these are all that were taken, in the order in which they were drawn
        chosen = top(values, min(growth.num_tokens, values.shape[1]))[1].sort(1).values
        values = values.gather(1, chosen)
        likeliest = top(values, min(growth.most_expanded, values.shape[1]))[1].sort(1).values
        found.add(tokens.flatten(1).gather(1, chosen), values, chosen // draws, likeliest)
    tokens, values, parents = found.lists()
    batch.report_fault(values.isnan().any(1), "the draft model produced NaN or infinite logits")
    order = (values == float("-inf")).long().sort(dim=1, stable=True).indices[:, : growth.num_tokens + 1]
    tree, tokens = tree_of(tokens, values, parents, order, growth.depth, draws)
    return Draft(tree, tokens, known.probs, distinct=True)


def level_sizes(found: Found, growth: Growth) -> Tensor:
    """`[A, K]`: how many of the N best nodes found are on each level below the root."""
    _, values, _ = found.lists()
    places = best_places(values, growth.num_tokens + 1)
    exists, ends, size = values.gather(1, places) > float("-inf"), [], 1
    for level in found.values[1:]:
        inside = (places >= size) & (places < size + level.shape[1])
        ends.append((inside & exists).sum(1))
        size += level.shape[1]
    return torch.stack(ends, 1)


def shared_out(value: Tensor, scores: Tensor, size: Tensor, draws: int) -> Tensor:
    """`[A, n]`: how many children each parent gets of `size [A]`, at most `draws`; see the module, 2.

    value [A, n]: logarithms of the parents' values; scores [A, n, V]: of their children."""
    likely, _ = top_log_probs(scores, draws)
    offers = (value[..., None] + likely).flatten(1)
    best, chosen = top(offers, offers.shape[1])
    wanted = (torch.arange(best.shape[1], device=best.device) < size[:, None]) & (best > float("-inf"))
    return torch.zeros_like(value, dtype=torch.int64).scatter_add_(1, chosen // draws, wanted.long())


def draw_children(scores: Tensor, numbers: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the children of n parents with `numbers [A, n, C]`, `counts [A, n]` of which are to be the draft's.

    Returns tokens `[A, n, C]`, the distributions `[A, n, V]` and which tokens are the draft's."""
    q = torch.empty(scores.shape, dtype=torch.promote_types(scores.dtype, torch.float32), device=scores.device)
    tokens, left = sample_distinct(scores, numbers, probs=q)
    q = torch.where(left[..., :1], q, 1 / q.shape[2])  # where there is no token at all
    return tokens, q, left & (torch.arange(numbers.shape[2], device=q.device) < counts[..., None])


class Distributions:
    """The distributions of the nodes with children, in the order of the nodes.

    probs [A, I, V]: uniform ones where a row has fewer."""

    def __init__(self, rows: int, most: int, size: int, like: Tensor):
        self._flat = like.new_full((rows * most + 1, size), 1 / size)  # the last one takes those without children
        self.probs, self._most = self._flat[:-1].view(rows, most, size), most
        self._next = torch.arange(rows, device=like.device)[:, None] * most

    def add(self, q: Tensor, has_children: Tensor) -> None:
        """Add those of a level's parents, `q [A, n, V]`, that have children."""
        places = self._next + has_children.long().cumsum(1) - 1
        places = torch.where(has_children, places, len(self._flat) - 1)
        self._flat.index_copy_(0, places.flatten(), q.flatten(0, 1).to(self._flat.dtype))
        self._next = self._next + has_children.sum(1, keepdim=True)
