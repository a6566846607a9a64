"""The shapes of drafts that a user may ask for."""

from specdec.drafters.base import Drafter
from specdec.model.runner import ModelRunner
from specdec.planning.policy import DRAFTERS_OWN, PLAIN, FixedPolicy, shape_of
from specdec.trees.tree import TokenTree, require_width


def fixed_policy(drafter: Drafter | None, tree: TokenTree | str | None) -> FixedPolicy:
    """Always `tree` (None: the drafter's own shape), or plain rounds without a drafter."""
    if drafter is None:
        return FixedPolicy(PLAIN, 0)
    if isinstance(tree, TokenTree):
        return FixedPolicy(shape_of(tree), tree.size - 1)
    return FixedPolicy(DRAFTERS_OWN, drafter.traits.max_tokens)


def require_shape(drafter: Drafter | None, tree: TokenTree | str, target: ModelRunner) -> None:
    """Raise ValueError for a `tree` that is none, or not one that `drafter` can draft for `target`."""
    if drafter is None or not (isinstance(tree, TokenTree) or tree == "auto"):
        raise ValueError(f'tree is a TokenTree, "auto" or None and needs a drafter, got {tree!r} and {drafter!r}')
    if isinstance(tree, str):
        return
    if tree.size > target.MAX_TREE:
        raise ValueError(f"a tree may have {target.MAX_TREE} nodes, got {tree.size}")
    deepest, shapes = drafter.traits.max_depth, drafter.traits.shapes
    if deepest is not None and tree.max_depth > deepest:
        raise ValueError(
            f"a {type(drafter).__name__} with {deepest} levels cannot draft a tree of depth {tree.max_depth}"
        )
    require_width(tree, target.vocab_size)
    if shapes in ("own", "grown") or (shapes == "chain" and not tree.is_chain):
        raise ValueError(
            f"a {type(drafter).__name__} cannot draft the tree with parents {tree.parents}: it drafts {shapes} shapes"
        )
