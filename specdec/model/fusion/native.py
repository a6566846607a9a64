"""Products, norms, rotations and gates as kernels in C, in a recording or at once (`attention.recording.Sink`).

Each function returns None for what its kernel does not take, which then runs as PyTorch operations."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from attention.native.call import Call
from attention.native.library import Library
from attention.recorded_steps import is_plain
from attention.recording import Sink

HERE = Path(__file__).parent
LINEAR, POINTWISE = Library(HERE / "skinny_linear_kernel.c"), Library(HERE / "pointwise_kernel.c")
DTYPES = torch.float32, torch.bfloat16  # of products; the rest takes float32
MAX_ROWS = 64  # of a product with a matrix that is larger than CACHED: more rows are as fast in PyTorch
CACHED = 1 << 20  # numbers
PIECE = 1 << 16  # numbers in the rows that a product takes at a time
GATES = {"silu": 0, "gelu_tanh": 1}


def linear(sink: Sink, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    """`x [..., in]` @ `weight [out, in]`.T + `bias [out]` of each, side by side: `[..., sum of out]`.

    A sum after a single one joins it."""
    rows, half = _rows(x), x.dtype == torch.bfloat16
    if rows is None or x.dtype not in DTYPES:
        return None
    if not all(_multiplies(x, rows[0], *pair) for pair in zip(weights, biases, strict=True)):
        return None
    (count, x_row), inputs, width = rows, x.shape[-1], sum(len(weight) for weight in weights)
    most = max(24, PIECE // inputs // 24 * 24)  # rows at a time

    def into(y: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None = None) -> Call:
        sizes = count, inputs, len(weight), x_row, weight.stride(0), width, width, int(half), most
        adding = (lambda other, out: into(out, weight, bias, other)) if added is None and len(weights) == 1 else None
        return Call(LINEAR, "skinny_linear", x, weight, bias, added, y, wide, *sizes, adding=adding)

    with sink.pause():
        y = x.new_empty(*x.shape[:-1], width)
        wide = x.new_empty(min(count, most), inputs, dtype=torch.float32) if half else None
        places = y.split([len(weight) for weight in weights], -1)
    for index, (weight, bias, place) in enumerate(zip(weights, biases, places, strict=True)):
        reads = x, weight, *(() if bias is None else (bias,))
        sink.leaf(into(place, weight, bias), *reads, outputs=[] if index else [y])
    return y


def _multiplies(x: Tensor, rows: int, weight: Tensor, bias: Tensor | None) -> bool:
    given = [weight] if bias is None else [weight, bias]
    if weight.shape[1:] != x.shape[-1:] or bias is not None and bias.shape != weight.shape[:1]:
        return False  # PyTorch says what is wrong
    plain = (p.dtype == x.dtype and p.device == x.device and is_plain(p) for p in given)
    if x.device.type != "cpu" or not all(plain) or any(p.stride(-1) != 1 for p in given):
        return False
    return rows > 0 and (rows <= MAX_ROWS or weight.numel() <= CACHED)


def rms_norm(sink: Sink, x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor | None:
    """See `pointwise_reference.rms_norm`."""
    grid = _grid(x)
    if grid is None or not _floats(x, weight) or weight.stride(0) != 1 or weight.shape != x.shape[-1:]:
        return None
    with sink.pause():
        y = x.new_empty(x.shape)
    (outer, inner), (x_outer, x_inner) = grid
    sizes = outer, inner, x.shape[-1], x_outer, x_inner, int(offset), float(eps)
    sink.leaf(Call(POINTWISE, "rms_norm", x, weight, y, *sizes), x, weight, outputs=[y])
    return y


def rotate(sink: Sink, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """One of the tensors of `pointwise_reference.rotate`."""
    if x.ndim != 4 or not _floats(x, cos, sin) or any(part.stride(-1) != 1 for part in (x, cos, sin)):
        return None
    rows, heads, tokens, width = x.shape
    if rows != 1 or width % 2 or not cos.shape == sin.shape == (1, tokens, width):
        return None
    with sink.pause():
        y = x.new_empty(x.shape)
    sizes = heads, tokens, width, *x.stride()[1:3], cos.stride(1), sin.stride(1)
    sink.leaf(Call(POINTWISE, "rotate", x, cos, sin, y, *sizes), x, cos, sin, outputs=[y])
    return y


def gate(sink: Sink, both: Tensor, activation: str) -> Tensor | None:
    """See `pointwise_reference.gate`."""
    rows = _rows(both)
    if rows is None or not _floats(both) or activation not in GATES:
        return None
    width = both.shape[-1] // 2
    with sink.pause():
        y = both.new_empty(*both.shape[:-1], width)
    sink.leaf(Call(POINTWISE, "gate", both, y, rows[0], width, rows[1], GATES[activation]), both, outputs=[y])
    return y


def _floats(*given: Tensor) -> bool:
    return all(x.dtype == torch.float32 and x.device.type == "cpu" and is_plain(x) for x in given)


def _rows(x: Tensor) -> tuple[int, int] | None:
    """The number of rows of `x [..., width]` and the distance between them; None where they have no single one."""
    grid = _grid(x)
    if grid is None:
        return None
    (outer, inner), (outer_stride, inner_stride) = grid
    if outer == 1 or outer_stride == inner * inner_stride:
        return outer * inner, inner_stride
    return (outer, outer_stride) if inner == 1 else None


def _grid(x: Tensor) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The sizes and strides of the leading dimensions of `x [..., width]` as two; None where it takes more."""
    if x.ndim < 1 or x.stride(-1) != 1 or not x.numel():
        return None
    merged: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = merged[-1][0] * size, stride
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    outer, inner = [*[(1, 0)] * (2 - len(merged)), *merged]
    return (outer[0], inner[0]), (outer[1], inner[1])
