"""MTP modules as feature models: one module step by step, or one module a depth.

With D modules, step p of module d reads the embedding of token p + d + 1 and what step p of module d - 1 gave, for the
first module the target's state of token p; it predicts token p + d + 2 (DeepSeek-AI 2024, DeepSeek-V3, equations 21 to
23). All modules have keys and values of step p at the same place of a sequence, each in a layer of its own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attention import AttentionBatch, ModelAdapter
from attention.kv.layout import LayerLayout
from specdec.drafters.mtp.network import MtpInput, final_norm
from specdec.model.feature_runner import FeatureTraits
from specdec.model.features import Features

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel


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


@dataclass(frozen=True, slots=True)
class MtpModules:
    """A `FeatureModel` of several modules, one a depth: those of `depths`, which have one layer each and are alike.

    Its hidden states are those of all modules, `[T, D, h]`. Raises ValueError for others."""

    depths: tuple[MtpSteps, ...]
    module: nn.ModuleList = field(init=False)

    def __post_init__(self):
        layers = [step.adapter.layout.layers for step in self.depths]
        if not layers or any(len(one) != 1 or one != layers[0] for one in layers):
            raise ValueError(f"MTP modules, one a depth, must have one layer each, all alike, got {layers}")
        object.__setattr__(self, "module", nn.ModuleList([step.network for step in self.depths]))

    @property
    def traits(self) -> FeatureTraits:
        """See `FeatureModel`."""
        one, count = self.depths[0].traits, len(self.depths)
        layout = LayerLayout(one.layout.layers * count)
        return FeatureTraits(one.features, layout, one.vocab_size, one.dtype, one.max_length, tokens_ahead=count)

    def step(self, tokens: Tensor, states: Tensor, fed: bool, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
        """See `FeatureModel`, with `tokens [T, D]`: all modules over the text; the output is that of the first one."""
        found = []
        for depth in range(len(self.depths)):
            output, states = self.deeper(depth, tokens[:, depth], states, batch)
            found.append((output, states))
        return found[0][0], torch.stack([hidden for _, hidden in found], 1)

    def deeper(self, depth: int, tokens: Tensor, states: Tensor, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
        """Module `depth` over `tokens [T]` and what the module before gave, `states [T, h]` -> output and hidden."""
        return self.depths[depth].step(tokens, states, depth == 0, batch.of_layer(depth))

    def logits(self, output: Tensor, depth: int = 0) -> Tensor:
        """See `FeatureModel`; `output [M, h]` is that of module `depth`."""
        return self.depths[depth].logits(output)

    @property
    def ids(self) -> Tensor | None:
        """See `FeatureModel`: all tokens."""
        return None

    def own_logits(self, output: Tensor) -> Tensor:
        """See `FeatureModel`."""
        return self.logits(output)

    def fused(self, fuse: Callable[[nn.Module], nn.Module]) -> "MtpModules":
        """See `FeatureModel`: the modules as they are."""
        return self
