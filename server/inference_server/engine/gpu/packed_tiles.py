"""Which tile a product with packed weights takes on a GPU: by measurement where it was measured, else by rule."""

from __future__ import annotations

from typing import NamedTuple

from inference_server.engine.quantization.packing import Scheme


class VectorTile(NamedTuple):
    """How a product with one vector is cut into programs."""

    rows: int
    """Rows of a program (of each half where gate and up are computed together)."""
    vectors: int
    """Pieces of 16 bytes taken of each row at once."""
    warps: int


class PackedTile(NamedTuple):
    """How a product of few rows is cut into programs."""

    rows: int
    """Rows of a program; a power of two, at least 16."""
    columns: int
    """Outputs of a program (of each half where gate and up are computed together)."""
    splits: int
    """Programs that share an output by parts of the depth."""
    stages: int
    warps: int
    after: bool
    """Scales are applied to a group's sums, not to its weights."""
    pair: bool = False
    """Two blocks are taken at once; not with ``after``."""
    bulk: bool = True
    """Tiles are fetched by the bulk copy engine (TMA)."""
    ahead: int = 4
    """Blocks whose weights are asked for before the kernel before has ended."""


MOST_ROWS = 512
"""Products of more rows, of prompts, expand the matrix for cuBLAS: at 256 that takes nearly twice as long."""
STRIP = 64
"""Outputs of a program that computes few rows."""


def vector_tile(n: int, k: int, scheme: Scheme, *, gated: bool = False) -> VectorTile:
    """The tile for one vector times a matrix of ``n`` rows of ``k``."""
    wide, fine = scheme.stored_bits == 8, 0 < scheme.group < 64
    if n >= 65536:
        return VectorTile(4, 64, 2)
    if gated:
        return VectorTile(2, 64, 2) if wide else VectorTile(4 if fine else 8, 128, 4)
    if wide:
        return VectorTile(8, 128, 4) if k >= 8192 or n <= 4096 else VectorTile(16, 64, 4)
    if k >= 8192:
        return VectorTile(4, 64, 2) if fine else VectorTile(8, 64, 4)
    if n <= 4096:
        return VectorTile(8, 64, 2) if fine else VectorTile(16, 128, 4)
    return VectorTile(16, 32, 4)


def packed_tile(n: int, k: int, m: int, scheme: Scheme, *, gated: bool = False, processors: int = 132) -> PackedTile:
    """The tile for ``m`` rows of a matrix of ``n`` by ``k``."""
    wide = scheme.stored_bits == 8
    rows = next((each for each in (16, 32, 64) if each >= m), 128)
    if wide and n >= 65536 and m > 64:
        return PackedTile(rows, 2 * STRIP, 1, 4, 8, False)
    blocks = -(-k // (512 // scheme.stored_bits))
    splits = 1
    if not gated and n < 16384:
        programs = -(-n // STRIP) * -(-m // rows)
        each = 4 if m <= 16 or (m <= 32 and not wide) else 2
        splits = max(1, min(8, round(each * processors / programs), blocks // 4))
    # Scaling sums costs by the rows, scaling weights by the weights; and sums of small groups are many.
    coarse = not wide and scheme.group >= 64
    after = coarse and ((gated and m <= 64) or (not gated and m > 16))
    pair = not after and rows < 128 and (wide or rows == 16)
    if rows == 128:
        stages = (3 if gated else 4) if wide else (2 if gated else 3)
    else:
        stages = 3 if rows == 16 and not wide else 4
    return PackedTile(rows, STRIP, splits, stages, 4, after, pair)
