"""Short causal convolutions inside a block, with kernels that follow the tokens (DFlash2)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdec.drafters.block.config import BlockConfig


class BlockConvolution(nn.Module):
    """Two convolutions, of what a part of a layer reads and of what it gives, over the last K places of a block.

    Channel c of place t becomes the sum over taps i of (base[i, c] + own[t, i, group of c]) * x[t - i, c]; a projection
    of what is read gives each place its own kernels, one for each group of channels, of both convolutions. Places
    before the block count as zeros."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.size, taps, hidden = config.block_size, config.conv_taps, config.hidden_size
        self.shape = 2, taps, hidden // config.conv_group
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, hidden))
        self.kernel_projection = nn.Linear(hidden, 2 * taps * self.shape[2], bias=False)

    def kernels(self, x: Tensor) -> Tensor:
        """Each place's kernels of both convolutions, `[T, 2, K, groups]`, of what a part reads, `x [T, h]`."""
        return self.kernel_projection(x).unflatten(-1, self.shape)

    def forward(self, x: Tensor, kernels: Tensor, which: int) -> Tensor:
        """`x [T, h]` of whole blocks, convolved by base and own `kernels`, the first (0) or the second (1)."""
        blocks, own = (each.unflatten(0, (-1, self.size)) for each in (x, kernels[:, which]))
        grouped = blocks.unflatten(-1, (self.shape[2], -1))  # [M, B, groups, channels]
        total = torch.zeros_like(grouped)
        for tap in range(self.shape[1]):
            before = functional.pad(grouped, (0, 0, 0, 0, tap, 0))[:, : self.size]
            base = self.base_kernel[which, tap].to(x.dtype).unflatten(-1, (self.shape[2], -1))
            total = total + (base + own[:, :, tap, :, None]) * before
        return total.flatten(2).flatten(0, 1)


def around(convolution: BlockConvolution | None, x: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
    """`part(x)` of `x [T, h]`, with a convolution before and one after it, if there are any."""
    if convolution is None:
        return part(x)
    kernels = convolution.kernels(x)
    return convolution(part(convolution(x, kernels, 0)), kernels, 1)
