"""Matrix products of 2 to 256 rows on a GPU: one kernel, and the measured choice of its tiles. Owns no buffer.

At these sizes a product is bound by reading the weights once, and cuBLAS leaves a fifth to a third of the time on the
table: it splits rows that need no splitting, reads weights again, and starts only when the kernel before has ended.
Here a program holds all rows (up to 256, in two accumulators where their number is not a power of two) against a strip
of the weights; several programs may share a strip by parts of its depth, and whoever reads the result adds their
parts, in order, so that no atomic operation is needed and the sum never changes. The roles are swapped (weights times
transposed rows): the matrix units take the weights' strip as their 64 or 128 rows and any 16 rows of input as columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from inference_server.engine.gpu import kernels

MAX_ROWS = 256
MAX_SPLITS = 8


class Tile(NamedTuple):
    """How a product is cut into programs."""

    rows: int
    """Rows of a program; a power of two, at least 16."""
    more: int
    """Rows beyond these in a second accumulator; 0 for none."""
    columns: int
    """Outputs of a program (of each half where gate and up are computed together)."""
    depth: int
    """Inputs taken at once."""
    splits: int
    """Programs that share an output by parts of the depth."""
    stages: int
    warps: int
    bulk: bool
    """Tiles are fetched by the bulk copy engine (TMA)."""
    ahead: int
    """Steps whose weights are asked for before the kernel before has ended."""


@triton.jit(do_not_specialize=["m"])
def _linear_kernel(
    x, x_bulk, x_bulk2, weight, weight_bulk, out, m, n, k, share,
    BM: tl.constexpr, BM2: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
    BULK: tl.constexpr, AHEAD: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(m, BM + BM2)
    row0 = (tl.program_id(0) % row_tiles) * (BM + BM2)
    col0 = (tl.program_id(0) // row_tiles) * BN
    split = tl.program_id(1)
    begin = split * share
    stop = tl.minimum(begin + share, k)
    col = col0 + tl.arange(0, BN)
    row = row0 + tl.arange(0, BM)
    deep = tl.arange(0, BK)
    strip = weight + col.to(tl.int64)[:, None] * k
    if PDL == 2:
        gdc_launch_dependents()
    if AHEAD > 0:
        line = begin + tl.arange(0, AHEAD * BK // 64) * 64
        kernels.ask(strip + line[None, :])
        if GATED:
            kernels.ask(strip + n.to(tl.int64) * k + line[None, :])
    if PDL:
        gdc_wait()
    if PDL == 1:
        gdc_launch_dependents()
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    if GATED:
        up = tl.zeros((BN, BM), dtype=tl.float32)
    if BM2 > 0:
        row2 = row0 + BM + tl.arange(0, BM2)
        acc2 = tl.zeros((BN, BM2), dtype=tl.float32)
        if GATED:
            up2 = tl.zeros((BN, BM2), dtype=tl.float32)
    for at in tl.range(begin, stop, BK, num_stages=STAGES):
        if BULK:
            w = weight_bulk.load([col0, at])
            a = x_bulk.load([row0, at])
        else:
            place = at + deep
            inside = place[None, :] < stop
            if EVEN:
                w = tl.load(strip + place[None, :], eviction_policy="evict_first")
                a = tl.load(x + row[:, None] * k + place[None, :], mask=row[:, None] < m, other=0.0)
            else:
                w = tl.load(strip + place[None, :], mask=(col[:, None] < n) & inside, other=0.0)
                a = tl.load(x + row[:, None] * k + place[None, :], mask=(row[:, None] < m) & inside, other=0.0)
        if WIDE:
            w, a = w.to(tl.float32), a.to(tl.float32)
        acc = tl.dot(w, tl.trans(a), acc, input_precision="ieee")
        if GATED:
            if BULK:
                u = weight_bulk.load([n + col0, at])
            elif EVEN:
                u = tl.load(strip + n.to(tl.int64) * k + place[None, :], eviction_policy="evict_first")
            else:
                u = tl.load(strip + n.to(tl.int64) * k + place[None, :], mask=(col[:, None] < n) & inside, other=0.0)
            if WIDE:
                u = u.to(tl.float32)
            up = tl.dot(u, tl.trans(a), up, input_precision="ieee")
        if BM2 > 0:
            if BULK:
                b = x_bulk2.load([row0 + BM, at])
            elif EVEN:
                b = tl.load(x + row2[:, None] * k + place[None, :], mask=row2[:, None] < m, other=0.0)
            else:
                b = tl.load(x + row2[:, None] * k + place[None, :], mask=(row2[:, None] < m) & inside, other=0.0)
            if WIDE:
                b = b.to(tl.float32)
            acc2 = tl.dot(w, tl.trans(b), acc2, input_precision="ieee")
            if GATED:
                up2 = tl.dot(u, tl.trans(b), up2, input_precision="ieee")
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * up
        if BM2 > 0:
            acc2 = acc2 / (1.0 + tl.exp(-acc2)) * up2
    target = out + split.to(tl.int64) * m * n
    mask = (row[:, None] < m) & (col[None, :] < n)
    tl.store(target + row[:, None] * n + col[None, :], tl.trans(acc).to(out.dtype.element_ty), mask=mask)
    if BM2 > 0:
        mask = (row2[:, None] < m) & (col[None, :] < n)
        tl.store(target + row2[:, None] * n + col[None, :], tl.trans(acc2).to(out.dtype.element_ty), mask=mask)


def linear(x: Tensor, weight: Tensor, out: Tensor, tile: Tile, *, gated: bool = False, pdl: bool = False) -> None:
    """``out = x @ weight.T``, in parts that the reader adds; or, ``gated``, ``silu(x @ gate.T) * (x @ up.T)``.

    Parameters
    ----------
    x : Tensor
        ``[M, K]``
    weight : Tensor
        ``[N, K]``; if ``gated`` ``[2 N, K]``, gate above up.
    out : Tensor
        ``[splits, M, N]``, any floating dtype; ``[M, N]`` if ``gated``.
    tile : Tile
        ``splits`` is 1 if ``gated``.
    """
    (m, k), n = x.shape, weight.shape[0] // (2 if gated else 1)
    # The engine fetches boxes whose rows begin at 16 bytes; the interpreter's cannot convert what it fetched.
    bulk = tile.bulk and (k * x.element_size()) % 16 == 0
    depth = tile.depth
    descriptors: list[Any] = [None, None, None]
    if bulk:
        descriptors[0] = TensorDescriptor.from_tensor(x, [tile.rows, depth])
        descriptors[1] = TensorDescriptor.from_tensor(x, [tile.more, depth]) if tile.more else None
        descriptors[2] = TensorDescriptor.from_tensor(weight, [tile.columns, depth])
    share = triton.cdiv(triton.cdiv(k, depth), tile.splits) * depth
    grid = (triton.cdiv(m, tile.rows + tile.more) * triton.cdiv(n, tile.columns), tile.splits)
    even = n % tile.columns == 0 and k % depth == 0
    kernels.start(_linear_kernel, grid)(
        x, descriptors[0], descriptors[1], weight, descriptors[2], out, m, n, k, share,
        tile.rows, tile.more, tile.columns, depth, gated, even, bulk,
        0 if kernels.INTERPRETED or not even else tile.ahead, x.dtype == torch.float32 or kernels.INTERPRETED,
        tile.stages, kernels.early(pdl), num_warps=tile.warps, **kernels.launch_options(pdl),
    )  # fmt: skip


def cut_rows(m: int) -> tuple[int, int]:
    """Rows of the first and of the second accumulator for ``m`` rows, the two together at most 256."""
    for rows, more in ((16, 0), (32, 0), (32, 16), (64, 0), (64, 32), (128, 0), (128, 32), (128, 64)):
        if m <= rows + more:
            return rows, more
    return 256, 0


SHARED_MEMORY = 224 * 1024


def stages_of(rows: int, columns: int, depth: int, *, gated: bool, programs: int = 1) -> int:
    """How many steps fit into the shared memory of a multiprocessor that runs ``programs`` at a time."""
    step = (rows + columns * (2 if gated else 1)) * depth * 2
    return max(2, min(8, SHARED_MEMORY // programs // step))


def choose_tile(n: int, k: int, m: int, *, gated: bool = False, processors: int = 132) -> Tile | None:
    """The tile for ``m`` rows of a matrix of ``n`` by ``k``; ``None`` where cuBLAS is the better choice."""
    if not 1 < m <= MAX_ROWS:
        return None
    rows, more = cut_rows(m)
    columns = 64 if gated or n < 64 * processors else 128
    depth = 64 if rows + more > 64 else 128
    splits = 1
    if not gated and n < 16384:
        programs = triton.cdiv(n, columns)
        splits = max(1, min(MAX_SPLITS, round(processors / programs), k // 512 or 1))
    return Tile(rows, more, columns, depth, splits, stages_of(rows + more, columns, depth, gated=gated), 8, True, 2)
