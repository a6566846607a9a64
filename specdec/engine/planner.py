"""The policies of an engine's groups, and what they have in common."""

from collections.abc import Hashable

from specdec.drafters import Drafter
from specdec.drafters.base import runners_of
from specdec.drafters.shapes import fixed_policy, require_shape
from specdec.drafters.suffix_memory import clear_memories
from specdec.model.fingerprint import brings_weights_of
from specdec.model.runner import ModelRunner
from specdec.planning.candidates import LONG_LENGTHS, most_nodes, shapes_under_load
from specdec.planning.fit import Fit
from specdec.planning.load import LoadPolicy
from specdec.planning.policy import Policy, Shape
from specdec.requests.request import Request
from specdec.trees.tree import TokenTree


class Planner:
    """Makes the policy of each group; what policies learn of one kind of sampling outlives the group.

    Where the target's weights are brought for each pass, which then costs the same for one token or hundreds, few rows
    may draft long chains and large trees.

    tree: see `Engine`. Raises ValueError for one that the drafter cannot draft.
    """

    def __init__(self, target: ModelRunner, drafter: Drafter | None, tree: TokenTree | str | None):
        if drafter is not None and tree is not None:
            require_shape(drafter, tree, target)
        self._drafter, self._tree, self._fits = drafter, tree, dict[Hashable, Fit]()
        self._most_nodes = most_nodes(target.vocab_size)
        self._shapes: list[Shape] = []
        if drafter is not None and tree == "auto":
            traits, long = drafter.traits, 0 if not brings_weights_of(target.model) else LONG_LENGTHS[-1]
            levels = min(long, traits.max_depth or long)
            own_depth = traits.own_depth or traits.max_tokens
            own = traits.shapes, traits.tree, own_depth
            self._shapes = shapes_under_load(*own, levels, traits.max_tokens)

    @property
    def usual_room(self) -> int:
        """Tokens that a round adds to a row in the target's cache, but for long drafts of few rows."""
        if self._drafter is None:
            return 1
        own = self._tree.size - 1 if isinstance(self._tree, TokenTree) else self._drafter.traits.max_tokens
        return 1 + max(own, self._drafter.traits.target_tokens)

    @property
    def room(self) -> int:
        """Tokens that a round may add to a row in the target's cache."""
        return max([self.usual_room, *(1 + shape.tokens for shape in self._shapes)])

    @property
    def draft_room(self) -> int:
        """Tokens that a round may add to a row in the cache of a draft model."""
        return self.room if self._drafter is None else max(self.room, self._drafter.traits.own_tokens)

    def forget_texts(self) -> None:
        """Drop what requests so far have taught of acceptance, and answers in memories; the times of rounds stay."""
        clear_memories(self._drafter)
        for fit in self._fits.values():
            fit.forget_texts()

    def policy(self, request: Request) -> Policy:
        """A policy for requests that are sampled like `request`."""
        if self._drafter is None or self._tree != "auto":
            return fixed_policy(self._drafter, self._tree)
        traits, kind = self._drafter.traits, (request.do_sample, request.processors.kinds())
        if kind not in self._fits:
            self._fits[kind] = Fit(has_model=any(True for _ in runners_of(self._drafter)))
        largest = max([traits.max_tokens, *(shape.tokens for shape in self._shapes)])
        return LoadPolicy(self._fits[kind], self._shapes, largest, most_nodes=self._most_nodes)
