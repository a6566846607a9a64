"""Losses on the logits of an output layer that hold one chunk of them at a time, and nothing of that chunk twice.

With V = 128k, five heads and 2048 positions the logits of a plain loss, their logarithms and their gradients take some
ten gigabytes. Here the forward pass takes each chunk of positions through the output layer, overwrites its logits, some
rows at a time, with the gradient of the loss over them (softmax minus the labels, or q minus p), sends that back
through the layer at once and drops the chunk; the backward pass only scales what is ready. Nothing is computed twice.
torch 2.13 has `torch.nn.functional.linear_cross_entropy` for one weight matrix; the layer here is any function of the
states that does not need its own result for its gradient (a matrix, a matrix plus a low-rank product), and the loss may
be a divergence."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 2**28  # of a chunk: 2092 positions at V = 128k; smaller chunks sum up the layer's gradient more often
LOGITS_IN_FP32 = 2**24  # of these at a time
Layer = Callable[[Tensor], Tensor]
Overwrite = Callable[[Tensor, int], Tensor]


def positions_at_once(vocab_size: int) -> int:
    """How many positions make a chunk of about 2^28 logits.

    >>> positions_at_once(128_256)
    2092
    """
    return max(1, LOGITS // vocab_size)


def linear_cross_entropy(
    layer: Layer, states: Tensor, labels: Tensor, parameters: Sequence[Tensor], chunk: int
) -> Tensor:
    """The sum over n of -log softmax(layer(states))[labels], `chunk` positions at a time.

    `states [n, H]`, `labels [n]`; `parameters` are the weights of `layer` that are learned. Raises ValueError for a
    chunk below 1."""

    def overwrite(logits: Tensor, start: int) -> Tensor:
        log_q, here = logits.log_softmax(-1, dtype=torch.float32), labels[start : start + len(logits), None]
        loss = -log_q.gather(1, here).sum()
        logits.copy_(log_q.exp_().scatter_add_(1, here, torch.full_like(here, -1, dtype=torch.float32)))
        return loss

    return _Chunked.apply(layer, overwrite, chunk, states, *parameters)


def linear_divergence(
    layer: Layer, states: Tensor, teacher: Tensor, parameters: Sequence[Tensor], chunk: int
) -> Tensor:
    """The sum over n of KL(p || q), p = softmax(layer(teacher)), q = softmax(layer(states)); no gradient reaches p.

    `states` and `teacher` are `[n, H]`; the other arguments are those of `linear_cross_entropy`."""

    def overwrite(logits: Tensor, start: int) -> Tensor:
        log_q = logits.log_softmax(-1, dtype=torch.float32)
        log_p = layer(teacher[start : start + len(logits)]).log_softmax(-1, dtype=torch.float32)
        p = log_p.exp()
        loss = (p * log_p.sub_(log_q)).sum()
        logits.copy_(log_q.exp_().sub_(p))
        return loss

    return _Chunked.apply(layer, overwrite, chunk, states, *parameters)


class _Chunked(torch.autograd.Function):
    """The sum of the losses that `overwrite(logits, start)` returns; it replaces logits by the loss's gradient."""

    @staticmethod
    def forward(ctx, layer: Layer, overwrite: Overwrite, chunk: int, states: Tensor, *parameters: Tensor) -> Tensor:
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        learned = ctx.needs_input_grad[3:]
        total, by_states = states.new_zeros((), dtype=torch.float32), []
        by_parameters: list[Tensor | None] = [None] * len(parameters)
        for start in range(0, len(states), chunk):
            loss, found = _chunk(layer, overwrite, start, states[start : start + chunk], parameters, learned)
            total += loss
            by_states += [found.pop(0)] if learned[0] else []
            for i in (i for i, needed in enumerate(learned[1:]) if needed):
                gradient, before = found.pop(0), by_parameters[i]
                by_parameters[i] = gradient if before is None else before.add_(gradient)
                del gradient, before  # before the next one is made: each may be as large as the layer
        ctx.gradients = [torch.cat(by_states) if by_states else None, *by_parameters]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, by_loss: Tensor):
        gradients, ctx.gradients = ctx.gradients, None  # handed over, not kept: what is kept would be copied into .grad
        return None, None, None, *(None if gradient is None else gradient.mul_(by_loss) for gradient in gradients)


def _chunk(layer: Layer, overwrite: Overwrite, start: int, states: Tensor, parameters: Sequence[Tensor],
           learned: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The loss of one chunk and its gradients by the states and parameters that are `learned`."""
    states = states.detach().requires_grad_(learned[0])
    with torch.set_grad_enabled(any(learned)):
        logits = layer(states)
    slope, rows = logits.detach(), max(1, LOGITS_IN_FP32 // logits.shape[1])
    losses = (overwrite(slope[first : first + rows], start + first) for first in range(0, len(slope), rows))
    loss = reduce(torch.add, losses)
    inputs = [x for x, needed in zip((states, *parameters), learned, strict=True) if needed]
    return loss, list(torch.autograd.grad(logits, inputs, slope)) if inputs else []
