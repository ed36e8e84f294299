"""Packed weights: what is stored is what was rounded, and the kernels multiply with exactly that."""

from __future__ import annotations

import pytest
import torch
from fast_operations import run_operation

pytest.importorskip("numba")

from inference_server.engine.cpu import kernels
from inference_server.engine.quantization import packing, planes
from inference_server.engine.quantization.packing import GRIDS, PackedMatrix, Rounded, Scheme

SCHEMES = [
    Scheme(8),
    Scheme(8, 32),
    Scheme(4, 32, "minimum"),
    Scheme(4, 64, "zero-point"),
    Scheme(4, 128),
    Scheme(3, 32),
    Scheme(3, 64, "minimum"),
]


def multiply(x: torch.Tensor, packed: PackedMatrix) -> torch.Tensor:
    out = torch.full((len(x), packed.rows), torch.nan)
    scheme, bf16 = packed.scheme, int(x.dtype == torch.bfloat16)
    op = [kernels.OP_PACKED, x.data_ptr(), packed.data.data_ptr(), out.data_ptr(), packed.columns, packed.rows]
    run_operation([*op, bf16, 0, 0, scheme.stored_bits, packed.group, GRIDS.index(scheme.grid)], rows=len(x))
    return out


def random_rounded(scheme: Scheme, rows: int, columns: int) -> Rounded:
    """Integers and scales that were never weights, so that rounding has no part in what is checked."""
    groups = columns // (scheme.group or columns)
    if scheme.bits == 8:
        return Rounded(torch.randint(-127, 128, (rows, columns)).to(torch.int8), torch.rand(rows, groups), None, scheme)
    values = torch.randint(0, scheme.levels, (rows, columns)).to(torch.uint8)
    scale = torch.rand(rows, groups).half().float()
    offset = {
        "symmetric": None,
        "zero-point": torch.randint(0, scheme.levels, (rows, groups)).float(),
        "minimum": torch.randn(rows, groups).half().float(),
    }[scheme.grid]
    return Rounded(values, scale, offset, scheme)


def meaning(rounded: Rounded) -> torch.Tensor:
    """The definition of each grid, in float64."""
    rows, columns = rounded.values.shape
    values = rounded.values.double().view(rows, rounded.scale.shape[1], -1)
    scale = rounded.scale.double()[..., None]
    if rounded.scheme.bits == 8:
        return (values * scale).view(rows, columns)
    if rounded.offset is None:
        return ((values - rounded.scheme.levels // 2) * scale).view(rows, columns)
    offset = rounded.offset.double()[..., None]
    if rounded.scheme.grid == "minimum":
        return (values * scale + offset).view(rows, columns)
    return ((values - offset) * scale).view(rows, columns)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(3, 128), (16, 384)])
def test_packing_keeps_every_integer_and_scale(scheme: Scheme, rows: int, columns: int) -> None:
    torch.manual_seed(rows)
    rounded = random_rounded(scheme, rows, columns)
    packed = packing.pack(rounded)
    assert packed.nbytes == packing.packed_bytes(rows, columns, scheme)
    back = packed.unpack()
    assert torch.equal(back.values, rounded.values)
    assert torch.equal(back.scale, rounded.scale)
    assert (back.offset is None) == (rounded.offset is None)
    assert back.offset is None or torch.equal(back.offset, rounded.offset)
    assert torch.equal(packed.dequantize(2, rows), packed.dequantize()[2:])
    assert torch.allclose(packed.dequantize().double(), meaning(rounded), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_packed_kernel_agrees_with_float64_of_its_own_weights(dtype: torch.dtype, scheme: Scheme) -> None:
    """For one row, a few, and many; for whole tiles of eight outputs and a part of one."""
    torch.manual_seed(0)
    for rows, (n, k) in ((1, (64, 1536)), (2, (20, 128)), (3, (17, 384)), (5, (64, 1536)), (70, (20, 128))):
        packed = packing.pack(random_rounded(scheme, n, k))
        x = torch.randn(rows, k).to(dtype)
        expected = x.double() @ packed.dequantize().double().T
        got = multiply(x, packed)
        assert float((got - expected).norm() / expected.norm()) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_packed_row_is_what_the_whole_weights_give_bit_for_bit(dtype: torch.dtype, scheme: Scheme) -> None:
    """So a result depends neither on the rows beside it nor on how many there are."""
    torch.manual_seed(0)
    packed = packing.pack(random_rounded(scheme, 24, 384))
    x, whole = torch.randn(9, 384).to(dtype), packed.dequantize().to(dtype)
    together = multiply(x, packed)
    out = torch.empty(9, 24)
    op = [kernels.OP_LINEAR, x.data_ptr(), whole.data_ptr(), out.data_ptr(), 384, 24, int(dtype == torch.bfloat16)]
    run_operation([*op, 0, 0], rows=9)
    assert torch.equal(together, out)
    for count in (1, 2, 3, 4):
        assert torch.equal(multiply(x[:count], packed), together[:count])


@pytest.mark.parametrize("scheme", [Scheme(4, 32, "minimum"), Scheme(8, 32)], ids=str)
def test_weights_on_a_grid_of_gguf_are_packed_without_loss(scheme: Scheme) -> None:
    """Q4_1 and Q8_0: float16 scales, each group's smallest and largest weight on the ends of its grid."""
    torch.manual_seed(0)
    rounded = random_rounded(scheme, 40, 256)
    groups = rounded.values.view(40, -1, 32)
    groups[..., 5], groups[..., 7] = (0, 15) if scheme.bits == 4 else (-127, 3)
    rounded.scale = (rounded.scale * 0.01).half().float()
    weight = rounded.dequantize()
    packed = packing.quantize(weight, scheme)
    assert torch.equal(packed.dequantize(), weight)


def test_floating_point_weights_are_rounded_to_the_nearest_number_and_come_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 128)
    weight[3] = 0
    packed = planes.quantize(weight, Scheme(8, grid="float"))
    every = torch.arange(256).to(torch.uint8).view(packing.FLOAT).float()
    every = every[~every.isnan()]
    scaled = torch.nan_to_num(weight / packed.unpack().scale)
    nearest = (scaled[..., None] - every).abs().amin(-1)
    stored = packed.unpack()
    assert torch.allclose((scaled - stored.values.view(packing.FLOAT).float()).abs(), nearest, atol=1e-4)
    assert torch.equal(packed.dequantize(), stored.dequantize())
    assert not packed.dequantize()[3].any()
    with pytest.raises(ValueError, match="floating-point weights have 8 bits"):
        Scheme(4, 32, "float")


@pytest.mark.parametrize("grid", GRIDS)
def test_rounding_is_to_the_nearest_value_on_the_grid(grid: packing.Grid) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 128)
    rounded = packing.round_to_nearest(weight, Scheme(4, 64, grid))
    every = torch.stack(
        [
            Rounded(torch.full_like(rounded.values, value), rounded.scale, rounded.offset, rounded.scheme).dequantize()
            for value in range(16)
        ]
    )
    nearest = (every - weight).abs().amin(0)
    assert torch.allclose((rounded.dequantize() - weight).abs(), nearest, atol=1e-6)


def test_extreme_weights_are_packed_to_finite_ones() -> None:
    for weight in (torch.zeros(8, 64), torch.full((8, 64), 3e-9), torch.full((8, 64), 1e6)):
        for scheme in SCHEMES[:3]:
            packed = packing.quantize(weight, scheme)
            assert torch.isfinite(packed.dequantize()).all()


def test_a_group_that_does_not_divide_a_row_becomes_the_next_smaller_one_that_does() -> None:
    assert Scheme(4, 128).fitted(576).group == 96
    assert Scheme(4, 64).fitted(1536).group == 64
    assert Scheme(8).fitted(576).group == 0
    with pytest.raises(ValueError, match="multiple of 32"):
        Scheme(4, 32).fitted(80)
