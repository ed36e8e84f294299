"""Keys and values in 8 bits: what is stored, what the kernels make of it, and the switch while requests run."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from architectures import build
from serving import DEVICE, GREEDY, engine_for, run, submit, switch

from inference_server.engine.attention import IN_8_BITS, PagedKVTensors, no_fp8
from inference_server.engine.core import Engine, RequestError
from inference_server.engine.kv_cache import Copy, SwapIn, SwapOut
from inference_server.features import FeatureError
from inference_server.protocol import Notice

HERE = ["int8", *(["fp8"] if no_fp8(DEVICE) is None else [])]
"""What the engine can store keys and values in on this device."""
SHAPES = [(2, 32, 32)]


def tensors_of(dtype: torch.dtype, blocks: int, block: int = 16, precision: str = "int8") -> PagedKVTensors:
    tensors = PagedKVTensors(blocks, block, torch.device("cpu"), dtype)
    tensors.reserve(SHAPES)
    tensors.store_as(precision)
    return tensors


@pytest.mark.parametrize("precision", list(IN_8_BITS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_memory_holds_more_positions_with_a_rounding_error_of_half_a_step(
    dtype: torch.dtype, precision: str
) -> None:
    torch.manual_seed(0)
    tensors = tensors_of(dtype, 8, precision=precision)
    memory = sum(each.nbytes for each in tensors.whole)
    slots = len(tensors.keys[0])
    per_slot = 2 * 2 * (32 + 4)
    assert memory - per_slot < slots * per_slot <= memory
    everywhere = torch.arange(slots)
    keys, values = torch.randn(slots, 2, 32), torch.randn(slots, 2, 32) * 100
    values[3] = 0
    tensors.write(0, everywhere, keys, values)
    for stored, original in zip(tensors.read(0, everywhere, torch.float32), (keys, values), strict=True):
        largest = original.abs().amax(-1, keepdim=True)
        # Of floating point the step is an eighth of a power of two at or below the number, down to 2 ** -9.
        step = largest / 127 if precision == "int8" else (original.abs() / 8).maximum(largest / 448 / 512)
        assert ((stored - original).abs() <= 0.51 * step).all(), "every slot is apart from every other and from scales"
    tensors.store_as("master")
    assert tensors.keys[0].dtype == dtype
    assert sum(each.nbytes for each in tensors.whole) == memory


@pytest.mark.parametrize("precision", list(IN_8_BITS))
def test_copies_and_swaps_take_the_scales_along(precision: str) -> None:
    torch.manual_seed(0)
    tensors = tensors_of(torch.float32, 4, block=4, precision=precision)
    keys = torch.randn(8, 2, 32)
    tensors.write(0, torch.arange(8), keys, keys)
    tensors.transfer([Copy(0, 3), SwapOut(7, [1], 4)])
    tensors.write(0, torch.arange(4, 8), torch.zeros(4, 2, 32), torch.zeros(4, 2, 32))
    tensors.transfer([SwapIn(7, [2], 4)])
    read, _ = tensors.read(0, torch.arange(16), torch.float32)
    assert torch.equal(read[12:16], read[0:4])
    assert torch.allclose(read[8:12], keys[4:8], atol=0.03, rtol=0.07)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 300])
def test_attention_over_8_bit_blocks_agrees_with_float64_of_what_is_stored(dtype: torch.dtype, window: int) -> None:
    """Contexts from one position to several splits; 3 query heads per KV head; blocks in any order."""
    pytest.importorskip("numba")
    from fast_operations import run_operation

    from inference_server.engine.cpu import kernels

    torch.manual_seed(0)
    heads, kv, dim, block = 6, 2, 32, 16
    lengths = [1, 15, 16, 256, 257, 777]
    tensors = tensors_of(dtype, 128)
    blocks = torch.randperm(128).tolist()
    everywhere = torch.arange(128 * block)
    tensors.write(0, everywhere, torch.randn(len(everywhere), kv, dim), torch.randn(len(everywhere), kv, dim))
    keys, values = tensors.read(0, everywhere, torch.float64)
    qkv = torch.randn(len(lengths), heads + 2 * kv, dim).to(dtype)
    out = torch.full((len(lengths), heads, dim), torch.nan, dtype=dtype)
    tables, at = [], 0
    for length in lengths:
        count = -(-length // block)
        tables.append(torch.tensor(blocks[at : at + count], dtype=torch.int32))
        at += count
    positions = torch.tensor(lengths) - 1
    rows = torch.arange(len(lengths))
    addresses = torch.tensor([table.data_ptr() for table in tables])
    splits = -(-max(lengths) // kernels.SPLIT)
    partials = torch.empty(len(lengths), kv, splits, heads // kv, dim + 2)
    scaling, bf16 = dim**-0.5, int(dtype == torch.bfloat16)
    bits = int(torch.tensor(scaling).view(torch.int32))
    cache = [tensors.keys[0].data_ptr(), tensors.values[0].data_ptr()]
    scales = [tensors.key_scales[0].data_ptr(), tensors.value_scales[0].data_ptr()]
    shared = {
        "positions": positions.data_ptr(),
        "rows": len(lengths),
        "attend_rows": rows.data_ptr(),
        "num_attend": len(lengths),
        "tables": addresses.data_ptr(),
        "block_size": block,
        "max_splits": splits,
        "partials": partials.data_ptr(),
    }
    attend = [kernels.OP_ATTEND, qkv.data_ptr(), out.data_ptr(), *cache, heads, kv, dim, window, bits, bf16, *scales]
    run_operation(attend, **shared)
    run_operation([kernels.OP_COMBINE, out.data_ptr(), heads, kv, dim, window, bf16], **shared)
    for row, length in enumerate(lengths):
        slots = torch.cat([torch.arange(block) + int(each) * block for each in tables[row]])[:length]
        if window:
            slots = slots[-window:]
        for head in range(heads):
            scores = keys[slots, head // 3] @ qkv[row, head].double() * scaling
            expected = torch.softmax(scores, 0) @ values[slots, head // 3]
            error = (out[row, head].double() - expected).norm() / expected.norm()
            assert float(error) < (1e-5 if dtype == torch.float32 else 1e-2)


def prompts(count: int) -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(3, 256) for _ in range(draw.randrange(1, 60))] for _ in range(count)]


def answers_of(engine: Engine, first: int = 0, **how: Any) -> dict[int, list[int]]:
    for index, prompt in enumerate(prompts(5)):
        submit(engine, first + index, prompt, max_tokens=12, **GREEDY)
    return {handle - first: tokens for handle, tokens in run(engine, **how).items()}


@pytest.mark.parametrize("precision", HERE)
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3"])
def test_both_paths_say_the_same_with_8_bit_keys_and_values(name: str, precision: str) -> None:
    features = {"kv_cache_dtype": precision}
    fast = engine_for(build(name), features=features)
    plain = engine_for(build(name), features={**features, "fast_path": False})
    assert fast.fast is not None
    assert answers_of(fast) == answers_of(plain)


@pytest.mark.parametrize("precision", HERE)
def test_how_a_prompt_is_cut_into_steps_does_not_change_the_answer(precision: str) -> None:
    features = {"kv_cache_dtype": precision}
    whole = answers_of(engine_for(build("llama"), features=features))
    pieces = answers_of(engine_for(build("llama"), features={**features, "max_num_batched_tokens": 7}))
    assert whole == pieces


def test_what_the_device_cannot_store_is_refused_with_what_to_do_instead() -> None:
    engine = engine_for(build("llama"))
    if "fp8" in HERE:
        assert switch(engine, {"kv_cache_dtype": "fp8"}).values["kv_cache_dtype"] == "fp8"
        return
    for name in ("kv_cache_dtype", "weight_precision"):
        with pytest.raises(FeatureError, match=r"capability 8\.9 .* int8 takes the same memory"):
            engine.set_features(0, {name: "fp8"})
    started = engine_for(build("llama"), features={"kv_cache_dtype": "fp8"})
    assert started.features.kv_cache_dtype == "master"
    assert any("8.9" in news.text for news in started.take_news() if isinstance(news, Notice))


@pytest.mark.parametrize("precision", HERE)
def test_switching_while_requests_run_loses_none_and_ends_where_it_began(precision: str) -> None:
    there = {"kv_cache_dtype": precision}
    engine = engine_for(build("llama"), kv_bytes=1 << 17)
    before = answers_of(engine)
    switch(engine, there)  # what has to be compiled for it is, and each switch from now on comes at once
    memory = sum(each.nbytes for each in engine.runner.tensors.whole)
    switches = {step: {"kv_cache_dtype": ("master", precision)[step // 2 % 2]} for step in range(2, 40, 2)}
    assert [len(tokens) for tokens in answers_of(engine, 10, switches=switches).values()] == [12] * 5
    engine.set_features(0, {"kv_cache_dtype": "master"})
    assert answers_of(engine, 20) == before
    assert sum(each.nbytes for each in engine.runner.tensors.whole) == memory
    started_so = answers_of(engine_for(build("llama"), features=there))
    engine.set_features(0, there)
    assert answers_of(engine, 30) == started_so


def test_a_longer_text_fits_and_the_switch_back_is_refused_while_it_runs() -> None:
    engine = engine_for(build("llama"), kv_bytes=100 * 2 * 3 * 2 * 16 * 4)
    limit = engine.max_model_len
    assert limit == 96, "100 positions in whole blocks of 16"
    long = [5] * (limit + 50)
    with pytest.raises(RequestError, match="shorten"):
        submit(engine, 0, long, max_tokens=2, **GREEDY)
    applied = switch(engine, {"kv_cache_dtype": "int8"})
    assert applied.max_model_len == engine.max_model_len > 3 * limit
    bytes_before, work = engine.loaded.kv_bytes_per_token, applied.work
    assert bytes_before / work.kv_bytes_per_token == pytest.approx(4 * 16 / (16 + 4))
    submit(engine, 1, long, max_tokens=20, **GREEDY)
    with pytest.raises(FeatureError, match="wait for it to end"):
        engine.set_features(0, {"kv_cache_dtype": "master"})
    assert engine.features.kv_cache_dtype == "int8"
    assert len(run(engine)[1]) == 20
