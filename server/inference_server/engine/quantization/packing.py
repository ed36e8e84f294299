"""The packed form of a weight matrix: schemes, rounding to nearest, packing, and what the packed weights stand for.

A scheme divides each row of a matrix into groups; the weights of a group are ``scale * q + offset`` for small integers
``q``. In 8 bits there is no offset, and ``q`` may be numbers of 8-bit floating point (e4m3) in place of integers. In 4
bits the grid of a group is one of three:

* symmetric: ``scale * (q - 8)``;
* zero point: ``scale * (q - zero)`` with an integer zero, so that zero itself is on the grid;
* minimum: ``scale * q + minimum``, the grid of GGUF's Q4_1. A matrix that lies on such a grid is packed without loss.

The kernels of ``engine.cpu.kernels`` read the layout that :func:`pack` writes, and describe it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Grid = Literal["symmetric", "zero-point", "minimum", "float"]
GRIDS: tuple[Grid, ...] = ("symmetric", "zero-point", "minimum")
"""Of integers, in the order of the kernels' numbers for them."""
FLOAT = torch.float8_e4m3fn
FLOAT_MOST = 448.0
TILE = 8
"""Rows that are packed together."""
BLOCK = 32
"""Neighbouring weights of a row that are packed together."""
HALF_MAX = 65504.0
CHUNK_WEIGHTS = 1 << 22
"""Weights that are rounded at once, so that rounding needs little memory beside the result."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are rounded.

    Attributes
    ----------
    bits : int
        8 or 4, as stored. 3 and 2 use the first 8 and 4 values of a 4-bit grid, in 4-bit storage.
    group : int
        Weights that share a scale; 0 for a whole row.
    grid : {"symmetric", "zero-point", "minimum", "float"}
        ``"float"`` in 8 bits alone, with a scale for a whole row.
    """

    bits: int
    group: int = 0
    grid: Grid = "symmetric"

    def __post_init__(self) -> None:
        if self.bits not in {2, 3, 4, 8}:
            raise ValueError(f"weights are packed in 8, 4, 3 or 2 bits, not {self.bits}")
        if self.group % BLOCK:
            raise ValueError(f"a group has a multiple of {BLOCK} weights, not {self.group}")
        if self.bits == 8 and self.grid not in {"symmetric", "float"}:
            raise ValueError("8-bit weights have a symmetric grid, or are floating point")
        if self.grid == "float" and (self.bits != 8 or self.group):
            raise ValueError("floating-point weights have 8 bits and a scale for each row")

    @property
    def stored_bits(self) -> int:
        """Bits that a weight takes."""
        return 8 if self.bits == 8 else 4

    @property
    def levels(self) -> int:
        """Number of values on the grid of a 4-bit (or narrower) group."""
        return 1 << self.bits

    def fitted(self, columns: int) -> Scheme:
        """Return this scheme with the largest group of at most its size that divides rows of ``columns`` weights.

        Raises
        ------
        ValueError
            If not even the smallest group does.
        """
        if columns % BLOCK:
            raise ValueError(f"rows of {columns} weights are not a multiple of {BLOCK}")
        if self.group == 0:
            return self
        group = next(size for size in range(self.group, 0, -BLOCK) if columns % size == 0)
        return Scheme(self.bits, group, self.grid)


@dataclass(slots=True)
class Rounded:
    """A matrix rounded to a grid, not packed yet.

    Attributes
    ----------
    values : Tensor
        uint8 ``[rows, columns]``, or int8 in 8 bits; the bits of floating-point weights are in int8 too.
    scale : Tensor
        float32 ``[rows, groups]``; representable in float16 where the scheme has fewer than 8 bits.
    offset : Tensor or None
        float32 ``[rows, groups]``: integer zeros or minima; ``None`` in a symmetric scheme.
    scheme : Scheme
    """

    values: Tensor
    scale: Tensor
    offset: Tensor | None
    scheme: Scheme

    def to(self, device: torch.device) -> Rounded:
        """The same on a device."""
        offset = None if self.offset is None else self.offset.to(device)
        return Rounded(self.values.to(device), self.scale.to(device), offset, self.scheme)

    def dequantize(self) -> Tensor:
        """What it stands for, float32 ``[rows, columns]``, with the very roundings of the kernels."""
        rows, columns = self.values.shape
        groups = self.scale.shape[1]
        values = self.values.view(rows, groups, columns // groups)
        scale = self.scale[..., None]
        if self.scheme.grid == "float":
            values = values.view(FLOAT)
        if self.scheme.bits == 8:
            return (values.float() * scale).view(rows, columns)
        # A float16 times four bits is exact in float32, and so is its product with an integer zero of four bits: one
        # rounding in the sum is all there is, as in a fused multiply-add.
        return (values.float() * scale + self._base()[..., None]).view(rows, columns)

    def _base(self) -> Tensor:
        if self.offset is None:
            return -self.scale * (self.scheme.levels // 2)
        return self.offset if self.scheme.grid == "minimum" else -self.scale * self.offset


@dataclass(slots=True)
class Packed(ABC):
    """A packed weight matrix, in the form that somebody's kernels read.

    Attributes
    ----------
    data : Tensor
        uint8, one piece.
    rows, columns : int
        Of the matrix it stands for.
    scheme : Scheme
        With a group that divides ``columns``.
    """

    data: Tensor
    rows: int
    columns: int
    scheme: Scheme

    @property
    def group(self) -> int:
        """Weights per group, spelled out."""
        return self.scheme.group or self.columns

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.columns // self.group

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.data.nbytes

    @abstractmethod
    def unpack(self, first: int = 0, last: int | None = None) -> Rounded:
        """The rounded weights of rows ``[first, last)``."""

    def dequantize(self, first: int = 0, last: int | None = None) -> Tensor:
        """The weights of rows ``[first, last)`` as float32."""
        return self.unpack(first, last).dequantize()


class PackedMatrix(Packed):
    """What a CPU's kernels read: ``data`` is ``[tiles, bytes of a tile]``; the last is filled up with zero rows."""

    __slots__ = ()

    def unpack(self, first: int = 0, last: int | None = None) -> Rounded:
        """The rounded weights of rows ``[first, last)``."""
        last = self.rows if last is None else last
        skip = first % TILE
        scheme, group, groups = self.scheme, self.group, self.groups
        bits = scheme.stored_bits
        tiles = self.data[first // TILE : -(-last // TILE)]
        count = tiles.shape[0] * TILE
        body = tiles.view(tiles.shape[0], groups, -1)
        header = _header_bytes(scheme)
        numbers = body[:, :, :header].contiguous().view(torch.float32 if bits == 8 else torch.float16)
        scale = numbers[:, :, :TILE].float().permute(0, 2, 1).reshape(count, groups)
        offset = None
        if numbers.shape[2] > TILE:
            offset = numbers[:, :, TILE:].float().permute(0, 2, 1).reshape(count, groups)
        blocks = body[:, :, header:].reshape(tiles.shape[0], groups, group // BLOCK, TILE, -1)
        if bits == 8:
            values = blocks.contiguous().view(torch.int8)
        else:
            values = torch.cat((blocks & 15, blocks >> 4), dim=-1)
            if offset is None:
                values -= zero_shift(scheme)
        values = values.permute(0, 3, 1, 2, 4).reshape(count, self.columns)
        keep = slice(skip, skip + last - first)
        return Rounded(values[keep].contiguous(), scale[keep], None if offset is None else offset[keep], scheme)


def packed_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    """Memory that a matrix takes when packed."""
    group = scheme.group or columns
    tile = columns // group * (_header_bytes(scheme) + group * TILE * scheme.stored_bits // 8)
    return -(-rows // TILE) * tile


def pack(rounded: Rounded, into: Tensor | None = None) -> PackedMatrix:
    """Lay a rounded matrix out for the kernels.

    Parameters
    ----------
    rounded : Rounded
    into : Tensor, optional
        uint8, of :func:`packed_bytes`, to write to.
    """
    rows, columns = rounded.values.shape
    scheme = rounded.scheme
    groups = rounded.scale.shape[1]
    group = columns // groups
    tiles = -(-rows // TILE)
    missing = tiles * TILE - rows
    values, scale, offset = rounded.values, rounded.scale, rounded.offset
    if missing:
        values = torch.nn.functional.pad(values, (0, 0, 0, missing))
        scale = torch.nn.functional.pad(scale, (0, 0, 0, missing))
        offset = None if offset is None else torch.nn.functional.pad(offset, (0, 0, 0, missing))
    numbers = [scale] if offset is None else [scale, offset]
    dtype = torch.float32 if scheme.bits == 8 else torch.float16
    header = torch.cat([each.to(dtype).view(tiles, TILE, groups).permute(0, 2, 1) for each in numbers], dim=2)
    blocks = values.view(tiles, TILE, groups, group // BLOCK, BLOCK).permute(0, 2, 3, 1, 4)
    if scheme.bits == 8:
        body = blocks.contiguous().view(torch.uint8)
    else:
        if offset is None:
            blocks = blocks + zero_shift(scheme)
        body = blocks[..., :16] | (blocks[..., 16:] << 4)
    header_bytes = header.contiguous().view(torch.uint8)
    if into is None:
        into = torch.empty(tiles, packed_bytes(rows, columns, scheme) // tiles, dtype=torch.uint8)
    into = into.view(tiles, -1)
    target = into.view(tiles, groups, -1)
    target[:, :, : header_bytes.shape[2]] = header_bytes
    target[:, :, header_bytes.shape[2] :] = body.reshape(tiles, groups, -1)
    return PackedMatrix(into, rows, columns, scheme)


def round_to_nearest(weight: Tensor, scheme: Scheme) -> Rounded:
    """Round each weight to the nearest value on its group's grid.

    Parameters
    ----------
    weight : Tensor
        ``[rows, columns]``, floating point.
    scheme : Scheme
        Its group must divide ``columns``.
    """
    rows, columns = weight.shape
    group = scheme.group or columns
    parts = weight.detach().float().view(rows, columns // group, group)
    scale, offset = grid_of(parts, scheme)
    values = nearest(parts, scale[..., None], None if offset is None else offset[..., None], scheme)
    return Rounded(values.view(rows, columns), scale, offset, scheme)


def grid_of(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale and offset, each ``[…]``, of groups ``[…, weights]`` in float32, as they will be stored."""
    if scheme.bits == 8:
        return groups.abs().amax(-1) / (FLOAT_MOST if scheme.grid == "float" else 127), None
    steps = scheme.levels - 1
    if scheme.grid == "symmetric":
        return _half(groups.abs().amax(-1) / (steps / 2)), None
    least, most = groups.amin(-1), groups.amax(-1)
    if scheme.grid == "minimum":
        return _half((most - least) / steps), _half(least)
    least, most = least.clamp(max=0), most.clamp(min=0)
    scale = _half((most - least) / steps)
    zero = torch.where(scale > 0, -least / scale, torch.zeros_like(scale)).round().clamp(0, steps)
    return scale, zero


def nearest(weights: Tensor, scale: Tensor, offset: Tensor | None, scheme: Scheme) -> Tensor:
    """The integers whose grid values are nearest to ``weights``; scale and offset broadcast to them."""
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    if scheme.grid == "float":
        return (weights * inverse).clamp_(-FLOAT_MOST, FLOAT_MOST).to(FLOAT).view(torch.int8)
    if scheme.bits == 8:
        return (weights * inverse).round_().clamp_(-127, 127).to(torch.int8)
    if offset is None:
        zero: Tensor | int = scheme.levels // 2
        values = (weights * inverse).add_(zero)
    elif scheme.grid == "minimum":
        values = (weights - offset).mul_(inverse)
    else:
        values = (weights * inverse).add_(offset)
    return values.round_().clamp_(0, scheme.levels - 1).to(torch.uint8)


def quantize(weight: Tensor, scheme: Scheme, into: Tensor | None = None) -> PackedMatrix:
    """Round a matrix to nearest and pack it, some rows at a time."""
    rows, columns = weight.shape
    scheme = scheme.fitted(columns)
    if into is None:
        into = torch.empty(packed_bytes(rows, columns, scheme), dtype=torch.uint8)
    into = into.view(-(-rows // TILE), -1)
    step = max(CHUNK_WEIGHTS // columns // TILE, 1) * TILE
    for first in range(0, rows, step):
        part = round_to_nearest(weight[first : first + step], scheme)
        pack(part, into[first // TILE : -(-min(first + step, rows) // TILE)])
    return PackedMatrix(into, rows, columns, scheme)


def _header_bytes(scheme: Scheme) -> int:
    if scheme.bits == 8:
        return 4 * TILE
    return 2 * TILE if scheme.grid == "symmetric" else 4 * TILE


def zero_shift(scheme: Scheme) -> int:
    """What is added to a symmetric grid's integers: the kernels have its zero at 8 whatever the number of levels."""
    return 8 - scheme.levels // 2


def _half(numbers: Tensor) -> Tensor:
    """The nearest float16, as float32."""
    return numbers.clamp(-HALF_MAX, HALF_MAX).half().float()
