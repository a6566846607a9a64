"""What each layer of a model keeps of a token in the cache.

Every layer keeps a key and a value today. A latent (multi-head latent attention) and a recurrent state (linear
attention, state-space models) will be further kinds of layer, each a dataclass beside `KeyValueLayer`."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class KeyValueLayer:
    """A layer that keeps a key and a value of a token for each kv head.

    >>> KeyValueLayer(num_kv_heads=8, head_dim=128, value_head_dim=0)
    Traceback (most recent call last):
    ...
    ValueError: value_head_dim must be at least 1, got 0
    """

    num_kv_heads: int
    head_dim: int
    value_head_dim: int

    def __post_init__(self):
        for name in (field.name for field in fields(self)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """The layers of a model that keep something, in the order in which a forward runs them.

    >>> layout = LayerLayout.uniform(num_layers=2, num_kv_heads=8, head_dim=128)
    >>> len(layout.layers), layout.common
    (2, KeyValueLayer(num_kv_heads=8, head_dim=128, value_head_dim=128))
    """

    layers: tuple[KeyValueLayer, ...]

    def __post_init__(self):
        if not self.layers:
            raise ValueError("a layout needs at least one layer, got none")

    @classmethod
    def uniform(
        cls, num_layers: int, num_kv_heads: int, head_dim: int, value_head_dim: int | None = None
    ) -> "LayerLayout":
        """`num_layers` equal layers; values have the keys' head dim unless `value_head_dim` gives their own."""
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        return cls((KeyValueLayer(num_kv_heads, head_dim, value_head_dim or head_dim),) * num_layers)

    @property
    def common(self) -> KeyValueLayer:
        """What every layer keeps. Raises ValueError where layers differ."""
        kinds = dict.fromkeys(self.layers)
        if len(kinds) != 1:
            raise ValueError(f"the layers keep different things: {list(kinds)}")
        return self.layers[0]
