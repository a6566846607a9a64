"""Blocks over dense tensors: the reference of what their places see, for tests, measurements and training."""

import torch
from torch import Tensor

from specdec.drafters.block.config import BlockConfig
from specdec.drafters.block.module import BlockModel


class DenseBlocks:
    """A `Keep` and an `Attend` for the blocks after M anchors of one text of S tokens, all in one forward.

    A place sees context tokens before its anchor, in a layer with a window the last of them only, and the places of its
    own block, in a causal layer those up to itself. anchors [M]: their places in the text."""

    def __init__(self, config: BlockConfig, anchors: Tensor):
        self._config, self._anchors = config, anchors
        self._context = dict[int, tuple[Tensor, Tensor]]()

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take a layer's keys and values `[S, G, D]` of the text."""
        self._context[layer] = k, v

    def sees(self, layer: int, length: int) -> Tensor:
        """Which of `length` context tokens and M * B places each place sees in a layer, bool `[M * B, S + M * B]`."""
        config, size = self._config, self._config.block_size
        anchor = self._anchors.repeat_interleave(size)[:, None]
        text = torch.arange(length, device=anchor.device)
        context, window = text < anchor, config.window(layer)
        if window is not None:
            context &= text >= anchor - window
        place = torch.arange(len(anchor), device=anchor.device)
        block = place[:, None] // size == place // size
        if config.is_causal(layer):
            block &= place <= place[:, None]
        return torch.cat([context, block], 1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q [M * B, H, D]`, `k [M * B, G, D]`, `v [M * B, G, D]` -> `[M * B, H, D]`."""
        keys, values = self._context[layer]
        sees, group = self.sees(layer, len(keys)), q.shape[1] // k.shape[1]
        k, v = (torch.cat(pair).repeat_interleave(group, 1) for pair in ((keys, k), (values, v)))
        scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("hts,shd->thd", scores.masked_fill(~sees, float("-inf")).softmax(-1), v)


def block_places(model: BlockModel, features: Tensor, tokens: Tensor, anchors: Tensor) -> Tensor:
    """The states of all places of the blocks after `anchors [M]` of a text, `[M, B, h]`.

    features [S, F]: the target's, of each of the text's `tokens [S]`."""
    size, dense = model.config.block_size, DenseBlocks(model.config, anchors)
    model.keep_context(model.fuse(features), torch.arange(len(features), device=anchors.device), dense.keep)
    positions = anchors[:, None] + torch.arange(size, device=anchors.device)
    embedded = model.embed(model.block_tokens(tokens[anchors]).flatten())
    return model(embedded, positions.flatten(), dense).unflatten(0, (len(anchors), size))


def slot_logits(model: BlockModel, places: Tensor, before: Tensor) -> Tensor:
    """The logits of the first k slots, each after the tokens before it, `[M, k, V_draft]`, of `places [M, B, h]`.

    before [M, k]: the token before each slot, the anchor first."""
    hidden, said = model.slots(places)[:, : before.shape[1]], model.said(places, before)
    logits, head = model.logits(hidden), model.head or model.recurrent
    return logits if said is None or head is None else logits + head.added(said)
