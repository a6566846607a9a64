"""MTP as a drafter: a target's own module for further tokens, step by step over pages of its own.

The module reads the target's last hidden state of token i and the embedding of token i + 1, and predicts token i + 2.
After a round it runs again over the accepted tokens, with the target's states; every further level reads what the level
above gave, after the module's norm. Source: DeepSeek-AI 2024 (DeepSeek-V3), sections 2.2 and 5.4.3."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from attention import AttentionBatch, ModelAdapter
from specdec.drafters.base import DraftSession
from specdec.drafters.feature_drafting import FeatureDrafting
from specdec.drafters.mtp.layouts import MtpLayout, find_modules
from specdec.drafters.mtp.network import MtpInput, build_module, final_norm
from specdec.loading import fetch_weights, read_weights, weight_places
from specdec.model.feature_runner import FeatureTraits
from specdec.model.features import Features
from specdec.model.runner import ModelRunner
from specdec.requests.rows import Rows
from specdec.trees.tree import TokenTree

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class MtpModule:
    """An MTP module of the target `model`: `network`, one of `count` in its checkpoint, which has the `layout`."""

    model: "PreTrainedModel"
    network: "PreTrainedModel"
    layout: MtpLayout
    number: int = 0
    count: int = 1


def load_mtp(model: "PreTrainedModel", name: str | Path | None = None, number: int = 0) -> MtpModule:
    """MTP module `number` of the target `model` from the checkpoint that it was loaded from, or from `name`.

    Raises ValueError or FileNotFoundError, naming what, for a checkpoint without it or with another target's."""
    place = name or model.config.name_or_path
    if not place:
        raise ValueError(
            f"the {type(model).__name__} was not loaded from a checkpoint: name the one with its MTP modules"
        )
    places = weight_places(fetch_weights(place))
    layout, modules = find_modules(places, model.config.get_text_config().num_hidden_layers)
    if not 0 <= number < len(modules):
        raise ValueError(f"{place} has {len(modules)} MTP modules, number {number} is not one of them")
    held = read_weights(places, modules[number].values())
    weights = {mine: held[theirs] for mine, theirs in modules[number].items()}
    return MtpModule(model, build_module(model, layout, weights), layout, number, len(modules))


def make_mtp(target: ModelRunner, path: str | None, number: int = 0, **options) -> "MtpDrafter":
    """A drafter with an MTP module of the target, from `path` or the checkpoint that the target was loaded from."""
    return MtpDrafter(load_mtp(target.model, path, number), **options)


class MtpDrafter:
    """Drafts with an MTP module (`load_mtp`) a chain of `num_tokens`, or `tree`, or trees of each row's own.

    One module is repeated at every depth. `dynamic`, `sample`, `kv_dtype`, `window` and `sinks` are those of
    `Eagle3Drafter`.

    normed: whether the states that it reads are those after the final norm, the target's and then its own, as in vLLM
        and transformers; else those before it, as in exllamav3 and mlx-lm. What a checkpoint was trained with only
        acceptance tells.
    zero_first: whether the embedding at position 0 counts as zero, as in vLLM; transformers keeps it.

    Raises ValueError for numbers out of range and, in `validate`, for another target than the module's."""

    def __init__(self, module: MtpModule, num_tokens: int = 3, tree: TokenTree | None = None,
                 dynamic: tuple[int, int, int] | None = None, sample: bool = True, kv_dtype: str | None = None,
                 normed: bool = True, zero_first: bool = False, window: int | None = None, sinks: int = 0):  # fmt: skip
        self.module, steps = module, MtpSteps(module.network, normed, zero_first)
        if sinks and steps.adapter.has_windows:
            raise ValueError(f"the MTP module has sliding windows, beside which there are no {sinks} sinks")
        self._drafting = FeatureDrafting(steps, num_tokens, tree, dynamic, sample, kv_dtype, window, sinks)
        self.runner, self.traits = self._drafting.runner, self._drafting.traits

    def validate(self, target: ModelRunner) -> None:
        """Raise ValueError unless `target` runs the model that the module belongs to."""
        if target.model is not self.module.model:
            raise ValueError(
                f"the MTP module is that of a {type(self.module.model).__name__} that is not the generator's target"
            )
        self._drafting.require_fit(target, self.runner.source.traits.vocab_size)

    def start(self, rows: Rows, max_tokens: int) -> DraftSession:
        """Begin to draft; the module's own cache gets room for every row."""
        return self._drafting.session(rows, max_tokens)

    def describe(self) -> str:
        """What the checkpoint's layout decided, and what was chosen."""
        module, layout = self.module, self.module.layout
        order = "[hidden; token]" if layout.hidden_first else "[token; hidden]"
        steps: MtpSteps = self.runner.source  # type: ignore[assignment]
        first, norm = "counts as zero" if steps.zero_first else "is kept", "after" if steps.normed else "before"
        return (
            f"MTP module {module.number} of {module.count} in the {layout.name} layout: its projection reads {order}, "
            f"hidden states are those {norm} the final norm, the target's and then its own; the embedding at position "
            f"0 {first}"
        )


@dataclass(frozen=True, slots=True)
class MtpSteps:
    """A `FeatureModel`: `network`, whose embedding is an `MtpInput`, step by step over pages."""

    network: "PreTrainedModel"
    normed: bool = True
    zero_first: bool = False
    adapter: ModelAdapter = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "adapter", ModelAdapter(self.network))

    @property
    def module(self) -> nn.Module:
        """See `FeatureModel`."""
        return self.network

    @property
    def traits(self) -> FeatureTraits:
        """See `FeatureModel`."""
        adapter = self.adapter
        return FeatureTraits(self._reads, adapter.layout, adapter.vocab_size, adapter.dtype, adapter.max_positions)

    @property
    def _reads(self) -> Features:
        return Features("output" if self.normed else "last_block", "prompt")

    def step(self, tokens: Tensor, states: Tensor, fed: bool, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
        """See `FeatureModel`; the output is that of the module's norm."""
        first, none = self.network.get_input_embeddings(), tokens.new_empty(0)
        assert isinstance(first, MtpInput)
        with first.reading(states[None], (batch.positions == 0)[None] if self.zero_first else None):
            given = tokens, batch.positions, batch, none, self._reads.layers
            _, hidden = self.adapter.forward_with_features(*given, all_tokens=True)
        return (hidden if self.normed else final_norm(self.network)(hidden)), hidden

    def logits(self, output: Tensor) -> Tensor:
        """See `FeatureModel`."""
        return self.network.get_output_embeddings()(output)

    @property
    def ids(self) -> Tensor | None:
        """See `FeatureModel`: all tokens."""
        return None

    def own_logits(self, output: Tensor) -> Tensor:
        """See `FeatureModel`."""
        return self.logits(output)

    def fused(self, fuse: Callable[[nn.Module], nn.Module]) -> "MtpSteps":
        """See `FeatureModel`: the model as it is."""
        return self
