"""What the file of an EAGLE-3 drafter decides, each of it a field: no reader of the weights has to know the format."""

from dataclasses import dataclass
from typing import Literal

from specdec.drafters.network.rotation import Rotation

FEATURE_NORMS = ("none", "each", "whole")
DEEPER_NORMS = ("input_layernorm", "hidden_norm")
OUTPUTS = ("own", "target", "embeddings")


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """Shape and readings of an EAGLE-3 drafter. e, h: widths of embeddings and layers; F: of the features.

    target_hidden_size, target_vocab_size: of the model that it drafts for.
    target_layers: the states that it reads, as in transformers' `output_hidden_states`; see `Features.layers`.
    draft_vocab_size: of its own output; the tokens are `Eagle3Model.draft_tokens`, unless it is the target's.
    rotation: its own rotary positions.
    embedding_size: e (None: h).
    own_embeddings: whether it has a table of its own; else it reads the target's.
    output: where its output layer is: its "own", the "target"'s, or its "embeddings".
    activation: of the gated MLP, by transformers' name.
    norm_before_residual: whether the normed feature goes past the first layer, not the feature itself.
    feature_norm: the RMSNorm before the features are fused: "none", one for "each" state, or one for the "whole".
    norm_output: whether the next step reads the state after the last norm (EAGLE-3.1), not before.
    deeper_norm: which tensor of a layer after the first norms its input; the other, if a file has it, is not used.
    qk_norm: whether queries and keys of each head are normed (Qwen3).
    attention_bias, mlp_bias, fusion_bias: whether these products have biases.
    windows: of each layer, the last tokens that it sees (None: all).
    mask_token: the token at slots that are drafted in parallel (P-EAGLE); None: one token a step.

    Raises ValueError for a bad value."""

    hidden_size: int
    target_hidden_size: int
    target_vocab_size: int
    draft_vocab_size: int
    target_layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    rotation: Rotation
    num_layers: int = 1
    embedding_size: int | None = None
    own_embeddings: bool = False
    output: Literal["own", "target", "embeddings"] = "own"
    activation: str = "silu"
    rms_norm_eps: float = 1e-6
    norm_before_residual: bool = False
    feature_norm: Literal["none", "each", "whole"] = "none"
    norm_output: bool = False
    deeper_norm: Literal["input_layernorm", "hidden_norm"] = "input_layernorm"
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    fusion_bias: bool = False
    windows: tuple[int | None, ...] | None = None
    mask_token: int | None = None

    def __post_init__(self):
        sizes = ("hidden_size", "target_hidden_size", "target_vocab_size", "draft_vocab_size", "num_heads",
                 "num_kv_heads", "intermediate_size", "num_layers")  # fmt: skip
        for name in sizes:
            if type(size := getattr(self, name)) is not int or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.draft_vocab_size > self.target_vocab_size:
            raise ValueError(
                f"draft_vocab_size {self.draft_vocab_size} exceeds target_vocab_size {self.target_vocab_size}"
            )
        layers = self.target_layers
        if not isinstance(layers, tuple) or not layers or any(type(x) is not int or x < 0 for x in layers):
            raise ValueError(f"target_layers must be a tuple of indices from 0 on, got {layers!r}")
        for name, allowed in (("feature_norm", FEATURE_NORMS), ("deeper_norm", DEEPER_NORMS), ("output", OUTPUTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.output != "own" and self.draft_vocab_size != self.target_vocab_size:
            raise ValueError(
                f"draft_vocab_size {self.draft_vocab_size} of {self.target_vocab_size} tokens needs an output layer of "
                f"its own, got output {self.output!r}"
            )
        if self.windows is not None and len(self.windows) != self.num_layers:
            raise ValueError(f"windows must have a value for each of {self.num_layers} layers, got {self.windows}")
        if any(type(window) is not int or window < 1 for window in self.windows or () if window is not None):
            raise ValueError(f"a window must be an integer of at least 1, got {self.windows}")
        if self.mask_token is not None and not 0 <= self.mask_token < self.target_vocab_size:
            raise ValueError(f"mask_token must lie below {self.target_vocab_size}, got {self.mask_token}")

    @property
    def head_dim(self) -> int:
        """D, the width of a head."""
        return self.rotation.head_dim

    @property
    def feature_size(self) -> int:
        """F, the width of the target's states that `Eagle3Model.fuse` reads."""
        return len(self.target_layers) * self.target_hidden_size

    @property
    def embedded_size(self) -> int:
        """e, the width of embeddings."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def parallel(self) -> bool:
        """Whether all tokens come from one pass (P-EAGLE)."""
        return self.mask_token is not None

    def window(self, layer: int) -> int | None:
        """The last tokens that a layer sees, itself included (None: all)."""
        return None if self.windows is None else self.windows[layer]
