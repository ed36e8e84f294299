"""Products with packed weights agree with float64 of the very weights that are packed, in every scheme."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from architectures import build
from test_gpu_kernels import DEVICE, DTYPES, normed, relative

from inference_server.engine.attention import NAME, PagedKVTensors
from inference_server.engine.gpu import packed, products
from inference_server.engine.gpu.packed_tiles import PackedTile, VectorTile, packed_tile
from inference_server.engine.gpu.runner import GpuRunner
from inference_server.engine.llama import fuse
from inference_server.engine.quantization import packing, planes
from inference_server.engine.quantization.packing import GRIDS, Scheme
from inference_server.engine.quantization.planes import PlaneMatrix
from inference_server.engine.quantization.variants import HEAD_OF_INT4, WeightFormat, WeightVariants
from inference_server.engine.request import Request
from inference_server.engine.runner import ModelRunner
from inference_server.engine.scheduler import Scheduled, StepPlan
from inference_server.protocol import Kind, SamplingParams

SCHEMES = [
    Scheme(8),
    Scheme(8, grid="float"),
    Scheme(8, 32),
    *(Scheme(4, group, grid) for group in (32, 64, 96, 128) for grid in GRIDS),
    Scheme(3, 32, "symmetric"),
]
EXACT = 1e-4
"""Of float32 sums from which what the weights' bits had too much is subtracted."""
NAMES = [f"int{each.bits}-{each.group}-{each.grid}" for each in SCHEMES]


def tolerance(dtype: torch.dtype) -> float:
    """Beside 16-bit inputs products are added in float16, or weights scaled in bfloat16; not in the interpreter."""
    return EXACT if dtype == torch.float32 else 1e-2


def gated_tolerance(gate: torch.Tensor, up: torch.Tensor, factor: float) -> float:
    """What an error of ``factor`` in both factors may make of their product: small ones suffer more."""
    active = torch.nn.functional.silu(gate)
    product = gate.norm() * up.norm() * 1.1 + up.norm() * active.norm()
    return factor * float(product / gate.numel() ** 0.5 / (active * up).norm())


def matrix_of(n: int, k: int, scheme: Scheme) -> tuple[PlaneMatrix, torch.Tensor]:
    weight = torch.randn(n, k, device=DEVICE) * (0.2 + torch.rand(n, 1, device=DEVICE)) + 0.1
    matrix = planes.quantize(weight, scheme)
    return matrix, matrix.dequantize().double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
@pytest.mark.parametrize(("n", "k"), [(7, 96), (5, 1184)])
def test_packed_matrix_times_vector_agrees_with_float64(dtype: torch.dtype, scheme: Scheme, n: int, k: int) -> None:
    torch.manual_seed(n)
    matrix, weight = matrix_of(n, k, scheme)
    x, gain = torch.randn(k, device=DEVICE).to(dtype), torch.randn(k, device=DEVICE).to(dtype)
    out = torch.full((n,), torch.nan, device=DEVICE)
    tile = VectorTile(4, 16, 2)
    packed.gemv(x, matrix, out=out, tile=tile)
    assert relative(out, weight @ x.double()) < tolerance(dtype)
    packed.gemv(x, matrix, out=out.fill_(torch.nan), gain=gain, eps=1e-5)
    assert relative(out, weight @ normed(x, gain, 1e-5)) < tolerance(dtype)
    residual, copy = torch.randn(n, device=DEVICE), torch.full((n,), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    expected = residual.double() + weight @ x.double()
    packed.gemv(x, matrix, residual=residual, copy=copy, tile=tile)
    assert relative(residual, expected) < tolerance(dtype)
    assert relative(copy, expected) < 2**-7
    both, halves = matrix_of(2 * n, k, scheme)
    gate, up = (halves @ normed(x, gain, 1e-6)).chunk(2)
    packed.gemv(x, both, out=out.fill_(torch.nan), gain=gain, eps=1e-6, gated=True, tile=tile)
    assert relative(out, torch.nn.functional.silu(gate) * up) < gated_tolerance(gate, up, tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
@pytest.mark.parametrize(("m", "n", "k"), [(5, 64, 192), (19, 40, 96)])
def test_packed_products_of_few_rows_agree_with_float64(
    dtype: torch.dtype, scheme: Scheme, m: int, n: int, k: int
) -> None:
    torch.manual_seed(m)
    x = torch.randn(m, k, device=DEVICE).to(dtype)
    matrix, weight = matrix_of(n, k, scheme)
    both, halves = matrix_of(2 * n, k, scheme)
    gate, up = (x.double() @ halves.T).chunk(2, dim=1)
    for after in (False, True):
        for splits in (1, 2):
            parts = torch.full((splits, m, n), torch.nan, device=DEVICE)
            packed.linear(x, matrix, parts, PackedTile(16, 64, splits, 2, 4, after))
            assert relative(parts.sum(0), x.double() @ weight.T) < tolerance(dtype)
        active = torch.full((m, n), torch.nan, device=DEVICE, dtype=dtype)
        packed.linear(x, both, active, PackedTile(16, 64, 1, 2, 4, after), gated=True)
        assert relative(active, torch.nn.functional.silu(gate) * up) < tolerance(dtype)


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_expanding_a_matrix_gives_its_dequantized_weights(scheme: Scheme) -> None:
    torch.manual_seed(0)
    matrix, weight = matrix_of(21, 480, scheme)
    out = torch.full((21, 480), torch.nan, device=DEVICE)
    packed.expand(matrix, out)
    assert relative(out, weight) < 1e-6
    packed.expand(matrix, out[3:12].fill_(torch.nan), 3, 12)
    assert relative(out[3:12], weight[3:12]) < 1e-6


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
@pytest.mark.parametrize(("rows", "columns"), [(7, 32), (9, 576), (3, 1120)])
def test_what_is_packed_for_a_gpu_is_what_is_packed_for_a_cpu(scheme: Scheme, rows: int, columns: int) -> None:
    torch.manual_seed(rows)
    weight, scheme = torch.randn(rows, columns), scheme.fitted(columns)
    matrix, same = planes.quantize(weight, scheme), packing.quantize(weight, scheme)
    assert torch.equal(matrix.dequantize(), same.dequantize())
    assert torch.equal(matrix.dequantize(1, 3), same.dequantize(1, 3))
    assert matrix.nbytes == planes.packed_bytes(rows, columns, scheme)
    rounded = same.unpack()
    again = planes.pack(rounded, torch.full((matrix.nbytes,), 255, dtype=torch.uint8))
    assert torch.equal(again.units, matrix.units)
    assert torch.equal(again.numbers, matrix.numbers)


def test_a_packed_product_of_many_rows_is_that_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(products, "EXPANDED_BYTES", 96 * 4 * 10)
    for scheme in (Scheme(8), Scheme(4, 32, "minimum")):
        matrix, weight = matrix_of(37, 96, scheme)
        x = torch.randn(6, 96, device=DEVICE)
        for most in (5, 6):
            monkeypatch.setattr(products, "MOST_ROWS", most)
            out = torch.full((6, 37), torch.nan, device=DEVICE)
            products.many(x, matrix, out)
            assert relative(out, x.double() @ weight.T) < EXACT


@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (1024, 2048), (151936, 1024), (576, 576)])
def test_every_number_of_rows_has_a_tile_and_room_for_its_parts(n: int, k: int) -> None:
    like = torch.empty(n, k, dtype=torch.bfloat16, device="meta")
    for scheme in SCHEMES[:-1]:
        for m in range(2, 513):
            tile = packed_tile(n, k, m, scheme)
            assert packed_tile(n, k, m, scheme, gated=True).splits == 1
            assert tile.splits * m * n <= products.space([m], like)
            assert (
                tile.stages * (tile.rows * 1024 // scheme.stored_bits + tile.columns * 64) * (1 + tile.pair) < 220_000
            )


FORMATS = [
    WeightFormat(Scheme(8), Scheme(8)),
    WeightFormat(Scheme(8, grid="float"), Scheme(8, grid="float")),
    WeightFormat(Scheme(4, 32, "minimum"), HEAD_OF_INT4),
    WeightFormat(Scheme(4, 64, "symmetric"), HEAD_OF_INT4),
    WeightFormat(Scheme(4, 128, "zero-point"), HEAD_OF_INT4),
]


def test_the_gpu_runner_gives_the_logits_of_the_plain_path_with_every_copy_of_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "MOST_ROWS", 12)
    model: Any = build("qwen3").to(DEVICE)
    model.set_attn_implementation(NAME)
    tensors = PagedKVTensors(16, 16, torch.device(DEVICE), torch.float32)
    tensors.reserve([(model.config.num_key_value_heads, 16, 16)] * model.config.num_hidden_layers)
    plain = ModelRunner(model, tensors)
    fast = GpuRunner(fuse(model, torch.float32, 64), plain, 64, 4)
    variants = WeightVariants(model, fast.architecture, 1 << 30, lambda _: None, layout=planes, built=fast.compile_for)
    requests = []
    for handle in range(3):
        tokens = torch.randint(3, 256, (40,)).tolist()
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        requests.append(Request(handle=handle, prompt_len=30, tokens=tokens, sampling=sampling, seed=0, arrival=handle))
        requests[-1].blocks = [handle, 8 + handle, 4 + handle]
    a, b, c = requests
    steps: list[list[tuple[Request, int, int]]] = [
        [(a, 0, 20), (b, 0, 7), (c, 0, 3)],
        [(a, 20, 2), (b, 7, 1), (c, 3, 4)],
        [(a, 22, 1), (b, 8, 1), (c, 7, 1)],
        [(a, 23, 1)],
    ]
    seen: dict[str, list[torch.Tensor]] = {}
    number = 0
    for weights in (None, *FORMATS, None, FORMATS[1]):
        if weights is not None and not variants.ready(weights):
            variants.build(weights)
        fast.use(variants.use(weights))
        label, logits = "master" if weights is None else weights.label, []
        for parts in steps:
            items = [Scheduled(request, start, count, Kind.PREFILL, sample=True) for request, start, count in parts]
            plan = StepPlan(number, items, use_cache=True)
            number += 1
            expected = plain.forward(plan, plain.prepare(plan)).clone()
            logits.append(fast.forward(plan, fast.prepare(plan)).clone())
            assert relative(logits[-1], expected) <= (1e-5 if weights is None else 10 * EXACT), (label, parts)
        if label in seen:
            assert all(torch.equal(*pair) for pair in zip(logits, seen[label], strict=True)), "a flip leaves no trace"
        seen[label] = logits
    assert not torch.equal(seen["master"][-1], seen["int8"][-1])
    other = fast.sibling()
    other.use(variants.use(FORMATS[1]))
    plan = StepPlan(number, [Scheduled(a, 23, 1, Kind.PREFILL, sample=True)], use_cache=True)
    assert torch.equal(other.forward(plan, other.prepare(plan)), seen[FORMATS[1].label][-1])
    variants.use(None)
    fast.use(None)
    other.use(None)
    assert len(fast._packed_graphs) == len(FORMATS)
    assert variants.drop() > 0
    gc.collect()
    assert not fast._packed_graphs, "what was recorded with a copy goes with it"
