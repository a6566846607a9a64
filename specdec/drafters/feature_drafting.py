"""What drafters share whose model reads the target's features (EAGLE-3, MTP, DFlash): shapes, traits and sessions."""

from collections.abc import Callable

from attention.kv.window import KeyWindow
from specdec.drafters.base import DrafterTraits, DraftSession, DraftState
from specdec.drafters.dynamic import DynamicTreeSession, require_expansion
from specdec.drafters.feature_state import FeatureState
from specdec.drafters.model import ModelDraftSession
from specdec.drafters.model_state import require_equal
from specdec.model.feature_runner import FeatureModel, FeatureRunner
from specdec.model.runner import ModelRunner
from specdec.requests.rows import Rows
from specdec.trees.tree import TokenTree, require_length, require_width, tree_to_draft

MakeState = Callable[[FeatureRunner, Rows, int, int], DraftState]


class FeatureDrafting:
    """Drafts by `source`: a chain of `num_tokens`, or `tree`, or trees that grow on the device.

    dynamic: (nodes, depth, width) of trees that grow, see `DynamicTreeDrafter`.
    sample: whether to draw tokens, with sampling, from the draft's own distribution, not the most likely ones.
    kv_dtype: that of its own cache, whose pages are as large as the target's.
    window, sinks: it attends to the last `window` tokens and the first `sinks` ones only (None: to all).
    make_state: `make_state(runner, rows, max_tokens, depth)`, the state of drafts of so many nodes and levels (None: a
        `FeatureState`, whose steps read the ones above them).

    Raises ValueError for shapes that there are not, or several of them."""

    def __init__(self, source: FeatureModel, num_tokens: int = 5, tree: TokenTree | None = None,
                 dynamic: tuple[int, int, int] | None = None, sample: bool = True,
                 kv_dtype: str | None = None, window: int | None = None, sinks: int = 0,
                 make_state: MakeState | None = None):  # fmt: skip
        require_length(num_tokens)
        if tree is not None and dynamic is not None:
            raise ValueError(f"a drafter has either a tree or dynamic trees, got {tree.parents} and {dynamic}")
        self.runner = FeatureRunner(source, kv_dtype=kv_dtype, sees=KeyWindow.of(window, sinks))
        self._dynamic, self._sample, self._make_state = dynamic, sample, make_state
        about, self._longest = source.traits, source.traits.max_length
        again = about.tokens_ahead - 1
        if dynamic is not None:
            require_expansion(*dynamic)
            self.traits = DrafterTraits(dynamic[0], captured=True, own_depth=dynamic[1], features=about.features,
                                        max_length=self._longest, own_tokens=dynamic[1] * dynamic[2],
                                        runs_again=again)  # fmt: skip
            return
        self.tree = own = tree_to_draft(num_tokens, tree)
        self.traits = DrafterTraits(own.size - 1, "tree", max_depth=own.max_depth, own_depth=own.max_depth, tree=own,
                                    captured=True, features=about.features, max_length=self._longest,
                                    runs_again=again)  # fmt: skip

    def require_fit(self, target: ModelRunner, draft_vocab_size: int) -> None:
        """Raise ValueError unless this can draft for `target` with so many different tokens; take its page size."""
        about = self.runner.source.traits
        require_equal("device", self.runner.device, target.device)
        require_equal("vocabulary size", about.vocab_size, target.vocab_size)
        if target.ranks.several:
            raise ValueError(f"no drafter reads features of a target that is split over {target.ranks.count} ranks yet")
        target.adapter.hidden_layers(about.features.layers)  # raises for a layer that the target does not have
        widest = TokenTree.from_widths((self._dynamic[2],)) if self._dynamic is not None else self.tree
        require_width(widest, draft_vocab_size)
        self.runner.match_pages(target)

    def session(self, rows: Rows, max_tokens: int) -> DraftSession:
        """Begin to draft."""
        if self._dynamic is not None:
            ids = None if rows.processors.name_tokens or self._make_state is not None else self.runner.source.ids
            state = self._state(rows, self.traits.own_tokens, own=ids is not None)
            return DynamicTreeSession(state, *self._dynamic, self._longest, ids)
        state, sample = self._state(rows, max_tokens), self._sample and rows.do_sample
        return ModelDraftSession(state, self.tree, sample, max_length=self._longest)

    def _state(self, rows: Rows, max_tokens: int, own: bool = False) -> DraftState:
        if self._make_state is None:
            return FeatureState(self.runner, rows, max_tokens, own)
        return self._make_state(self.runner, rows, max_tokens, self.traits.deepest)
