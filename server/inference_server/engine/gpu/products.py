"""Matrix products of a step on a GPU, with master weights or packed ones: which kernel computes which. Owns no buffer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference_server.engine.gpu import kernels, packed
from inference_server.engine.gpu.linear import linear
from inference_server.engine.gpu.packed_tiles import MOST_ROWS, packed_tile
from inference_server.engine.gpu.tiles import Tile, choose_tile
from inference_server.engine.llama import Architecture
from inference_server.engine.quantization.packing import Scheme
from inference_server.engine.quantization.planes import PlaneMatrix
from inference_server.engine.quantization.variants import Variant

Weight = Tensor | PlaneMatrix
"""A matrix ``[out, in]`` as a step reads it."""
EXPANDED_BYTES = 64 << 20
"""A packed matrix that many rows are multiplied with is written out in parts of about this size."""
SPACE_FOR = (Scheme(8), Scheme(4, 32), Scheme(4, 128))
"""Schemes of whose products all others need no more room."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The matrices of a layer, as a step reads them."""

    qkv: Weight
    output: Weight
    gate_up: Weight
    down: Weight


@dataclass(frozen=True, slots=True)
class Weights:
    """The matrices of a model, as a step reads them."""

    layers: list[LayerWeights]
    head: Weight
    narrow: bool
    """All of them are packed: one row's residual stream is read in as many bits as the model computes in."""


def weights_of(architecture: Architecture, variant: Variant | None) -> Weights:
    """The master's matrices, or a variant's where it has them."""

    def read(weight: Tensor) -> Weight:
        found = None if variant is None else variant.of(weight)
        return found if isinstance(found, PlaneMatrix) else weight

    layers = [
        LayerWeights(read(layer.qkv), read(layer.output), read(layer.gate_up), read(layer.down))
        for layer in architecture.layers
    ]
    head = read(architecture.head)
    every = [each for layer in layers for each in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    return Weights(layers, head, all(isinstance(each, PlaneMatrix) for each in (*every, head)))


def vector(
    x: Tensor,
    weight: Weight,
    *,
    out: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    copy: Tensor | None = None,
    pdl: bool,
) -> None:
    """``out = weight @ x``, or ``residual += weight @ x`` and the same into ``copy``; of the normalized ``x`` with ``gain``.

    Only packed weights take a ``copy``.
    """
    if isinstance(weight, PlaneMatrix):
        packed.gemv(x, weight, out=out, gain=gain, eps=eps, residual=residual, copy=copy, pdl=pdl)
    else:
        kernels.gemv(x, weight, out=out, gain=gain, eps=eps, residual=residual, pdl=pdl)


def gated_vector(x: Tensor, gain: Tensor, eps: float, weight: Weight, out: Tensor, *, pdl: bool) -> None:
    """``out = silu(gate @ n) * (up @ n)`` with ``n`` the RMS norm of ``x``; ``weight`` is gate above up."""
    if isinstance(weight, PlaneMatrix):
        packed.gemv(x, weight, out=out, gain=gain, eps=eps, gated=True, pdl=pdl)
    else:
        kernels.gemv_gate_up(x, gain, eps, weight, out, pdl=pdl)


def few(x: Tensor, weight: Weight, whole: Tensor, parts: Tensor, *, pdl: bool) -> Tensor:
    """``x @ weight.T`` in ``whole``, or in several parts to be summed, ``[parts, rows, columns]``."""
    rows, columns = len(x), whole.shape[1]
    if isinstance(weight, PlaneMatrix):
        own = packed_tile(columns, weight.columns, rows, weight.scheme)
        out = parts[: own.splits * rows * columns].view(own.splits, rows, columns)
        packed.linear(x, weight, out, own, pdl=pdl)
        return out
    tile = tile_of(weight, rows)
    if tile is None:
        kernels.multiply(x, weight, whole)
        return whole
    out = parts[: tile.splits * rows * columns].view(tile.splits, rows, columns)
    linear(x, weight, out, tile, pdl=pdl)
    return out


def gated_few(x: Tensor, weight: Weight, both: Tensor, active: Tensor, *, pdl: bool) -> None:
    """``active = silu(x @ gate.T) * (x @ up.T)``; ``both`` is room for the two."""
    if isinstance(weight, PlaneMatrix):
        own = packed_tile(active.shape[1], weight.columns, len(x), weight.scheme, gated=True)
        packed.linear(x, weight, active, own, gated=True, pdl=pdl)
        return
    tile = tile_of(weight, len(x), gated=True)
    if tile is not None:
        linear(x, weight, active, tile, gated=True, pdl=pdl)
    else:
        kernels.multiply(x, weight, both)
        kernels.silu_mul(both, active, pdl=pdl)


def whole_few(x: Tensor, weight: Weight, out: Tensor, *, pdl: bool) -> None:
    """``out = x @ weight.T``, not in parts."""
    if isinstance(weight, PlaneMatrix):
        own = packed_tile(out.shape[1], weight.columns, len(x), weight.scheme)._replace(splits=1)
        packed.linear(x, weight, out[None], own, pdl=pdl)
        return
    tile = tile_of(weight, len(x))
    if tile is not None and tile.splits == 1:
        linear(x, weight, out, tile, pdl=pdl)
    else:
        kernels.multiply(x, weight, out)


def many(x: Tensor, weight: Weight, out: Tensor) -> None:
    """``out = x @ weight.T`` for any number of rows."""
    if not isinstance(weight, PlaneMatrix):
        kernels.multiply(x, weight, out)
    elif len(x) <= MOST_ROWS:
        whole_few(x, weight, out, pdl=False)
    else:
        # Parts that stay in the cache until they are multiplied with.
        step = max(EXPANDED_BYTES // (weight.columns * x.element_size()), 1)
        room = torch.empty(min(step, weight.rows), weight.columns, dtype=x.dtype, device=x.device)
        for first in range(0, weight.rows, step):
            last = min(first + step, weight.rows)
            packed.expand(weight, room, first, last)
            kernels.multiply(x, room[: last - first], out[:, first:last])


def tile_of(weight: Tensor, rows: int, *, gated: bool = False) -> Tile | None:
    """How the own kernel computes a product of few rows with the master; ``None`` where cuBLAS does."""
    if weight.dtype != torch.bfloat16 and not kernels.INTERPRETED:
        return None
    return choose_tile(weight.shape[0] // (2 if gated else 1), weight.shape[1], rows, gated=gated)


def space(sizes: list[int], *weights: Tensor) -> int:
    """Room for the parts of products with these weights, packed ones too."""
    most = 0
    for weight in weights:
        columns, depth = weight.shape
        for rows in sizes:
            tile = tile_of(weight, rows)
            splits = [] if tile is None else [tile.splits]
            splits += [packed_tile(columns, depth, rows, scheme).splits for scheme in SPACE_FOR]
            most = max(most, max(splits) * rows * columns)
    return most
