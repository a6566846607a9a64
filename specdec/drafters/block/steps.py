"""A block drafter over pages: the context's keys and values in them for good, those of a block for one pass.

A place of a block sees places after it, which causal attention over pages does not know. So a block's keys and values
are stored first, and its places come after them as further nodes of a tree: the queries. Each sees the first nodes of
the other places, and itself, which tree masks can say.

Positions of all nodes are the anchor's, from which windows are counted: every place of a block sees the same tokens of
the context. The network's rotation turns places by positions of their own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from attention import AttentionBatch
from attention.paged.layer import store_and_attend, store_only
from specdec.cuda_graph import keep_alive
from specdec.drafters.block.module import BlockModel
from specdec.drafters.network.traits import traits_of
from specdec.model.feature_runner import FeatureTraits
from specdec.model.fusion.deferred_linear import materialise
from specdec.trees.tensors import as_words


@dataclass(frozen=True, slots=True)
class BlockSteps:
    """A `FeatureModel` whose steps keep the context; `block` is the pass that drafts."""

    network: BlockModel

    @property
    def module(self) -> nn.Module:
        """See `FeatureModel`."""
        return self.network

    @property
    def traits(self) -> FeatureTraits:
        """See `FeatureModel`."""
        return traits_of(self.network.config, self.network.fc.weight.dtype)

    def step(self, tokens: Tensor, states: Tensor, fed: bool, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
        """Keep the context of tokens whose features are `states [T, F]`; `tokens` are not read.

        Returns their fused vectors `[T, h]`, twice. Raises ValueError for states that are no features."""
        if not fed:
            raise ValueError("a block drafter has no steps over states of its own, got fed False")
        fused = materialise(self.network.fuse(states))
        self.network.keep_context(fused, batch.positions, lambda layer, k, v: store_only(batch, layer, k, v))
        return fused, fused

    def block(self, tokens: Tensor, held: AttentionBatch, queries: AttentionBatch) -> Tensor:
        """The states of the places of blocks `tokens [A, B]` -> `[A, B, h]`.

        held: the B nodes that keep the blocks' keys and values; queries: the next B nodes."""
        network, (rows, size) = self.network, tokens.shape
        config, words = network.config, keep_alive(block_words(size, tokens.device))
        kinds = {config.is_causal(layer) for layer in range(config.num_layers)}
        sees = {causal: replace(queries, tree_bits=words[causal].repeat(rows, 1)) for causal in kinds}
        places = torch.arange(size, device=tokens.device).repeat(rows)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            window, batch = config.window(layer), sees[config.is_causal(layer)]
            store_only(held, layer, k, v)
            return store_and_attend(batch, layer, q, k, v, config.head_dim**-0.5, window and window + 1)

        embedded = network.embed(tokens.flatten())
        output = materialise(network(embedded, queries.positions + places, attend))
        return output.unflatten(0, (rows, size))

    def logits(self, output: Tensor) -> Tensor:
        """See `FeatureModel`: the places' own."""
        return self.network.over_target(self.network.logits(output))

    @property
    def ids(self) -> Tensor | None:
        """See `FeatureModel`."""
        return self.network.draft_tokens

    def own_logits(self, output: Tensor) -> Tensor:
        """See `FeatureModel`: the places' own."""
        return self.network.logits(output)

    def fused(self, fuse: Callable[[nn.Module], nn.Module]) -> "BlockSteps":
        """See `FeatureModel`."""
        return BlockSteps(cast(BlockModel, fuse(self.network)))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def block_words(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of 2 * `size` nodes each query sees, as words `[size, W]`: those of all places, or up to its own."""
    own = torch.eye(size, dtype=torch.bool)
    others = ~own
    full, causal = (as_words(torch.cat([seen, own], 1)).to(device) for seen in (others, others.tril()))
    return full, causal
