"""Trees that grow level by level on the device, one for each row: EAGLE-2's expansion and reranking, without a model.

Expansion: the nodes of a level propose their likeliest children, `candidates`; the W best of these by the sum of
log-probabilities down their path are run next, and are the nodes of the next level. Reranking: the best candidates of
all levels are the draft. A candidate's sum never exceeds its parent's, so its parent is in the draft too; of equal ones
the earlier is better, so that this holds for them. Source: Li et al. 2024 (EAGLE-2), section 4."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attention.dispatch import resolve
from specdec.drafters.grown import best_tree
from specdec.sampling.draws import top
from specdec.trees.draft import Draft
from specdec.trees.tensors import TreeMask, as_words


@dataclass(frozen=True, slots=True)
class Run:
    """The nodes that a model has run so far, R of each row: the root, then W a level. Those of the last level, P:

    value [A, P]: log-probability of the path down to each.
    candidate, place [A, P]: its numbers among all candidates and among the R.

    Of all R:

    depths [A, R], words [A, R, N / 64]: depths and ancestor bits (`as_words`)."""

    value: Tensor
    candidate: Tensor
    place: Tensor
    depths: Tensor
    words: Tensor

    @classmethod
    def roots(cls, root: Tensor) -> "Run":
        """Of the last tokens `[A, 1]`, whose paths have probability 1."""
        zero = torch.zeros_like(root)
        return cls(torch.zeros_like(root, dtype=torch.float32), zero, zero, zero, torch.ones_like(root)[..., None])

    @property
    def mask(self) -> TreeMask:
        """What a forward over the last level's nodes reads."""
        return TreeMask(tensors=(self.depths, self.words))


@dataclass(frozen=True, slots=True)
class Candidates:
    """All nodes that have been proposed, C of each row with the root first: tokens, values and parents, `[A, C]`."""

    tokens: Tensor
    values: Tensor
    parents: Tensor

    @classmethod
    def roots(cls, root: Tensor) -> "Candidates":
        """The last tokens `[A, 1]`, which come before every other node."""
        value = torch.full_like(root, float("inf"), dtype=torch.float32)
        return cls(root, value, torch.full_like(root, -1))

    def join(self, tokens: Tensor, values: Tensor, parents: Tensor) -> "Candidates":
        """These and more, `[A, m]`."""
        pairs = (self.tokens, tokens), (self.values, values), (self.parents, parents)
        return Candidates(*(torch.cat(pair, 1) for pair in pairs))


@dataclass(frozen=True, slots=True)
class Chosen:
    """W candidates that are run next, `[A, W]` each, in the order of the candidates.

    tokens; above: which node of the last level each follows."""

    tokens: Tensor
    above: Tensor


class Expansion:
    """Grows trees below the last tokens `root [A, 1]`, up to `depth` levels, from the `width` likeliest at each node.

    ids [V']: the target's ids of the tokens that nodes are given as (None: these are the target's).
    impl: "triton" launches one kernel a level, else some 25 operations; see `paged_attention`."""

    run: Run
    """The nodes that a model has run, after a first `expand`."""

    def __init__(self, root: Tensor, depth: int, width: int, ids: Tensor | None = None, impl: str | None = None):
        self.depth, self.width, self._root, self._ids, self._level = depth, width, root, ids, 0
        self._impl = resolve(impl, root.device)
        if self._impl == "triton":  # room for all, into which kernels write
            room = 1 + width + (depth - 1) * width * width
            long = lambda: torch.empty(len(root), room, dtype=torch.int64, device=root.device)
            self._found = Candidates(long(), torch.empty(len(root), room, device=root.device), long())
        else:
            self.run, self._found = Run.roots(root), Candidates.roots(root)

    def expand(self, likelihoods: Tensor, likely: Tensor) -> Chosen | None:
        """Give the last level's nodes children with log-probabilities and tokens `[A, P, W]`.

        Returns what is to be run next; None after the last level."""
        self._level += 1
        last = self._level == self.depth
        if self._impl == "triton":
            from specdec.drafters.expansion_kernel import launch_expand

            before = None if self._level == 1 else self.run
            given = likelihoods, likely, self._ids
            grown = launch_expand(before, self._root, self._found, *given, self._level, last)
        else:
            likely = likely if self._ids is None else self._ids[likely]
            candidates, grown = _expand(self.run, likelihoods, likely, self._found.tokens.shape[1], self._level, last)
            self._found = self._found.join(*candidates)
        if grown is None:
            return None
        self.run, chosen = grown
        return chosen

    def best(self, size: int) -> Draft:
        """The draft of the `size` best candidates, among them the root; those of -inf are absent."""
        seen = self._found.tokens, self._found.values, self._found.parents
        return best_tree(*seen, size, self.depth, self.width, impl=self._impl)


def _expand(run: Run, likelihoods: Tensor, likely: Tensor, first: int, level: int, last: bool
            ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Run, Chosen] | None]:  # fmt: skip
    """Tokens, values and parents of the new candidates, whose first has the number `first`, and the nodes run next."""
    width, device = likely.shape[2], likely.device
    values = (run.value[..., None] + likelihoods).flatten(1)
    candidates = likely.flatten(1), values, run.candidate.repeat_interleave(width, 1)
    if last:
        return candidates, None
    value, chosen = top(values, width)
    chosen, order = chosen.sort(1)  # in the order of the candidates, so that parents stay before children
    above = chosen // width
    parent, ran = run.place.gather(1, above), run.depths.shape[1]
    place = torch.arange(ran, ran + width, device=device).expand(len(chosen), -1)
    itself = as_words(torch.arange(ran + width, device=device) == place[..., None])
    words = torch.nn.functional.pad(run.words, (0, itself.shape[2] - run.words.shape[2]))
    seen = words.gather(1, parent[..., None].expand(-1, -1, words.shape[2])) | itself
    depths = torch.cat([run.depths, torch.full_like(place, level)], 1)
    grown = Run(value.gather(1, order), first + chosen, place, depths, torch.cat([words, seen], 1))
    return candidates, (grown, Chosen(candidates[0].gather(1, chosen), above))
