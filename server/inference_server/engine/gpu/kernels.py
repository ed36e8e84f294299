"""Triton kernels of the GPU fast path, and the functions that launch them. Owns no state and no buffer.

Conventions: weights are ``[out, in]``; the residual stream is float32; a row with position −1 is padding and is neither
read from nor written to the cache. ``seats`` are rows of the device's block table, one for each request.
Every kernel runs under ``TRITON_INTERPRET=1`` as well; the tests compare each with float64.

``PDL`` is programmatic dependent launch: a kernel starts while the one before it drains, fetches its first weights, and
only then waits for the other's results (``gdc_wait``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter. Its matrix products are wrong for bfloat16, so there they are float32."""
LOG2E = tl.constexpr(1.4426950408889634)


unchanged = threading.RLock()
"""While held, no kernel takes the place of one that was launched: another thread may have compiled the same.

A kernel is loaded when it is first launched, which must not happen while launches are captured.
"""


class _Mode(threading.local):
    compiling = False


_mode = _Mode()


@contextmanager
def compiling() -> Iterator[None]:
    """Within, the functions of this module compile their kernels, many at once, and launch nothing.

    It holds for the calling thread alone: others may launch meanwhile.
    """
    if INTERPRETED:
        yield
        return
    _mode.compiling = True
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, ExitStack() as stack:
            mode = stack.enter_context(triton.AsyncCompileMode(pool))
            yield
            wait(mode.raw_futures)
            with unchanged:
                stack.close()
    finally:
        _mode.compiling = False


def multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = x @ weight.T`` by cuBLAS."""
    if not _mode.compiling:
        torch.mm(x, weight.t(), out=out)


def start(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """What launches ``kernel`` on ``grid``, or only compiles it."""
    if _mode.compiling:
        return partial(kernel.run, grid=grid, warmup=True)
    launch: Callable[..., Any] = kernel[grid]
    return launch


@triton.jit
def _wait(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def ask(pointers):
    """Have the lines that hold ``pointers`` brought into the L2 cache, waiting for nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


# -- matrix times one vector -------------------------------------------------------------------------------------------
# At batch 1 a step reads every weight once and does nothing else worth mentioning: these kernels exist to keep the
# memory busy. The norm costs no pass of its own: its factor is common to all outputs, so it is applied at the end.


@triton.jit
def _gemv_kernel(
    x,
    gain,
    weight,
    out,
    residual,
    N,
    K: tl.constexpr,
    eps,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = weight + n[:, None].to(tl.int64) * K + k[None, :]
    inside = n[:, None] < N
    w = tl.load(rows, mask=inside & (k[None, :] < K), other=0.0, eviction_policy="evict_first")
    _wait(PDL)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    squares = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        ahead = start + BLOCK_K + k
        w_ahead = tl.load(
            rows + start + BLOCK_K, mask=inside & (ahead[None, :] < K), other=0.0, eviction_policy="evict_first"
        )
        here = start + k
        v = tl.load(x + here, mask=here < K, other=0.0).to(tl.float32)
        if NORM:
            squares += v * v
            v = v * tl.load(gain + here, mask=here < K, other=0.0)
        total += w.to(tl.float32) * v[None, :]
        w = w_ahead
    result = tl.sum(total, axis=1)
    if NORM:
        result = result * tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    if ADD:
        tl.store(residual + n, tl.load(residual + n, mask=n < N, other=0.0) + result, mask=n < N)
    else:
        tl.store(out + n, result.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _gemv_gate_up_kernel(
    x,
    gain,
    weight,
    out,
    N,
    K: tl.constexpr,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = weight + n[:, None].to(tl.int64) * K + k[None, :]
    below = weight + (n[:, None].to(tl.int64) + N) * K + k[None, :]
    inside = n[:, None] < N
    g = tl.load(rows, mask=inside & (k[None, :] < K), other=0.0, eviction_policy="evict_first")
    u = tl.load(below, mask=inside & (k[None, :] < K), other=0.0, eviction_policy="evict_first")
    _wait(PDL)
    gate = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    squares = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        mask = inside & ((start + BLOCK_K + k)[None, :] < K)
        g_ahead = tl.load(rows + start + BLOCK_K, mask=mask, other=0.0, eviction_policy="evict_first")
        u_ahead = tl.load(below + start + BLOCK_K, mask=mask, other=0.0, eviction_policy="evict_first")
        here = start + k
        v = tl.load(x + here, mask=here < K, other=0.0)
        squares += v * v
        v = v * tl.load(gain + here, mask=here < K, other=0.0)
        gate += g.to(tl.float32) * v[None, :]
        up += u.to(tl.float32) * v[None, :]
        g, u = g_ahead, u_ahead
    factor = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    a, b = tl.sum(gate, axis=1) * factor, tl.sum(up, axis=1) * factor
    result = a / (1.0 + tl.exp(-a)) * b
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < N)


Tile = tuple[int, int, int]
"""Rows and columns of a program's tile, and its warps."""


def gemv_tile(n: int, k: int) -> Tile:
    """The tile for a matrix of ``n`` rows of ``k``, by what was measured on an H100 (docs/gpu-performance.md)."""
    widest = int(triton.next_power_of_2(k))
    if n >= 65536:
        tile = (8, 1024, 4)
    elif k >= 8192:
        tile = (2, 2048, 4)
    elif k <= 1024:
        tile = (4, 512, 4)
    elif n <= 4096:
        tile = (4, 2048, 8)
    elif n <= 8192:
        tile = (4, 512, 4)
    else:
        tile = (8, 512, 4)
    return (tile[0], min(tile[1], widest), tile[2])


def gemv(
    x: Tensor,
    weight: Tensor,
    *,
    out: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    tile: Tile | None = None,
    pdl: bool = False,
) -> None:
    """``out = weight @ x``, or ``residual += weight @ x``; with ``gain``, of the normalized ``x`` (RMS norm).

    ``x`` is ``[K]``; ``out`` ``[N]`` of any floating dtype; ``gain`` ``[K]`` and ``residual`` ``[N]`` float32.
    """
    n, k = weight.shape
    rows, columns, warps = tile or gemv_tile(n, k)
    start(_gemv_kernel, (triton.cdiv(n, rows),))(
        x,
        gain,
        weight,
        out,
        residual,
        n,
        k,
        eps,
        gain is not None,
        residual is not None,
        rows,
        columns,
        pdl,
        num_warps=warps,
        **launch_options(pdl),
    )


def gemv_gate_up(
    x: Tensor, gain: Tensor, eps: float, weight: Tensor, out: Tensor, *, tile: Tile | None = None, pdl: bool = False
) -> None:
    """``out = silu(gate @ n) * (up @ n)`` with ``n`` the RMS norm of ``x``; ``weight`` is gate above up, ``[2 N, K]``."""
    n, k = weight.shape[0] // 2, weight.shape[1]
    rows, columns, warps = tile or (8, min(int(triton.next_power_of_2(k)), 512), 4)
    rows = max(rows // 2, 1)
    start(_gemv_gate_up_kernel, (triton.cdiv(n, rows),))(
        x, gain, weight, out, n, k, eps, rows, columns, pdl, num_warps=warps, **launch_options(pdl)
    )


# -- elementwise -------------------------------------------------------------------------------------------------------


@triton.jit
def _embed_kernel(ids, seats, last, table, residual, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0)
    _wait(PDL)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + row)
    if token < 0:
        token = tl.load(last + tl.load(seats + row))
    value = tl.load(table + token.to(tl.int64) * HIDDEN + column, mask=column < HIDDEN, other=0.0)
    tl.store(residual + row.to(tl.int64) * HIDDEN + column, value.to(tl.float32), mask=column < HIDDEN)


def embed(ids: Tensor, seats: Tensor, last: Tensor, table: Tensor, residual: Tensor, *, pdl: bool = False) -> None:
    """``residual[row] = table[ids[row]]``; an id of −1 stands for the token last chosen for the row's seat."""
    rows, hidden = residual.shape
    block = min(triton.next_power_of_2(hidden), 1024)
    start(_embed_kernel, (rows, triton.cdiv(hidden, block)))(
        ids, seats, last, table, residual, hidden, block, pdl, num_warps=4, **launch_options(pdl)
    )


@triton.jit
def _norm_kernel(
    residual, delta, gain, out, apart, HIDDEN: tl.constexpr, eps, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    _wait(PDL)
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN
    x = tl.load(residual + row * HIDDEN + column, mask=mask, other=0.0)
    for part in tl.static_range(PARTS):
        x += tl.load(delta + part * apart + row * HIDDEN + column, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 0:
        tl.store(residual + row * HIDDEN + column, x, mask=mask)
    factor = tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
    y = x * factor * tl.load(gain + column, mask=mask, other=0.0)
    tl.store(out + row * HIDDEN + column, y.to(out.dtype.element_ty), mask=mask)


def add_norm(
    residual: Tensor, delta: Tensor | None, gain: Tensor, eps: float, out: Tensor, *, pdl: bool = False
) -> None:
    """``residual += delta``, and its RMS norm into ``out``; a ``delta`` of ``[parts, rows, hidden]`` is summed first."""
    rows, hidden = out.shape
    block = triton.next_power_of_2(hidden)
    parts = 0 if delta is None else delta.shape[0] if delta.dim() == 3 else 1
    apart = residual.shape[0] * hidden
    start(_norm_kernel, (rows,))(
        residual, delta, gain, out, apart, hidden, eps, parts, block, pdl,
        num_warps=8 if block >= 4096 else 4, **launch_options(pdl),
    )  # fmt: skip


@triton.jit
def _silu_kernel(both, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    _wait(PDL)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate = tl.load(both + row * 2 * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * WIDTH + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=mask)


def silu_mul(both: Tensor, out: Tensor, *, pdl: bool = False) -> None:
    """``out = silu(gate) * up`` for ``both`` ``[T, 2 W]``, gate before up."""
    rows, width = out.shape
    block = min(triton.next_power_of_2(width), 1024)
    start(_silu_kernel, (rows, triton.cdiv(width, block)))(
        both, out, width, block, pdl, num_warps=4, **launch_options(pdl)
    )


# -- attention ---------------------------------------------------------------------------------------------------------


@triton.jit
def _rotated(base, place, apart, bias, gain, heads, position, cos, sin, eps, PARTS: tl.constexpr, D: tl.constexpr,
             BIAS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, EACH: tl.constexpr, mask):  # fmt: skip
    """Heads ``[len(heads), D]`` of a projection as attention uses them: with bias, normalized, rotated; float32.

    They begin at ``base + place``. The projection is the sum of ``PARTS``, that lie ``apart`` from one another. All of
    them stand at one ``position``, or, with ``EACH``, at one of their own.
    """
    d = tl.arange(0, D)
    other = (d + D // 2) % D
    x = tl.load(base + place[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(base + place[:, None] + other[None, :], mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        more = base + part * apart
        x += tl.load(more + place[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        y += tl.load(more + place[:, None] + other[None, :], mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias + heads[:, None] * D + d[None, :], mask=mask, other=0.0)
        y += tl.load(bias + heads[:, None] * D + other[None, :], mask=mask, other=0.0)
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
        x = x * factor[:, None] * tl.load(gain + d)[None, :]
        y = y * factor[:, None] * tl.load(gain + other)[None, :]
    if ROTATE:
        if EACH:
            turn = position[:, None] * (D // 2) + (d % (D // 2))[None, :]
            c = tl.load(cos + turn, mask=mask, other=0.0)
            s = tl.load(sin + turn, mask=mask, other=0.0)
            s = tl.where((d < D // 2)[None, :], -s, s)
            x = x * c + y * s
        else:
            c = tl.load(cos + position * (D // 2) + d % (D // 2))
            s = tl.load(sin + position * (D // 2) + d % (D // 2))
            s = tl.where(d < D // 2, -s, s)
            x = x * c[None, :] + y * s[None, :]
    return x


@triton.jit
def _factors(peak, cache):
    """Scales of heads whose largest number is ``peak``, in a ``cache`` of 8 bits, and what brings them to its range."""
    largest: tl.constexpr = 127.0 if cache.dtype.element_ty == tl.int8 else 448.0
    scale = tl.div_rn(peak, peak * 0.0 + largest)
    return scale, tl.where(scale > 0.0, tl.div_rn(scale * 0.0 + 1.0, scale), 0.0)


@triton.jit
def _rounded(x, cache):
    """Numbers in the range of a ``cache`` of 8 bits as it has them: with :func:`_factors`, what the plain path writes."""
    if cache.dtype.element_ty == tl.int8:
        # Added to 1.5 times 2 ** 23 a number is rounded to the nearest integer, of two the even one.
        x = ((x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)
    else:
        x = x.to(cache.dtype.element_ty)
    return x


def field_of_two(shift: int, body: str) -> tl.constexpr:
    """Inline assembly that shifts two units right by ``shift`` into t, and goes on."""
    begin = f"shr.b32 t, $1, {shift};" if shift else "mov.b32 t, $1;"
    return tl.constexpr("{ .reg .b32 t, a, b; " + begin + " " + body + " }")


_INTEGER = (
    "lop3.b32 a, t, 0x007f007f, 0x43004300, 0xea; lop3.b32 b, t, 0x00800080, 0x43004300, 0xea; "
    "mov.b32 t, 0xbf80bf80; fma.rn.bf16x2 $0, b, t, a;"
)
"""128 + the lower seven bits, minus 128 or 256 by the sign bit: two's complement, exactly."""
INTEGER0, INTEGER1 = (field_of_two(shift, _INTEGER) for shift in (0, 8))
_FLOAT = (
    "and.b32 a, a, 0x07f007f0; lop3.b32 a, a, b, 0x80008000, 0xf8; "
    "mov.b32 b, 0x7b807b80; mov.b32 t, 0x80008000; fma.rn.bf16x2 $0, a, b, t;"
)
"""Exponent and fraction where a bfloat16 has its own, and the sign, times 2 ** 120: exact, also where it is denormal."""
FLOAT0 = field_of_two(0, "shl.b32 a, t, 4; shl.b32 b, t, 8; " + _FLOAT)
FLOAT1 = field_of_two(0, "shr.b32 a, t, 4; mov.b32 b, t; " + _FLOAT)


@triton.jit
def _units(cache, place, inside, D: tl.constexpr):
    """Heads of 8 bits at ``place`` as units of two neighbours, ``[n, D / 2]``.

    The matrix units take numbers of 16 bits two rows at a time; bytes they would have to be handed one by one.
    """
    pair = tl.arange(0, D // 2)
    units = cache.to(tl.pointer_type(tl.int16), bitcast=True)
    return tl.load(units + place[:, None] // 2 + pair[None, :], mask=inside[:, None], other=0)


@triton.jit
def _bytes(unit, cache, ODD: tl.constexpr, like):
    """The first or the second of each unit's two numbers, exactly, in the type of ``like``."""
    integers: tl.constexpr = cache.dtype.element_ty == tl.int8
    if like.dtype == tl.bfloat16:
        integer: tl.constexpr = INTEGER1 if ODD else INTEGER0
        number: tl.constexpr = FLOAT1 if ODD else FLOAT0
        assembly: tl.constexpr = integer if integers else number
        value = tl.inline_asm_elementwise(assembly, "=r,r", [unit], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        value = (unit >> (8 * ODD)).to(tl.int8)
        if not integers:
            value = value.to(cache.dtype.element_ty, bitcast=True)
        value = value.to(like.dtype)
    return value


@triton.jit
def _halves(heads):
    """The even elements of heads ``[n, D]``, and the odd ones."""
    return tl.split(tl.reshape(heads, (heads.shape[0], heads.shape[1] // 2, 2)))


@triton.jit
def _joined(even, odd):
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def _scores(q_even, q_odd, keys, place, inside, like, precision: tl.constexpr, D: tl.constexpr):
    """Products ``[m, n]`` of heads given as halves, ``[m, D / 2]``, with ``n`` keys in 8 bits, without their scales."""
    unit = _units(keys, place, inside, D)
    k_even, k_odd = _bytes(unit, keys, 0, like), _bytes(unit, keys, 1, like)
    if q_even.shape[1] < 16:  # the matrix units take no fewer
        even = q_even.to(tl.float32)[:, None, :] * k_even.to(tl.float32)[None, :, :]
        scores = tl.sum(even + q_odd.to(tl.float32)[:, None, :] * k_odd.to(tl.float32)[None, :, :], axis=2)
    else:
        scores = tl.dot(q_even, tl.trans(k_even), input_precision=precision)
        scores = tl.dot(q_odd, tl.trans(k_odd), scores, input_precision=precision)
    return scores


@triton.jit
def _add_values(
    even, odd, shares, values, value_scales, place, inside, like, precision: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Add values in 8 bits by their shares ``[m, n]`` to the even and the odd elements of what was attended to."""
    shares = shares * tl.load(value_scales + place // D, mask=inside, other=0.0)[None, :]
    shares = shares.to(like.dtype)
    unit = _units(values, place, inside, D)
    even = tl.dot(shares, _bytes(unit, values, 0, like), even, input_precision=precision)
    odd = tl.dot(shares, _bytes(unit, values, 1, like), odd, input_precision=precision)
    return even, odd


@triton.jit
def _store(k, v, keys, values, key_scales, value_scales, place, given, D: tl.constexpr, SCALED: tl.constexpr):
    """Write keys and values ``[n, D]`` to heads ``place`` of the cache; return them as they are there, and their scales."""
    at, mask = place[:, None] * D + tl.arange(0, D)[None, :], given[:, None]
    k_scale = tl.full(place.shape, 1.0, tl.float32)
    v_scale = k_scale
    if SCALED:
        k_scale, k_factor = _factors(tl.max(tl.abs(k), axis=1), keys)
        v_scale, v_factor = _factors(tl.max(tl.abs(v), axis=1), values)
        k, v = _rounded(k * k_factor[:, None], keys), _rounded(v * v_factor[:, None], values)
        tl.store(key_scales + place, k_scale, mask=given)
        tl.store(value_scales + place, v_scale, mask=given)
    else:
        k, v = k.to(keys.dtype.element_ty), v.to(values.dtype.element_ty)
    tl.store(keys + at, k, mask=mask)
    tl.store(values + at, v, mask=mask)
    return k, v, k_scale, v_scale


@triton.jit
def _gather(total, largest, weight, target, own, g, rows, slot0, split, active, partial, state, counter,
            D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Leave what a split found; the last to finish adds up all of them, in order: the sum is the same whoever that is.

    Of each of a split's ``ROWS`` rows ``[D]`` those that are ``own`` count, ``g`` by number, ``rows`` of them.
    """
    tl.store(partial + (slot0 + split * ROWS + g)[:, None] * D + tl.arange(0, D)[None, :], total, mask=own)
    tl.store(state + (slot0 + split * ROWS + g) * 2, largest, mask=g < rows)
    tl.store(state + (slot0 + split * ROWS + g) * 2 + 1, weight, mask=g < rows)
    tl.debug_barrier()
    done = tl.atomic_add(counter, 1, sem="acq_rel")
    if done == active - 1:
        largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        weight = tl.zeros((ROWS,), dtype=tl.float32)
        total = tl.zeros((ROWS, D), dtype=tl.float32)
        for i in range(active):
            at = slot0 + i * ROWS + g
            m = tl.load(state + at * 2, mask=g < rows, other=0.0, cache_modifier=".cg")
            w = tl.load(state + at * 2 + 1, mask=g < rows, other=1.0, cache_modifier=".cg")
            parts = partial + at[:, None] * D + tl.arange(0, D)[None, :]
            t = tl.load(parts, mask=own, other=0.0, cache_modifier=".cg")
            peak = tl.maximum(largest, m)
            old, new = tl.exp2(largest - peak), tl.exp2(m - peak)
            weight = weight * old + w * new
            total = total * old[:, None] + t * new[:, None]
            largest = peak
        tl.store(target, (total / weight[:, None]).to(target.dtype.element_ty), mask=own)
        tl.store(counter, 0)


@triton.jit(do_not_specialize=["table_width", "block_size"])
def _attend_decode_kernel(
    qkv, bias, q_gain, k_gain, cos, sin, order, positions, seats, tables, keys, values, key_scales, value_scales, out,
    partial, state, counters, scale, eps, table_width, block_size, apart,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, WINDOW: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr,
    ORDERED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    IEEE: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # The heads of a row side by side: their keys lie in the same pages of memory.
    head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    if ORDERED:
        # The longest contexts first: programs that start last decide when all are done.
        row = tl.load(order + row)
    position = tl.load(positions + row)
    if AHEAD:
        # Positions and block tables are inputs of the step, and all but the newest key and value are older than it:
        # have the first of them brought into the L2 cache while the projection is still being computed.
        first = 0
        if WINDOW > 0:
            first = tl.maximum(position + 1 - WINDOW, 0)
        first += split * tl.cdiv(tl.cdiv(position + 1 - first, SPLITS), BLOCK) * BLOCK
        p = first + tl.arange(0, BLOCK)
        early = p < position
        slot = tl.load(tables + tl.load(seats + row) * table_width + p // block_size, mask=early, other=0)
        place = (slot.to(tl.int64) * block_size + p % block_size) * (KV * D) + head * D
        line = tl.arange(0, LINES) * (D // LINES)
        ask(keys + place[:, None] + line[None, :])
        ask(values + place[:, None] + line[None, :])
        if SCALED:
            ask(key_scales + place // D)
            ask(value_scales + place // D)
    _wait(PDL)
    g = tl.arange(0, GP)
    d = tl.arange(0, D)
    own = (g < G)[:, None]
    target = out + row * H * D + (head * G + g)[:, None] * D + d[None, :]
    if position < 0:
        if split == 0:
            tl.store(target, tl.zeros((GP, D), dtype=out.dtype.element_ty), mask=own)
    else:
        length = position + 1
        low = 0
        if WINDOW > 0:
            low = tl.maximum(length - WINDOW, 0)
        share = tl.cdiv(tl.cdiv(length - low, SPLITS), BLOCK) * BLOCK
        active = tl.cdiv(length - low, share)
        if split < active:
            begin = low + split * share
            # The newest position is in registers, not yet in the cache.
            stop = tl.minimum(begin + share, position)
            base = qkv + row * ((H + 2 * KV) * D)
            table = tables + tl.load(seats + row) * table_width
            heads = head * G + g
            q = _rotated(base, heads * D, apart, bias, q_gain, heads, position, cos, sin, eps, PARTS, D, BIAS, NORM, ROTATE,
                         False, own)  # fmt: skip
            q = (q * (scale * LOG2E)).to(out.dtype.element_ty)
            if WIDE:
                q = q.to(tl.float32)
            largest = tl.full((GP,), float("-inf"), dtype=tl.float32)
            weight = tl.zeros((GP,), dtype=tl.float32)
            total = tl.zeros((GP, D), dtype=tl.float32)
            if SCALED:
                q_even, q_odd = _halves(q)
                total, odd = _halves(total)
            for start in tl.range(begin, stop, BLOCK, num_stages=STAGES):
                p = start + tl.arange(0, BLOCK)
                inside = p < stop
                slot = tl.load(table + p // block_size, mask=inside, other=0)
                place = (slot.to(tl.int64) * block_size + p % block_size) * (KV * D) + head * D
                if SCALED:
                    scores = _scores(q_even, q_odd, keys, place, inside, q, precision, D)
                    scores *= tl.load(key_scales + place // D, mask=inside, other=0.0)[None, :]
                else:
                    k = tl.load(keys + place[:, None] + d[None, :], mask=inside[:, None], other=0.0)
                    if WIDE:
                        k = k.to(tl.float32)
                    scores = tl.dot(q, tl.trans(k), input_precision=precision)
                scores = tl.where(inside[None, :], scores, float("-inf"))
                peak = tl.maximum(largest, tl.max(scores, axis=1))
                factor = tl.exp2(largest - peak)
                shares = tl.exp2(scores - peak[:, None])
                weight = weight * factor + tl.sum(shares, axis=1)
                total = total * factor[:, None]
                if SCALED:
                    odd = odd * factor[:, None]
                    total, odd = _add_values(total, odd, shares, values, value_scales, place, inside, q, precision, D)
                else:
                    v = tl.load(values + place[:, None] + d[None, :], mask=inside[:, None], other=0.0)
                    if WIDE:
                        v = v.to(tl.float32)
                    total = tl.dot(shares.to(v.dtype), v, total, input_precision=precision)
                largest = peak
            if SCALED:
                total = _joined(total, odd)
            if split == active - 1:
                one = tl.arange(0, 1)
                k_new = _rotated(base, (H + head + one) * D, apart, bias, k_gain, H + head + one, position, cos, sin, eps,
                                 PARTS, D, BIAS, NORM, ROTATE, False, (one == 0)[:, None])  # fmt: skip
                v_new = tl.load(base + (H + KV + head) * D + d).to(tl.float32)
                for part in tl.static_range(1, PARTS):
                    v_new += tl.load(base + part * apart + (H + KV + head) * D + d).to(tl.float32)
                if BIAS:
                    v_new += tl.load(bias + (H + KV + head) * D + d)
                k_new = tl.reshape(k_new, (D,))
                here = tl.load(table + position // block_size).to(tl.int64) * block_size + position % block_size
                if SCALED:
                    k_scale, k_factor = _factors(tl.max(tl.abs(k_new), axis=0), keys)
                    v_scale, v_factor = _factors(tl.max(tl.abs(v_new), axis=0), values)
                    k_new, v_new = _rounded(k_new * k_factor, keys), _rounded(v_new * v_factor, values)
                    tl.store(key_scales + here * KV + head, k_scale)
                    tl.store(value_scales + here * KV + head, v_scale)
                else:
                    k_new, v_new = k_new.to(keys.dtype.element_ty), v_new.to(values.dtype.element_ty)
                tl.store(keys + here * (KV * D) + head * D + d, k_new)
                tl.store(values + here * (KV * D) + head * D + d, v_new)
                score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], axis=1)
                if SCALED:
                    score *= k_scale
                peak = tl.maximum(largest, score)
                factor = tl.exp2(largest - peak)
                share_new = tl.exp2(score - peak)
                weight = weight * factor + share_new
                if SCALED:
                    share_new *= v_scale
                total = total * factor[:, None] + share_new[:, None] * v_new.to(tl.float32)[None, :]
                largest = peak
            if active == 1:
                tl.store(target, (total / weight[:, None]).to(out.dtype.element_ty), mask=own)
            elif SPLITS > 1:
                slot0 = ((row * KV + head) * SPLITS) * GP
                counter = counters + row * KV + head
                _gather(total, largest, weight, target, own, g, G, slot0, split, active, partial, state, counter, D, GP)


@triton.jit(do_not_specialize=["first", "table_width", "block_size"])
def _rotate_write_kernel(
    qkv, bias, q_gain, k_gain, cos, sin, positions, seats, tables, keys, values, key_scales, value_scales, first, eps,
    table_width, block_size,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, KP: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    row = first + tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    d = tl.arange(0, D)
    base = qkv + row * ((H + 2 * KV) * D)
    if position >= 0:
        block = tl.load(tables + tl.load(seats + row) * table_width + position // block_size).to(tl.int64)
        here = (block * block_size + position % block_size) * KV
        h = tl.arange(0, HP)
        mask = (h < H)[:, None]
        q = _rotated(base, h * D, 0, bias, q_gain, h, position, cos, sin, eps, 1, D, BIAS, NORM, ROTATE, False, mask)
        j = tl.arange(0, KP)
        owned = (j < KV)[:, None]
        k = _rotated(base, (H + j) * D, 0, bias, k_gain, H + j, position, cos, sin, eps, 1, D, BIAS, NORM, ROTATE, False,
                     owned)  # fmt: skip
        v = tl.load(base + (H + KV + j)[:, None] * D + d[None, :], mask=owned, other=0.0).to(tl.float32)
        if BIAS:
            v += tl.load(bias + (H + KV + j)[:, None] * D + d[None, :], mask=owned, other=0.0)
        # Each element of q was read by two threads (its head is rotated in halves): all reads before any write.
        tl.debug_barrier()
        tl.store(base + h[:, None] * D + d[None, :], q.to(qkv.dtype.element_ty), mask=mask)
        _store(k, v, keys, values, key_scales, value_scales, here + j, j < KV, D, SCALED)


@triton.jit
def _attend_tiles(
    q, position, keys, values, key_scales, value_scales, table, low, stop, largest, weight, total, scale, block_size, head,
    KV: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr, IEEE: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries to the positions ``[low, stop)``, added to what it attended to before."""
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    d = tl.arange(0, D)
    if SCALED:
        q_even, q_odd = _halves(q)
        total, odd = _halves(total)
    for start in tl.range(low, stop, BLOCK, num_stages=STAGES):
        p = start + tl.arange(0, BLOCK)
        inside = p < stop
        slot = tl.load(table + p // block_size, mask=inside, other=0).to(tl.int64) * block_size + p % block_size
        where = slot * (KV * D) + head * D
        if SCALED:
            scores = _scores(q_even, q_odd, keys, where, inside, q, precision, D)
            scores *= tl.load(key_scales + where // D, mask=inside, other=0.0)[None, :] * (scale * LOG2E)
        else:
            k = tl.load(keys + where[:, None] + d[None, :], mask=inside[:, None], other=0.0)
            if WIDE:
                k = k.to(tl.float32)
            scores = tl.dot(q, tl.trans(k), input_precision=precision) * (scale * LOG2E)
        if MASKED:
            seen = (p[None, :] <= position[:, None]) & inside[None, :]
            if WINDOW > 0:
                seen = seen & (p[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        # A row may see nothing of a tile yet: −inf − −inf would be no number.
        peak = tl.maximum(tl.maximum(largest, tl.max(scores, axis=1)), -1e30)
        factor = tl.exp2(largest - peak)
        shares = tl.exp2(scores - peak[:, None])
        weight = weight * factor + tl.sum(shares, axis=1)
        total = total * factor[:, None]
        if SCALED:
            odd = odd * factor[:, None]
            total, odd = _add_values(total, odd, shares, values, value_scales, where, inside, q, precision, D)
        else:
            v = tl.load(values + where[:, None] + d[None, :], mask=inside[:, None], other=0.0)
            if WIDE:
                v = v.to(tl.float32)
            total = tl.dot(shares.to(v.dtype), v, total, input_precision=precision)
        largest = peak
    if SCALED:
        total = _joined(total, odd)
    return largest, weight, total


@triton.jit(do_not_specialize=["table_width", "block_size"])
def _attend_varlen_kernel(
    qkv, tiles, tables, keys, values, key_scales, value_scales, out, scale, table_width, block_size,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, G: tl.constexpr, TOKENS: tl.constexpr, WINDOW: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, IEEE: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tile = tl.program_id(1)
    seat = tl.load(tiles + tile * 4)
    first = tl.load(tiles + tile * 4 + 1)
    begin = tl.load(tiles + tile * 4 + 2)
    count = tl.load(tiles + tile * 4 + 3)
    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    token = r // G
    own = ((r < TOKENS * G) & (token < count))[:, None]
    place = (first + token).to(tl.int64)
    query_head = head * G + r % G
    q = tl.load(qkv + place[:, None] * ((H + 2 * KV) * D) + query_head[:, None] * D + d[None, :], mask=own, other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    position = begin + token
    table = tables + seat * table_width
    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((BLOCK_M,), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    if WINDOW > 0:
        masked = tl.maximum(begin + 1 - WINDOW, 0)
    else:
        # Positions that every query of the tile sees need no mask.
        masked = begin // BLOCK * BLOCK
        largest, weight, total = _attend_tiles(
            q, position, keys, values, key_scales, value_scales, table, 0, masked, largest, weight, total, scale,
            block_size, head, KV, D, WINDOW, False, SCALED, BLOCK, IEEE, WIDE, STAGES,
        )  # fmt: skip
    largest, weight, total = _attend_tiles(
        q, position, keys, values, key_scales, value_scales, table, masked, begin + count, largest, weight, total, scale,
        block_size, head, KV, D, WINDOW, True, SCALED, BLOCK, IEEE, WIDE, STAGES,
    )  # fmt: skip
    target = out + place[:, None] * (H * D) + query_head[:, None] * D + d[None, :]
    tl.store(target, (total / tl.maximum(weight, 1e-30)[:, None]).to(out.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=["table_width", "block_size", "splits"])
def _attend_verify_kernel(
    qkv, bias, q_gain, k_gain, cos, sin, segments, positions, seats, tables, keys, values, key_scales, value_scales, out,
    partial, state, counters, scale, eps, table_width, block_size, apart, splits,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, G: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    NEW: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
    SCALED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, IEEE: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    segment = tl.program_id(1)
    split = tl.program_id(2)
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    first = tl.load(segments + 2 * segment)
    count = tl.load(segments + 2 * segment + 1)
    _wait(PDL)
    if count > 0:
        begin = tl.load(positions + first)
        low = 0
        if WINDOW > 0:
            low = tl.maximum(begin + 1 - WINDOW, 0)
        # What is in the cache already is shared among the splits; the last of them takes the new positions as well.
        known = begin + 1 - low
        share = tl.cdiv(tl.cdiv(known, splits), BLOCK) * BLOCK
        active = tl.cdiv(known, share)
        if split < active:
            start = low + split * share
            d = tl.arange(0, D)
            r = tl.arange(0, ROWS)
            token = r // G
            own = ((r < DEPTH * G) & (token < count))[:, None]
            place = (first + token).to(tl.int64)
            heads = head * G + r % G
            position = begin + token
            table = tables + tl.load(seats + first) * table_width
            stride = (H + 2 * KV) * D
            q = _rotated(qkv, place * stride + heads * D, apart, bias, q_gain, heads, position, cos, sin, eps, PARTS, D,
                         BIAS, NORM, ROTATE, True, own)  # fmt: skip
            q = q.to(out.dtype.element_ty)
            if WIDE:
                q = q.to(tl.float32)
            largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
            weight = tl.zeros((ROWS,), dtype=tl.float32)
            total = tl.zeros((ROWS, D), dtype=tl.float32)
            largest, weight, total = _attend_tiles(
                q, position, keys, values, key_scales, value_scales, table, start, tl.minimum(start + share, begin),
                largest, weight, total, scale, block_size, head, KV, D, WINDOW, True, SCALED, BLOCK, IEEE, WIDE, STAGES,
            )  # fmt: skip
            if split == active - 1:
                n = tl.arange(0, NEW)
                given = n < count
                new = (first + n).to(tl.int64) * stride
                zero = n * 0
                k = _rotated(qkv, new + (H + head) * D, apart, bias, k_gain, zero + H + head, begin + n, cos, sin, eps,
                             PARTS, D, BIAS, NORM, ROTATE, True, given[:, None])  # fmt: skip
                from_v = qkv + new[:, None] + (H + KV + head) * D + d[None, :]
                v = tl.load(from_v, mask=given[:, None], other=0.0).to(tl.float32)
                for part in tl.static_range(1, PARTS):
                    v += tl.load(from_v + part * apart, mask=given[:, None], other=0.0).to(tl.float32)
                if BIAS:
                    v += tl.load(bias + (H + KV + head) * D + d)[None, :]
                slot = tl.load(table + (begin + n) // block_size, mask=given, other=0).to(tl.int64)
                here = (slot * block_size + (begin + n) % block_size) * KV + head
                k, v, k_scale, v_scale = _store(k, v, keys, values, key_scales, value_scales, here, given, D, SCALED)
                k, v = k.to(q.dtype), v.to(q.dtype)
                scores = tl.dot(q, tl.trans(k), input_precision=precision) * (scale * LOG2E)
                if SCALED:
                    scores *= k_scale[None, :]
                seen = (n[None, :] <= token[:, None]) & given[None, :]
                if WINDOW > 0:
                    seen = seen & (n[None, :] > token[:, None] - WINDOW)
                scores = tl.where(seen, scores, float("-inf"))
                peak = tl.maximum(largest, tl.max(scores, axis=1))
                factor = tl.exp2(largest - peak)
                shares = tl.exp2(scores - peak[:, None])
                weight = weight * factor + tl.sum(shares, axis=1)
                if SCALED:
                    shares *= v_scale[None, :]
                total = tl.dot(shares.to(v.dtype), v, total * factor[:, None], input_precision=precision)
                largest = peak
            target = out + place[:, None] * (H * D) + heads[:, None] * D + d[None, :]
            if active == 1:
                tl.store(target, (total / tl.maximum(weight, 1e-30)[:, None]).to(out.dtype.element_ty), mask=own)
            else:
                slot0 = ((segment * KV + head) * splits) * ROWS
                counter = counters + segment * KV + head
                rows = tl.minimum(count, DEPTH) * G
                _gather(total, largest, weight, target, own, r, rows, slot0, split, active, partial, state, counter, D,
                        ROWS)  # fmt: skip


VARLEN_ROWS = 128
"""Query rows of a tile: several positions times the query heads that share a KV head."""


def tile_tokens(heads: int, kv_heads: int) -> int:
    """Positions that one tile of :func:`attend_varlen` covers."""
    return VARLEN_ROWS // (heads // kv_heads)


# -- choosing tokens ---------------------------------------------------------------------------------------------------


@triton.jit
def _argmax_parts_kernel(logits, best, index, VOCAB: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
                         PDL: tl.constexpr):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _wait(PDL)
    column = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * VOCAB + column, mask=column < VOCAB, other=float("-inf")).to(tl.float32)
    peak, where = tl.max(value, axis=0, return_indices=True)
    tl.store(best + row * PARTS + part, peak)
    tl.store(index + row * PARTS + part, part * BLOCK + where)


@triton.jit
def _argmax_kernel(best, index, seats, tokens, last, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0)
    _wait(PDL)
    part = tl.arange(0, BLOCK)
    value = tl.load(best + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    _, where = tl.max(value, axis=0, return_indices=True)
    token = tl.load(index + row * PARTS + where)
    tl.store(tokens + row, token)
    seat = tl.load(seats + row)
    if seat >= 0:
        tl.store(last + seat, token)


ARGMAX_BLOCK = 4096


def argmax(
    logits: Tensor, seats: Tensor, best: Tensor, index: Tensor, tokens: Tensor, last: Tensor, *, pdl: bool = False
) -> None:
    """Most likely token of each row (the first of equals), into ``tokens[row]`` and, by seat, into ``last``.

    ``best`` and ``index`` are scratch of ``[rows, ceil(vocab / ARGMAX_BLOCK)]``, float32 and int32. A seat of −1 is
    padding.
    """
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, ARGMAX_BLOCK)
    start(_argmax_parts_kernel, (rows, parts))(logits, best, index, vocab, parts, ARGMAX_BLOCK, pdl, num_warps=4,
                                        **launch_options(pdl))  # fmt: skip
    start(_argmax_kernel, (rows,))(best, index, seats, tokens, last, parts, triton.next_power_of_2(parts), pdl, num_warps=1,
                            **launch_options(pdl))  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _scatter_kernel(target, where, what, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    tl.store(target + tl.load(where + i, mask=mask, other=0), tl.load(what + i, mask=mask, other=0), mask=mask)


def scatter(target: Tensor, where: Tensor, what: Tensor) -> None:
    """``target.view(-1)[where] = what``, all int32."""
    count = where.numel()
    start(_scatter_kernel, (triton.cdiv(count, 128),))(target, where, what, count, 128, num_warps=1)


Scales = tuple[Tensor, Tensor]
"""Of keys and values in 8 bits, float32 ``[slots, KV]`` each."""


def launch_options(pdl: bool) -> dict[str, Any]:
    return {"launch_pdl": True} if pdl else {}


def decode_splits(batch: int, kv_heads: int) -> int:
    """How many programs share one request's context: enough to fill the device at small batches."""
    return max(1, min(32, int(triton.next_power_of_2(triton.cdiv(256, batch * kv_heads)))))


def _decode_tile(rows: int, *, wide: bool, narrow: bool) -> tuple[int, int, int]:
    """Positions of a tile of :func:`attend_decode`, warps and stages, by measurement (docs/gpu-performance.md).

    ``wide`` is float32, ``narrow`` a cache in 8 bits: there not more threads than positions, or each thread fetches every
    scale that it needs itself.
    """
    if narrow:
        return (128, 4, 2 if wide else 3) if rows < 128 else (64, 2, 2 if wide else 3)
    if wide:
        return 64, 4, 2
    if rows < 16:
        return 64, 4, 3
    if rows < 128:
        return 128, 8, 2
    return 64, 2, 5


def attend_decode(
    qkv: Tensor,
    bias: Tensor | None,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    seats: Tensor,
    tables: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    partial: Tensor,
    state: Tensor,
    counters: Tensor,
    *,
    scale: float,
    eps: float,
    block_size: int,
    window: int,
    rotate: bool,
    splits: int,
    order: Tensor | None = None,
    block: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
    scales: Scales | None = None,
    pdl: bool = False,
) -> None:
    """One new position for each row: bias, q/k norm and rotation, its write to the cache, and its attention.

    Parameters
    ----------
    qkv : Tensor
        ``[B, (H + 2 KV) D]`` as projected, or ``[parts, B, (H + 2 KV) D]`` still to be summed.
    positions, seats : Tensor
        int32 ``[B]``.
    tables : Tensor
        int32 ``[seats, width]``, cache blocks of each seat.
    keys, values : Tensor
        ``[slots, KV, D]``, of the model's type, or of 8 bits.
    out : Tensor
        ``[B, H D]``
    partial, state, counters : Tensor
        Scratch: ``B · KV · splits · GP`` heads (GP: query heads per KV head, at least 16) of D, of 2 (float32), and
        ``B · KV`` int32 that are 0 between calls.
    order : Tensor, optional
        int32 ``[B]``: the rows in the order in which to start them.
    scales : tuple of Tensor, optional
        Of keys and values in 8 bits, float32 ``[slots, KV]`` each.
    """
    kv, d = keys.shape[1], keys.shape[2]
    rows, h = out.shape[0], out.shape[1] // d
    parts = qkv.shape[0] if qkv.dim() == 3 else 1
    wide = out.dtype == torch.float32
    tile = _decode_tile(rows, wide=wide, narrow=scales is not None)
    block, warps, stages = block or tile[0], warps or tile[1], stages or tile[2]
    start(_attend_decode_kernel, (kv, rows, splits))(
        qkv, bias, q_gain, k_gain, cos, sin, order, positions, seats, tables, keys, values, *(scales or (None, None)), out,
        partial, state, counters, scale, eps, tables.shape[1], block_size, rows * qkv.shape[-1],
        h, kv, d, h // kv, padded_group(h // kv), window,
        bias is not None, q_gain is not None, rotate, scales is not None, parts, order is not None, splits, block,
        wide, INTERPRETED, stages, pdl and not INTERPRETED,
        triton.cdiv(d * keys.element_size(), 128), pdl,
        num_warps=warps, **launch_options(pdl),
    )  # fmt: skip


def verify_rows(depth: int, group: int) -> int:
    """Rows of a matrix product for ``group`` query heads at each of ``depth`` positions."""
    return max(16, int(triton.next_power_of_2(depth * group)))


def attend_verify(
    qkv: Tensor,
    bias: Tensor | None,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    segments: Tensor,
    positions: Tensor,
    seats: Tensor,
    tables: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    partial: Tensor,
    state: Tensor,
    counters: Tensor,
    *,
    scale: float,
    eps: float,
    block_size: int,
    window: int,
    rotate: bool,
    splits: int,
    depth: int,
    block: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
    scales: Scales | None = None,
    pdl: bool = False,
) -> None:
    """A few new positions of each request: what :func:`attend_decode` does, reading each context once for all of them.

    Parameters
    ----------
    qkv : Tensor
        ``[T, (H + 2 KV) D]`` as projected, or ``[parts, T, (H + 2 KV) D]`` still to be summed.
    segments : Tensor
        int32 ``[n, 2]``: a request's first row, and how many there are, at most ``depth``; 0 for padding. Rows that are
        in no segment are left as they are.
    positions, seats : Tensor
        int32 ``[T]``; positions of a segment follow one another.
    partial, state, counters : Tensor
        Scratch: ``n · KV · splits`` times :func:`verify_rows` of D, of 2 (float32), and ``n · KV`` int32 that are 0
        between calls. The first two are not used where ``splits`` is 1.
    depth : int
        A power of two.
    """
    kv, d = keys.shape[1], keys.shape[2]
    rows, h = out.shape[0], out.shape[1] // d
    parts = qkv.shape[0] if qkv.dim() == 3 else 1
    tile = verify_rows(depth, h // kv)
    if warps is None:  # by measurement (docs/gpu-performance.md)
        warps = 8 if tile > 64 or (segments.shape[0] < 8 and scales is None) else 4
    block = block or (128 if scales is not None and warps == 4 and out.dtype != torch.float32 else 64)
    wide = out.dtype == torch.float32
    start(_attend_verify_kernel, (kv, segments.shape[0], splits))(
        qkv, bias, q_gain, k_gain, cos, sin, segments, positions, seats, tables, keys, values, *(scales or (None, None)),
        out, partial, state, counters, scale, eps, tables.shape[1], block_size, rows * qkv.shape[-1], splits,
        h, kv, d, h // kv, depth, tile, max(16, depth), window,
        bias is not None, q_gain is not None, rotate, scales is not None, parts, block, wide, INTERPRETED,
        stages or (2 if wide else 3), pdl,
        num_warps=warps, **launch_options(pdl),
    )  # fmt: skip


def padded_group(group: int) -> int:
    """Rows of a matrix product for ``group`` query heads."""
    return max(16, int(triton.next_power_of_2(group)))


def rotate_write(
    qkv: Tensor,
    bias: Tensor | None,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    seats: Tensor,
    tables: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    eps: float,
    block_size: int,
    rotate: bool,
    first: int = 0,
    scales: Scales | None = None,
) -> None:
    """Bias, q/k norm and rotation, queries in place, keys and values into the cache, of the rows from ``first`` on."""
    kv, d = keys.shape[1], keys.shape[2]
    h = qkv.shape[1] // d - 2 * kv
    start(_rotate_write_kernel, (qkv.shape[0] - first,))(
        qkv, bias, q_gain, k_gain, cos, sin, positions, seats, tables, keys, values, *(scales or (None, None)), first, eps,
        tables.shape[1], block_size,
        h, kv, d, triton.next_power_of_2(h), triton.next_power_of_2(kv), bias is not None, q_gain is not None, rotate,
        scales is not None,
        num_warps=8,
    )  # fmt: skip


def attend_varlen(
    qkv: Tensor,
    tiles: Tensor,
    tables: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    *,
    scale: float,
    block_size: int,
    window: int,
    rows: int = VARLEN_ROWS,
    block: int = 64,
    warps: int = 8,
    stages: int = 2,
    scales: Scales | None = None,
) -> None:
    """Attention of many positions, after :func:`rotate_write`.

    ``tiles`` is int32 ``[n, 4]``: seat, first row, its position, and how many (at most :func:`tile_tokens`) positions.
    """
    kv, d = keys.shape[1], keys.shape[2]
    h = out.shape[1] // d
    start(_attend_varlen_kernel, (kv, tiles.shape[0]))(
        qkv, tiles, tables, keys, values, *(scales or (None, None)), out, scale, tables.shape[1], block_size,
        h, kv, d, h // kv, rows // (h // kv), window, scales is not None, rows, block, out.dtype == torch.float32,
        INTERPRETED, stages,
        num_warps=warps,
    )  # fmt: skip
