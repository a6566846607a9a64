"""The target's logits after a text, computed in two ways that are both right, and what their difference explains.

At once: by transformers, one forward over the whole text. By steps: over pages, the last tokens one at a time, as
decoding does. Rounding alone separates the two, so their largest difference is the noise of logits after this text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.model.runner import ModelRunner

TOKENS = 4096  # of texts in one forward


class Readings:
    """Both readings of a transformers model over texts, with pages of their own and without graphs and fused kernels.

    With 8-bit keys and values the forward at once also runs over pages, since transformers' cache has full precision.
    """

    def __init__(self, model: Any, kv_dtype: str | None = None):
        self.model, self._kv_dtype = model, kv_dtype
        self._runner = ModelRunner(model, kv_dtype=kv_dtype, mode="eager")
        self.vocab_size = self._runner.vocab_size

    @torch.inference_mode()
    def both(self, texts: Tensor, last: int = 1) -> Tensor:
        """`[2, U, last, V]` float32: at once and by steps, after each of the last tokens of `texts [U, n]`."""
        few = texts.split(max(1, TOKENS // texts.shape[1]))
        return torch.cat([torch.stack([self._at_once(some, last), self._by_steps(some, last)]) for some in few], 1)

    def _at_once(self, texts: Tensor, last: int) -> Tensor:
        if self._kv_dtype is None:
            return self.model(texts, logits_to_keep=last, use_cache=False).logits[:, -last:].float()
        return self._over_pages(texts, last, at_once=True)

    def _by_steps(self, texts: Tensor, last: int) -> Tensor:
        return self._over_pages(texts, last, at_once=False)

    def _over_pages(self, texts: Tensor, last: int, at_once: bool) -> Tensor:
        runner, (count, length) = self._runner, texts.shape
        runner.reserve([length] * count)
        sequences = [runner.cache.add() for _ in range(count)]
        try:
            if at_once:
                logits = runner.forward(sequences, texts.flatten(), [length] * count).logits
                return logits.unflatten(0, (count, length))[:, -last:].float()
            if length > last:
                runner.extend(sequences, list(texts[:, :-last]))
            steps = texts[:, -last:].unbind(1)
            return torch.stack([runner.forward(sequences, one, [1] * count).logits.float() for one in steps], 1)
        finally:
            for sequence in sequences:
                runner.cache.free(sequence)

    @property
    def precision(self) -> float:
        """The relative distance of neighbouring numbers in the dtype that the target computes its logits with."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        dtype = torch.float32 if dtype.itemsize < 2 else dtype
        if self._kv_dtype is not None:
            return 2.0**-7
        if dtype == torch.float32 and self._runner.device.type == "cuda":
            return 2.0**-10 if torch.get_float32_matmul_precision() != "highest" else torch.finfo(dtype).eps
        return torch.finfo(dtype).eps


def noise_of(readings: Tensor) -> float:
    """The largest difference between two readings `[2, V]`, of tokens that both allow."""
    finite = readings.isfinite().all(0)
    return float((readings[0] - readings[1])[finite].abs().max()) if bool(finite.any()) else 0.0


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether rounding alone can have decided between tokens, of which None stands after an end.

    margins: the distance between the two best tokens, in each reading.
    behind: for each token, how far it lies behind the best, in each reading (None: after an end).
    noise: the largest difference between the readings.
    near_tie: whether each token is behind by at most twice the noise, in both readings.
    """

    margins: tuple[float, float]
    behind: tuple[tuple[float, float] | None, ...]
    noise: float
    near_tie: bool


def judge(scores: Tensor, tokens: Sequence[int | None], noise: float | None = None) -> Judgement:
    """What two readings `scores [2, V]` say of `tokens`; noise: of the logits before processors (None: of `scores`).

    >>> judge(torch.tensor([[1.0, 0.99, 0.0], [1.0, 1.01, 0.0]]), [0, 1]).near_tie
    True
    >>> judge(torch.tensor([[1.0, 0.99, 0.0], [1.0, 1.01, 0.0]]), [0, 2]).near_tie
    False
    """
    best = scores.topk(2).values
    noise = noise_of(scores) if noise is None else noise
    pair = lambda two: (float(two[0]), float(two[1]))
    behind = tuple(None if token is None else pair(best[:, 0] - scores[:, token]) for token in tokens)
    near = all(side is not None and max(side) <= 2 * noise for side in behind)
    return Judgement(pair(best[:, 0] - best[:, 1]), behind, noise, near)
