"""Packed numbers in kernels as 16-bit ones, in which they are exact.

On a GPU four bytes are converted at a time: their bits are put beside those of a power of two, which is then taken away
(128 + n is exact in bfloat16 for n < 128, 1024 + n in float16), or the fields of e4m3 numbers are moved."""

from functools import cache

import torch
import triton
import triton.language as tl

# $0 and $1: two numbers each; the products and sums are exact
_E4M3 = """{{ .reg .b32 bits, sign, scale, zero;
    mov.b32 scale, {scale}; mov.b32 zero, 0x80008000;
    prmt.b32 bits, $2, 0, 0x1404; and.b32 sign, bits, 0x80008000;
    and.b32 bits, bits, 0x7F007F00; shr.b32 bits, bits, {shift}; or.b32 bits, bits, sign;
    fma.rn.{kind} $0, bits, scale, zero;
    prmt.b32 bits, $2, 0, 0x3424; and.b32 sign, bits, 0x80008000;
    and.b32 bits, bits, 0x7F007F00; shr.b32 bits, bits, {shift}; or.b32 bits, bits, sign;
    fma.rn.{kind} $1, bits, scale, zero; }}"""
# $0 to $3: two words' first, second, third and fourth four bits, as 128 + n or 1024 + n; $5 to $8: what is added
_INT4 = """{{ .reg .b32 second, third, fourth, one, beside; mov.b32 one, {one}; mov.b32 beside, {beside};
    shr.b32 second, $4, 4; shr.b32 third, $4, 8; shr.b32 fourth, $4, 12;
    lop3.b32 $0, $4, 0x000F000F, beside, 0xEA; fma.rn.{kind} $0, $0, one, $5;
    lop3.b32 $1, second, 0x000F000F, beside, 0xEA; fma.rn.{kind} $1, $1, one, $6;
    lop3.b32 $2, third, 0x000F000F, beside, 0xEA; fma.rn.{kind} $2, $2, one, $7;
    lop3.b32 $3, fourth, 0x000F000F, beside, 0xEA; fma.rn.{kind} $3, $3, one, $8; }}"""
# scales are 2 ** 120 and 2 ** 8: how much larger the exponents of the wider formats are
E4M3_TO_BFLOAT16 = tl.constexpr(_E4M3.format(kind="bf16x2", shift=4, scale="0x7B807B80"))
E4M3_TO_FLOAT16 = tl.constexpr(_E4M3.format(kind="f16x2", shift=1, scale="0x5C005C00"))
INT4_TO_BFLOAT16 = tl.constexpr(_INT4.format(kind="bf16x2", one="0x3F803F80", beside="0x43004300"))
INT4_TO_FLOAT16 = tl.constexpr(_INT4.format(kind="f16x2", one="0x3C003C00", beside="0x64006400"))


@cache
def converts_fast(device: torch.device) -> bool:
    """Whether a device has the instructions above."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@triton.jit
def eight_bits(tile, like, FP8: tl.constexpr, FAST: tl.constexpr):
    """Bytes, int8 or e4m3 in int8, as the type that the pointer `like` is for."""
    BFLOAT: tl.constexpr = like.dtype.element_ty == tl.bfloat16
    if not FP8:
        numbers = tile.to(tl.float32).to(like.dtype.element_ty)  # which Triton does by such instructions
    elif FAST:
        numbers = _convert(tile, E4M3_TO_BFLOAT16 if BFLOAT else E4M3_TO_FLOAT16, like)
    else:  # by way of float16, which has the same fields with more bits
        bits = tile.to(tl.int16)  # sign-extended: bit 15 is the sign
        half = ((bits & -32768) | ((bits & 127) << 7)).to(tl.float16, bitcast=True)
        numbers = (half.to(tl.float32) * 256.0).to(like.dtype.element_ty)  # exponents are 7 and 15 above the true ones
    return numbers


@triton.jit
def _convert(tile, ASM: tl.constexpr, like):
    return tl.inline_asm_elementwise(ASM, "=&r,=&r,r", [tile], dtype=like.dtype.element_ty, is_pure=True, pack=4)


@triton.jit
def four_bits(words, zeros, like, FAST: tl.constexpr):
    """The four numbers of each 16-bit word, less the integers `zeros` of each, as the type that `like` is for."""
    BFLOAT: tl.constexpr = like.dtype.element_ty == tl.bfloat16
    if FAST:
        BESIDE: tl.constexpr = -128 if BFLOAT else -1024
        a, b, c, d = tl.inline_asm_elementwise(
            INT4_TO_BFLOAT16 if BFLOAT else INT4_TO_FLOAT16,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [
                words,
                (BESIDE - zeros[0]).to(tl.float32).to(like.dtype.element_ty),
                (BESIDE - zeros[1]).to(tl.float32).to(like.dtype.element_ty),
                (BESIDE - zeros[2]).to(tl.float32).to(like.dtype.element_ty),
                (BESIDE - zeros[3]).to(tl.float32).to(like.dtype.element_ty),
            ],
            dtype=(like.dtype.element_ty, like.dtype.element_ty, like.dtype.element_ty, like.dtype.element_ty),
            is_pure=True,
            pack=2,
        )
    else:
        bits = words.to(tl.int32)
        a = ((bits & 15) - zeros[0]).to(tl.float32).to(like.dtype.element_ty)
        b = ((bits >> 4 & 15) - zeros[1]).to(tl.float32).to(like.dtype.element_ty)
        c = ((bits >> 8 & 15) - zeros[2]).to(tl.float32).to(like.dtype.element_ty)
        d = ((bits >> 12 & 15) - zeros[3]).to(tl.float32).to(like.dtype.element_ty)
    return a, b, c, d
