"""Whatever is submitted, cancelled and switched, and in whatever order, every request gets the output it gets alone.

The whole engine with a tiny model, on the device that the engine's tests run on; ``ENGINE_PROPERTY_SECONDS`` lets it go
on for so long.
"""

from __future__ import annotations

import os
import time
from typing import Any

import hypothesis.strategies as st
from architectures import build
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from serving import engine_for, run, submit

from inference_server.engine.core import Engine
from inference_server.features import FeatureError

SECONDS = float(os.environ.get("ENGINE_PROPERTY_SECONDS", "8"))
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.9, "seed": 11},
    {"temperature": 1.2, "top_k": 9, "top_p": 0.9, "seed": 12},
    {"temperature": 0.7, "seed": 13, "presence_penalty": 0.8},
]
SWITCHES: dict[str, list[Any]] = {
    "overlap": [True, False],
    "cuda_graphs": [True, False],
    "fast_path": [True, False],
    "kv_cache": [True, True, False],
    "kv_layout": ["paged", "contiguous"],
    "block_size": [4, 8, 16],
    "prefix_cache_read": [True, False],
    "prefix_cache_write": [True, False],
    "batching": ["continuous", "static", "single"],
    "chunked_prefill": [True, False],
    "preemption": ["recompute", "swap"],
    "scheduling_policy": ["fcfs", "priority", "shortest-first"],
    "max_num_seqs": [1, 3, 8],
    "max_num_batched_tokens": [5, 40, 256],
    "response_cache": [True, False],
    "speculation": ["off", "ngram", "early_exit", "draft"],
    "num_speculative_tokens": [1, 3, 8],
    "early_exit_layers": [1, 2],
    "adaptive_speculation": [True, False, False],
    "instrumentation": ["full", "steps"],
}
LENGTHS = (1, 3, 8, 17, 40)
ENGINES: dict[str, Engine] = {}
ALONE: dict[tuple[int, int, int], list[int]] = {}


def engine() -> Engine:
    """One engine for all examples, with little room, so that requests push one another out."""
    if not ENGINES:
        model = build("qwen3")
        for name, kv_bytes in (("alone", 1 << 20), ("shared", 3 * 2 * 2 * 16 * 4 * 16 * 9)):
            # The draft model has the same words and says others, unless it agrees by chance.
            draft = build("qwen3", seed=1) if name == "shared" else None
            ENGINES[name] = engine_for(model, draft, max_num_seqs=8, kv_bytes=kv_bytes)
    return ENGINES["shared"]


def text(length: int, variant: int) -> list[int]:
    """Prompts that share their beginnings."""
    return [(7 * place + (variant if place > length // 2 else 0)) % 250 + 3 for place in range(length)]


def alone(length: int, variant: int, kind: int, count: int) -> list[int]:
    """What a request gets that has an engine to itself, on the plain path."""
    key = (length, variant, kind)
    if key not in ALONE:
        single = ENGINES["alone"]
        single.set_features(0, {"fast_path": False, "overlap": False, "prefix_cache_read": False})
        submit(single, 0, text(length, variant), max_tokens=24, ignore_eos=True, **SAMPLING[kind])
        ALONE[key] = run(single)[0]
    return ALONE[key][:count]


class EngineMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.engine = engine()
        self.outputs: dict[int, list[int]] = {}
        self.expected: dict[int, list[int]] = {}
        self.handle = 0

    @rule(
        length=st.sampled_from(LENGTHS),
        variant=st.integers(0, 2),
        kind=st.integers(0, len(SAMPLING) - 1),
        count=st.integers(1, 24),
        priority=st.integers(0, 2),
    )
    def submit(self, length: int, variant: int, kind: int, count: int, priority: int) -> None:
        self.expected[self.handle] = alone(length, variant, kind, count)
        self.outputs[self.handle] = []
        submit(self.engine, self.handle, text(length, variant), max_tokens=count, ignore_eos=True, **SAMPLING[kind])
        self.engine.requests[self.handle].priority = priority
        self.handle += 1

    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        available = [spec.name for spec in self.engine.specs if spec.available and spec.name in SWITCHES]
        name = data.draw(st.sampled_from(available))
        value = data.draw(st.sampled_from(SWITCHES[name]))
        values = {name: value}
        if values == {"kv_layout": "contiguous"}:
            values["prefix_cache_read"] = False
        try:
            self.engine.set_features(0, values)
        except FeatureError:
            return  # two values that exclude each other, or a cache too small for what runs: refused, nothing changed

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(sorted(self.engine.requests)))
        self.engine.cancel(handle)
        del self.expected[handle], self.outputs[handle]

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            if not self.engine.has_work():
                return
            report, _ = self.engine.step()
            if report is None:
                continue
            for handle, token in zip(report.tokens.request, report.tokens.token_id, strict=True):
                if handle in self.outputs:  # else it was cancelled when the step was under way
                    self.outputs[handle].append(token)

    @invariant()
    def nobody_got_anything_else(self) -> None:
        if hasattr(self, "outputs"):
            for handle, tokens in self.outputs.items():
                assert tokens == self.expected[handle][: len(tokens)], f"request {handle}"

    def teardown(self) -> None:
        if not hasattr(self, "outputs"):
            return
        for _ in range(2000):
            if not self.engine.has_work():
                break
            self.step(1)
        self.nobody_got_anything_else()
        assert self.outputs == self.expected, "every request ended with all its tokens"
        self.engine.check_integrity()
        assert self.engine.cache.usage().used_blocks == 0
        self.engine.set_features(0, {"kv_cache": True, "batching": "continuous", "max_num_seqs": 8})


def test_every_request_gets_the_output_it_gets_alone() -> None:
    examples, until = 0, time.monotonic() + SECONDS
    while time.monotonic() < until:
        run_state_machine_as_test(
            EngineMachine,
            settings=settings(
                max_examples=10,
                stateful_step_count=40,
                deadline=None,
                derandomize=False,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        examples += 10
    print(f"{examples} examples")
