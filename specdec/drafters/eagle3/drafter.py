"""EAGLE-3 as a drafter: one layer reads states of the target, and drafts a chain or a tree by steps of its own.

After a round the drafter's layer runs again over the accepted tokens, with the target's states, and the step of the
last one gives the first drafted token; every further level is a step over what the level above has given. Source: Li et
al. 2025 (EAGLE-3); Li et al. 2024 (EAGLE-2) for dynamic trees."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from attention import AttentionBatch
from specdec.drafters.base import DraftSession
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.drafters.feature_drafting import FeatureDrafting
from specdec.drafters.network.traits import traits_of
from specdec.drafters.parallel_state import ParallelState
from specdec.model.feature_runner import FeatureTraits, attend_over
from specdec.model.fusion.deferred_linear import materialise
from specdec.model.runner import ModelRunner
from specdec.requests.rows import Rows
from specdec.trees.tree import TokenTree


class Eagle3Drafter:
    """Drafts with `model` a chain of `num_tokens`, or `tree`, or trees of each row's own.

    A model with a `mask_token` (P-EAGLE) drafts all levels in one pass: the nodes of a level have one distribution.

    dynamic: (nodes, depth, width) of trees that grow where the drafter is sure, see `DynamicTreeDrafter`; EAGLE-2's own
        are (60, 6, 10).
    sample: whether to draw tokens, with sampling, from the drafter's own distribution, not the most likely ones.
    kv_dtype: "int8" or "fp8" quantises its own cache.
    window, sinks: it attends to the last `window` tokens and the first `sinks` ones only (None: to all).

    Raises ValueError for such numbers out of range and, in `validate`, for a target of another hidden size, vocabulary
    or device."""

    def __init__(self, model: Eagle3Model, num_tokens: int = 5, tree: TokenTree | None = None,
                 dynamic: tuple[int, int, int] | None = None, sample: bool = True,
                 kv_dtype: str | None = None, window: int | None = None, sinks: int = 0):  # fmt: skip
        if sinks and any(model.config.windows or ()):
            raise ValueError(f"the drafter has windows {model.config.windows}, beside which there are no {sinks} sinks")
        self.model = model.eval()
        in_parallel = lambda runner, rows, room, depth: ParallelState(runner, rows, room, model.mask_steps(depth - 1))
        make_state = in_parallel if model.config.parallel else None
        shape = num_tokens, tree, dynamic
        self._drafting = FeatureDrafting(Eagle3Steps(model), *shape, sample, kv_dtype, window, sinks, make_state)
        self.runner, self.traits = self._drafting.runner, self._drafting.traits

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless the drafter is for a model of this shape."""
        config, width = self.model.config, target.model.config.get_text_config().hidden_size
        if config.target_hidden_size != width:
            raise ValueError(
                f"the drafter reads states of width {config.target_hidden_size} (target_hidden_size), the target's "
                f"have {width}"
            )
        self._drafting.require_fit(target, config.draft_vocab_size)

    def describe(self) -> str:
        """Where it is from, what its file said and what its format decided; empty for one that no file has made."""
        return self.model.about

    def start(self, rows: Rows, max_tokens: int) -> DraftSession:
        """Begin to draft; the drafter's own cache gets room for every row."""
        return self._drafting.session(rows, max_tokens)


@dataclass(frozen=True, slots=True)
class Eagle3Steps:
    """A `FeatureModel`: `network` step by step over pages."""

    network: Eagle3Model

    @property
    def module(self) -> nn.Module:
        """See `FeatureModel`."""
        return self.network

    @property
    def traits(self) -> FeatureTraits:
        """See `FeatureModel`."""
        return traits_of(self.network.config, self.network.fc.weight.dtype)

    def step(self, tokens: Tensor, states: Tensor, fed: bool, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
        """See `FeatureModel`."""
        network = self.network
        hidden = network.fuse(states) if fed else states
        attend = attend_over(batch, windows=network.config.windows)
        output, hidden = network(network.embed(tokens), hidden, batch.positions, attend)
        return materialise(output), materialise(hidden)

    def logits(self, output: Tensor) -> Tensor:
        """See `FeatureModel`."""
        return self.network.target_logits(output)

    @property
    def ids(self) -> Tensor | None:
        """See `FeatureModel`."""
        return self.network.draft_tokens

    def own_logits(self, output: Tensor) -> Tensor:
        """See `FeatureModel`."""
        return self.network.logits(output)

    def fused(self, fuse: Callable[[nn.Module], nn.Module]) -> "Eagle3Steps":
        """See `FeatureModel`."""
        return Eagle3Steps(cast(Eagle3Model, fuse(self.network)))
