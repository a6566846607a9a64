"""Losses on the logits of an output layer that hold one chunk of them at a time, and nothing of that chunk twice.

With V = 128k, five heads and 2048 positions the logits of a plain loss, their logarithms and their gradients take some
ten gigabytes. Here the forward pass takes each chunk of positions through the output layer, overwrites its logits, some
rows at a time, with the gradient of the loss over them (softmax minus the labels, or q minus p), sends that back
through the layer at once and drops the chunk; the backward pass only scales what is ready. Nothing is computed twice.
torch 2.13 has `torch.nn.functional.linear_cross_entropy` for one weight matrix; the layer here is any function of the
states that does not need its own result for its gradient (a matrix, a matrix plus a low-rank product), and the loss may
be a divergence or a distance from another distribution, with a weight for each position."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 2**28  # of a chunk: 2092 positions at V = 128k; smaller chunks sum up the layer's gradient more often
LOGITS_IN_FP32 = 2**24  # of these at a time
Layer = Callable[[Tensor], Tensor]
Overwrite = Callable[[Tensor, int], Tensor]
"""`overwrite(logits [m, V], start) -> losses [m]` of positions from `start` on; each row of logits is replaced by the
gradient of its loss."""


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
    return linear_loss(cross_entropy(labels), layer, states, parameters, chunk)[0]


def linear_divergence(
    layer: Layer, states: Tensor, teacher: Tensor, parameters: Sequence[Tensor], chunk: int
) -> Tensor:
    """The sum over n of KL(p || q), p = softmax(layer(teacher)), q = softmax(layer(states)); no gradient reaches p.

    `states` and `teacher` are `[n, H]`; the other arguments are those of `linear_cross_entropy`."""
    return linear_loss(divergence(layer, teacher), layer, states, parameters, chunk)[0]


def linear_loss(
    overwrite: Overwrite,
    layer: Layer,
    states: Tensor,
    parameters: Sequence[Tensor],
    chunk: int,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of all positions' losses, each times its weight, and the losses `[n]` themselves, without a gradient.

    overwrite        `cross_entropy(…)`, `divergence(…)` or `total_variation(…)` of these positions
    weights          `[n]`; None: 1

    The other arguments are those of `linear_cross_entropy`."""
    return _Chunked.apply(layer, overwrite, chunk, weights, states, *parameters)


def cross_entropy(labels: Tensor) -> Overwrite:
    """-log q[labels], q = softmax(logits), `labels [n]`."""

    def overwrite(logits: Tensor, start: int) -> Tensor:
        log_q, here = _log_softmax(logits), labels[start : start + len(logits), None]
        losses = -log_q.gather(1, here)[:, 0]
        logits.copy_(log_q.exp_().scatter_add_(1, here, torch.full_like(here, -1, dtype=log_q.dtype)))
        return losses

    return overwrite


def divergence(teacher_layer: Layer, teacher: Tensor) -> Overwrite:
    """KL(p || q), p = softmax(teacher_layer(teacher)), `teacher [n, H]`."""

    def overwrite(logits: Tensor, start: int) -> Tensor:
        log_q = _log_softmax(logits)
        log_p = _log_softmax(teacher_layer(teacher[start : start + len(logits)]))
        p = log_p.exp()
        losses = (p * log_p.sub_(log_q)).sum(1)
        logits.copy_(log_q.exp_().sub_(p))
        return losses

    return overwrite


def total_variation(teacher_layer: Layer, teacher: Tensor) -> Overwrite:
    """sum |p - q| / 2, the probability that a token drawn from q is rejected (Leviathan et al. 2023, 3.2).

    p is that of `divergence`; where p and q are equal the slope is taken as 0."""

    def overwrite(logits: Tensor, start: int) -> Tensor:
        q = _log_softmax(logits).exp_()
        difference = _log_softmax(teacher_layer(teacher[start : start + len(logits)])).exp_().sub_(q).neg_()
        losses = difference.abs().sum(1) / 2
        slope = difference.sign_().div_(2)
        logits.copy_(slope.sub_((slope * q).sum(1, keepdim=True)).mul_(q))
        return losses

    return overwrite


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32, for float64 in that."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class _Chunked(torch.autograd.Function):
    """The weighted sum of the losses that `overwrite(logits, start)` returns, and these losses."""

    @staticmethod
    def forward(ctx, layer: Layer, overwrite: Overwrite, chunk: int, weights: Tensor | None, states: Tensor,
                *parameters: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        learned = ctx.needs_input_grad[4:]
        each = [states.new_zeros(0, dtype=torch.promote_types(states.dtype, torch.float32))]
        by_states, by_parameters = list[Tensor](), list[Tensor | None]([None] * len(parameters))
        for start in range(0, len(states), chunk):
            given = states[start : start + chunk], None if weights is None else weights[start : start + chunk]
            losses, found = _chunk(layer, overwrite, start, *given, parameters, learned)
            each.append(losses)
            by_states += [found.pop(0)] if learned[0] else []
            for i in (i for i, needed in enumerate(learned[1:]) if needed):
                gradient, before = found.pop(0), by_parameters[i]
                by_parameters[i] = gradient if before is None else before.add_(gradient)
                del gradient, before  # before the next one is made: each may be as large as the layer
        ctx.gradients = [torch.cat(by_states) if by_states else None, *by_parameters]
        all_losses = torch.cat(each)
        ctx.mark_non_differentiable(all_losses)
        return (all_losses if weights is None else all_losses * weights).sum(), all_losses

    @staticmethod
    @once_differentiable
    def backward(ctx, by_loss: Tensor, _):
        gradients, ctx.gradients = ctx.gradients, None  # handed over, not kept: what is kept would be copied into .grad
        scaled = (None if gradient is None else gradient.mul_(by_loss) for gradient in gradients)
        return None, None, None, None, *scaled


def _chunk(layer: Layer, overwrite: Overwrite, start: int, states: Tensor, weights: Tensor | None,
           parameters: Sequence[Tensor], learned: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The losses of one chunk, and the gradients of their weighted sum by the states and parameters that `learned`."""
    states = states.detach().requires_grad_(learned[0])
    with torch.set_grad_enabled(any(learned)):
        logits = layer(states)
    slope, rows = logits.detach(), max(1, LOGITS_IN_FP32 // logits.shape[1])
    losses = torch.cat([overwrite(slope[first : first + rows], start + first) for first in range(0, len(slope), rows)])
    if weights is not None:
        slope.mul_(weights[:, None])
    inputs = [x for x, needed in zip((states, *parameters), learned, strict=True) if needed]
    return losses, list(torch.autograd.grad(logits, inputs, slope)) if inputs else []
