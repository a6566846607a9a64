"""What the file of a block drafter decides, each of it a field: no reader of the weights has to know the format."""

from dataclasses import dataclass
from typing import Literal

from specdec.drafters.network.rotation import Rotation

OUTPUTS = ("own", "target")
MARKOV_KINDS = ("none", "vanilla", "gated", "rnn", "selector", "domino")
CONFIDENCES = ("none", "hidden", "markov")


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """Shape and readings of a block drafter. h: width of its layers, the target's too; B: tokens of a block.

    target_vocab_size: of the model that it drafts for.
    target_layers: the states that it reads, as in transformers' `output_hidden_states`; see `Features.layers`.
    block_size: B, the last accepted token (the anchor) and B - 1 mask tokens.
    mask_token: the token at places that are not known yet.
    draft_vocab_size: of its own output; the tokens are `BlockModel.draft_tokens`, unless it is the target's.
    rotation: its own rotary positions.
    own_embeddings: whether it has a table of its own; else it reads the target's.
    output: where its output layer is: its "own" or the "target"'s.
    from_anchor: whether place k of a block predicts the token after it (DSpark), not the one at it (DFlash).
    activation: of the gated MLP, by transformers' name.
    qk_norm: whether queries and keys of each head are normed.
    attention_bias, mlp_bias: whether these products have biases.
    windows: of each layer, the last tokens before the anchor that all places of a block see (None: all).
    causal: of each layer, whether a place sees only those before it in the block (None: no layer).
    markov: the head that adds what tokens before say, of rank `markov_rank`: DSpark's, DFlash2's "selector", "domino".
    memory_size, plain_slots: of a "domino" head the width of its state, and the first slots to which it adds nothing.
    candidates: the most likely tokens of a place, among which alone a "selector" chooses.
    conv_taps, conv_group: tokens that the convolutions around attention and MLP read (DFlash2; 0: there are none), and
        channels that share a kernel.
    confidence: what the head that estimates acceptance reads: the "hidden" state, or that of the "markov" head too.
    embedding_scale, output_scale, softcap: logits are softcap * tanh(output_scale * x / softcap) (None: no softcap).

    Raises ValueError for a bad value."""

    hidden_size: int
    target_vocab_size: int
    draft_vocab_size: int
    target_layers: tuple[int, ...]
    block_size: int
    mask_token: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    rotation: Rotation
    num_layers: int = 1
    own_embeddings: bool = False
    output: Literal["own", "target"] = "target"
    from_anchor: bool = False
    activation: str = "silu"
    rms_norm_eps: float = 1e-6
    qk_norm: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    windows: tuple[int | None, ...] | None = None
    causal: tuple[bool, ...] | None = None
    markov: Literal["none", "vanilla", "gated", "rnn", "selector", "domino"] = "none"
    markov_rank: int = 0
    memory_size: int = 0
    plain_slots: int = 0
    candidates: int = 0
    conv_taps: int = 0
    conv_group: int = 16
    confidence: Literal["none", "hidden", "markov"] = "none"
    embedding_scale: float = 1.0
    output_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self):
        sizes = ("hidden_size", "target_vocab_size", "draft_vocab_size", "num_heads", "num_kv_heads",
                 "intermediate_size", "num_layers")  # fmt: skip
        for name in sizes:
            if type(size := getattr(self, name)) is not int or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        self._check_block()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.draft_vocab_size > self.target_vocab_size:
            raise ValueError(
                f"draft_vocab_size {self.draft_vocab_size} exceeds target_vocab_size {self.target_vocab_size}"
            )
        for name, allowed in (("output", OUTPUTS), ("markov", MARKOV_KINDS), ("confidence", CONFIDENCES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.output == "target" and self.draft_vocab_size != self.target_vocab_size:
            raise ValueError(
                f"draft_vocab_size {self.draft_vocab_size} of {self.target_vocab_size} tokens needs an output layer of "
                "its own, got output 'target'"
            )
        for name in ("windows", "causal"):
            if (each := getattr(self, name)) is not None and len(each) != self.num_layers:
                raise ValueError(f"{name} must have a value for each of {self.num_layers} layers, got {each}")
        if any(type(window) is not int or window < 1 for window in self.windows or () if window is not None):
            raise ValueError(f"a window must be an integer of at least 1, got {self.windows}")
        if (self.markov == "none") != (self.markov_rank == 0) or self.markov_rank < 0:
            raise ValueError(f"a markov head has a rank of at least 1, got {self.markov!r} of rank {self.markov_rank}")
        if self.confidence == "markov" and self.markov in ("none", "selector", "domino"):
            raise ValueError(f"a confidence head that reads the markov head needs one, got markov {self.markov!r}")
        self._check_selector()
        self._check_domino()

    def _check_block(self) -> None:
        layers = self.target_layers
        if not isinstance(layers, tuple) or not layers or any(type(x) is not int or x < 0 for x in layers):
            raise ValueError(f"target_layers must be a tuple of indices from 0 on, got {layers!r}")
        if type(self.block_size) is not int or self.block_size < 2:
            raise ValueError(
                f"block_size must be at least 2, the last accepted token and a mask token, got {self.block_size!r}"
            )
        if type(self.mask_token) is not int or not 0 <= self.mask_token < self.target_vocab_size:
            raise ValueError(
                f"mask_token must be a token below target_vocab_size {self.target_vocab_size}, got {self.mask_token!r}"
            )

    def _check_selector(self) -> None:
        most = self.target_vocab_size if self.markov == "selector" else 0
        if not bool(most) <= self.candidates <= most:
            raise ValueError(
                f"a selector, and nothing else, chooses among 1 to {self.target_vocab_size} candidates, got markov "
                f"{self.markov!r} with {self.candidates}"
            )
        if most and self.draft_vocab_size != most:
            raise ValueError(f"a selector needs all {most} tokens, got draft_vocab_size {self.draft_vocab_size}")
        if not 0 <= self.conv_taps <= self.block_size:
            raise ValueError(f"conv_taps must lie in 0 to block_size {self.block_size}, got {self.conv_taps}")
        if self.conv_group < 1 or self.conv_taps and self.hidden_size % self.conv_group:
            raise ValueError(f"conv_group must divide hidden_size {self.hidden_size}, got {self.conv_group}")

    def _check_domino(self) -> None:
        is_domino, given = self.markov == "domino", (self.memory_size, self.plain_slots)
        if any(type(number) is not int for number in given) or is_domino != (self.memory_size > 0) or min(given) < 0:
            raise ValueError(
                "a domino head, and nothing else, has a memory_size of at least 1 and plain_slots, got "
                f"{self.memory_size!r} and {self.plain_slots!r} with markov {self.markov!r}"
            )
        if self.plain_slots > (self.num_slots if is_domino else 0):
            raise ValueError(
                f"plain_slots of a domino head must lie in 0 to the block's {self.num_slots} slots, got "
                f"{self.plain_slots} with markov {self.markov!r}"
            )

    @property
    def head_dim(self) -> int:
        """D, the width of a head."""
        return self.rotation.head_dim

    @property
    def feature_size(self) -> int:
        """F, the width of the target's states that `BlockModel.fuse` reads."""
        return len(self.target_layers) * self.hidden_size

    @property
    def num_slots(self) -> int:
        """K, the tokens that one block predicts."""
        return self.block_size if self.from_anchor else self.block_size - 1

    def window(self, layer: int) -> int | None:
        """The last tokens before the anchor that a layer sees (None: all)."""
        return None if self.windows is None else self.windows[layer]

    def is_causal(self, layer: int) -> bool:
        """Whether places of a block see only those before them in a layer."""
        return self.causal is not None and self.causal[layer]


def require_layers(layers: tuple[int, ...], count: int) -> None:
    """Raise ValueError for states that a target of `count` layers does not have, and for its last one.

    Of transformers' `output_hidden_states` the last is after the final norm, and no drafter is trained with that."""
    if max(layers) > count:
        raise ValueError(f"target_layers {layers} name states that a target of {count} layers does not have")
    if count in layers:
        raise ValueError(
            f"target_layers {layers} name the state after the last of {count} layers, which is after the final norm, "
            f"unlike the others: a drafter reads states up to {count - 1}"
        )
