"""The packed form of a weight matrix that a GPU's kernels read. Knows no kernel; runs on any device.

A row is a sequence of 16-bit units, 32 to a block. A unit holds two weights of 8 bits or four of 4; its field ``p``
(from the lowest bits up) belongs to the block's columns ``32 p`` to ``32 p + 31``, one for each unit. So a block covers
64 or 128 columns, a field of a block never spans two groups, and one mask takes the same field out of two units at a
time. Rows end with a whole block: columns that the matrix does not have are zero.

Behind the rows stand four bytes for each row and group: in 8 bits, and on a symmetric grid, the scale as float32; else
scale and offset as float16. 8-bit weights are two's complement, or e4m3; on a symmetric 4-bit grid zero is 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inference_server.engine.quantization.packing import (
    CHUNK_WEIGHTS,
    Packed,
    Rounded,
    Scheme,
    round_to_nearest,
    zero_shift,
)

UNITS = 32
"""Units of a block."""
UNIT_BITS = 16
NUMBERS_ALIGNMENT = 128
"""Where the scales begin, in bytes."""


class PlaneMatrix(Packed):
    """What a GPU's kernels read: in ``data`` the rows' units, then scales and offsets."""

    __slots__ = ()

    @property
    def planes(self) -> int:
        """Weights of a unit."""
        return UNIT_BITS // self.scheme.stored_bits

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return _blocks(self.columns, self.scheme)

    @property
    def units(self) -> Tensor:
        """int16 ``[rows, 32 blocks]``."""
        end = self.rows * self.blocks * UNITS * 2
        return self.data[:end].view(torch.int16).view(self.rows, -1)

    @property
    def numbers(self) -> Tensor:
        """int32 ``[rows, groups]``: the bits of a float32 scale, or of a float16 scale below a float16 offset."""
        begin = _numbers_begin(self.rows, self.columns, self.scheme)
        return self.data[begin : begin + 4 * self.rows * self.groups].view(torch.int32).view(self.rows, -1)

    def write(self, first: int, rounded: Rounded) -> None:
        """Put rounded rows in their place, from row ``first`` on."""
        rows, columns = rounded.values.shape
        scheme, planes, blocks = self.scheme, self.planes, self.blocks
        values = rounded.values.view(torch.uint8)
        if scheme.bits != 8 and rounded.offset is None:
            values = values + zero_shift(scheme)
        missing = blocks * UNITS * planes - columns
        if missing:
            values = torch.nn.functional.pad(values, (0, missing))
        fields = values.view(rows, blocks, planes, UNITS).unbind(2)
        if scheme.stored_bits == 4:
            fields = (fields[0] | (fields[1] << 4), fields[2] | (fields[3] << 4))
        last = first + rows
        self.units[first:last] = torch.stack(fields, -1).view(torch.int16).view(rows, -1)
        if rounded.offset is None:
            self.numbers[first:last] = rounded.scale.float().contiguous().view(torch.int32)
        else:
            pair = torch.stack((rounded.scale, rounded.offset), -1).half()
            self.numbers[first:last] = pair.view(torch.int32).view(rows, -1)

    def unpack(self, first: int = 0, last: int | None = None) -> Rounded:
        """The rounded weights of rows ``[first, last)``."""
        last = self.rows if last is None else last
        scheme = self.scheme
        halves = self.units[first:last].contiguous().view(torch.uint8).view(last - first, self.blocks, UNITS, 2)
        fields = [halves[..., 0], halves[..., 1]]
        if scheme.stored_bits == 4:
            fields = [part for half in fields for part in (half & 15, half >> 4)]
        values = torch.stack(fields, 2).reshape(last - first, -1)[:, : self.columns].contiguous()
        numbers = self.numbers[first:last]
        if scheme.bits == 8:
            return Rounded(values.view(torch.int8), numbers.view(torch.float32), None, scheme)
        if scheme.grid == "symmetric":
            return Rounded(values - zero_shift(scheme), numbers.view(torch.float32), None, scheme)
        pair = numbers.contiguous().view(torch.float16).view(last - first, -1, 2).float()
        return Rounded(values, pair[..., 0], pair[..., 1], scheme)


def packed_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    """Memory that a matrix takes when packed."""
    return _numbers_begin(rows, columns, scheme) + 4 * rows * (columns // (scheme.group or columns))


def pack(rounded: Rounded, into: Tensor | None = None) -> PlaneMatrix:
    """Lay a rounded matrix out for the kernels.

    Parameters
    ----------
    rounded : Rounded
    into : Tensor, optional
        uint8, of :func:`packed_bytes`, to write to; its device need not be the matrix's.
    """
    rows, columns = rounded.values.shape
    matrix = _room(rows, columns, rounded.scheme, into, rounded.values.device)
    matrix.write(0, rounded.to(matrix.data.device))
    return matrix


def quantize(weight: Tensor, scheme: Scheme, into: Tensor | None = None) -> PlaneMatrix:
    """Round a matrix to nearest and pack it, some rows at a time."""
    rows, columns = weight.shape
    matrix = _room(rows, columns, scheme.fitted(columns), into, weight.device)
    step = max(CHUNK_WEIGHTS // columns, 1)
    for first in range(0, rows, step):
        part = weight[first : first + step].to(matrix.data.device)
        matrix.write(first, round_to_nearest(part, matrix.scheme))
    return matrix


def _room(rows: int, columns: int, scheme: Scheme, into: Tensor | None, device: torch.device) -> PlaneMatrix:
    if into is None:
        into = torch.empty(packed_bytes(rows, columns, scheme), dtype=torch.uint8, device=device)
    return PlaneMatrix(into, rows, columns, scheme)


def _blocks(columns: int, scheme: Scheme) -> int:
    return -(-columns // (UNITS * UNIT_BITS // scheme.stored_bits))


def _numbers_begin(rows: int, columns: int, scheme: Scheme) -> int:
    return -(-rows * _blocks(columns, scheme) * UNITS * 2 // NUMBERS_ALIGNMENT) * NUMBERS_ALIGNMENT
