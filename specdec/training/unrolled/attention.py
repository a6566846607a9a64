"""What the steps after every token of packed texts see: the text up to there, and the steps after that token so far.

It is what decoding has in the drafter's cache, for all tokens of all texts at once (Li et al. 2025, 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attention import flash_attention
from attention.gpu import to_device
from specdec.training.backbone import packed_ends


class UnrolledAttention:
    """An `Attend` over packed texts for one step after the other; `documents [B, S]`, T = B * S.

    Row j of step k is the k-th step after anchor j. It sees the rows of step 0 up to its own anchor, in its own text,
    and its own anchor's row of each step since.

    windows: of each layer, how many rows one sees, itself included (None: all).
    sliding: whether windows are counted back from the step itself, as pages have it and P-EAGLE and MTP are trained;
        else from the anchor, as EAGLE-3 is."""

    def __init__(self, documents: Tensor, windows: Sequence[int | None] | None, device: torch.device,
                 sliding: bool = False):  # fmt: skip
        ends, self._longest = packed_ends(documents)
        self._ends, self._windows, self._sliding = to_device(ends, device), windows, sliding
        self._size = documents.numel()
        self._rows: Tensor | None = None
        self._kept = dict[int, list[tuple[Tensor, Tensor]]]()  # keys and values [T, G, D] of each step, by layer

    def after(self, rows: Tensor | None) -> None:
        """The next steps come after these anchors only, `rows [M]`, which had all steps before (None: after all T)."""
        self._rows = rows

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q [M, H, D]`, `k [M, G, D]`, `v [M, G, D]` -> `[M, H, D]`."""
        return self.attend(layer, q, k, v, None, None if self._windows is None else self._windows[layer])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        """The same with the scale of scores (None: D^-0.5) and the window of this call.

        Raises ValueError for a sliding window that no longer reaches back to the anchor."""
        q, k = q.to(v.dtype), k.to(v.dtype)
        steps = self._kept.setdefault(layer, [])
        steps.append((self._placed(k), self._placed(v)))
        since = len(steps) - 1
        if window is not None and self._sliding and since:
            if window <= since:
                raise ValueError(f"a window of {window} tokens is left by step {since} after a token: train fewer")
            window -= since
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, lse = self._over_text(q, *steps[0], scale, window, return_lse=since > 0)
        if not since:
            return out
        # [M, G, H / G, …]: keys and values are shared, not repeated, and what the backward needs stays in their dtype
        grouped, width = (-1, k.shape[1], q.shape[1] // k.shape[1]), q.shape[-1]
        q, out, lse = q.reshape(*grouped, width), out.reshape(*grouped, width), lse.reshape(grouped)
        own = [(self._taken(key), self._taken(value)) for key, value in steps[1:-1]] + [(k, v)]
        scores = [torch.einsum("tghd,tgd->tgh", q, key).to(lse.dtype) * scale for key, _ in own]
        total = torch.logsumexp(torch.stack([lse, *scores]), 0)
        mixed = out * (lse - total).exp()[..., None]
        for score, (_, value) in zip(scores, own, strict=True):
            mixed = mixed + value[:, :, None] * (score - total).exp()[..., None]
        return mixed.flatten(1, 2).to(v.dtype)

    def _over_text(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None,
                   return_lse: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Attention to the rows of step 0 -> `[M, H, D]`, and the log-sum-exp `[M, H]` (unless wanted, the same).

        Queries take their anchors' places; other places have zeros, whose results nobody reads."""
        found = flash_attention(self._placed(q), k, v, cu_seqlens_q=self._ends, max_seqlen_q=self._longest,
                                scale=scale, window=window, return_lse=return_lse)  # fmt: skip
        out, lse = found if isinstance(found, tuple) else (found, found)
        return self._taken(out), self._taken(lse)

    def _placed(self, x: Tensor) -> Tensor:
        """`x [M, …]` at the places of its anchors, `[T, …]`."""
        if self._rows is None:
            return x
        return x.new_zeros(self._size, *x.shape[1:]).index_copy(0, self._rows, x)

    def _taken(self, x: Tensor) -> Tensor:
        """What `x [T, …]` has at the anchors, `[M, …]`."""
        return x if self._rows is None else x.index_select(0, self._rows)
