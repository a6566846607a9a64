"""A drafter's own rotary positions: whatever its file says, never the target's.

The scalings are those of transformers. Two of them change with the length of a text ("dynamic", "longrope"), which keys
in a cache cannot follow: here they are what they are for texts up to `Rotation.max_length`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attention.dispatch import resolve

BY_LENGTH = {"dynamic": None, "longrope": "original_max_position_embeddings"}  # where a text gets too long, if it does


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary position embeddings of heads of `head_dim`, the first half against the second ("neox").

    parameters: `rope_type`, `rope_theta` and what the type needs, as in `rope_parameters` of a transformers config.
    max_positions: `max_position_embeddings` of the file.

    Raises ValueError for a type that transformers does not have, or without what it needs.

    >>> Rotation(64, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 2048).max_length is None
    True
    """

    head_dim: int
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10_000.0})
    max_positions: int = 2048

    def __post_init__(self):
        theta, share = self.parameters.get("rope_theta"), self.parameters.get("partial_rotary_factor", 1.0)
        if not isinstance(theta, int | float) or theta <= 0:
            raise ValueError(f"rope_theta must be a positive number, got {theta!r}")
        if not 0 < share <= 1:
            raise ValueError(f"partial_rotary_factor must lie in (0, 1], got {share!r}")
        self.frequencies()

    @property
    def kind(self) -> str:
        """The type of scaling, "default" for none."""
        return self.parameters.get("rope_type", "default")

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest text for which the rotation does not change (None: it never does)."""
        if self.kind not in BY_LENGTH:
            return None
        name = BY_LENGTH[self.kind]
        return self.max_positions if name is None else int(self.parameters.get(name) or self.max_positions)

    def frequencies(self) -> tuple[Tensor, float]:
        """Angles a position of each pair of dimensions, `[R / 2]` float32, and the factor of cosine and sine."""
        dim = int(self.head_dim * self.parameters.get("partial_rotary_factor", 1.0))
        if dim < 2 or dim % 2:
            raise ValueError(f"{dim} of {self.head_dim} dimensions rotate, which must be an even number from 2 on")
        if self.kind == "default":
            steps = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")
            return 1.0 / (self.parameters["rope_theta"] ** (steps / dim)), 1.0
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if self.kind not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise ValueError(f"rope_type must be one of {known}, got {self.kind!r}")
        try:
            config = LlamaConfig(
                hidden_size=self.head_dim, num_attention_heads=1, num_key_value_heads=1, head_dim=self.head_dim,
                max_position_embeddings=self.max_positions, rope_parameters=dict(self.parameters),
            )  # fmt: skip
            frequencies, factor = ROPE_INIT_FUNCTIONS[self.kind](config, torch.device("cpu"))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"rope_parameters {dict(self.parameters)} lack what {self.kind!r} needs: {error}"
            ) from error
        return frequencies.float(), float(factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, impl: str | None = None) -> Tensor:
    """Rotate the first R dimensions of `x [T, H, D]` by `cos [T, R]`, `sin [T, R]`; the others stay."""
    width = cos.shape[-1]

    def fallback_reason() -> str | None:
        if torch.is_grad_enabled():
            return "gradients are wanted"
        if width != x.shape[2] or width % 2 or x.dtype.itemsize > 4 or {x.dtype} != {cos.dtype, sin.dtype}:
            return f"it takes whole heads of one dtype up to float32, got {list(x.shape)} of {x.dtype} and {cos.dtype}"
        return None if x.stride(2) == cos.stride(1) == sin.stride(1) == 1 else "it takes contiguous heads"

    if resolve(impl, x.device, fallback_reason) == "triton":
        from specdec.model.fusion.pointwise_kernel import rotate as rotate_by_kernel

        heads_first = x.transpose(0, 1)[None]
        return rotate_by_kernel(heads_first[:, :0], heads_first, cos[None], sin[None])[1][0].transpose(0, 1)
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return turned if not rest.shape[-1] else torch.cat([turned, rest], -1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` of `q [1, H, T, D]` and `k [1, G, T, D]` by `cos` and `sin` `[1, T, R]`, under transformers' name and in
    its layout, by which `fuse_pointwise` knows it."""
    turned = [rotate(x[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None] for x in (q, k)]
    return turned[0], turned[1]


class Angles:
    """Cosines and sines of a `Rotation`, whose frequencies stay in float32 whatever the dtype of a model."""

    def __init__(self, rotation: Rotation):
        self._rotation, self._held = rotation, dict[torch.device, tuple[Tensor, float]]()

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[T, R]` of the angles at `positions [T]`."""
        device = positions.device
        if device not in self._held:
            with torch.inference_mode(False):
                frequencies, factor = self._rotation.frequencies()
                self._held[device] = torch.cat([frequencies, frequencies]).to(device), factor
        return angles(positions, *self._held[device], dtype)


def angles(positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype,
           impl: str | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cosine and sine `[T, R]`, times `factor`, of `positions [T]` times `frequencies [R]`, in float32 until the end.

    The kernel may differ in the last bit of a cosine, so that training, with gradients, keeps to PyTorch."""
    reason = lambda: "gradients are wanted" if torch.is_grad_enabled() else None
    if resolve(impl, positions.device, reason) == "triton":
        from specdec.drafters.network.rotation_kernel import launch_angles

        return launch_angles(positions, frequencies, factor, dtype)
    of_each = positions[:, None] * frequencies
    cos, sin = of_each.cos(), of_each.sin()
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    return cos.to(dtype), sin.to(dtype)
