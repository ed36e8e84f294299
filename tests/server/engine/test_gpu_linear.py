"""Products of few rows agree with float64 whatever their tiles, and their readers add the parts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from test_gpu_kernels import DEVICE, DTYPES, normed, relative, tolerance

from inference_server.engine.gpu import kernels
from inference_server.engine.gpu.linear import linear
from inference_server.engine.gpu.tiles import MAX_ROWS, SHARED_MEMORY, Tile, choose_tile

TILES = [
    Tile(16, 0, 64, 32, 1, 2, 4, bulk=False, ahead=1),
    Tile(16, 0, 64, 64, 3, 3, 4, bulk=True, ahead=2),
    Tile(32, 16, 64, 32, 2, 2, 4, bulk=True, ahead=0),
    Tile(32, 16, 64, 32, 2, 2, 4, bulk=False, ahead=2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(5, 64, 128), (37, 96, 192), (3, 40, 72), (61, 128, 64)])
def test_products_of_few_rows_agree_with_float64_for_every_tile(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    torch.manual_seed(m)
    x, weight = torch.randn(m, k, device=DEVICE).to(dtype), torch.randn(n, k, device=DEVICE).to(dtype)
    expected = x.double() @ weight.double().T
    gate, up = expected.chunk(2, dim=1)
    for tile in TILES:
        parts = torch.full((tile.splits, m, n), torch.nan, device=DEVICE)
        linear(x, weight, parts, tile)
        assert relative(parts.sum(0), expected) < 1e-5, tile
        active = torch.full((m, n // 2), torch.nan, device=DEVICE, dtype=dtype)
        linear(x, weight, active, tile._replace(splits=1), gated=True)
        assert relative(active, torch.nn.functional.silu(gate) * up) < tolerance(dtype), tile


def test_the_norm_adds_the_parts_of_a_product() -> None:
    torch.manual_seed(0)
    residual, parts, gain = (torch.randn(shape, device=DEVICE) for shape in ((5, 96), (3, 5, 96), (96,)))
    summed = residual.double() + parts.double().sum(0)
    out = torch.full((5, 96), torch.nan, device=DEVICE)
    kernels.add_norm(residual, parts, gain, 1e-5, out)
    assert relative(residual, summed) < 1e-6
    assert relative(out, normed(summed, gain, 1e-5)) < 1e-5


@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (2048, 1024), (151936, 1024), (576, 576)])
def test_every_number_of_rows_has_a_tile_that_covers_it_and_fits_into_shared_memory(n: int, k: int) -> None:
    for gated in (False, True):
        for m in range(2, MAX_ROWS + 1):
            tile = choose_tile(n, k, m, gated=gated)
            if tile is None:
                continue
            assert -(-m // (tile.rows + tile.more)) * (tile.rows + tile.more) >= m
            step = (tile.rows + tile.more + tile.columns * (2 if gated else 1)) * tile.depth * 2
            assert tile.stages >= 2
            assert tile.stages * step <= SHARED_MEMORY
            assert tile.splits == 1 or not gated
    assert choose_tile(n, k, 1) is None
    assert choose_tile(n, k, MAX_ROWS + 1) is None
