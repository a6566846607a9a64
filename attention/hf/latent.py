"""Multi-head latent attention over pages of latents: the projections to keys and values move to queries and outputs.

A layer makes the keys and values of all heads of one latent c of a token, and adds one rotated key r that all heads
share (DeepSeek-AI 2024, DeepSeek-V2, section 2.1):

    k_h = [W_UK,h c ; r]      v_h = W_UV,h c      <q_h, k_h> = <[W_UK,h^T q_nope,h ; q_rope,h], [c ; r]>

So the pages need [c ; r] alone, as one key of one kv head whose first numbers are the value: the query is multiplied by
W_UK^T before attention, and the result by W_UV after it. transformers' modules make keys and values in a method
`expand_kv(c, r)`; those of a twin get one that gives the latents."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attention.hf.probe import UnsupportedArchitecture
from attention.hf.split import local_part, split_by_outputs
from attention.hf.twin import SLOT

LATENT = "_latent_heads"  # attribute of a twin's modules that holds their `LatentHeads`
PROJECTION = "kv_b_proj"  # of transformers' modules with `expand_kv`, to keys and values of all heads
SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True, slots=True)
class LatentHeads:
    """How the heads of a layer read latents.

    expand: has W_UK,h and W_UV,h of each head as its weight `[H * (key_dim + value_dim), rank]`, which may change. Of a
        model that is split over processes these are the heads of this one; the latents, of all heads, are with each.
    key_dim, value_dim: numbers of a head's key without the rotated ones, and of its value."""

    expand: nn.Linear
    key_dim: int
    value_dim: int

    def _weights(self) -> tuple[Tensor, Tensor]:
        """W_UK `[H, key_dim, rank]` and W_UV `[H, value_dim, rank]`."""
        by_head = local_part(self.expand.weight).unflatten(0, (-1, self.key_dim + self.value_dim))
        return by_head[:, : self.key_dim], by_head[:, self.key_dim :]

    def query(self, query: Tensor) -> Tensor:
        """Queries `[T, H, key_dim + rotated]` for keys -> queries for latents `[T, H, rank + rotated]`."""
        plain, rotated = query[..., : self.key_dim], query[..., self.key_dim :]
        absorbed = torch.bmm(plain.transpose(0, 1), self._weights()[0]).transpose(0, 1)
        return torch.cat([absorbed, rotated], -1)

    def value(self, mixed: Tensor) -> Tensor:
        """Sums of latents `[T, H, rank]` -> sums of values `[T, H, value_dim]`."""
        return torch.bmm(mixed.transpose(0, 1), self._weights()[1].transpose(1, 2)).transpose(0, 1)


def keep_latents(twin: nn.Module, wanted: frozenset[str] | None = None) -> frozenset[str]:
    """Make the modules `wanted` of a twin hand latents to attention (None: all that can) -> their names.

    Raises UnsupportedArchitecture where one of them cannot."""
    kept = set()
    for name, module in twin.named_modules():
        if SLOT in vars(module) and (wanted is None or name in wanted) and (heads := latent_heads(module)) is not None:
            vars(module)[LATENT], vars(module)["expand_kv"] = heads, _latents
            kept.add(name)
    if lost := sorted((wanted or frozenset()) - kept):
        raise UnsupportedArchitecture(
            f"the projection of latents ({PROJECTION}) in {', '.join(lost)} now has a hook, an adapter or other "
            "weights; pages were made for latents, so the model needs a new runner"
        )
    return frozenset(kept)


def latent_heads(module: nn.Module) -> LatentHeads | None:
    """The `LatentHeads` of an attention module; None for one that attends to keys and values (see `why_expanded`)."""
    if not _makes_keys(module) or why_expanded(module) is not None:
        return None
    sizes = vars(module)
    return LatentHeads(module.get_submodule(PROJECTION), sizes["qk_nope_head_dim"], sizes["v_head_dim"])  # type: ignore[arg-type]


def why_expanded(module: nn.Module) -> str | None:
    """Why a module must make the keys and values of all heads of its latents; None: it need not, or it has none."""
    if not _makes_keys(module):
        return None
    layer: Any = module._modules.get(PROJECTION)
    rank, key_dim, _, value_dim = sizes = [vars(module).get(name) for name in SIZES]
    if type(layer) is not nn.Linear:
        return f"its {PROJECTION} is a {type(layer).__name__}, not an nn.Linear"
    own, split = vars(layer), split_by_outputs(layer)
    if layer._forward_hooks or layer._forward_pre_hooks or "_hf_hook" in own or ("forward" in own and not split):
        return f"its {PROJECTION} has hooks or a forward of its own"
    weight = local_part(layer.weight) if split else layer.weight
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point() or weight.is_meta:
        return f"its {PROJECTION} has no plain weight (quantised, split by inputs, or elsewhere)"
    if layer.bias is not None or not all(type(size) is int for size in sizes):
        return f"its {PROJECTION} has a bias, or one of {', '.join(SIZES)} is unknown"
    if weight.shape[1] != rank or weight.shape[0] % (key_dim + value_dim):
        return f"its {PROJECTION} of {list(weight.shape)} does not fit {dict(zip(SIZES, sizes, strict=True))}"
    return None


def expanded_layers(twin: nn.Module, layers: Sequence[str]) -> str | None:
    """Which of the modules `layers` do not keep the latents that they have, in words; None: there is none."""
    reasons = Counter(why for name in dict.fromkeys(layers) if (why := why_expanded(twin.get_submodule(name))))
    told = "; ".join(f"{count} layers: {why}" for why, count in reasons.items())
    return f"keeps the keys and values of all heads in place of their latents ({told})" if reasons else None


def _makes_keys(module: nn.Module) -> bool:
    """Whether it makes keys and values of latents by transformers' method for that."""
    return callable(getattr(type(module), "expand_kv", None))


def _latents(latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """In place of `expand_kv`: `[1, 1, T, rank]` and `[1, 1, T, rotated]` -> one head's keys, and values in them."""
    return torch.cat([latent, rotated], -1), latent
