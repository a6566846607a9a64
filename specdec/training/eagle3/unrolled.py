"""Training-time test: the steps that decoding takes after every token of a text at once (Li et al. 2025, 3.2).

Row j of step k is the k-th step after anchor j, the token whose target state its features began with: it reads the
embedding of token j + 1 + k and what row j of step k - 1 gave, in step 0 the target's features of token j, and predicts
token j + 2 + k. It sees the rows of step 0 up to its own anchor, in its own text, and its own anchor's row of each step
since: what decoding has in its cache there. The drafter reads tokens of the text, never its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attention import flash_attention
from attention.gpu import to_device
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.training.backbone import packed_ends, positions_of


class UnrolledAttention:
    """An `Attend` over packed texts for one step after the other; `documents [B, S]`, T = B * S.

    windows: of each layer, how many rows of step 0 one sees, its own anchor's included (None: all)."""

    def __init__(self, documents: Tensor, windows: Sequence[int | None] | None, device: torch.device):
        ends, self._longest = packed_ends(documents)
        self._ends, self._windows = to_device(ends, device), windows
        self._kept = dict[int, list[tuple[Tensor, Tensor]]]()  # keys and values of each step, by layer

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q [T, H, D]`, `k [T, G, D]`, `v [T, G, D]` -> `[T, H, D]`."""
        q, k = q.to(v.dtype), k.to(v.dtype)
        steps = self._kept.setdefault(layer, [])
        steps.append((k, v))
        out, lse = self._over_text(layer, q, *steps[0], return_lse=len(steps) > 1)
        if len(steps) == 1:
            return out
        # [T, G, H / G, …]: keys and values are shared, not repeated, and what the backward needs stays in their dtype
        grouped, width = (-1, k.shape[1], q.shape[1] // k.shape[1]), q.shape[-1]
        q, out, lse = q.reshape(*grouped, width), out.reshape(*grouped, width), lse.reshape(grouped)
        scores = [torch.einsum("tghd,tgd->tgh", q, key).to(lse.dtype) * width**-0.5 for key, _ in steps[1:]]
        total = torch.logsumexp(torch.stack([lse, *scores]), 0)
        mixed = out * (lse - total).exp()[..., None]
        for score, (_, value) in zip(scores, steps[1:], strict=True):
            mixed = mixed + value[:, :, None] * (score - total).exp()[..., None]
        return mixed.flatten(1, 2).to(v.dtype)

    def _over_text(self, layer: int, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
        """Attention to the rows of step 0 -> `[T, H, D]`, and the log-sum-exp `[T, H]` (unless wanted, the same)."""
        window = None if self._windows is None else self._windows[layer]
        found = flash_attention(q, k, v, cu_seqlens_q=self._ends, max_seqlen_q=self._longest, window=window,
                                return_lse=return_lse)  # fmt: skip
        return found if isinstance(found, tuple) else (found, found)


def unroll(network: Eagle3Model, tokens: Tensor, documents: Tensor, features: Tensor, depth: int) -> list[Tensor]:
    """The `output [B * S, h]` of each of `depth` steps, for `Eagle3Model.logits`.

    tokens `[B, S]`, documents `[B, S]` best on the CPU, features `[B, S, F]`, see `Backbone.features`. Rows whose
    token, or label, is in another text or after the end are computed too; nobody sees them."""
    documents = documents.cpu()
    attend = UnrolledAttention(documents, network.config.windows, tokens.device)
    positions = to_device(positions_of(documents).flatten(), tokens.device)
    hidden, outputs = network.fuse(features.flatten(0, 1)), []
    for step in range(depth):
        embedded = network.embed(tokens.roll(-1 - step, 1).flatten())
        output, hidden = network(embedded, hidden, positions + step, attend)
        outputs.append(output)
    return outputs
