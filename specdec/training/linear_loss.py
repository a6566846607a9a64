"""Losses on the logits of an output layer that hold one chunk of them at a time, and nothing of that chunk twice.

With V = 128k, five heads and 2048 positions the logits of a plain loss, their logarithms and their gradients take some
ten gigabytes. Here the forward pass takes each chunk of positions through the output layer, overwrites its logits, some
rows at a time, with the gradient of the loss over them (softmax minus the labels, or q minus p), sends that back
through the layer at once and drops the chunk; the backward pass only scales what is ready. Nothing is computed twice.
torch 2.13 has `torch.nn.functional.linear_cross_entropy` for one weight matrix; the layer here is any function of the
states that does not need its own result for its gradient (a matrix, a matrix plus a low-rank product), and the loss may
be a divergence or a distance from another distribution, with a weight for each position."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention.dispatch import resolve

LOGITS = 2**28  # of a chunk: 2092 positions at V = 128k; smaller chunks sum up the layer's gradient more often
LOGITS_IN_FP32 = 2**24  # of these at a time
Layer = Callable[[Tensor], Tensor]
Overwrite = Callable[[Tensor, int], Tensor]
"""`overwrite(logits [m, V], start) -> losses [m]` of positions from `start` on; each row of logits is replaced by the
gradient of its loss."""


def positions_at_once(vocab_size: int, logits: int = LOGITS) -> int:
    """How many positions make a chunk of about so many logits.

    >>> positions_at_once(128_256)
    2092
    """
    return max(1, logits // vocab_size)


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
    return linear_loss(divergence(Teacher(layer, teacher)), layer, states, parameters, chunk)[0]


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


def cross_entropy(labels: Tensor, none: Tensor | None = None) -> Overwrite:
    """-log q[labels], q = softmax(logits), `labels [n]`; with `none`, bool `[n]`, 0 where that is true."""

    def overwrite(logits: Tensor, start: int) -> Tensor:
        log_q, here = _log_softmax(logits), labels[start : start + len(logits), None]
        losses = -log_q.gather(1, here)[:, 0]
        logits.copy_(log_q.exp_().scatter_add_(1, here, torch.full_like(here, -1, dtype=log_q.dtype)))
        if none is not None:
            without = none[start : start + len(logits)]
            logits.masked_fill_(without[:, None], 0)
            losses = losses.masked_fill(without, 0)
        return losses

    return _in_parts(overwrite)


@dataclass(frozen=True, slots=True)
class Teacher:
    """The distributions p that positions learn from: softmax(layer(states)).

    layer      called without gradients
    states     `[u, H]`
    rows       which of them each position has, int64 `[n]` on the CPU, none smaller than the one before (None: its own)
    on_device  the same, int32, where the states are
    """

    layer: Layer
    states: Tensor
    rows: Tensor | None = None
    on_device: Tensor | None = None

    def logits(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Those of the positions from `start` on, `[v, V]`, each once, and which each position has, int32 `[count]`."""
        if self.rows is None or self.on_device is None:
            return self.layer(self.states[start : start + count]), None
        first, last = int(self.rows[start]), int(self.rows[start + count - 1])
        return self.layer(self.states[first : last + 1]), self.on_device[start : start + count] - first


def divergence(teacher: Teacher, impl: str | None = None) -> Overwrite:
    """KL(p || q), p the teacher's; `impl` as in `attention.dispatch.resolve`."""

    def overwrite(logits: Tensor, start: int) -> Tensor:
        log_q = _log_softmax(logits)
        log_p = _expand(_log_softmax, *teacher.logits(start, len(logits)))
        p = log_p.exp()
        losses = (p * log_p.sub_(log_q)).sum(1)
        logits.copy_(log_q.exp_().sub_(p))
        return losses

    return _by_kernel("kl", teacher, _in_parts(overwrite), impl)


def total_variation(teacher: Teacher, impl: str | None = None) -> Overwrite:
    """sum |p - q| / 2, the probability that a token drawn from q is rejected (Leviathan et al. 2023, 3.2).

    p and `impl` are those of `divergence`; where p and q are equal the slope is taken as 0."""

    def overwrite(logits: Tensor, start: int) -> Tensor:
        q = _log_softmax(logits).exp_()
        p = _expand(lambda given: _log_softmax(given).exp_(), *teacher.logits(start, len(logits)))
        difference = p.sub_(q).neg_()
        losses = difference.abs().sum(1) / 2
        slope = difference.sign_().div_(2)
        logits.copy_(slope.sub_((slope * q).sum(1, keepdim=True)).mul_(q))
        return losses

    return _by_kernel("tv", teacher, _in_parts(overwrite), impl)


DISTANCES = {"kl": divergence, "tv": total_variation}


def weighted_sum(parts: Sequence[tuple[float, Overwrite]], each: Tensor) -> Overwrite:
    """The sum of several losses times their weights; column i of `each [n, parts]` gets those of the i-th.

    All but the last are computed on a copy of some rows' logits at a time. A part of weight 0 is computed too."""
    weights = each.new_tensor([weight for weight, _ in parts])

    def overwrite(logits: Tensor, start: int) -> Tensor:
        rows = slice(start, start + len(logits))
        slopes = [logits.clone() for _ in parts[1:]] + [logits]
        for column, ((weight, part), slope) in enumerate(zip(parts, slopes, strict=True)):
            each[rows, column] = part(slope, start).to(each.dtype)
            if weight != 1:
                slope.mul_(weight)
        for slope in slopes[:-1]:
            logits.add_(slope)
        return each[rows] @ weights

    return _in_parts(overwrite)


def _expand(of: Callable[[Tensor], Tensor], logits: Tensor, rows: Tensor | None) -> Tensor:
    """`of(logits)` for each position, a tensor of its own."""
    found = of(logits)
    return found if rows is None else found[rows.long()]


def _in_parts(overwrite: Overwrite) -> Overwrite:
    """The same, so many positions at a time that their logits in float32 are few."""

    def parts(logits: Tensor, start: int) -> Tensor:
        rows = max(1, LOGITS_IN_FP32 // logits.shape[1])
        places = range(0, len(logits), rows)
        return torch.cat([overwrite(logits[place : place + rows], start + place) for place in places])

    return parts


def _by_kernel(kind: str, teacher: Teacher, reference: Overwrite, impl: str | None) -> Overwrite:
    """A distance by the Triton kernel where that can be, which needs no logits in float32."""

    def overwrite(logits: Tensor, start: int) -> Tensor:
        reason = lambda: None if logits.dtype != torch.float64 else "it takes no float64"
        if resolve(impl, logits.device, reason) == "reference":
            return reference(logits, start)
        from specdec.training.distance_kernel import launch_distance

        return launch_distance(logits, *teacher.logits(start, len(logits)), kind)

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
    slope = logits.detach()
    losses = overwrite(slope, start)
    if weights is not None:
        slope.mul_(weights[:, None])
    inputs = [x for x, needed in zip((states, *parameters), learned, strict=True) if needed]
    return losses, list(torch.autograd.grad(logits, inputs, slope)) if inputs else []
