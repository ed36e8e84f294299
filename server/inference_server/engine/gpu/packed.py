"""Matrix products on a GPU whose weights are read packed and expanded in registers. Owns no buffer.

The layout is that of :mod:`inference_server.engine.quantization.planes`. Three kernels:

* one vector (:func:`gemv`, :func:`gemv_gate_up`): a thread takes 16 bytes of each of several rows at a time. Weights
  become float32 without being converted: a 4-bit field that stays where it is, with the bits of 1.0 or-ed around it, is
  ``1 + q / 128`` or ``1 + q / 2048``, and what is too much is subtracted once for all, from the sums. Scales are applied
  to sums of a group;
* few rows (:func:`linear`): fields become bfloat16 two at a time, exactly, in the registers that the matrix units read
  (swapped roles as in :mod:`inference_server.engine.gpu.linear`). The scale goes onto the weights, or onto a group's sum;
* many rows (:func:`expand`): the matrix is written out whole, for cuBLAS.

On a grid with an offset the weights are ``scale (q - 8) + centre``: around the middle of the grid, both terms are small
enough to be rounded to bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from inference_server.engine.gpu import kernels
from inference_server.engine.gpu.packed_tiles import PackedTile, VectorTile, vector_tile
from inference_server.engine.quantization.planes import UNITS, PlaneMatrix

FLOAT, ROW, SYMMETRIC, ZERO_POINT, MINIMUM = (tl.constexpr(number) for number in range(-1, 4))
"""What stands behind the rows: a scale of a whole row, or for each group a scale alone or with an offset.

Up to ``ROW`` it is the first; what it scales are floating-point numbers or integers.
"""
VECTOR = 8
"""Units that a thread takes at once: 16 bytes."""


def grid_number(matrix: PlaneMatrix) -> int:
    """Which of these a matrix has, as the kernels number them."""
    scheme = matrix.scheme
    if scheme.bits == 8:
        return -1 if scheme.grid == "float" else 1 if scheme.group else 0
    return {"symmetric": 1, "zero-point": 2, "minimum": 3}[scheme.grid]


# -- numbers of a group ------------------------------------------------------------------------------------------------


@triton.jit
def _scale_of(number, GRID: tl.constexpr):
    """The scale, float32."""
    if GRID <= 1:
        scale = number.to(tl.float32, bitcast=True)
    else:
        scale = (number & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale


@triton.jit
def _offset_of(number):
    """Zero or minimum, float32."""
    return ((number >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _centre_of(number, scale, GRID: tl.constexpr):
    """What a weight of 8 is, float32."""
    offset = _offset_of(number)
    return scale * (8.0 - offset) if GRID == 2 else offset + 8.0 * scale


# -- one vector --------------------------------------------------------------------------------------------------------


@triton.jit
def _run(x, gain, squares, column, K: tl.constexpr, V: tl.constexpr, NORM: tl.constexpr):
    """Eight neighbouring inputs of each thread: those of even units, and those of odd ones, each ``[V, 4]``."""
    at = column[:, None] + tl.arange(0, 8)[None, :]
    inside = (column < K)[:, None]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        squares += tl.sum(value * value, axis=1)
        value = value * tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, (V, 4, 2)))
    return even, odd, squares


ASSEMBLY = tl.constexpr(not kernels.INTERPRETED)
FIELD16, FIELD12 = (tl.constexpr(f"lop3.b32 $0, $1, {15 << bit}, 0x3f800000, 0xea;") for bit in (16, 12))
BYTE_AT0, BYTE_AT8 = (
    tl.constexpr(f"lop3.b32 $0, $1, {0xFF << bit}, {0x4B000000 | 0x80 << bit}, 0x6a;") for bit in (0, 8)
)


@triton.jit
def _field(word, BIT: tl.constexpr):
    """``1 + q / 128`` of the field at bit 16, ``1 + q / 2048`` of that at bit 12."""
    if ASSEMBLY:  # left alone, the compiler makes two instructions of it
        assembly: tl.constexpr = FIELD16 if BIT == 16 else FIELD12
        value = tl.inline_asm_elementwise(assembly, "=f,r", [word], dtype=tl.float32, is_pure=True, pack=1)
    else:
        value = ((word & (15 << BIT)) | 0x3F800000).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _byte(word, BIT: tl.constexpr):
    """The byte at bit 0 as a signed number, or that at bit 8 times 256; exact."""
    # The sign bit is turned over, so that the byte counts from -128 up, in the last bits of 2 ** 23.
    if ASSEMBLY:
        assembly: tl.constexpr = BYTE_AT0 if BIT == 0 else BYTE_AT8
        biased = tl.inline_asm_elementwise(assembly, "=f,r", [word], dtype=tl.float32, is_pure=True, pack=1)
    else:
        biased = ((word & (0xFF << BIT)) ^ (0x4B000000 | (0x80 << BIT))).to(tl.float32, bitcast=True)
    return biased - (8388608.0 + 128.0 * (1 << BIT))


FLOATS = tl.constexpr(
    "{ .reg .b16 l, h, a, b; .reg .b32 t; mov.b32 {l, h}, $4; "
    "cvt.rn.f16x2.e4m3x2 t, l; mov.b32 {a, b}, t; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; "
    "cvt.rn.f16x2.e4m3x2 t, h; mov.b32 {a, b}, t; cvt.f32.f16 $2, a; cvt.f32.f16 $3, b; }"
)


@triton.jit
def _float(word, BIT: tl.constexpr):
    """The byte at a bit as the floating-point number that it is."""
    return ((word >> BIT) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def _floats(word):
    """The four bytes of a word, the lowest first, as the floating-point numbers that they are."""
    if ASSEMBLY:
        numbers = tl.inline_asm_elementwise(
            FLOATS, "=f,=f,=f,=f,r", [word], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        numbers = _float(word, 0), _float(word, 8), _float(word, 16), _float(word, 24)
    return numbers


@triton.jit
def _quarters(tensor, ROWS: tl.constexpr, V: tl.constexpr):
    """``[ROWS, V, 4]`` as four ``[ROWS, V]``."""
    even, odd = tl.split(tl.reshape(tensor, (ROWS, V, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _sums4(
    word, even0, odd0, even1, odd1, even2, odd2, even3, odd3, number, COUNT: tl.constexpr, GRID: tl.constexpr,
    BN: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """What a tile of 4-bit words adds to its rows' sums, ``[BN, V]``; ``number`` has those of the ``COUNT`` groups."""
    left, right, turned = word << 8, word >> 8, (word << 16) | (word >> 16)
    # Fields 1 and 3 stand at bit 12: their inputs were multiplied by 16 for it.
    begin0 = -(1.0 + 1.0 / 16) * (even0 + odd0)
    begin1 = -(1.0 + 1.0 / 256) * (even1 + odd1)
    begin2 = -(1.0 + 1.0 / 16) * (even2 + odd2)
    begin3 = -(1.0 + 1.0 / 256) * (even3 + odd3)
    if COUNT == 1:
        total = _field(turned, 16) * even0[None] + (begin0 + begin1 + begin2 + begin3)[None]
        total += _field(word, 16) * odd0[None]
        total += _field(left, 12) * even1[None]
        total += _field(right, 12) * odd1[None]
        total += _field(left, 16) * even2[None]
        total += _field(right, 16) * odd2[None]
        total += _field(word, 12) * even3[None]
        total += _field(turned, 12) * odd3[None]
        scale = _scale_of(number, GRID)
        added = 128.0 * scale * tl.sum(total, axis=2)
        if GRID > 1:
            inputs = even0 + odd0 + even2 + odd2 + (even1 + odd1 + even3 + odd3) / 16
            added += _centre_of(number, scale, GRID) * tl.sum(inputs, axis=1)[None]
    elif COUNT == 2:
        number0, number1 = tl.split(number)
        total0 = _field(turned, 16) * even0[None] + (begin0 + begin1)[None]
        total0 += _field(word, 16) * odd0[None]
        total0 += _field(left, 12) * even1[None]
        total0 += _field(right, 12) * odd1[None]
        total1 = _field(left, 16) * even2[None] + (begin2 + begin3)[None]
        total1 += _field(right, 16) * odd2[None]
        total1 += _field(word, 12) * even3[None]
        total1 += _field(turned, 12) * odd3[None]
        scale0, scale1 = _scale_of(number0, GRID), _scale_of(number1, GRID)
        whole = scale0[:, :, None] * total0 + scale1[:, :, None] * total1
        added = 128.0 * tl.sum(whole, axis=2)
        if GRID > 1:
            inputs0 = tl.sum(even0 + odd0 + (even1 + odd1) / 16, axis=1)
            inputs1 = tl.sum(even2 + odd2 + (even3 + odd3) / 16, axis=1)
            added += (
                _centre_of(number0, scale0, GRID) * inputs0[None] + _centre_of(number1, scale1, GRID) * inputs1[None]
            )
    else:
        number0, number1, number2, number3 = _quarters(number, BN, V)
        scale0, scale1 = _scale_of(number0, GRID), _scale_of(number1, GRID)
        scale2, scale3 = _scale_of(number2, GRID), _scale_of(number3, GRID)
        whole = scale0[:, :, None] * (_field(turned, 16) * even0[None] + begin0[None] + _field(word, 16) * odd0[None])
        whole += scale1[:, :, None] * (_field(left, 12) * even1[None] + begin1[None] + _field(right, 12) * odd1[None])
        whole += scale2[:, :, None] * (_field(left, 16) * even2[None] + begin2[None] + _field(right, 16) * odd2[None])
        whole += scale3[:, :, None] * (_field(word, 12) * even3[None] + begin3[None] + _field(turned, 12) * odd3[None])
        added = 128.0 * tl.sum(whole, axis=2)
        if GRID > 1:
            added += _centre_of(number0, scale0, GRID) * tl.sum(even0 + odd0, axis=1)[None]
            added += _centre_of(number1, scale1, GRID) * (tl.sum(even1 + odd1, axis=1) / 16)[None]
            added += _centre_of(number2, scale2, GRID) * tl.sum(even2 + odd2, axis=1)[None]
            added += _centre_of(number3, scale3, GRID) * (tl.sum(even3 + odd3, axis=1) / 16)[None]
    return added


def _dot_assembly(mask: int) -> tl.constexpr:
    """Inline assembly: a field of each of eight units times eight inputs, added to two running sums."""
    each = "".join(f"and.b32 t, ${1 + word}, {mask}; fma.rn.f16x2 s, t, ${5 + word}, s; " for word in range(4))
    return tl.constexpr("{ .reg .b32 t, s; mov.b32 s, $9; " + each + "mov.b32 $0, s; }")


# As it stands in the last bits of a float16 a field is a number already: q, or 16 q, times 2 ** -24. Multiplied by inputs
# that reach up to 2 ** 15, products are large enough to lose nothing that counts.
DOT_LOW, DOT_HIGH = _dot_assembly(0x000F000F), _dot_assembly(0x00F000F0)
LARGEST_INPUT = tl.constexpr(32768.0)
OF_FIELDS = tl.constexpr(2.0**24 / 32768.0)
"""What sums of such products have to be multiplied by, where the largest input was 1."""
HALVES = tl.constexpr(
    "{ .reg .b16 l, h; .reg .f32 a, b; mov.b32 {l, h}, $1; cvt.f32.f16 a, l; cvt.f32.f16 b, h; add.f32 $0, a, b; }"
)


@triton.jit
def _dots(words0, words1, words2, words3, even, odd, factor, sums, HIGH: tl.constexpr, V: tl.constexpr):
    """Add a field's products to two running sums in float16 for each piece of a row."""
    pairs = tl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even * factor, odd * factor], dtype=tl.int32, is_pure=True, pack=1
    )
    pairs0, pairs1, pairs2, pairs3 = _quarters(pairs, 1, V)
    assembly: tl.constexpr = DOT_HIGH if HIGH else DOT_LOW
    return tl.inline_asm_elementwise(
        assembly, "=r,r,r,r,r,r,r,r,r,r", [words0, words1, words2, words3, pairs0, pairs1, pairs2, pairs3, sums],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _summed(sums):
    """The two running sums together, float32."""
    return tl.inline_asm_elementwise(HALVES, "=f,r", [sums], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _group_sum(total, inputs, largest, number, GRID: tl.constexpr):
    """What a group adds to a row: of its sum of ``q`` times inputs over ``largest``, and the sum of the inputs."""
    scale = _scale_of(number, GRID)
    if GRID == 3:
        added = scale * (total * largest) + _offset_of(number) * inputs
    elif GRID == 2:
        added = scale * (total * largest - _offset_of(number) * inputs)
    else:
        added = scale * (total * largest - 8.0 * inputs)
    return added


@triton.jit
def _quick_sums4(
    word, even0, odd0, even1, odd1, even2, odd2, even3, odd3, number, COUNT: tl.constexpr, GRID: tl.constexpr,
    BN: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """As :func:`_sums4`, with eight products at a time added up in float16.

    Each thread scales its inputs so that the largest is 1: whatever they are, nothing overflows.
    """
    largest = tl.maximum(tl.maximum(tl.abs(even0), tl.abs(odd0)), tl.maximum(tl.abs(even1), tl.abs(odd1)))
    largest = tl.maximum(
        largest, tl.maximum(tl.maximum(tl.abs(even2), tl.abs(odd2)), tl.maximum(tl.abs(even3), tl.abs(odd3)))
    )
    largest = tl.maximum(tl.max(largest, axis=1), 1e-30)
    low = (LARGEST_INPUT / largest)[:, None]
    high = low / 16
    largest = (largest * OF_FIELDS)[None]
    words0, words1, words2, words3 = _quarters(word.to(tl.int32, bitcast=True), BN, V)
    none = tl.zeros((BN, V), dtype=tl.int32)
    sums0 = _dots(words0, words1, words2, words3, even0, odd0, low, none, False, V)
    sums1 = _dots(words0, words1, words2, words3, even1, odd1, high, sums0 if COUNT < 4 else none, True, V)
    words0, words1, words2, words3 = words0 >> 8, words1 >> 8, words2 >> 8, words3 >> 8
    sums2 = _dots(words0, words1, words2, words3, even2, odd2, low, none, False, V)
    sums3 = _dots(words0, words1, words2, words3, even3, odd3, high, sums2 if COUNT < 4 else none, True, V)
    inputs0, inputs1 = tl.sum(even0 + odd0, axis=1)[None], tl.sum(even1 + odd1, axis=1)[None]
    inputs2, inputs3 = tl.sum(even2 + odd2, axis=1)[None], tl.sum(even3 + odd3, axis=1)[None]
    if COUNT == 1:
        added = _group_sum(
            _summed(sums1) + _summed(sums3), inputs0 + inputs1 + inputs2 + inputs3, largest, number, GRID
        )
    elif COUNT == 2:
        number0, number1 = tl.split(number)
        added = _group_sum(_summed(sums1), inputs0 + inputs1, largest, number0, GRID)
        added += _group_sum(_summed(sums3), inputs2 + inputs3, largest, number1, GRID)
    else:
        number0, number1, number2, number3 = _quarters(number, BN, V)
        added = _group_sum(_summed(sums0), inputs0, largest, number0, GRID)
        added += _group_sum(_summed(sums1), inputs1, largest, number1, GRID)
        added += _group_sum(_summed(sums2), inputs2, largest, number2, GRID)
        added += _group_sum(_summed(sums3), inputs3, largest, number3, GRID)
    return added


@triton.jit
def _sums8(word, even0, odd0, even1, odd1, number, COUNT: tl.constexpr, GRID: tl.constexpr):
    """The same of 8-bit words, with one group, two, or (``GRID`` up to 0) none."""
    if GRID < 0:
        byte0, byte1, byte2, byte3 = _floats(word)
        first = byte0 * even0[None] + byte2 * odd0[None]
        second = byte1 * even1[None] + byte3 * odd1[None]
    else:
        high = word >> 16
        first = _byte(word, 0) * even0[None] + _byte(high, 0) * odd0[None]
        second = _byte(word, 8) * even1[None] + _byte(high, 8) * odd1[None]  # these inputs were divided by 256
    if GRID <= 0:
        added = tl.sum(first + second, axis=2)
    elif COUNT == 1:
        added = number.to(tl.float32, bitcast=True) * tl.sum(first + second, axis=2)
    else:
        number0, number1 = tl.split(number)
        scale0, scale1 = number0.to(tl.float32, bitcast=True), number1.to(tl.float32, bitcast=True)
        added = tl.sum(scale0[:, :, None] * first + scale1[:, :, None] * second, axis=2)
    return added


@triton.jit
def _numbers_at(
    numbers, n, block, N, GROUPS: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, SPAN: tl.constexpr
):
    """Numbers of the groups of each row's block: ``[BN, V]``, or ``[BN, V, COUNT]`` where there are several."""
    # Loaded the other way round: of two directions without neighbours the compiler gives the first to the threads.
    rows = (numbers + n.to(tl.int64) * GROUPS)[None, :]
    inside = (n < N)[None, :]
    if COUNT == 1:
        group = (block * SPAN // GROUP)[:, None]
        found = tl.trans(tl.load(rows + group, mask=inside & (group < GROUPS), other=0))
    else:
        part = tl.arange(0, COUNT)
        if COUNT * GROUP == SPAN:
            group = block[:, None] * COUNT + part[None, :]
        else:
            group = (block[:, None] * SPAN + part[None, :] * (SPAN // COUNT)) // GROUP
        group = group[:, None, :]
        found = tl.load(rows[:, :, None] + group, mask=inside[:, :, None] & (group < GROUPS), other=0)
        found = tl.trans(found, (1, 0, 2))
    return found


@triton.jit
def _vector_kernel(
    x, gain, words, numbers, out, residual, copy, N, eps,
    K: tl.constexpr, VECTORS: tl.constexpr, BITS: tl.constexpr, GRID: tl.constexpr, GROUP: tl.constexpr,
    COUNT: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, COPY: tl.constexpr, GATED: tl.constexpr,
    QUICK: tl.constexpr, BN: tl.constexpr, V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    span: tl.constexpr = 512 // BITS
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    groups: tl.constexpr = K // GROUP
    lane = tl.arange(0, V)
    place = tl.arange(0, 4 * V)[None, :]
    rows = words + n[:, None].to(tl.int64) * (VECTORS * 4) + place
    inside = (n < N)[:, None]
    w = tl.load(rows, mask=inside & (place < VECTORS * 4), other=0, eviction_policy="evict_first")
    if GATED:
        below = rows + N.to(tl.int64) * (VECTORS * 4)
        numbers_below = numbers + N.to(tl.int64) * groups
        u = tl.load(below, mask=inside & (place < VECTORS * 4), other=0, eviction_policy="evict_first")
    if GRID > 0:
        number = _numbers_at(numbers, n, lane // 4, N, groups, GROUP, COUNT, span)
        if GATED:
            number_up = _numbers_at(numbers_below, n, lane // 4, N, groups, GROUP, COUNT, span)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BN, V), dtype=tl.float32)
    if GATED:
        up = tl.zeros((BN, V), dtype=tl.float32)
    squares = tl.zeros((V,), dtype=tl.float32)
    for start in tl.range(0, VECTORS, V):
        here = tl.reshape(w.to(tl.uint32, bitcast=True), (BN, V, 4))
        if GATED:
            here_up = tl.reshape(u.to(tl.uint32, bitcast=True), (BN, V, 4))
        numbers_here = 0
        numbers_up = 0
        if GRID > 0:
            numbers_here = number
            if GATED:
                numbers_up = number_up
        if VECTORS > V:
            more = inside & (place + (start + V) * 4 < VECTORS * 4)
            w = tl.load(rows + (start + V) * 4, mask=more, other=0, eviction_policy="evict_first")
            if GATED:
                u = tl.load(below + (start + V) * 4, mask=more, other=0, eviction_policy="evict_first")
            if GRID > 0:
                block = (start + V + lane) // 4
                number = _numbers_at(numbers, n, block, N, groups, GROUP, COUNT, span)
                if GATED:
                    number_up = _numbers_at(numbers_below, n, block, N, groups, GROUP, COUNT, span)
        at = start + lane
        column = at // 4 * span + at % 4 * 8
        even0, odd0, squares = _run(x, gain, squares, column, K, V, NORM)
        even1, odd1, squares = _run(x, gain, squares, column + 32, K, V, NORM)
        if BITS == 4:
            even2, odd2, squares = _run(x, gain, squares, column + 64, K, V, NORM)
            even3, odd3, squares = _run(x, gain, squares, column + 96, K, V, NORM)
            if QUICK:
                total += _quick_sums4(here, even0, odd0, even1, odd1, even2, odd2, even3, odd3,
                                      numbers_here, COUNT, GRID, BN, V)  # fmt: skip
                if GATED:
                    up += _quick_sums4(here_up, even0, odd0, even1, odd1, even2, odd2, even3, odd3,
                                       numbers_up, COUNT, GRID, BN, V)  # fmt: skip
            else:
                even1, odd1, even3, odd3 = even1 * 16, odd1 * 16, even3 * 16, odd3 * 16
                total += _sums4(here, even0, odd0, even1, odd1, even2, odd2, even3, odd3,
                                numbers_here, COUNT, GRID, BN, V)  # fmt: skip
                if GATED:
                    up += _sums4(here_up, even0, odd0, even1, odd1, even2, odd2, even3, odd3,
                                 numbers_up, COUNT, GRID, BN, V)  # fmt: skip
        else:
            if GRID >= 0:
                even1, odd1 = even1 / 256, odd1 / 256
            total += _sums8(here, even0, odd0, even1, odd1, numbers_here, COUNT, GRID)
            if GATED:
                up += _sums8(here_up, even0, odd0, even1, odd1, numbers_up, COUNT, GRID)
    result = tl.sum(total, axis=1)
    if GRID <= 0:
        result = result * tl.load(numbers + n, mask=n < N, other=0).to(tl.float32, bitcast=True)
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
        result = result * factor
    if GATED:
        below_sum = tl.sum(up, axis=1)
        if GRID <= 0:
            below_sum = below_sum * tl.load(numbers + N + n, mask=n < N, other=0).to(tl.float32, bitcast=True)
        if NORM:
            below_sum = below_sum * factor
        result = result / (1.0 + tl.exp(-result)) * below_sum
    if ADD:
        result += tl.load(residual + n, mask=n < N, other=0.0)
        tl.store(residual + n, result, mask=n < N)
        if COPY:
            tl.store(copy + n, result.to(copy.dtype.element_ty), mask=n < N)
    else:
        tl.store(out + n, result.to(out.dtype.element_ty), mask=n < N)


def gemv(
    x: Tensor,
    matrix: PlaneMatrix,
    *,
    out: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    copy: Tensor | None = None,
    gated: bool = False,
    tile: VectorTile | None = None,
    pdl: bool = False,
) -> None:
    """``out = weight @ x``, or ``residual += weight @ x``; with ``gain``, of the normalized ``x`` (RMS norm).

    Parameters
    ----------
    x : Tensor
        ``[K]``. In 16 bits it is read without being moved between threads.
    matrix : PlaneMatrix
        ``[N, K]``; if ``gated`` ``[2 N, K]``, gate above up, and what is stored is ``silu(gate @ x) * (up @ x)``.
    out, residual : Tensor, optional
        ``[N]``, of any floating dtype, and float32.
    gain : Tensor, optional
        ``[K]``
    copy : Tensor, optional
        ``[N]``: takes the new residual too, in fewer bits for the next reader.
    """
    n, k, bits = matrix.rows // (2 if gated else 1), matrix.columns, matrix.scheme.stored_bits
    grid = grid_number(matrix)
    vectors = matrix.blocks * UNITS // VECTOR
    tile = tile or vector_tile(n, k, matrix.scheme, gated=gated)
    rows, width = tile.rows, min(tile.vectors, int(triton.next_power_of_2(vectors)))
    words = matrix.units.view(torch.int32)
    kernels.start(_vector_kernel, (triton.cdiv(n, rows),))(
        x, gain, words, matrix.numbers, out, residual, copy, n, eps,
        k, vectors, bits, grid, matrix.group, groups_of_block(matrix), gain is not None, residual is not None,
        copy is not None, gated, x.dtype == torch.bfloat16 and not kernels.INTERPRETED, rows, width, pdl, num_warps=tile.warps, **kernels.launch_options(pdl),
    )  # fmt: skip


def groups_of_block(matrix: PlaneMatrix) -> int:
    """How many numbers a block has: 1 where it lies within a group, else 2 or (for 4 bits) 4."""
    planes, group = matrix.planes, matrix.group
    span = 32 * planes
    if grid_number(matrix) <= 0 or group % span == 0:
        return 1
    return 2 if planes == 4 and group == 64 else planes


# -- few rows ----------------------------------------------------------------------------------------------------------


_NIBBLE = "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; mov.b32 a, 0x43084308; sub.rn.bf16x2 $0, t, a;"
"""128 + q has its q in the last bits of a bfloat16; minus 136 it is q - 8, exactly."""
NIBBLE0, NIBBLE1, NIBBLE2, NIBBLE3 = (kernels.field_of_two(shift, _NIBBLE) for shift in (0, 4, 8, 12))
BYTE0, BYTE1, FLOAT0, FLOAT1 = kernels.INTEGER0, kernels.INTEGER1, kernels.FLOAT0, kernels.FLOAT1


@triton.jit
def _integers(unit, PLANE: tl.constexpr, BITS: tl.constexpr, GRID: tl.constexpr, WIDE: tl.constexpr):
    """A field of each unit: ``q - 8``, the signed byte or the number it is, as bfloat16, or float32 where ``WIDE``."""
    if GRID < 0 and WIDE:
        value = _float(unit.to(tl.int32), 8 * PLANE)
    elif WIDE:
        whole = unit.to(tl.int32)
        if BITS == 4:
            value = ((whole >> (4 * PLANE)) & 15).to(tl.float32) - 8.0
        else:
            value = ((whole << (24 - 8 * PLANE)) >> 24).to(tl.float32)
    else:
        low: tl.constexpr = NIBBLE0 if PLANE == 0 else NIBBLE1
        high: tl.constexpr = NIBBLE2 if PLANE == 2 else NIBBLE3
        byte: tl.constexpr = BYTE0 if PLANE == 0 else BYTE1
        number: tl.constexpr = FLOAT0 if PLANE == 0 else FLOAT1
        field: tl.constexpr = byte if BITS == 8 else low if PLANE < 2 else high
        assembly: tl.constexpr = number if GRID < 0 else field
        value = tl.inline_asm_elementwise(assembly, "=r,r", [unit], dtype=tl.bfloat16, is_pure=True, pack=2)
    return value


@triton.jit
def _scaled(value, scale, centre, GRID: tl.constexpr, WIDE: tl.constexpr):
    """``value * scale``, with ``centre`` added on the grids that have one; a scale and a centre for each row."""
    if WIDE:
        value = value * scale[:, None]
        if GRID > 1:
            value += centre[:, None]
    else:
        value, by = tl.broadcast(value, scale.to(tl.bfloat16)[:, None])
        if GRID > 1:
            value, plus = tl.broadcast(value, centre.to(tl.bfloat16)[:, None])
            value = tl.inline_asm_elementwise(
                "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [value, by, plus], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            value = tl.inline_asm_elementwise(
                "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [value, by], dtype=tl.bfloat16, is_pure=True, pack=2
            )
    return value


@triton.jit
def _side_by_side(a, b, BN: tl.constexpr):
    """``a`` and ``b`` in one; a matter of names, since the matrix units' registers are in this order anyway."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (BN, 2 * a.shape[1]))


@triton.jit
def _group(numbers, col, known, column, groups, GROUP: tl.constexpr, GRID: tl.constexpr):
    """Scale and centre of each row's group at a column."""
    group = tl.zeros_like(col) + column // GROUP
    number = tl.load(numbers + col * groups + group, mask=known & (group < groups), other=0)
    scale = _scale_of(number, GRID)
    centre = scale
    if GRID > 1:
        centre = _centre_of(number, scale, GRID)
    return scale, centre


@triton.jit
def _weights(
    unit, numbers, col, known, column, groups, BITS: tl.constexpr, GRID: tl.constexpr, GROUP: tl.constexpr,
    COUNT: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block's weights in the order of their columns, scaled unless by rows: ``[BN, 32 planes]``."""
    first, second = _integers(unit, 0, BITS, GRID, WIDE), _integers(unit, 1, BITS, GRID, WIDE)
    if BITS == 4:
        third, fourth = _integers(unit, 2, BITS, GRID, WIDE), _integers(unit, 3, BITS, GRID, WIDE)
    if GRID > 0:
        scale, centre = _group(numbers, col, known, column, groups, GROUP, GRID)
        first = _scaled(first, scale, centre, GRID, WIDE)
        if COUNT == 16 // BITS:
            scale, centre = _group(numbers, col, known, column + 32, groups, GROUP, GRID)
        second = _scaled(second, scale, centre, GRID, WIDE)
        if BITS == 4:
            if COUNT > 1:
                scale, centre = _group(numbers, col, known, column + 64, groups, GROUP, GRID)
            third = _scaled(third, scale, centre, GRID, WIDE)
            if COUNT == 4:
                scale, centre = _group(numbers, col, known, column + 96, groups, GROUP, GRID)
            fourth = _scaled(fourth, scale, centre, GRID, WIDE)
    tile = _side_by_side(first, second, BN)
    if BITS == 4:
        tile = _side_by_side(tile, _side_by_side(third, fourth, BN), BN)
    return tile


@triton.jit
def _group_integers(unit, PART: tl.constexpr, BITS: tl.constexpr, GRID: tl.constexpr, COUNT: tl.constexpr,
                    BN: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The integers of a block's ``PART``-th group in the order of their columns."""
    each: tl.constexpr = 16 // BITS // COUNT
    tile = _integers(unit, PART * each, BITS, GRID, WIDE)
    if each > 1:
        tile = _side_by_side(tile, _integers(unit, PART * each + 1, BITS, GRID, WIDE), BN)
    if each == 4:
        rest = _side_by_side(_integers(unit, 2, BITS, GRID, WIDE), _integers(unit, 3, BITS, GRID, WIDE), BN)
        tile = _side_by_side(tile, rest, BN)
    return tile


@triton.jit
def _inputs(x, x_bulk, row, row0, column, m, k, WIDTH: tl.constexpr, BULK: tl.constexpr, WIDE: tl.constexpr):
    """``[WIDTH, BM]`` inputs from a column on."""
    if BULK:
        a = x_bulk.load([row0, column])
    else:
        place = column + tl.arange(0, WIDTH)
        a = tl.load(x + row[:, None] * k + place[None, :], mask=(row < m)[:, None] & (place < k)[None, :], other=0.0)
    if WIDE:
        a = a.to(tl.float32)
    return tl.trans(a)


@triton.jit
def _units_at(strip, units_bulk, col0, inside, at, blocks, BULK: tl.constexpr):
    """A block's units, ``[BN, 32]``."""
    if BULK:
        unit = units_bulk.load([col0, at * 32])
    else:
        place = at * 32 + tl.arange(0, 32)
        unit = tl.load(strip + place[None, :], mask=inside & (place < blocks * 32)[None, :], other=0)
    return unit


@triton.jit
def _after(
    acc, unit, a, numbers, col, known, column, groups, PART: tl.constexpr, BITS: tl.constexpr, GRID: tl.constexpr,
    GROUP: tl.constexpr, COUNT: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add a group's product, scaled when it is done."""
    q = _group_integers(unit, PART, BITS, GRID, COUNT, BN, WIDE)
    scale, centre = _group(numbers, col, known, column, groups, GROUP, GRID)
    if GRID > 1:
        same, _ = tl.broadcast(centre.to(q.dtype)[:, None], q)
        acc = tl.dot(same, a, acc, input_precision="ieee")
    return acc + scale[:, None] * tl.dot(q, a, input_precision="ieee")


@triton.jit(do_not_specialize=["m"])
def _few_rows_kernel(
    x, x_bulk, units, units_bulk, numbers, out, m, n, k, blocks, groups, share,
    BITS: tl.constexpr, GRID: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, GATED: tl.constexpr,
    AFTER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PAIR: tl.constexpr, BULK: tl.constexpr,
    AHEAD: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    span: tl.constexpr = 512 // BITS
    row_tiles = tl.cdiv(m, BM)
    row0 = (tl.program_id(0) % row_tiles) * BM
    col0 = (tl.program_id(0) // row_tiles) * BN
    split = tl.program_id(1)
    begin = split * share
    stop = tl.minimum(begin + share, blocks)
    col = col0 + tl.arange(0, BN)
    row = row0 + tl.arange(0, BM)
    known = col < n
    strip = units + col.to(tl.int64)[:, None] * (blocks * 32)
    below = strip + n.to(tl.int64) * (blocks * 32)
    inside = known[:, None]
    if PDL:
        gdc_launch_dependents()
    if AHEAD > 0:
        line = (begin * 32 + tl.arange(0, AHEAD) * 64)[None, :]
        kernels.ask(strip + line)
        if GATED:
            kernels.ask(below + line)
    if PDL:
        gdc_wait()
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    if GATED:
        up = tl.zeros((BN, BM), dtype=tl.float32)
    for at in tl.range(begin, stop, 2 if PAIR else 1, num_stages=STAGES):
        unit = _units_at(strip, units_bulk, col0, inside, at, blocks, BULK)
        if GATED:
            unit_up = _units_at(below, units_bulk, n + col0, inside, at, blocks, BULK)
        if AFTER:
            for part in tl.static_range(COUNT):
                column = at * span + part * (span // COUNT)
                a = _inputs(x, x_bulk, row, row0, column, m, k, span // COUNT, BULK, WIDE)
                acc = _after(
                    acc, unit, a, numbers, col, known, column, groups, part, BITS, GRID, GROUP, COUNT, BN, WIDE
                )
                if GATED:
                    up = _after(up, unit_up, a, numbers, n + col, known, column, groups, part, BITS, GRID, GROUP, COUNT,
                                BN, WIDE)  # fmt: skip
        else:
            column = at * span
            tile = _weights(unit, numbers, col, known, column, groups, BITS, GRID, GROUP, COUNT, BN, WIDE)
            if GATED:
                tile_up = _weights(unit_up, numbers, n + col, known, column, groups, BITS, GRID, GROUP, COUNT, BN, WIDE)
            if PAIR:  # where the share ends in between, the second half meets inputs beyond the last: no row has any
                unit = _units_at(strip, units_bulk, col0, inside, at + 1, blocks, BULK)
                more = _weights(unit, numbers, col, known, column + span, groups, BITS, GRID, GROUP, COUNT, BN, WIDE)
                tile = _side_by_side(tile, more, BN)
                if GATED:
                    unit_up = _units_at(below, units_bulk, n + col0, inside, at + 1, blocks, BULK)
                    more = _weights(unit_up, numbers, n + col, known, column + span, groups, BITS, GRID, GROUP, COUNT,
                                    BN, WIDE)  # fmt: skip
                    tile_up = _side_by_side(tile_up, more, BN)
            a = _inputs(x, x_bulk, row, row0, column, m, k, span * 2 if PAIR else span, BULK, WIDE)
            acc = tl.dot(tile, a, acc, input_precision="ieee")
            if GATED:
                up = tl.dot(tile_up, a, up, input_precision="ieee")
    if GRID <= 0:
        acc *= tl.load(numbers + col, mask=known, other=0).to(tl.float32, bitcast=True)[:, None]
        if GATED:
            up *= tl.load(numbers + n + col, mask=known, other=0).to(tl.float32, bitcast=True)[:, None]
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    target = out + split.to(tl.int64) * m * n
    mask = (row < m)[:, None] & known[None, :]
    tl.store(target + row[:, None].to(tl.int64) * n + col[None, :], tl.trans(acc).to(out.dtype.element_ty), mask=mask)


def linear(
    x: Tensor, matrix: PlaneMatrix, out: Tensor, tile: PackedTile, *, gated: bool = False, pdl: bool = False
) -> None:
    """``out = x @ weight.T``, in parts that the reader adds; or, ``gated``, ``silu(x @ gate.T) * (x @ up.T)``.

    Parameters
    ----------
    x : Tensor
        ``[M, K]``
    matrix : PlaneMatrix
        ``[N, K]``; if ``gated`` ``[2 N, K]``, gate above up.
    out : Tensor
        ``[splits, M, N]``, any floating dtype; ``[M, N]`` if ``gated``.
    tile : PackedTile
        ``splits`` is 1 if ``gated``.
    """
    (m, k), n = x.shape, matrix.rows // (2 if gated else 1)
    units, count, grid = matrix.units, groups_of_block(matrix), grid_number(matrix)
    after, span = tile.after and grid > 0, UNITS * matrix.planes
    pair = tile.pair and not after
    bulk = tile.bulk and (k * x.element_size()) % 16 == 0 and not kernels.INTERPRETED
    descriptors: list[Any] = [None, None]
    if bulk:
        width = span // count if after else span * (2 if pair else 1)
        descriptors[0] = TensorDescriptor.from_tensor(x, [tile.rows, width])
        descriptors[1] = TensorDescriptor.from_tensor(units, [tile.columns, UNITS])
    step = 2 if pair else 1
    share = triton.cdiv(triton.cdiv(matrix.blocks, step), tile.splits) * step
    programs = (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns), tile.splits)
    wide = x.dtype == torch.float32
    stages = tile.stages // 2 if wide else tile.stages  # rows of float32 take twice the shared memory
    # Lines of 128 bytes hold two blocks.
    lines = int(triton.next_power_of_2(triton.cdiv(tile.ahead, 2))) if tile.ahead and n % tile.columns == 0 else 0
    kernels.start(_few_rows_kernel, programs)(
        x, descriptors[0], units, descriptors[1], matrix.numbers, out, m, n, k, matrix.blocks, matrix.groups, share,
        matrix.scheme.stored_bits, grid, matrix.group, count, gated, after, tile.rows, tile.columns, pair, bulk,
        0 if kernels.INTERPRETED else lines, wide or kernels.INTERPRETED, stages, pdl,
        num_warps=tile.warps, **kernels.launch_options(pdl),
    )  # fmt: skip


# -- many rows ---------------------------------------------------------------------------------------------------------


@triton.jit
def _expand_kernel(
    units, numbers, out, first, last, k, blocks, groups,
    BITS: tl.constexpr, GRID: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    planes: tl.constexpr = 16 // BITS
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    source = first + row
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    place = tl.program_id(1) * (BLOCKS * 32) + tl.arange(0, BLOCKS * 32)
    inside = (source < last)[:, None]
    begin = units + source[:, None].to(tl.int64) * (blocks * 32)
    unit = tl.load(begin + place[None, :], mask=inside & (place < blocks * 32)[None, :], other=0)
    unit = tl.reshape(unit.to(tl.int32), (BN, BLOCKS, 32))
    for plane in tl.static_range(planes):
        group = (block * (32 * planes) + plane * 32) // GROUP
        number = tl.load(numbers + source[:, None] * groups + group[None, :], mask=inside & (group < groups)[None, :],
                         other=0)  # fmt: skip
        scale = _scale_of(number, GRID)
        if BITS == 4:
            if GRID == 3:
                offset = _offset_of(number)
            elif GRID == 2:
                offset = -scale * _offset_of(number)
            else:
                offset = -8.0 * scale
            value = ((unit >> (4 * plane)) & 15).to(tl.float32) * scale[:, :, None] + offset[:, :, None]
        elif GRID < 0:
            value = _float(unit, 8 * plane) * scale[:, :, None]
        else:
            value = ((unit << (24 - 8 * plane)) >> 24).to(tl.float32) * scale[:, :, None]
        value = tl.reshape(value.to(out.dtype.element_ty), (BN, BLOCKS * 32))
        column = place // 32 * (32 * planes) + plane * 32 + place % 32
        tl.store(out + row[:, None].to(tl.int64) * k + column[None, :], value, mask=inside & (column < k)[None, :])


def expand(matrix: PlaneMatrix, out: Tensor, first: int = 0, last: int | None = None) -> None:
    """Write the weights of rows ``[first, last)`` to ``out``, ``[last - first, K]``."""
    last = matrix.rows if last is None else last
    rows, blocks = 8, 8
    grid = (triton.cdiv(last - first, rows), triton.cdiv(matrix.blocks, blocks))
    kernels.start(_expand_kernel, grid)(
        matrix.units, matrix.numbers, out, first, last, matrix.columns, matrix.blocks, matrix.groups,
        matrix.scheme.stored_bits, grid_number(matrix), matrix.group, rows, blocks, num_warps=4,
    )  # fmt: skip
