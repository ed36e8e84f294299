"""Matrix products of 2 to 256 rows on a GPU. Owns no buffer; ``tiles`` chooses how they are cut.

At these sizes a product is bound by reading the weights once. cuBLAS starts to only when the kernel before has ended,
and leaves SiLU and the sum of its parts to further kernels.
Here a program holds all rows (up to 256, in two accumulators where their number is not a power of two) against a strip
of the weights; several programs may share a strip by parts of its depth, and whoever reads the result adds their
parts, in order, so that no atomic operation is needed and the sum never changes. The roles are swapped (weights times
transposed rows): the matrix units take the weights' strip as their 64 or 128 rows and any 16 rows of input as columns.
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
from inference_server.engine.gpu.tiles import Tile


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
    if PDL:
        gdc_launch_dependents()
    if AHEAD > 0:
        line = begin + tl.arange(0, AHEAD) * 64
        kernels.ask(strip + line[None, :])
        if GATED:
            kernels.ask(strip + n.to(tl.int64) * k + line[None, :])
    if PDL:
        gdc_wait()
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
    lines = triton.next_power_of_2(tile.ahead * depth * x.element_size() // 128)
    kernels.start(_linear_kernel, grid)(
        x, descriptors[0], descriptors[1], weight, descriptors[2], out, m, n, k, share,
        tile.rows, tile.more, tile.columns, depth, gated, even, bulk,
        lines if even and not kernels.INTERPRETED else 0, x.dtype == torch.float32 or kernels.INTERPRETED,
        tile.stages, pdl, num_warps=tile.warps, **kernels.launch_options(pdl),
    )  # fmt: skip
