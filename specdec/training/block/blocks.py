"""The blocks after many anchors of packed texts in one forward, each as decoding runs it (DFlash; DSpark, 2607.05147).

A place of a block sees its own text's tokens before the anchor, in a layer with a window the last of them only, and the
places of its block, in a causal layer those up to itself. Both parts are flash attention, joined by their log-sum-exps:
all places of a block see the same context, so that its B places are heads of one query, and that query, in the row of
the token before the anchor, sees what causal attention shows it. The kernel then also runs the rows of tokens that
precede no anchor, whose queries are zeros and whose results nobody reads: S / M times the work for M anchors in S
tokens, for the sake of one kernel that never copies a text's keys. Without a kernel each text's anchors are computed by
themselves, which takes a core less than half the time. `specdec.drafters.block.dense` is the reference."""

from itertools import pairwise

import torch
from torch import Tensor

from attention import flash_attention
from attention.dispatch import resolve
from attention.gpu import to_device
from specdec.drafters.block.config import BlockConfig
from specdec.drafters.block.module import BlockModel
from specdec.training.backbone import packed_ends, positions_of


class PackedBlocks:
    """A `Keep` and an `Attend` for the blocks after M anchors of packed texts; T = R * S tokens.

    documents `[R, S]` on the CPU; anchors `[M]`: places among T, none the first token of a text."""

    def __init__(self, config: BlockConfig, documents: Tensor, anchors: Tensor, device: torch.device):
        ends, self._longest = packed_ends(documents)
        self._ends, self._config = to_device(ends, device), config
        self._rows = to_device(anchors - 1, device)  # causal attention shows it what is before the anchor
        self._texts = [(a, which) for a, b in pairwise(ends.tolist())
                       if len(which := ((anchors > a) & (anchors < b)).nonzero()[:, 0])]  # fmt: skip
        self._context = dict[int, tuple[Tensor, Tensor]]()

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take a layer's keys and values `[T, G, D]` of all tokens."""
        self._context[layer] = k.to(v.dtype), v

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q [M * B, H, D]`, `k [M * B, G, D]`, `v [M * B, G, D]` -> `[M * B, H, D]`."""
        shape = -1, self._config.block_size
        q, k, v = (x.to(v.dtype).unflatten(0, shape) for x in (q, k, v))
        inside, its = flash_attention(q, k, v, causal=self._config.is_causal(layer), return_lse=True)
        before, their = self._over_context(layer, q)
        total = torch.logaddexp(its, their)
        mixed = inside * (its - total).exp()[..., None] + before * (their - total).exp()[..., None]
        return mixed.to(v.dtype).flatten(0, 1)

    def _over_context(self, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of `q [M, B, H, D]` to the texts before the anchors `[M, B, H, D]`, log-sum-exps `[M, B, H]`."""
        keys, values = self._context[layer]
        heads = keys.shape[1], self._config.block_size, -1  # those of one key's head stay together
        grouped = q.unflatten(2, (heads[0], -1)).transpose(1, 2).flatten(1, 3)
        if resolve(None, q.device) == "reference":
            found = self._each_text(grouped, keys, values, self._config.window(layer))
        else:
            found = self._whole_rows(grouped, keys, values, self._config.window(layer))
        out, lse = (x.unflatten(1, heads).transpose(1, 2).flatten(2, 3) for x in found)
        return out, lse

    def _whole_rows(self, q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """See `_each_text`: one kernel over all rows."""
        queries = q.new_zeros(len(keys), *q.shape[1:]).index_copy(0, self._rows, q)
        out, lse = flash_attention(queries, keys, values, cu_seqlens_q=self._ends, max_seqlen_q=self._longest,
                                   window=window, return_lse=True)  # fmt: skip
        return out.index_select(0, self._rows), lse.index_select(0, self._rows)

    def _each_text(self, q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Attention of `q [M, H', D]` to each anchor's text before it `[M, H', D]`, log-sum-exps `[M, H']`."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        keys, values, before = keys.to(dtype), values.to(dtype), list[Tensor]()
        sums, order = list[Tensor](), torch.cat([which for _, which in self._texts]).argsort().to(q.device)
        for start, which in self._texts:
            own, last = q[which.to(q.device)].to(dtype).unflatten(1, (keys.shape[1], -1)), self._rows[which][:, None]
            text = slice(start, int(last.max()) + 1)
            place = torch.arange(start, text.stop, device=q.device)
            seen = (place <= last) if window is None else (place <= last) & (place > last - window)
            scores = torch.einsum("mghd,sgd->mghs", own, keys[text]) * q.shape[-1] ** -0.5
            scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
            before.append(torch.einsum("mghs,sgd->mghd", scores.softmax(-1), values[text]).flatten(1, 2))
            sums.append(scores.logsumexp(-1).flatten(1, 2))
        return torch.cat(before)[order].to(q.dtype), torch.cat(sums)[order]


def run_blocks(network: BlockModel, tokens: Tensor, documents: Tensor, features: Tensor, anchors: Tensor) -> Tensor:
    """The states of all places of the blocks after `anchors [M]`, `[M, B, h]`, as `BlockModel.slots` takes them.

    tokens     `[R, S]`
    documents  `[R, S]`, best on the CPU
    features   `[R, S, F]`, see `Backbone.features`; those at and after an anchor are not read
    anchors    `[M]` on the CPU, places among all R * S tokens

    Raises ValueError for an anchor that is the first token of its text, before which there is no context."""
    documents, device, size = documents.cpu(), tokens.device, network.config.block_size
    positions = positions_of(documents).flatten()
    places = positions[anchors, None] + torch.arange(size)
    if bool((places[:, 0] == 0).any()):
        first = int(anchors[places[:, 0] == 0][0])
        raise ValueError(f"an anchor needs a token before it in its text, and place {first} has none")
    blocks = PackedBlocks(network.config, documents, anchors, device)
    network.keep_context(network.fuse(features.flatten(0, 1)), to_device(positions, device), blocks.keep)
    embedded = network.embed(network.block_tokens(tokens.flatten()[to_device(anchors, device)]).flatten())
    return network(embedded, to_device(places.flatten(), device), blocks).unflatten(0, (len(anchors), size))
