"""Which tile a product of few rows takes: measured where it was (docs/gpu-performance.md), by rule elsewhere."""

from __future__ import annotations

from typing import NamedTuple

MAX_ROWS = 256
MAX_SPLITS = 8
SHARED_MEMORY = 224 * 1024
"""Bytes that the programs on one multiprocessor can hold together."""


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
    bulk: bool = True
    """Tiles are fetched by the bulk copy engine (TMA)."""
    ahead: int = 2
    """Steps whose weights are asked for before the kernel before has ended."""


Rows = tuple[tuple[int, "Tile | None"], ...]
"""Up to how many rows, and the tile; ``None`` where cuBLAS was faster."""

MEASURED: dict[tuple[int, int, bool], Rows] = {
    # Llama 3.1 8B: query, key and value; attention output; gate and up; down; head.
    (6144, 4096, False): (
        (16, Tile(16, 0, 64, 128, 2, 8, 4)),
        (32, Tile(32, 0, 64, 64, 1, 8, 4)),
        (64, Tile(64, 0, 64, 128, 1, 7, 4)),
        (96, Tile(64, 32, 64, 128, 1, 5, 4)),
        (128, Tile(128, 0, 64, 64, 1, 8, 4)),
        (256, None),
    ),
    (4096, 4096, False): (
        (16, Tile(16, 0, 64, 128, 2, 8, 4)),
        (32, Tile(32, 0, 64, 128, 2, 8, 4)),
        (64, Tile(64, 0, 64, 64, 2, 8, 4)),
        (96, Tile(64, 32, 64, 128, 2, 5, 4)),
        (128, Tile(128, 0, 64, 128, 2, 4, 4)),
        (256, None),
    ),
    (14336, 4096, True): (
        (16, Tile(16, 0, 128, 128, 1, 3, 4)),
        (32, Tile(32, 0, 128, 128, 1, 3, 4)),
        (64, Tile(64, 0, 64, 128, 1, 4, 4)),
        (96, Tile(64, 32, 64, 128, 1, 4, 8)),
        (128, Tile(128, 0, 64, 64, 1, 3, 8)),
        (160, Tile(128, 32, 64, 64, 1, 3, 8)),
        (192, Tile(128, 64, 64, 64, 1, 5, 8)),
        (256, Tile(256, 0, 64, 64, 1, 4, 8)),
    ),
    (4096, 14336, False): (
        (16, Tile(16, 0, 64, 128, 2, 8, 8)),
        (32, Tile(32, 0, 64, 128, 2, 8, 4)),
        (64, Tile(64, 0, 64, 64, 2, 8, 4)),
        (96, Tile(64, 32, 64, 128, 2, 5, 4)),
        (128, Tile(128, 0, 64, 128, 2, 4, 4)),
        (160, Tile(128, 32, 64, 128, 2, 4, 8)),
        (192, Tile(128, 64, 64, 64, 2, 7, 8)),
        (224, Tile(128, 0, 128, 128, 2, 3, 8)),
        (256, Tile(256, 0, 64, 64, 2, 5, 8)),
    ),
    (128256, 4096, False): (
        (16, Tile(16, 0, 64, 128, 1, 8, 4)),
        (32, Tile(32, 0, 64, 128, 1, 8, 4)),
        (64, Tile(64, 0, 128, 128, 1, 4, 4)),
        (96, Tile(64, 32, 64, 64, 1, 5, 4)),
        (128, Tile(128, 0, 128, 64, 1, 3, 8)),
        (160, Tile(128, 32, 128, 64, 1, 3, 8)),
        (192, Tile(128, 64, 128, 64, 1, 5, 8)),
        (256, Tile(256, 0, 128, 64, 1, 4, 8)),
    ),
    # Qwen3 0.6B, in the same order.
    (4096, 1024, False): (
        (16, Tile(16, 0, 64, 128, 2, 8, 4)),
        (32, Tile(32, 0, 64, 128, 2, 8, 8)),
        (64, Tile(64, 0, 64, 128, 2, 7, 8)),
        (128, Tile(64, 0, 64, 128, 1, 7, 4)),
        (256, Tile(128, 0, 64, 128, 1, 4, 4)),
    ),
    (1024, 2048, False): (
        (16, Tile(16, 0, 64, 128, 6, 5, 4)),
        (32, Tile(32, 0, 64, 128, 6, 4, 4)),
        (64, Tile(64, 0, 64, 128, 8, 3, 4)),
        (128, Tile(64, 0, 64, 64, 4, 7, 4)),
        (256, Tile(128, 0, 64, 128, 4, 4, 4)),
    ),
    (3072, 1024, True): (
        (16, Tile(16, 0, 64, 128, 1, 6, 4)),
        (32, Tile(32, 0, 64, 128, 1, 5, 4)),
        (128, Tile(64, 0, 64, 128, 1, 4, 4)),
        (192, None),
        (256, Tile(128, 0, 64, 128, 1, 3, 8)),
    ),
    (1024, 3072, False): (
        (16, Tile(16, 0, 64, 128, 8, 5, 4)),
        (32, Tile(32, 0, 64, 128, 6, 4, 4)),
        (64, Tile(64, 0, 64, 64, 6, 7, 4)),
        (128, Tile(64, 0, 64, 64, 4, 8, 4)),
        (256, Tile(128, 0, 64, 64, 4, 4, 4)),
    ),
    (151936, 1024, False): (
        (16, Tile(16, 0, 128, 128, 1, 6, 4)),
        (32, Tile(32, 0, 64, 128, 1, 8, 4)),
        (64, Tile(64, 0, 64, 128, 1, 3, 4)),
        (96, Tile(64, 32, 128, 128, 1, 4, 8)),
        (128, Tile(128, 0, 128, 128, 1, 3, 8)),
        (160, Tile(128, 32, 128, 64, 1, 6, 8)),
        (192, Tile(128, 64, 128, 64, 1, 5, 8)),
        (256, None),
    ),
}


def cut_rows(m: int) -> tuple[int, int]:
    """Rows of the first and of the second accumulator for ``m`` rows, the two together at most 256."""
    for rows, more in ((16, 0), (32, 0), (32, 16), (64, 0), (64, 32), (128, 0), (128, 32), (128, 64)):
        if m <= rows + more:
            return rows, more
    return 256, 0


def stages_of(rows: int, columns: int, depth: int, *, gated: bool, programs: int = 1) -> int:
    """How many steps fit into the shared memory of a multiprocessor that runs ``programs`` at a time."""
    step = (rows + columns * (2 if gated else 1)) * depth * 2
    return max(2, min(8, SHARED_MEMORY // programs // step))


def choose_tile(n: int, k: int, m: int, *, gated: bool = False, processors: int = 132) -> Tile | None:
    """The tile for ``m`` rows of a matrix of ``n`` by ``k``; ``None`` where cuBLAS is the better choice."""
    if not 1 < m <= MAX_ROWS:
        return None
    for most, tile in MEASURED.get((n, k, gated), ()):
        if m <= most:
            return tile
    narrow = not gated and n < 16384
    if narrow and m > 128 and k < 2 * n:
        return None
    rows, more = cut_rows(m)
    depth = 128 if rows + more <= 64 else 64
    splits = 1
    if narrow:
        splits = max(1, min(MAX_SPLITS, round(processors / -(-n // 64)), k // 256))
    stages = stages_of(rows + more, 64, depth, gated=gated)
    return Tile(rows, more, 64, depth, splits, stages, 4 if rows + more <= 64 else 8)
