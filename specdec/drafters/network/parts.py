"""Norms, attention, gated MLPs, the target's own tables and vocabulary maps, as all learned drafters use them."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdec.drafters.network.gradients import computed_again, gated_product, rms_norm
from specdec.drafters.network.rotation import apply_rotary_pos_emb, rotate
from specdec.model.fusion.projections import project

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`attend(layer, q [T, H, D], k [T, G, D], v [T, G, D]) -> [T, H, D]`: q and k are rotated; scores are scaled by
D**-0.5."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 at least, in the dtype of x."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` -> `[..., size]`."""
        return rms_norm(x, self.weight, self.eps)


class LayerSizes(Protocol):
    """The fields of a drafter's config that its attention and its MLPs are made from."""

    @property
    def hidden_size(self) -> int:
        """h."""

    @property
    def num_heads(self) -> int:
        """H."""

    @property
    def num_kv_heads(self) -> int:
        """G."""

    @property
    def head_dim(self) -> int:
        """D."""

    @property
    def attention_bias(self) -> bool:
        """Whether the products of attention have biases."""

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normed, head by head."""

    @property
    def rms_norm_eps(self) -> float:
        """Of all norms."""

    @property
    def intermediate_size(self) -> int:
        """Inner width of an MLP."""

    @property
    def activation(self) -> str:
        """By transformers' name."""

    @property
    def mlp_bias(self) -> bool:
        """Whether its products have biases."""


class Attention(nn.Module):
    """Projections around `attend`, of what is `read` wide (None: h)."""

    def __init__(self, config: LayerSizes, index: int, read: int | None = None):
        super().__init__()
        self.index, self.head_dim, bias = index, config.head_dim, config.attention_bias
        read = config.hidden_size if read is None else read
        queries, keys = (count * config.head_dim for count in (config.num_heads, config.num_kv_heads))
        self.q_proj, self.k_proj = nn.Linear(read, queries, bias=bias), nn.Linear(read, keys, bias=bias)
        self.v_proj, self.o_proj = nn.Linear(read, keys, bias=bias), nn.Linear(queries, config.hidden_size, bias=bias)
        norm = lambda: RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.q_norm, self.k_norm = norm(), norm()

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """`x [T, read]`, cosine and sine `[T, R]` -> keys, rotated, and values `[T, G, D]` of tokens that only others
        attend to."""
        k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in project(x, (self.k_proj, self.v_proj)))
        return rotate(self.k_norm(k), cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """`x [T, read]`, cosine and sine `[T, R]` -> `[T, h]`."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        heads_first = self.q_norm(q).transpose(0, 1)[None], self.k_norm(k).transpose(0, 1)[None]
        q, k = (x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*heads_first, cos[None], sin[None]))
        return self.o_proj(attend(self.index, q, k, v).flatten(-2))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: LayerSizes):
        super().__init__()
        from transformers.activations import ACT2FN

        if config.activation not in ACT2FN:
            raise ValueError(f"activation must be one that transformers has, got {config.activation!r}")
        inner, outer, bias = config.intermediate_size, config.hidden_size, config.mlp_bias
        self.gate_proj, self.up_proj = nn.Linear(outer, inner, bias=bias), nn.Linear(outer, inner, bias=bias)
        self.down_proj, self.act_fn = nn.Linear(inner, outer, bias=bias), ACT2FN[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """`[T, h]` -> `[T, h]`."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = gated_product(self.act_fn, gate, up)
        if not product.requires_grad:
            return self.down_proj(product)
        with computed_again(product, lambda: self.act_fn(gate) * up):
            return self.down_proj(product)


class Borrowed:
    """The target's embeddings and output layer: read where they are, never copied, moved or saved with a drafter."""

    __slots__ = ("embeddings", "output")

    def __init__(self, embeddings: nn.Module | None = None, output: nn.Module | None = None):
        self.embeddings, self.output = embeddings, output

    def __deepcopy__(self, memo) -> "Borrowed":
        return self

    def table(self, what: str) -> Tensor:
        """The weight of the "embeddings" `[V, e]` or the "output" layer `[V, h]`. Raises ValueError before `borrow`."""
        module = self.embeddings if what == "embeddings" else self.output
        if module is None:
            raise ValueError(f"this drafter reads the target's {what}: call borrow with the target's modules first")
        return module.weight  # type: ignore[return-value]


def over_target(logits: Tensor, draft_tokens: Tensor | None, size: int) -> Tensor:
    """`logits [..., V_draft]` over the target's `size` tokens, -inf for those that are never drafted.

    draft_tokens [V_draft]: the target's ids of what can be drafted (None: all tokens, in their order)."""
    if draft_tokens is None:
        return logits
    whole = logits.new_full((*logits.shape[:-1], size), float("-inf"))
    return whole.index_copy_(-1, draft_tokens, logits)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x [..., h]` times a borrowed `weight [V, h]`, in the dtype of `x` -> `[..., V]`."""
    return functional.linear(x, weight.to(x.dtype))


def require_draft_tokens(size: int, whole: int, draft_tokens: Tensor | None) -> None:
    """Raise ValueError unless `draft_tokens` are `size` different tokens of the target's `whole`, or None for all."""
    if draft_tokens is None:
        if size != whole:
            raise ValueError(f"a draft vocabulary of {size} out of {whole} tokens needs draft_tokens (d2t), got None")
        return
    if draft_tokens.dtype != torch.int64 or draft_tokens.shape != (size,):
        raise ValueError(f"draft_tokens must be int64 [{size}], got {draft_tokens.dtype} {list(draft_tokens.shape)}")
    if draft_tokens.is_meta:
        return
    least, most, different = int(draft_tokens.min()), int(draft_tokens.max()), len(draft_tokens.unique())
    if least < 0 or most >= whole or different != size:
        raise ValueError(
            f"draft_tokens must be {size} different tokens below {whole}, got {different} from {least} to {most}"
        )
