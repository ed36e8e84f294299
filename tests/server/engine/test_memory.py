"""Running out of memory ends no engine and no request that fits; sleep gives memory back and loses nothing."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from architectures import build
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import DEVICE, GREEDY, engine_for, generate, run, submit

from inference_server.engine import sampler
from inference_server.engine.core import Engine
from inference_server.engine.scheduler import StepPlan
from inference_server.engine.sleeping import SleepError
from inference_server.protocol import KvEvents, Notice, RequestFailed


@cache
def shared_model() -> Any:
    return build("llama")


@pytest.fixture
def model() -> Any:
    return shared_model()


def prompt(length: int, seed: int = 0) -> list[int]:
    random = Random(seed)
    return [random.randrange(3, 256) for _ in range(length)]


def limit_memory(engine: Engine, positions: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let steps of more than ``positions`` run out of memory; return the sizes of those that fitted."""
    fitted: list[int] = []
    for runner in {id(each): each for each in (engine.runner, engine.fast) if each is not None}.values():

        def forward(plan: StepPlan, packed: Any, original: Any = runner.forward) -> torch.Tensor:
            if plan.num_tokens > positions:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")
            fitted.append(plan.num_tokens)
            logits: torch.Tensor = original(plan, packed)
            return logits

        monkeypatch.setattr(runner, "forward", forward)
    return fitted


def test_when_memory_runs_out_a_step_is_divided_and_nothing_is_lost(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(model)
    prompts = {handle: prompt(60, handle) for handle in range(5)}
    expected = {handle: generate(model, tokens, 70) for handle, tokens in prompts.items()}
    fitted = limit_memory(engine, 40, monkeypatch)
    for handle, tokens in prompts.items():
        submit(engine, handle, tokens, max_tokens=70, **GREEDY)
    assert run(engine) == expected
    assert max(fitted) > 20, "the largest step that fits is looked for"
    news = engine.take_news()
    assert all(isinstance(each, Notice) for each in news)
    assert "Memory ran out in a step of 300 positions; no request is lost" in news[0].text
    assert engine.take_news() == []


def test_after_memory_ran_out_larger_steps_are_tried_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for(model, kv_bytes=1 << 22)
    with monkeypatch.context() as little:
        limit_memory(engine, 40, little)
        submit(engine, 0, prompt(100), max_tokens=150, **GREEDY)
        engine.step()
    fitted = limit_memory(engine, 1000, monkeypatch)
    run(engine)
    submit(engine, 1, prompt(300, 1), max_tokens=20, **GREEDY)
    run(engine)
    assert max(fitted) > 80


def test_a_request_that_cannot_be_divided_fails_alone_and_says_what_to_do(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(model, features={"chunked_prefill": False})
    limit_memory(engine, 40, monkeypatch)
    submit(engine, 0, prompt(90), max_tokens=5, **GREEDY)
    submit(engine, 1, prompt(12, 1), max_tokens=5, **GREEDY)
    submit(engine, 2, prompt(20, 2), max_tokens=5, **GREEDY)
    expected = {handle: generate(model, prompt(length, handle), 5) for handle, length in ((1, 12), (2, 20))}
    assert run(engine) == {0: [], **expected}
    failed = [each for each in engine.take_news() if isinstance(each, RequestFailed)]
    assert [(each.request, each.code) for each in failed] == [(0, "capacity")]
    assert "90 positions" in failed[0].error
    assert "switch chunked_prefill on, or shorten the prompt" in failed[0].error


def test_sampling_that_runs_out_of_memory_takes_fewer_rows_at_a_time(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = {"max_tokens": 9, "temperature": 0.9, "top_k": 20, "logprobs": 1, "ignore_eos": True}
    outputs = []
    for most in (100, 2):
        engine = engine_for(model)
        with monkeypatch.context() as patch:
            original = sampler.filtered_probabilities

            def filtered(logits: Any, requests: Any, most: int = most, original: Any = original) -> Any:
                if len(requests) > most:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return original(logits, requests)

            patch.setattr(sampler, "filtered_probabilities", filtered)
            for handle in range(7):
                submit(engine, handle, prompt(10, handle), seed=handle, **sampling)
            outputs.append(run(engine))
    assert outputs[0] == outputs[1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_memory_pressure_of_any_kind_at_any_moment_changes_no_output(model_seed: int) -> None:
    random = Random(model_seed)
    model = shared_model()
    engine = engine_for(model, kv_bytes=1 << 17, max_num_seqs=8)
    prompts = {handle: prompt(random.randrange(1, 40), handle) for handle in range(6)}
    expected = {handle: generate(model, tokens, 12) for handle, tokens in prompts.items()}
    outputs: dict[int, list[int]] = {handle: [] for handle in prompts}
    most = 10_000
    for runner in {id(each): each for each in (engine.runner, engine.fast) if each is not None}.values():

        def forward(plan: StepPlan, packed: Any, original: Any = runner.forward) -> torch.Tensor:
            late = random.random() < 0.5
            logits = original(plan, packed) if late and plan.num_tokens > most else None
            if plan.num_tokens > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(plan, packed) if logits is None else logits

        runner.forward = forward  # type: ignore[method-assign]
    for handle, tokens in prompts.items():
        submit(engine, handle, tokens, max_tokens=12, **GREEDY)
    switches: list[dict[str, Any]] = [
        {"preemption": "swap"},
        {"preemption": "recompute"},
        {"kv_layout": "contiguous", "prefix_cache_read": False},
        {"kv_layout": "paged", "prefix_cache_read": True},
        {"fast_path": False},
        {"block_size": 8},
        {"block_size": 16},
    ]
    while engine.has_work() or engine.asleep:
        if random.random() < 0.1:
            most = random.choice((10_000, 10_000, 1, 3, 17))
        if random.random() < 0.02:
            engine.set_features(0, random.choice(switches))
        if random.random() < (0.5 if engine.asleep else 0.02):
            engine.wake() if engine.asleep else engine.sleep()
        if engine.has_work():
            report, _ = engine.step()
            if report is not None:
                for handle, token in zip(report.tokens.request, report.tokens.token_id, strict=True):
                    outputs[handle].append(token)
    engine.check_integrity()
    assert all(isinstance(each, Notice | KvEvents) for each in engine.take_news())
    assert outputs == expected


def test_a_sleeping_engine_gives_memory_back_and_its_requests_go_on_where_they_were(model: Any) -> None:
    engine = engine_for(model, kv_bytes=1 << 28)
    tokens = prompt(50)
    expected = generate(model, tokens, 30)
    for tensor in (*engine.runner.tensors.keys, *engine.runner.tensors.values):
        tensor.fill_(1.0)
    outputs: list[int] = []
    submit(engine, 0, tokens, max_tokens=30, **GREEDY)
    for _ in range(7):
        report, _ = engine.step()
        assert report is not None
        outputs += report.tokens.token_id
    kv_bytes = sum(each.nbytes for each in (*engine.runner.tensors.keys, *engine.runner.tensors.values))
    freed = engine.sleep()
    assert freed.requests == 1
    assert freed.device_bytes > 0.9 * kv_bytes
    if DEVICE.type == "cuda":
        assert freed.host_bytes > 0
    with pytest.raises(SleepError, match="asleep already"):
        engine.sleep()
    while engine.has_work():  # a step that was under way
        report, _ = engine.step()
        assert report is not None
        outputs += report.tokens.token_id
    submit(engine, 1, tokens, max_tokens=30, **GREEDY)
    assert not engine.has_work()
    engine.set_features(1, {"kv_cache": False})
    engine.set_features(2, {"kv_cache": True})
    engine.wake()
    with pytest.raises(SleepError, match="not asleep"):
        engine.wake()
    second: list[int] = []
    while engine.has_work():
        report, _ = engine.step()
        assert report is not None
        for handle, token in zip(report.tokens.request, report.tokens.token_id, strict=True):
            (outputs if handle == 0 else second).append(token)
    engine.check_integrity()
    assert outputs == second == expected
