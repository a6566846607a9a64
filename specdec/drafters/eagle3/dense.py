"""Attention over dense tensors: the reference of what a drafter's tokens see, for tests and measurements."""

import torch
from torch import Tensor

from specdec.drafters.eagle3.config import Eagle3Config


class DenseAttention:
    """An `Attend` for one text that keeps all keys and values it has run.

    Each run token has an anchor, the token whose target state its features began with, and a depth, the steps since:
    depth 0 reads the target's own state. A token sees tokens of depth 0 up to its own anchor, and those of its own
    anchor up to its own depth; that is what speculators trains, chains of one token a step and P-EAGLE alike. A window
    is counted back from the anchor, in P-EAGLE from the token itself. `place(anchors, depths)` before each forward."""

    def __init__(self, config: Eagle3Config):
        self._config, self._kv = config, dict[int, tuple[Tensor, Tensor]]()
        self._anchors = self._depths = self._new = torch.empty(0, dtype=torch.int64)

    def place(self, anchors: Tensor, depths: Tensor) -> None:
        """Say where the tokens of the next forward are: `anchors [T]` and `depths [T]`, int64."""
        self._new = torch.arange(len(anchors), device=anchors.device) + len(self._anchors)
        self._anchors = torch.cat([self._anchors.to(anchors.device), anchors])
        self._depths = torch.cat([self._depths.to(depths.device), depths])

    def sees(self, window: int | None) -> Tensor:
        """Which of all S tokens the T placed last see, bool `[T, S]`."""
        anchor, depth = self._anchors[self._new, None], self._depths[self._new, None]
        text = (self._depths == 0) & (self._anchors <= anchor)
        if window is not None:
            text = text & (self._anchors > anchor + (depth if self._config.parallel else 0) - window)
        return text | (self._anchors == anchor) & (self._depths <= depth)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q [T, H, D]`, `k [T, G, D]`, `v [T, G, D]` -> `[T, H, D]`."""
        if layer in self._kv:
            k, v = (torch.cat([old, new]) for old, new in zip(self._kv[layer], (k, v), strict=True))
        self._kv[layer] = k, v
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~self.sees(self._config.window(layer)), float("-inf"))
        return torch.einsum("hts,shd->thd", scores.softmax(-1), v)
