"""What each layer of a model keeps of a token in the cache: a key and a value, of sizes that may differ from layer to
layer, or nothing where it attends to what an earlier layer keeps. Each kind of layer is a dataclass."""

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
class SharedLayer:
    """A layer that attends to the keys and values of an earlier one and keeps nothing.

    owner: the index of that layer among the layout's."""

    owner: int


Layer = KeyValueLayer | SharedLayer


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """The layers of a model that attend, in the order in which a forward runs them.

    Raises ValueError without a layer, and for a shared one whose owner is not an earlier layer that keeps something.

    >>> layout = LayerLayout.uniform(num_layers=2, num_kv_heads=8, head_dim=128)
    >>> len(layout.layers), layout.common
    (2, KeyValueLayer(num_kv_heads=8, head_dim=128, value_head_dim=128))
    >>> mixed = LayerLayout((KeyValueLayer(8, 256, 256), KeyValueLayer(2, 512, 512), SharedLayer(owner=0)))
    >>> [number for number, _ in mixed.keeping]
    [0, 1]
    """

    layers: tuple[Layer, ...]

    def __post_init__(self):
        if not self.layers:
            raise ValueError("a layout needs at least one layer, got none")
        for number, layer in enumerate(self.layers):
            if isinstance(layer, SharedLayer):
                if not 0 <= layer.owner < number or isinstance(self.layers[layer.owner], SharedLayer):
                    raise ValueError(f"layer {number} must share what an earlier layer keeps, got owner {layer.owner}")

    @classmethod
    def uniform(
        cls, num_layers: int, num_kv_heads: int, head_dim: int, value_head_dim: int | None = None
    ) -> "LayerLayout":
        """`num_layers` equal layers; values have the keys' head dim unless `value_head_dim` gives their own."""
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        return cls((KeyValueLayer(num_kv_heads, head_dim, value_head_dim or head_dim),) * num_layers)

    @property
    def keeping(self) -> tuple[tuple[int, KeyValueLayer], ...]:
        """The layers that keep something, each with its index."""
        return tuple((n, layer) for n, layer in enumerate(self.layers) if not isinstance(layer, SharedLayer))

    @property
    def common(self) -> KeyValueLayer:
        """What every layer keeps. Raises ValueError where layers differ."""
        kinds = dict.fromkeys(self.layers)
        (_, first), *_ = self.keeping
        if len(kinds) != 1:
            raise ValueError(f"the layers keep different things: {list(kinds)}")
        return first
