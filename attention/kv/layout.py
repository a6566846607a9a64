"""What each layer of a model keeps of a token in the cache: a key and a value, of sizes that may differ from layer to
layer, a latent of which they are made, or nothing where it attends to what an earlier layer keeps. Each kind of layer
is a dataclass. A recurrent layer keeps a state of the whole text."""

from dataclasses import dataclass, fields
from math import prod


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
        _require_sizes(self)

    @property
    def numbers(self) -> int:
        """Numbers that it keeps of a token."""
        return self.num_kv_heads * (self.head_dim + self.value_head_dim)


@dataclass(frozen=True, slots=True)
class LatentLayer:
    """A layer that keeps a latent of a token, of which all heads' keys and values are made, and a rotated key of all.

    For attention that is one kv head, whose value is the first `rank` numbers of its key (`attention.hf.latent`).

    >>> layer = LatentLayer(rank=512, rotated=64)
    >>> layer.num_kv_heads, layer.head_dim, layer.value_head_dim, layer.numbers
    (1, 576, 512, 576)
    """

    rank: int
    rotated: int

    def __post_init__(self):
        _require_sizes(self)

    @property
    def num_kv_heads(self) -> int:
        """One."""
        return 1

    @property
    def head_dim(self) -> int:
        """Numbers of its key."""
        return self.rank + self.rotated

    @property
    def value_head_dim(self) -> int:
        """Numbers of the key that are the value."""
        return self.rank

    @property
    def numbers(self) -> int:
        """Numbers that it keeps of a token."""
        return self.rank + self.rotated


def _require_sizes(layer: KeyValueLayer | LatentLayer) -> None:
    for name in (field.name for field in fields(layer)):
        if getattr(layer, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(layer, name)}")


@dataclass(frozen=True, slots=True)
class SharedLayer:
    """A layer that attends to the keys and values of an earlier one and keeps nothing.

    owner: the index of that layer among the layout's."""

    owner: int


Keeping = KeyValueLayer | LatentLayer  # the kinds that keep something
Layer = Keeping | SharedLayer
NOWHERE = (KeyValueLayer(1, 1, 1),)  # the layers of a model that attends nowhere, whose pages count its tokens


@dataclass(frozen=True, slots=True)
class RecurrentLayer:
    """A layer that keeps a state of the tokens so far, updated by one of `attention.recurrent.rules`.

    kind: the name of the rule
    state: shape of the state of one sequence
    inputs: shapes of what a token puts into the recurrence, from which the state can be computed again
    constants: shapes of what else the rule computes with, the same for all tokens

    >>> RecurrentLayer("convolution", state=(8, 3), inputs=((8,),)).state_numbers
    24
    """

    kind: str
    state: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    constants: tuple[tuple[int, ...], ...] = ()

    @property
    def keeps_dtype(self) -> bool:
        """Whether it keeps numbers in the model's dtype; others are sums over the text, in float32."""
        return self.kind == "convolution"

    @property
    def state_numbers(self) -> int:
        """Numbers of one state."""
        return prod(self.state)

    @property
    def token_numbers(self) -> int:
        """Numbers that a token puts into the recurrence."""
        return sum(map(prod, self.inputs))


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """The layers of a model that attend, in the order in which a forward runs them.

    Raises ValueError without a layer, and for a shared one whose owner is not an earlier layer that keeps something.

    recurrent: those with a state of the whole text, in an order of their own; a convolution and the recurrence that
        follows it are two.

    >>> layout = LayerLayout.uniform(num_layers=2, num_kv_heads=8, head_dim=128)
    >>> len(layout.layers), layout.common
    (2, KeyValueLayer(num_kv_heads=8, head_dim=128, value_head_dim=128))
    >>> mixed = LayerLayout((KeyValueLayer(8, 256, 256), KeyValueLayer(2, 512, 512), SharedLayer(owner=0)))
    >>> [number for number, _ in mixed.keeping]
    [0, 1]
    """

    layers: tuple[Layer, ...]
    recurrent: tuple[RecurrentLayer, ...] = ()

    def __post_init__(self):
        if not self.layers and not self.recurrent:
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
    def keeping(self) -> tuple[tuple[int, Keeping], ...]:
        """The layers that keep something, each with its index."""
        return tuple((n, layer) for n, layer in enumerate(self.layers) if not isinstance(layer, SharedLayer))

    def begins(self, other: "LayerLayout") -> bool:
        """Whether these layers keep what the first ones of `other` do."""
        own = () if self.layers == NOWHERE else self.layers
        return own == other.layers[: len(own)] and self.recurrent == other.recurrent[: len(self.recurrent)]

    @property
    def common(self) -> Keeping:
        """What every layer keeps. Raises ValueError where layers differ."""
        kinds = dict.fromkeys(self.layers)
        (_, first), *_ = self.keeping
        if len(kinds) != 1:
            raise ValueError(f"the layers keep different things: {list(kinds)}")
        return first
