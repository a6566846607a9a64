"""Block drafters: one pass of a few layers over a block of mask tokens drafts a chain, or a tree.

The target's states of accepted tokens are the context of the pass. A slot's distribution is its own (DFlash) or, with a
head, one given the token before (DSpark, DFlash2) or all those in the block (Domino), so that trees and drawn chains
follow conditional distributions."""

from dataclasses import replace

from specdec.drafters.base import DrafterTraits, DraftSession
from specdec.drafters.block.config import require_layers
from specdec.drafters.block.growth import Growth
from specdec.drafters.block.module import BlockModel
from specdec.drafters.block.session import BestFirstSession
from specdec.drafters.block.state import BlockState
from specdec.drafters.block.steps import BlockSteps
from specdec.drafters.feature_drafting import FeatureDrafting
from specdec.drafters.model import ModelDraftSession
from specdec.model.runner import ModelRunner
from specdec.requests.rows import Rows
from specdec.trees.tree import TokenTree


class BlockDrafter:
    """Drafts with `model` a chain of `num_tokens` (None: all that a block predicts), or `tree`, or trees that grow.

    dynamic: (nodes, depth, width) of trees that grow where the drafter is sure, see `DynamicTreeDrafter`.
    sample: whether to draw tokens, with sampling, from the drafter's own distribution, not the most likely ones.
        Without a head, tokens of a block are drawn independently: exact, but fewer are accepted.
    confidence: ends a row's chain before the first token that the confidence head expects to be accepted with a smaller
        probability; lossless, since it has not seen that token.
    growth: best-first trees that grow out of one pass, of at most so many nodes.
    kv_dtype: "int8" or "fp8" quantises its own cache.
    window, sinks: a block sees the last `window` tokens and the first `sinks` ones only (None: all).

    Raises ValueError for such numbers out of range and, in `validate`, for a target of another hidden size, vocabulary,
    number of layers or device."""

    def __init__(self, model: BlockModel, num_tokens: int | None = None, tree: TokenTree | None = None,
                 dynamic: tuple[int, int, int] | None = None, sample: bool = True, confidence: float | None = None,
                 kv_dtype: str | None = None, window: int | None = None, sinks: int = 0,
                 growth: Growth | None = None):  # fmt: skip
        config = model.config
        if sinks and any(config.windows or ()):
            raise ValueError(f"the drafter has windows {config.windows}, beside which there are no {sinks} sinks")
        self.model = model.eval()
        make_state = lambda runner, rows, room, depth: BlockState(runner, rows)
        shape = config.num_slots if num_tokens is None else num_tokens, tree, dynamic
        self._drafting = FeatureDrafting(BlockSteps(model), *shape, sample, kv_dtype, window, sinks, make_state)
        self.runner, self.traits = self._drafting.runner, self._drafting.traits
        if self.traits.deepest > config.num_slots:
            raise ValueError(
                f"a block of {config.block_size} predicts {config.num_slots} tokens, got a draft of depth "
                f"{self.traits.deepest}"
            )
        self._sample, self._confidence, self._growth = sample, confidence, growth
        if growth is not None:
            self.traits = _grown_traits(model, growth, self.traits, (num_tokens, tree, dynamic, confidence))
            return
        if confidence is None:
            return
        is_chain = dynamic is None and self._drafting.tree.is_chain
        if not (0 < confidence < 1 and is_chain and model.confidence_head is not None):
            raise ValueError(
                f"confidence must lie in (0, 1) and goes with a chain and a confidence head, got {confidence}, "
                f"a {'chain' if is_chain else 'tree'} and the head {config.confidence!r}"
            )
        self.traits = replace(self.traits, shapes="chain")

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless the drafter is for a model of this shape."""
        config, theirs = self.model.config, target.model.config.get_text_config()
        if config.hidden_size != theirs.hidden_size:
            raise ValueError(
                f"the drafter reads states of width {config.hidden_size} (hidden_size), the target's have "
                f"{theirs.hidden_size}"
            )
        require_layers(config.target_layers, theirs.num_hidden_layers)
        self._drafting.require_fit(target, config.candidates or config.draft_vocab_size)

    def describe(self) -> str:
        """Where it is from, what its file said and what its format decided; empty for one that no file has made."""
        return self.model.about

    def start(self, rows: Rows, max_tokens: int) -> DraftSession:
        """Begin to draft; the drafter's own cache gets room for every row."""
        if self._growth is None and self._confidence is None:
            return self._drafting.session(rows, max_tokens)
        state, sample = BlockState(self.runner, rows), self._sample and rows.do_sample
        if self._growth is not None:
            return BestFirstSession(state, self._growth, sample, self.traits.max_length)
        assert self._confidence is not None
        return ModelDraftSession(
            state, self._drafting.tree, sample, max_length=self.traits.max_length,
            goes_on=state.confident(self._confidence),
        )  # fmt: skip


def _grown_traits(model: BlockModel, growth: Growth, own: DrafterTraits, others: tuple) -> DrafterTraits:
    """Those of a drafter whose trees grow. Raises ValueError for other shapes beside, or too few slots."""
    config = model.config
    if any(other is not None for other in others):
        raise ValueError(f"growth goes without num_tokens, tree, dynamic and confidence, got {others}")
    if growth.depth > config.num_slots:
        raise ValueError(
            f"a block of {config.block_size} predicts {config.num_slots} tokens, got trees of depth {growth.depth}"
        )
    return replace(own, max_tokens=growth.num_tokens, shapes="grown", max_depth=None, own_depth=growth.depth, tree=None)
