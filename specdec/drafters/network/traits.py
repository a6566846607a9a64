"""What the configs of learned drafters say to those who run them."""

from typing import Protocol

import torch

from attention.kv.layout import LayerLayout
from specdec.drafters.network.rotation import Rotation
from specdec.model.feature_runner import FeatureTraits
from specdec.model.features import Features


class ReadingConfig(Protocol):
    """The fields of a drafter's config that `traits_of` reads."""

    @property
    def target_layers(self) -> tuple[int, ...]:
        """The target's layers whose states it reads."""

    @property
    def target_vocab_size(self) -> int:
        """V."""

    @property
    def num_layers(self) -> int:
        """Its own layers, which are alike."""

    @property
    def num_kv_heads(self) -> int:
        """G."""

    @property
    def head_dim(self) -> int:
        """D."""

    @property
    def rotation(self) -> Rotation:
        """Its own rotary positions: texts may be as long as these do not change."""


def traits_of(config: ReadingConfig, dtype: torch.dtype) -> FeatureTraits:
    """The traits of a network with this config and weights of `dtype`."""
    layout = LayerLayout.uniform(config.num_layers, config.num_kv_heads, config.head_dim)
    features, length = Features(config.target_layers, "prompt"), config.rotation.max_length
    return FeatureTraits(features, layout, config.target_vocab_size, dtype, length)
