"""Features: the hidden states of a target model that a learned drafter reads."""

from dataclasses import dataclass
from typing import Literal

TOKENS = ("last", "accepted", "prompt")


@dataclass(frozen=True, slots=True)
class Features:
    """Which hidden states a drafter reads; those of several layers are concatenated in the last dimension.

    layers: "output", the input of the output layer, after the final norm (Medusa); or indices as in transformers'
        `output_hidden_states`: 0 for the embeddings, i for the output of block i. The largest one, the number of
        blocks, is after the final norm too; "last_block" is before it. The order counts, duplicates are allowed.
    tokens: "last", the last accepted token of each round; "accepted", all accepted tokens; "prompt", these and all
        tokens of the prompt. A `ModelRunner` returns the features of all tokens whose logits it returns, with "prompt"
        those of all tokens of a forward; the round selects what was accepted.

    Raises ValueError for other layers or tokens.

    >>> Features((2, 16, 29), "prompt").layers
    (2, 16, 29)
    """

    layers: tuple[int, ...] | Literal["output", "last_block"] = "output"
    tokens: Literal["last", "accepted", "prompt"] = "last"

    def __post_init__(self):
        named = self.layers in ("output", "last_block")
        if not named and not (isinstance(self.layers, tuple) and self.layers):
            raise ValueError(f'layers must be "output", "last_block" or a tuple of indices, got {self.layers!r}')
        for layer in () if named else self.layers:
            if type(layer) is not int or layer < 0:
                raise ValueError(f"a layer is an index from 0 (the embeddings) on, got {layer!r} in {self.layers}")
        if self.tokens not in TOKENS:
            raise ValueError(f"tokens must be one of {', '.join(TOKENS)}, got {self.tokens!r}")
