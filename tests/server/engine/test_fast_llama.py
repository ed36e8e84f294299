"""The CPU fast path gives what the plain path and transformers give, alone, in a batch, and switched while running."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from architectures import build
from fast_operations import run_operation
from serving import GREEDY, engine_for, generate, run, submit

pytest.importorskip("numba")

from transformers import AutoConfig, AutoModelForCausalLM

from inference_server.engine.attention import PagedKVTensors
from inference_server.engine.cpu import kernels, path
from inference_server.engine.llama import UnsupportedError
from inference_server.engine.request import Request
from inference_server.engine.runner import ModelRunner
from inference_server.engine.scheduler import Scheduled, StepPlan
from inference_server.protocol import Kind, SamplingParams

FAMILY = ["llama", "mistral-window", "qwen2", "qwen3", "smollm3"]
BF16_STEP = 2.0**-8


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(3, 256) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 33])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (17, 96), (64, 1536)])
def test_the_matrix_kernel_agrees_with_float64(dtype: torch.dtype, rows: int, n: int, k: int) -> None:
    torch.manual_seed(rows)
    x, w = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
    out = torch.full((rows, n), torch.nan)
    bf16 = int(dtype == torch.bfloat16)
    run_operation([kernels.OP_LINEAR, x.data_ptr(), w.data_ptr(), out.data_ptr(), k, n, bf16, 0, 0], rows=rows)
    expected = x.double() @ w.double().T
    assert float((out - expected).abs().max()) < 1e-5 * k**0.5 * float(expected.abs().max() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_the_matrix_kernel_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(11, 64).to(dtype), torch.randn(40, 64).to(dtype)
    bf16 = int(dtype == torch.bfloat16)
    together, alone = torch.empty(11, 40), torch.empty(11, 40)
    run_operation([kernels.OP_LINEAR, x.data_ptr(), w.data_ptr(), together.data_ptr(), 64, 40, bf16, 0, 0], rows=11)
    for row in range(11):
        op = [kernels.OP_LINEAR, x[row].data_ptr(), w.data_ptr(), alone[row].data_ptr(), 64, 40, bf16, 0, 0]
        run_operation(op, rows=1, threads=1)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_adds_the_residual_and_normalizes_like_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, delta, weight = torch.randn(5, 96), torch.randn(5, 96).to(dtype), torch.randn(96)
    out = torch.empty(5, 96, dtype=dtype)
    expected = x.double() + delta.double()
    op = [kernels.OP_NORM, x.data_ptr(), delta.data_ptr(), weight.data_ptr(), out.data_ptr(), 96, bits(1e-5)]
    run_operation([*op, int(dtype == torch.bfloat16), 0], rows=5)
    assert torch.allclose(x.double(), expected, atol=1e-6)
    normed = expected / (expected.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    tolerance = 1e-6 if dtype == torch.float32 else BF16_STEP
    assert torch.allclose(out.double(), normed, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 96, 112])
def test_silu_times_up_agrees_with_float64(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    both = (30 * torch.randn(3, 2 * width)).to(dtype)
    out = torch.full((3, width), torch.nan, dtype=dtype)
    op = [kernels.OP_SILU, both.data_ptr(), out.data_ptr(), width, int(dtype == torch.bfloat16)]
    run_operation(op, rows=3)
    gate, up = both.double().chunk(2, dim=1)
    tolerance = 1e-6 if dtype == torch.float32 else BF16_STEP
    assert torch.allclose(out.double(), torch.nn.functional.silu(gate) * up, rtol=tolerance, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 300])
def test_attention_over_scattered_blocks_agrees_with_float64(dtype: torch.dtype, window: int) -> None:
    """Contexts from one position to several splits; 3 query heads per KV head; blocks in any order."""
    torch.manual_seed(0)
    heads, kv, dim, block = 6, 2, 32, 16
    lengths = [1, 15, 16, 256, 257, 777]
    blocks = torch.randperm(128).tolist()
    keys, values = torch.randn(128 * block, kv, dim).to(dtype), torch.randn(128 * block, kv, dim).to(dtype)
    qkv = torch.randn(len(lengths), heads + 2 * kv, dim).to(dtype)
    out = torch.full((len(lengths), heads, dim), torch.nan, dtype=dtype)
    tables = [np.array([blocks.pop() for _ in range(-(-n // block))], dtype=np.int32) for n in lengths]
    addresses = np.array([table.ctypes.data for table in tables])
    positions, rows = np.array(lengths) - 1, np.arange(len(lengths))
    splits = -(-max(lengths) // kernels.SPLIT)
    partials = torch.empty(len(lengths) * heads * splits * (dim + 2))
    bf16, scaling = int(dtype == torch.bfloat16), dim**-0.5
    common = {
        "rows": len(lengths),
        "positions": positions.ctypes.data,
        "attend_rows": rows.ctypes.data,
        "num_attend": len(rows),
        "tables": addresses.ctypes.data,
        "block_size": block,
        "max_splits": splits,
        "partials": partials.data_ptr(),
    }
    op = [kernels.OP_ATTEND, qkv.data_ptr(), out.data_ptr(), keys.data_ptr(), values.data_ptr()]
    run_operation([*op, heads, kv, dim, window, bits(scaling), bf16], **common)
    run_operation([kernels.OP_COMBINE, out.data_ptr(), heads, kv, dim, window, bf16], **common)
    for row, (length, table) in enumerate(zip(lengths, tables, strict=True)):
        slots = (torch.from_numpy(table.astype(np.int64))[:, None] * block + torch.arange(block)).flatten()[:length]
        if window:
            slots = slots[-window:]
        k, v = (cache[slots].double().repeat_interleave(heads // kv, 1) for cache in (keys, values))
        weights = torch.softmax(torch.einsum("hd,shd->hs", qkv[row, :heads].double(), k) * scaling, dim=-1)
        expected = torch.einsum("hs,shd->hd", weights, v)
        tolerance = 1e-5 if dtype == torch.float32 else BF16_STEP
        assert torch.allclose(out[row].double(), expected, rtol=tolerance, atol=tolerance), f"context {length}"


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("kernel", ["own", "torch"])
def test_logits_agree_with_the_plain_path_for_every_shape_of_step(name: str, kernel: str) -> None:
    model = build(name)
    engine = engine_for(model, kv_bytes=1 << 22)
    assert engine.fast is not None
    engine.fast.force(kernel)
    plain, fast = engine.runner, engine.fast
    requests = []
    blocks = list(range(engine.capacity.num_blocks))
    random.Random(0).shuffle(blocks)
    for handle, length in enumerate((300, 40, 17, 5)):
        tokens = torch.randint(3, 256, (length + 8,)).tolist()
        sampling = SamplingParams(max_tokens=1)
        request = Request(handle=handle, prompt_len=length, tokens=tokens, sampling=sampling, seed=0, arrival=handle)
        request.blocks = [blocks.pop() for _ in range(-(-len(tokens) // 16))]
        requests.append(request)
    a, b, c, d = requests
    steps: list[list[tuple[Request, int, int]]] = [
        [(a, 0, 100), (b, 0, 40)],
        [(a, 100, 190), (b, 40, 1), (c, 0, 17)],
        [(a, 290, 10), (b, 41, 3), (c, 17, 1), (d, 0, 5)],
        [(a, 300, 1), (b, 44, 1), (c, 18, 1), (d, 5, 1)],
        [(a, 301, 1)],
    ]
    for use_cache in (True, False):
        for number, parts in enumerate(steps):
            items = [
                Scheduled(request, start, count, Kind.PREFILL, sample=True)
                if use_cache
                else Scheduled(request, 0, start + count, Kind.PREFILL, sample=True)
                for request, start, count in parts
            ]
            plan = StepPlan(number, items, use_cache=use_cache)
            expected = plain.forward(plan, plain.prepare(plan)).clone()
            got = fast.forward(plan, fast.prepare(plan))
            assert float((got - expected).norm() / expected.norm()) <= 1e-5
            assert fast.greedy is not None
            assert fast.greedy.tolist() == got.argmax(-1).tolist()


@pytest.mark.parametrize("name", FAMILY)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    model = build(name)
    texts = prompts(6)
    expected = [generate(model, text, 24) for text in texts]
    engine = engine_for(model)
    assert engine.features.fast_path
    for handle, text in enumerate(texts):
        submit(engine, handle, text, max_tokens=24, **GREEDY)
    assert run(engine) == dict(enumerate(expected))


def test_switching_the_path_while_requests_run_changes_no_token() -> None:
    model = build("llama")
    texts = prompts(8)
    engine = engine_for(model)
    for handle, text in enumerate(texts):
        submit(engine, handle, text, max_tokens=30, **GREEDY)
    alone = run(engine)
    seen: set[str] = set()
    step = engine.step

    def recording() -> Any:
        report, settled = step()
        assert report is not None
        seen.add(report.step.path)
        return report, settled

    engine.step = recording  # type: ignore[method-assign]
    # Few blocks, so that requests are preempted, share prefixes and copy on write while the path changes.
    for handle, text in enumerate(texts):
        submit(engine, 10 + 10 * handle, text, samples=2, max_tokens=30, **GREEDY)
    switches: dict[int, dict[str, Any]] = {number: {"fast_path": number % 2 == 0} for number in range(1, 60)}
    switches[20] = {"kv_cache": False}
    switches[23] = {"kv_cache": True}
    switches[30] = {"block_size": 4}
    switched = run(engine, switches)
    assert all(tokens == alone[handle // 10 - 1] for handle, tokens in switched.items())
    assert seen >= {"eager", "fast-cpu fp32"}


def test_bfloat16_is_as_close_to_float32_as_the_plain_path_is() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.1,
    )
    exact = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.load_state_dict(exact.state_dict())
    exact.load_state_dict(model.state_dict())  # the same weights, bfloat16 rounded
    ids = torch.randint(3, 256, (1, 60))
    with torch.inference_mode():
        reference = exact(input_ids=ids).logits[0, -1].double()
    engine = engine_for(model)
    assert engine.fast is not None
    request = Request(
        handle=0, prompt_len=60, tokens=ids[0].tolist(), sampling=SamplingParams(max_tokens=1), seed=0, arrival=0
    )
    request.blocks = [3, 1, 0, 2]
    errors = {}
    for label, runner in (("plain", engine.runner), ("fast", engine.fast)):
        for number, (start, count) in enumerate(((0, 50), (50, 9), (59, 1))):
            plan = StepPlan(number, [Scheduled(request, start, count, Kind.PREFILL, sample=True)], use_cache=True)
            logits = runner.forward(plan, runner.prepare(plan))
        errors[label] = float((logits[0].double() - reference).norm() / reference.norm())
    assert errors["fast"] <= max(1e-2, 1.2 * errors["plain"])
    assert errors["fast"] <= 2e-2


def test_fusing_the_weights_holds_them_once_and_leaves_the_module_as_it_was() -> None:
    model = build("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    engine = engine_for(model)
    assert engine.fast is not None
    layer = model.model.layers[0].self_attn
    fused = engine.fast.architecture.layers[0].qkv
    storage = fused.untyped_storage().data_ptr()
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    assert {each.weight.untyped_storage().data_ptr() for each in projections} == {storage}
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_model_outside_of_the_family_is_served_without_it_and_says_why() -> None:
    engine = engine_for(build("gpt2"))
    (spec,) = [spec for spec in engine.specs if spec.name == "fast_path"]
    assert not spec.available
    assert spec.unavailable_reason is not None
    assert "GPT2LMHeadModel is not of the Llama family" in spec.unavailable_reason
    assert engine.features.fast_path is False
    submit(engine, 0, [5, 6], max_tokens=3, **GREEDY)
    assert len(run(engine)[0]) == 3


def test_a_fast_path_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    tensors = PagedKVTensors(8, 16, torch.device("cpu"), torch.float32)
    engine = engine_for(model)
    tensors.reserve(engine.loaded.kv_shapes)
    fuse = path.fuse

    def wrong(*arguments: Any) -> Any:
        architecture = fuse(*arguments)
        architecture.scaling *= 1.1
        return architecture

    monkeypatch.setattr(path, "fuse", wrong)
    with pytest.raises(UnsupportedError, match="logits differ"):
        path.start(model, ModelRunner(model, tensors), 128)


@pytest.mark.model
def test_the_default_model_gives_transformers_tokens_while_the_path_is_switched() -> None:
    from inference_server.engine.core import Engine
    from inference_server.protocol import EngineConfig

    engine = Engine.load(EngineConfig(model="default", kv_bytes=1 << 26), lambda *_: None)
    draw = random.Random(0)
    texts = [[draw.randrange(100, 40_000) for _ in range(length)] for length in (3, 21)]
    expected = [generate(engine.loaded.model, text, 12) for text in texts]
    for handle, text in enumerate(texts):
        submit(engine, handle, text, max_tokens=12, **GREEDY)
    assert run(engine, {4: {"fast_path": False}, 6: {"fast_path": True}}) == dict(enumerate(expected))
