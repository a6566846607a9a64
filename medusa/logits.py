"""What a model does to the results of its output layer before they are its logits: scale them (Granite, Cohere), cap
them (Gemma 2), both, or nothing.

It is measured, not read off the config: the same name divides in one family and multiplies in another, and a new
family has a new name. A forward of three tokens runs with an output layer that returns chosen numbers, and what comes
out gives the scale and the cap; anything else than these two is an error."""

import copy
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from attention.hf.twin import make_twin
from specdec.model.fusion.projections import shallow_copy
from specdec.model.output_layer import sizes_of

SMALL, LARGE = 2.0**-10, 2.0**20  # too small for a cap to matter; so large that only a cap is seen
PROBES = (0.0, *(sign * size for size in (SMALL, 0.25, 1.0, 4.0, 16.0, 64.0, LARGE) for sign in (1.0, -1.0)))
TOKENS = 3


@dataclass(frozen=True, slots=True)
class LogitMap:
    """Results z of an output layer become logits: `scale` z, and with `cap` c then c tanh(scale z / c).

    Raises ValueError for a scale or cap that is not positive and finite.

    >>> LogitMap(0.5, 3.0)(torch.tensor([0.0, 100.0])).tolist()
    [0.0, 3.0]
    """

    scale: float = 1.0
    cap: float | None = None

    def __post_init__(self):
        for name, value in (("logit_scale", self.scale), ("logit_cap", self.cap)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")

    def __call__(self, results: Tensor) -> Tensor:
        """`[..., V]` -> `[..., V]`; the gradient needs no value of the result."""
        scaled = results if self.scale == 1 else results * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap


@torch.no_grad()
def measure(model) -> tuple[LogitMap, Tensor]:
    """The `LogitMap` of a transformers causal language model, and states `[..., H]` that its output layer reads.

    `model` itself is not touched. Raises ValueError, naming the architecture, where it has no output layer or does
    anything else to the results."""
    name, layer = type(model).__name__, model.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{name} has no output layer, so there are no logits to guess")
    vocab, _ = sizes_of(layer)
    seen: list[tuple[Tensor, Tensor]] = []

    def probe(hidden: Tensor, *_, **__) -> Tensor:
        shape = (*hidden.shape[:-1], vocab)
        probes = torch.tensor(PROBES, device=hidden.device)
        results = probes[torch.arange(math.prod(shape), device=hidden.device) % len(probes)].view(shape)
        seen.append((hidden, results))
        return results.clone()

    tokens = torch.arange(TOKENS, device=model.device)[None] % vocab
    logits = _with_output_layer(model, probe)(input_ids=tokens, use_cache=False).logits
    if len(seen) != 1 or seen[0][1].shape != logits.shape:
        shapes = [list(results.shape) for _, results in seen]
        raise ValueError(
            f"{name} makes logits {list(logits.shape)} of its output layer's results {shapes}, so heads cannot start "
            "as this model"
        )
    hidden, results = seen[0]
    return _fit(results.flatten().double().cpu(), logits.flatten().double().cpu(), name), hidden


def _with_output_layer(model, forward) -> nn.Module:
    """A twin of `model` whose output layer is replaced by `forward`."""
    layer, twin = model.get_output_embeddings(), make_twin(model).model
    *path, last = next(name for name, module in model.named_modules() if module is layer).split(".")
    replaced = copy.copy(layer)
    replaced.forward = forward
    original, parent = model, cast(nn.Module, twin)
    for name in path:
        original, inner = original._modules[name], cast(nn.Module, parent._modules[name])
        inner = shallow_copy(inner) if inner is original else inner  # the model's own module stays as it is
        parent._modules = {**parent._modules, name: inner}
        parent = inner
    parent._modules = {**parent._modules, last: replaced}
    return twin


def _fit(results: Tensor, logits: Tensor, name: str) -> LogitMap:
    """The map that takes these results to these logits; `name` is the architecture's."""
    scale = float((logits / results)[results.abs() == SMALL].median())
    highest = float(logits[results.abs() == LARGE].abs().median())
    cap = highest if highest < 0.5 * scale * LARGE else None
    if 0 < scale < math.inf:
        found = LogitMap(_rounded(scale), cap and _rounded(cap))
        expected = found(results)
        # what is beyond float16 without a cap may have become infinite
        known = results.abs() < LARGE if cap is None else torch.ones_like(results, dtype=torch.bool)
        if bool(((logits - expected).abs() <= 2**-6 * expected.abs() + 1e-6)[known].all()):
            return found
    shown = ", ".join(f"{z:g} -> {y:.4g}" for z, y in zip(results[:12].tolist(), logits.tolist(), strict=False))
    raise ValueError(
        f"{name} does more to the results of its output layer than scale and cap them ({shown}), so heads cannot start "
        "as this model"
    )


def _rounded(value: float) -> float:
    """The seven digits that float32 has."""
    return float(f"{value:.7g}")
