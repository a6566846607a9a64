"""A causal convolution over each channel: its state is the window of the K - 1 inputs before."""

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1 << 20  # tokens of a chain that run at once: all


def run(state: Tensor, inputs: tuple[Tensor, ...], reads: tuple[Tensor, ...] = (), sees: Tensor | None = None,
        constants: tuple[Tensor, ...] = ()) -> Tensor:  # fmt: skip
    """`[B, M, C]`: outputs of M tokens after the window `state [B, C, K - 1]`.

    inputs: `[B, M, C]`
    constants: weight `[C, K]` and, where there is one, bias `[C]`
    sees: `[B, M, M]` bool, the ancestors of each token and itself, which come before it (None: a chain)
    """
    weight, bias = constants[0], constants[1] if len(constants) > 1 else None
    known = torch.cat([state, inputs[0].transpose(1, 2)], 2).to(weight.dtype)
    if sees is None:
        out = F.conv1d(known, weight[:, None], bias, groups=len(weight)).transpose(1, 2)
    else:
        at = _window(sees, weight.shape[1])  # [B, M, K]
        windows = known.gather(2, at.flatten(1)[:, None].expand(-1, len(weight), -1)).unflatten(2, at.shape[1:])
        out = torch.einsum("bcmk,ck->bmc", windows, weight)
        out = out if bias is None else out + bias
    return out.to(inputs[0].dtype)


def fold(state: Tensor, inputs: tuple[Tensor, ...], counts: Tensor, constants: tuple[Tensor, ...] = ()) -> Tensor:
    """The window after the first `counts [B]` of a chain of tokens."""
    known = torch.cat([state, inputs[0].transpose(1, 2)], 2)
    at = counts[:, None] + torch.arange(state.shape[2], device=counts.device)
    return known.gather(2, at[:, None].expand(-1, state.shape[1], -1))


def _window(sees: Tensor, width: int) -> Tensor:
    """`[B, M, K]`: where the last K - 1 ancestors of each token, and the token, are among the window and the tokens."""
    depth = sees.sum(2) - 1  # 0 for roots
    back = torch.arange(width - 1, -1, -1, device=sees.device)
    wanted = depth[..., None] - back  # the depths of those ancestors; negative ones are in the window
    found = (sees[:, :, None] & (depth[:, None, None] == wanted[..., None])).to(torch.uint8).argmax(3)
    return width - 1 + torch.where(wanted < 0, wanted, found)
