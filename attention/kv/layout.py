"""What each layer of a model keeps of a token in the cache.

Layers that attend keep a key and a value. A latent (multi-head latent attention) will be a further kind of layer, a
dataclass beside `KeyValueLayer`. A recurrent layer keeps a state of the whole text: `RecurrentLayer`."""

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
        for name in (field.name for field in fields(self)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


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
    """The layers of a model that keep something, in the order in which a forward runs them.

    recurrent: those with a state of the whole text, in an order of their own; a convolution and the recurrence that
        follows it are two.

    >>> layout = LayerLayout.uniform(num_layers=2, num_kv_heads=8, head_dim=128)
    >>> len(layout.layers), layout.common
    (2, KeyValueLayer(num_kv_heads=8, head_dim=128, value_head_dim=128))
    """

    layers: tuple[KeyValueLayer, ...]
    recurrent: tuple[RecurrentLayer, ...] = ()

    def __post_init__(self):
        if not self.layers and not self.recurrent:
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
