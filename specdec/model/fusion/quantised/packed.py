"""Weights in 8 or 4 bits, in the layouts that our kernels read; `dequantise` says which numbers they stand for.

* `EightBitWeight`: integers or e4m3 numbers, times a scale for each block of outputs and inner positions.
* `Int4Weight`: integers 0 to 15 with a scale and a zero for each output and group of inner positions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.model.fusion.weight_layout import adjacent

FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
LEAST_UNIT = 64  # inner positions that a scale of 8-bit numbers is for at least, if kernels are to read them
SPAN, KERNEL_SPAN = 32, 16  # inner positions between two numbers of a word of four; the least that kernels multiply
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class EightBitWeight:
    """A matrix `[out, in]` of 8-bit numbers, each times the scale of its block.

    values: `[out, in]`, int8 or float8_e4m3fn.
    scales: float32 `[out / tall, in / group]`, rounded up.
    tall, group: outputs and inner positions of a block; (1, in) is one scale for each output.

    Raises ValueError for other types, and scales that are not one a block.

    >>> weight = EightBitWeight(torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), torch.tensor([[0.5], [2.0]]), 1, 2)
    >>> weight.dequantise(torch.float32)
    tensor([[ 0.5000, -1.0000],
            [ 6.0000,  8.0000]])
    """

    values: Tensor
    scales: Tensor
    tall: int
    group: int

    def __post_init__(self):
        (out, inner), blocks = self.values.shape, tuple(self.scales.shape)
        if self.values.dtype not in FORMATS or self.scales.dtype != torch.float32:
            raise ValueError(f"int8 or e4m3 with float32 scales, got {self.values.dtype} and {self.scales.dtype}")
        if blocks != (-(-out // self.tall), -(-inner // self.group)):
            raise ValueError(f"a scale for each {self.tall} x {self.group} of {out} x {inner} numbers, got {blocks}")

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the matrix it stands for."""
        return len(self.values), self.values.shape[1]

    @property
    def kind(self) -> str:
        """What weights of equal kind have in common: they can be joined and a kernel treats them alike."""
        return FORMATS[self.values.dtype] if self.group >= self.shape[1] else f"{FORMATS[self.values.dtype]} in blocks"

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        return self.values.nbytes + self.scales.nbytes

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The matrix `[out, in]`: products in float32, then rounded to `dtype`."""
        scales = self.scales.repeat_interleave(self.tall, 0)[: self.shape[0]] if self.tall > 1 else self.scales
        if self.scales.shape[1] > 1:
            scales = scales.repeat_interleave(self.group, 1)[:, : self.shape[1]]
        return (self.values.float() * scales).to(dtype)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> "EightBitWeight":
        """The first outputs, `weight[:rows]`, in the same memory."""
        values = self.values[: rows.stop]
        return replace(self, values=values, scales=self.scales[: -(-len(values) // self.tall)])

    def join(self, others: Sequence["EightBitWeight"]) -> "EightBitWeight":
        """Outputs of `others` behind its own; `values` of all become views of the result where PyTorch allows it."""
        weights = (self, *others)
        _require_alike(weights)
        tall = self.tall if all(w.tall == self.tall and len(w) % w.tall == 0 for w in weights) else 1
        scales = [w.scales if tall > 1 else w.scales.repeat_interleave(w.tall, 0)[: len(w)] for w in weights]
        return EightBitWeight(adjacent([w.values for w in weights]), torch.cat(scales), tall, self.group)


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """A matrix `[out, in]` of numbers 0 to 15 with a scale and a zero for each output and group.

    values: int16 `[out, in / 4]`; in blocks of 4 s positions, s = `span_of(group, in)`, word j holds positions j (the
        lowest four bits), j + s, j + 2 s and j + 3 s.
    scales: int32 `[out, in / group]`, bits of the scale in the low and of the zero in the high 16 bits.
    group: inner positions that share a scale.
    dtype: of the scales, float16 or bfloat16.
    shifted: False: the zero is an integer, a weight is scale (q - zero). True: the zero is of `dtype`, a weight is
        scale (q - 8) + zero, which is torchao's form.

    Made by `pack_int4`."""

    values: Tensor
    scales: Tensor
    group: int
    dtype: torch.dtype
    shifted: bool

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the matrix it stands for."""
        return len(self.values), 4 * self.values.shape[1]

    @property
    def kind(self) -> str:
        """What weights of equal kind have in common: they can be joined and a kernel treats them alike."""
        return f"int4 {str(self.dtype).removeprefix('torch.')}{' shifted' if self.shifted else ''}"

    @property
    def tall(self) -> int:
        """Outputs that share a scale."""
        return 1

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        return self.values.nbytes + self.scales.nbytes

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The matrix `[out, in]`: products (and sums) in float32, then rounded to `dtype`."""
        blocks = self.values.unflatten(1, (-1, span_of(self.group, self.shape[1])))
        numbers = torch.stack([blocks >> bits & 15 for bits in (0, 4, 8, 12)], 2).flatten(1)
        numbers = numbers.unflatten(1, (-1, self.group)).float()
        scale = _low_half(self.scales).view(self.dtype).float()[..., None]
        high = _low_half(self.scales >> 16)
        zero = (high.view(self.dtype) if self.shifted else high).float()[..., None]
        weights = scale * (numbers - 8) + zero if self.shifted else scale * (numbers - zero)
        return weights.flatten(1).to(dtype)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> "Int4Weight":
        """The first outputs, `weight[:rows]`, in the same memory."""
        return replace(self, values=self.values[: rows.stop], scales=self.scales[: rows.stop])

    def join(self, others: Sequence["Int4Weight"]) -> "Int4Weight":
        """Outputs of `others` behind its own; tensors of all become views of the result where PyTorch allows it."""
        weights = (self, *others)
        _require_alike(weights)
        values, scales = (adjacent([getattr(w, name) for w in weights]) for name in ("values", "scales"))
        return replace(self, values=values, scales=scales)


PackedWeight = EightBitWeight | Int4Weight


def alike(weights: Sequence[PackedWeight]) -> bool:
    """Whether weights can be joined: they are of one kind, width and group."""
    return len({(weight.kind, weight.shape[1], weight.group) for weight in weights}) <= 1


def _require_alike(weights: Sequence[PackedWeight]) -> None:
    if not alike(weights):
        raise ValueError(f"weights of one kind, width and group can be joined, got {[w.kind for w in weights]}")


def pack_int4(numbers: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Int4Weight:
    """`numbers [out, in]` from 0 to 15, 16-bit `scales [out, in / group]` and `zeros` of the same shape.

    Zeros are integers, or of the scales' type: see `Int4Weight.shifted`. Raises ValueError for a group that does not
    fit (`group_misfit`), and other scales.

    >>> pack_int4(torch.tensor([[3, 9] * 16]), torch.ones(1, 1).half(), torch.tensor([[8]]), 32).shape
    Traceback (most recent call last):
        ...
    ValueError: numbers are read in blocks of 64, which 32 inner positions do not fill
    """
    out, inner = numbers.shape
    if why := group_misfit(inner, group):
        raise ValueError(why)
    if scales.dtype not in SIXTEEN_BITS or scales.shape != (out, inner // group) or zeros.shape != scales.shape:
        raise ValueError(
            f"16-bit scales and zeros [{out}, {inner // group}] are wanted, got {scales.dtype} {list(scales.shape)} "
            f"and {list(zeros.shape)}"
        )
    shifted = zeros.is_floating_point()
    blocks = numbers.to(torch.int32).unflatten(1, (-1, 4, span_of(group, inner)))
    values = sum(blocks[:, :, part] << 4 * part for part in range(4)).to(torch.int16).flatten(1)
    high = zeros.to(scales.dtype).contiguous().view(torch.int16) if shifted else zeros
    words = (high.to(torch.int32) << 16) | (scales.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF)
    return Int4Weight(values, words, group, scales.dtype, shifted)


def group_misfit(inner: int, group: int) -> str | None:
    """Why `inner` positions cannot be packed in 4 bits with a scale for each `group`; None if they can."""
    if not is_group(group):
        return f"groups of 16, 32 or multiples of {2 * SPAN} inner positions are read, got {group}"
    if inner % group:
        return f"its {inner} inner positions do not divide into groups of {group}"
    if inner % (4 * span_of(group, inner)):
        return f"numbers are read in blocks of {4 * span_of(group, inner)}, which {inner} inner positions do not fill"
    return None


def is_group(group: int) -> bool:
    """Whether weights in 4 bits may have a scale for each `group` inner positions of a width that it divides."""
    return group in (KERNEL_SPAN, SPAN) or group > 0 and group % (2 * SPAN) == 0


def span_of(group: int, inner: int) -> int:
    """Inner positions between two numbers of a word, all of which have one scale; kernels read KERNEL_SPAN or more."""
    if group > SPAN:
        return SPAN
    return KERNEL_SPAN // 2 if group == KERNEL_SPAN and inner % (4 * KERNEL_SPAN) else KERNEL_SPAN


def _low_half(words: Tensor) -> Tensor:
    """The low 16 bits of 32-bit words, as int16."""
    return ((words << 16) >> 16).to(torch.int16)
