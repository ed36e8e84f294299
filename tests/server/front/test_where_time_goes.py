"""The parts of real tokens' latencies: they add up under load, and a delay that is put somewhere is found there."""

from __future__ import annotations

import json
import statistics
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_front import TOKEN, RunningFront, running
from watcher import Watcher

from inference_server.protocol import PARTS, Kind, StepEvent, TelemetryCostEvent, TokensEvent

SLOWED = Path(__file__).parent / "slowed.py"
DELAY_NS = 50e6


@pytest.fixture(scope="module")
def slowable(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[tuple[RunningFront, Path]]:
    folder = tmp_path_factory.mktemp("slowed")
    switch = folder / "slow"
    switch.write_text("")
    environment = {
        "SLOWED": str(switch),
        "INFERENCE_WORKBENCH_ENGINE_COMMAND": json.dumps([sys.executable, str(SLOWED), "engine"]),
    }
    program = (str(SLOWED), "front")
    with running(folder, environment, "--model", str(tiny_model), "--kv-memory", "64M", program=program) as front:
        front.wait_for_engine("ready", 120)
        yield front, switch


def generate(front: RunningFront, tokens: int, prompt: object = "a few words", **extra: object) -> int:
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, "telemetry": True} | extra
    chunks = 0
    with front.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            chunks += line.startswith("data: {")
    return chunks


def parts_of(events: list[TokensEvent], *, first: bool) -> dict[str, list[int]]:
    """Each part of each token, first tokens or the others."""
    return {
        name: [
            value
            for event in events
            for value, index in zip(event.parts[number], event.index, strict=True)
            if (index == 0) == first
        ]
        for number, name in enumerate(PARTS)
    }


REQUESTS, TOKENS = 4, 6


def totals(front: RunningFront) -> dict[str, float]:
    """Each part in all tokens of some requests together."""
    count = REQUESTS * TOKENS
    with Watcher(front.url, TOKEN) as watcher:
        for _ in range(REQUESTS):
            generate(front, TOKENS)
        front.wait_for(lambda: sum(len(e.request) for e in watcher.events(TokensEvent)) == count, "tokens", 10)
    return {
        name: sum(sum(event.parts[number]) for event in watcher.events(TokensEvent))
        for number, name in enumerate(PARTS)
    }


@pytest.mark.parametrize(
    ("slow", "part", "times"),
    [
        ("sampling", "sampling", REQUESTS * TOKENS),
        ("scheduler", "host", REQUESTS * TOKENS),
        ("detokenizer", "detokenize", REQUESTS * TOKENS),
        ("tokenizer", "tokenize", REQUESTS),
    ],
)
def test_a_delay_of_50_ms_is_found_in_the_part_it_was_put_into(
    slowable: tuple[RunningFront, Path], slow: str, part: str, times: int
) -> None:
    front, switch = slowable
    switch.write_text("")
    generate(front, 4)
    before = totals(front)
    switch.write_text(slow)
    try:
        after = totals(front)
    finally:
        switch.write_text("")
    grown = {name: (after[name] - before[name]) / times for name in PARTS}
    assert 0.95 * DELAY_NS <= grown.pop(part) <= 1.4 * DELAY_NS
    assert max(grown.values()) < 0.3 * DELAY_NS, grown


def test_under_load_the_parts_add_up_and_almost_nothing_is_unexplained(front: RunningFront) -> None:
    with Watcher(front.url, TOKEN) as watcher:
        threads = [
            threading.Thread(target=generate, args=(front, 40, [65 + number] * (20 * number + 5)))
            for number in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        front.wait_for(lambda: sum(len(e.request) for e in watcher.events(TokensEvent)) == 320, "tokens", 10)
    residuals = []
    for event in watcher.events(TokensEvent):
        for place, latency in enumerate(event.latency_ns):
            parts = [values[place] for values in event.parts]
            assert sum(parts) == latency
            assert min(parts) >= 0
            residuals.append(parts[-1] / latency if latency else 0.0)
    assert statistics.median(residuals) <= 0.05
    assert sorted(residuals)[int(0.99 * len(residuals))] <= 0.05
    first = parts_of(watcher.events(TokensEvent), first=True)
    assert all(tokenize > 0 for tokenize in first["tokenize"])
    # Beside decoding a prompt has the marginal cost, which may be nothing. Where nobody decodes it has the whole pass.
    undisturbed = {
        request
        for step in watcher.events(StepEvent)
        if Kind.DECODE not in step.kind
        for request, kind in zip(step.request, step.kind, strict=True)
        if kind == Kind.PREFILL
    }
    requests = [
        request
        for event in watcher.events(TokensEvent)
        for request, index in zip(event.request, event.index, strict=True)
        if index == 0
    ]
    assert undisturbed
    assert all(
        prefill > 0 for request, prefill in zip(requests, first["prefill"], strict=True) if request in undisturbed
    )


def test_samples_of_one_prompt_share_its_prefill_in_their_parts(front: RunningFront) -> None:
    with Watcher(front.url, TOKEN) as watcher:
        generate(front, 3, prompt=[90] * 200, n=3)
        front.wait_for(lambda: sum(len(e.request) for e in watcher.events(TokensEvent)) == 9, "tokens", 10)
    first = parts_of(watcher.events(TokensEvent), first=True)
    assert len(first["prefill"]) == 3
    assert all(value > 0 for value in first["prefill"])
    assert max(first["stall"]) == 0


def test_instrumentation_can_be_switched_down_and_requests_still_work(front: RunningFront) -> None:
    with Watcher(front.url, TOKEN) as watcher:
        try:
            front.http.patch("/features", json={"instrumentation": "steps"}).raise_for_status()
            assert generate(front, 10) == 10
            front.wait_for(lambda: len(watcher.events(StepEvent)) >= 10, "steps", 10)
            assert not watcher.events(TokensEvent)
            front.http.patch("/features", json={"instrumentation": "off"}).raise_for_status()
            steps = len(watcher.events(StepEvent))
            assert generate(front, 10) == 10
            front.wait_until_idle()
            assert len(watcher.events(StepEvent)) == steps
            assert not watcher.events(TokensEvent)
        finally:
            front.http.patch("/features", json={"instrumentation": "full"}).raise_for_status()
        generate(front, 10)
        front.wait_for(lambda: sum(len(e.request) for e in watcher.events(TokensEvent)) == 10, "tokens", 10)
    last = watcher.events(TokensEvent)[-1]
    assert [sum(values[0] for values in last.parts)] == last.latency_ns[:1]


def test_what_watching_costs_is_told_while_steps_run(front: RunningFront) -> None:
    with Watcher(front.url, TOKEN) as watcher:
        front.wait_for(lambda: generate(front, 60) and watcher.events(TelemetryCostEvent), "cost", 20)
    cost = watcher.events(TelemetryCostEvent)[-1]
    assert cost.level == "full"
    assert cost.steps > 0
    assert 0 < cost.engine_ns < cost.step_ns
    assert 0 < cost.front_ns < cost.window_ns
    assert cost.bytes > 0
