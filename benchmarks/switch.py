"""How long each switch holds up the engine and how long until everyone has caught up, under load, on the default model.

    python benchmarks/switch.py [--requests 8] [--rounds 3]

Also what a shared prefix saves: time to first token cold and warm for a prompt of 1,000 tokens and more.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

from rich.console import Console
from rich.table import Table
from rows import append, cpu_name

from inference_server.engine.core import Engine
from inference_server.protocol import EngineConfig, FeaturesApplied, SamplingParams, Submit

SWITCHES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kv_cache": True}, {"kv_cache": False}),
    ({"kv_layout": "paged", "prefix_cache_read": False}, {"kv_layout": "contiguous", "prefix_cache_read": False}),
    ({"block_size": 16}, {"block_size": 32}),
    ({"prefix_cache_read": True}, {"prefix_cache_read": False}),
    ({"prefix_cache_write": True}, {"prefix_cache_write": False}),
    ({"batching": "continuous"}, {"batching": "static"}),
    ({"batching": "continuous"}, {"batching": "single"}),
    ({"scheduling_policy": "fcfs"}, {"scheduling_policy": "shortest-first"}),
    ({"chunked_prefill": True}, {"chunked_prefill": False}),
    ({"preemption": "recompute"}, {"preemption": "swap"}),
    ({"response_cache": False}, {"response_cache": True}),
    ({"max_num_seqs": 32}, {"max_num_seqs": 4}),
    ({"max_num_batched_tokens": 2048}, {"max_num_batched_tokens": 64}),
    ({"fast_path": True}, {"fast_path": False}),
]


class Load:
    """Keeps a number of requests running and counts what becomes of them."""

    def __init__(self, engine: Engine, requests: int) -> None:
        self.engine = engine
        self.requests = requests
        self.handles = itertools.count()
        self.submitted: dict[int, int] = {}
        self.received: dict[int, int] = {}

    def step(self) -> list[Any]:
        while len(self.engine.requests) < self.requests:
            self.submit([10 + (7 * n) % 4000 for n in range(64)], 120)
        report, settled = self.engine.step()
        if report is not None:
            for handle in report.tokens.request:
                self.received[handle] = self.received.get(handle, 0) + 1
        return settled

    def submit(self, prompt: list[int], tokens: int) -> int:
        handle = next(self.handles)
        self.submitted[handle] = tokens
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        self.engine.submit(Submit(requests=(handle,), prompt=tuple(prompt), sampling=sampling, arrival_ns=0))
        return handle

    def switch(self, values: dict[str, Any]) -> tuple[float, float]:
        """Apply values; return the milliseconds that it held up the engine, and those until all had caught up."""
        begin = time.perf_counter()
        messages = self.engine.set_features(0, values)
        applied = messages[0]
        assert isinstance(applied, FeaturesApplied)
        settled = len(messages) > 1
        for _ in range(1000):
            if settled:
                break
            settled = bool(self.step())
        return applied.apply_ns / 1e6, (time.perf_counter() - begin) * 1e3

    def drain(self) -> int:
        """Let everything end; return how many requests did not get all their tokens."""
        while self.engine.has_work():
            report, _ = self.engine.step()
            if report is not None:
                for handle in report.tokens.request:
                    self.received[handle] = self.received.get(handle, 0) + 1
        return sum(self.received.get(handle, 0) != tokens for handle, tokens in self.submitted.items())


def prefix_rows(engine: Engine, rounds: int) -> list[dict[str, Any]]:
    rows = []
    cold, warm, skipped = [], [], []
    for round_ in range(rounds):
        shared = [20 + (n * 13 + round_ * 101) % 4000 for n in range(1000)]
        for times, tail in ((cold, 5), (warm, 6)):
            load = Load(engine, 0)
            load.handles = itertools.count(10_000 + round_ * 10 + tail)
            begin = time.perf_counter()
            handle = load.submit([*shared, *range(tail, tail + 20)], 1)
            request = engine.requests[handle]
            load.drain()
            times.append((time.perf_counter() - begin) * 1e3)
        skipped.append(request.cached_prompt_tokens / request.prompt_len)
    for name, values in (("ttft_cold_ms", cold), ("ttft_warm_ms", warm)):
        rows.append(row("prefix_cache", name, statistics.median(values), "ms", values))
    rows.append(row("prefix_cache", "prefill_skipped_fraction", statistics.median(skipped), "fraction", skipped))
    return rows


def row(feature: str, metric: str, value: float, unit: str, values: list[float], **extra: Any) -> dict[str, Any]:
    return {
        "subject": "ours",
        "feature": feature,
        "metric": metric,
        "value": round(value, 4),
        "unit": unit,
        "runs": len(values),
        "spread": round(max(values) - min(values), 4),
        **extra,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="default")
    arguments = parser.parse_args()
    console = Console()
    engine = Engine.load(EngineConfig(model=arguments.model), lambda stage, *_: console.print(stage, style="dim"))
    rows = prefix_rows(engine, arguments.rounds)
    load = Load(engine, arguments.requests)
    for _ in range(10):
        load.step()
    table = Table("feature", "from → to", "held up, ms", "caught up, ms", "and back, ms")
    known = engine.features.as_dict()
    for before, after in SWITCHES:
        if not set(before) <= set(known):
            continue
        engine.set_features(0, before)
        there: list[tuple[float, float]] = []
        back: list[tuple[float, float]] = []
        for _ in range(arguments.rounds):
            for _ in range(4):
                load.step()
            there.append(load.switch(after))
            for _ in range(4):
                load.step()
            back.append(load.switch(before))
        feature = next(name for name in after if before[name] != after[name])
        for times, start, end in ((there, before, after), (back, after, before)):
            ends = {"from": start[feature], "to": end[feature]}
            held, total = [held for held, _ in times], [total for _, total in times]
            rows.append(row(feature, "apply_ms", statistics.median(held), "ms", held, **ends))
            rows.append(row(feature, "duration_ms", statistics.median(total), "ms", total, **ends))
        medians = [f"{statistics.median(values):.2f}" for values in zip(*there, strict=True)]
        table.add_row(
            feature,
            f"{before[feature]} → {after[feature]}",
            *medians,
            f"{statistics.median(total for _, total in back):.2f}",
        )
        engine.set_features(0, {name: value for name, value in known.items() if name in before})
    lost = load.drain()
    engine.check_integrity()
    rows.append(row("all", "requests_lost", lost, "requests", [lost]))
    console.print(table)
    console.print(f"{len(load.submitted)} requests under {arguments.requests} at a time, {lost} lost")
    for each in rows[:3]:
        console.print(f"{each['feature']} {each['metric']}: {each['value']} {each['unit']}")
    path = append("switch", rows, device="cpu", hardware=cpu_name(), packages=("torch", "transformers"))
    console.print(f"rows appended to {path}")


if __name__ == "__main__":
    main()
