"""Drafting in the target's own cache, for drafters that are made of the target's layers.

The target writes all keys and values that stay. A drafter reads them, and puts those of its own tokens into slots
after the accepted text, which the verification overwrites with the target's."""

from collections.abc import Sequence

from torch import Tensor

from specdec.drafters.base import DrafterTraits
from specdec.drafters.model import ModelDraftSession
from specdec.drafters.model_state import run_anew, run_nodes, see, unseen
from specdec.model.runner import ModelRunner
from specdec.requests.batch import Batch
from specdec.requests.rows import Row, Rows
from specdec.trees.tensors import Tree
from specdec.trees.tree import TokenTree, require_width


def borrowing_runner(model) -> ModelRunner:
    """A runner of `model` without a cache of its own."""
    runner = ModelRunner(model, mode="eager")
    runner.borrows_cache = True
    return runner


def shared_cache_traits(tree: TokenTree) -> DrafterTraits:
    """The traits of a drafter of any shape, by default `tree`, that runs its tokens in the target's cache."""
    tokens = tree.size - 1
    return DrafterTraits(tokens, "tree", target_tokens=tokens, captured=True, own_depth=tree.max_depth, tree=tree)


def require_own_target(model, target: ModelRunner, tree: TokenTree, runner: ModelRunner) -> None:
    """Raise ValueError unless `target` runs `model`, of whose layers the drafter is made, and `tree` fits it.

    runner: the drafter's, whose layers keep what the target's first ones do."""
    if target.model is not model:
        raise ValueError(f"the drafter uses layers of a {type(model).__name__} that is not the generator's target")
    own, kept = runner.adapter.layout, target.adapter.layout
    if not own.begins(kept):
        kinds, others = (list(dict.fromkeys(layout.layers)) for layout in (own, kept))
        raise ValueError(
            f"the drafter's layers keep {kinds} of a token, and the target's {others}, in whose cache it drafts: make "
            "the drafter anew"
        )
    require_width(tree, target.vocab_size)


def start_in_shared_cache(runner: ModelRunner, rows: Rows, tree: TokenTree, sample: bool) -> ModelDraftSession:
    """Begin to draft `tree` with the model of `runner`, in the cache of the target of `rows`."""
    runner.share_cache(rows.target)
    runner.match_mode(rows.target)
    return ModelDraftSession(SharedCacheState(runner), tree, sample and rows.do_sample)


class SharedCacheState:
    """A `DraftState` over the target's sequences, which `end_proposal` restores."""

    reader = None
    draft_room = 0  # the target's cache has room for drafted tokens: `DrafterTraits.target_tokens`

    def __init__(self, runner: ModelRunner):
        self.runner = runner

    def admit(self, rows: Rows, joining: Sequence[Row]) -> None:
        """Do nothing: the sequences are the target's."""

    def catch_up(self, batch: Batch) -> Tensor:
        """Run the last accepted token; before it, what the target has not seen runs through the target itself.

        So all that a drafter reads is the target's own, and no drafter runs a prompt."""
        if batch.captured:
            return run_anew(self, batch, 1)
        sequences = _of(batch.members)
        see(batch.rows.target, batch, sequences)
        return self.runner.extend(sequences, unseen(self.runner, batch, sequences))

    def see(self, rows: Rows, members: Sequence[Row]) -> None:
        """Do nothing: the target has seen all but the last token."""

    def run(self, batch: Batch, tokens: Tensor, tree: Tree = None, above: Tensor | None = None) -> Tensor:
        """See `DraftState.run`."""
        return run_nodes(self, batch, _of(batch.members), tokens, tree)

    def end_proposal(self, batch: Batch) -> None:
        """Drop the drafted tokens and the root, whose keys and values the verification writes."""
        for row in batch.members:
            self.runner.cache.truncate(row.sequence, row.length - 1)

    def truncate(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """Do nothing: the round truncates the target's sequences."""

    def pages_wanted(self, row: Row) -> int:
        """None: the target's cache has room for drafted tokens, `DrafterTraits.target_tokens`."""
        return 0

    def prefix_sequence(self, row: Row) -> int | None:
        """None: the target's own is shared already."""
        return None

    def with_pages(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[int]:
        """The target's sequences, which have all their pages already."""
        return _of(rows)

    def release(self, rows: Sequence[Row]) -> None:
        """Do nothing: the loop frees the target's sequences."""


def _of(rows: Sequence[Row]) -> list[int]:
    return [row.sequence for row in rows]
