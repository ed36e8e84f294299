"""How long each switch takes on a GPU under load, and that no request is lost: random weights at real shapes.

    python benchmarks/gpu_switch.py [--shape llama8b] [--requests 64] [--rounds 3]

``apply_ms`` is how long the engine is held up, ``duration_ms`` how long until every interrupted request has gone on.
``compiled`` is compiled once, behind the serving; ``ready_s`` is how long that takes. Rows go to
benchmarks/results/switch.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "server"), str(ROOT / "benchmarks")]

import torch
from gpu import SHAPES, build
from rows import append
from switch import SWITCHES, Load, row

from inference_server.engine import attention, loader
from inference_server.engine.core import Engine
from inference_server.garbage import keep_what_is_loaded
from inference_server.models.locate import LocatedModel
from inference_server.protocol import EngineConfig

ON_A_GPU: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"cuda_graphs": True}, {"cuda_graphs": False}),
    ({"overlap": True}, {"overlap": False}),
]
PLAIN = {"fast_path": False}


def make(shape: str, requests: int) -> Engine:
    model = build(shape, attention.NAME)
    device = torch.device("cuda", 0)
    loaded = loader.inspect(model, LocatedModel(shape, "random", Path()), device, torch.bfloat16, lambda *_: None)
    features: dict[str, Any] = {"max_num_seqs": requests, "max_num_batched_tokens": 2048}
    return Engine(EngineConfig(max_num_seqs=requests, max_model_len=4096, features=features), loaded)


def alternate(load: Load, before: dict[str, Any], after: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Switch there and back ``rounds`` times under load."""
    load.engine.set_features(0, before)
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for turn in range(2 * rounds):
        for _ in range(6):
            load.step()
        there = turn % 2 == 0
        times[there].append(load.switch(after if there else before))
    feature = next(name for name in after if before[name] != after[name])
    found = []
    for there, (start, end) in ((True, (before, after)), (False, (after, before))):
        held, total = ([each[part] for each in times[there]] for part in (0, 1))
        ends = {"from": start[feature], "to": end[feature]}
        found.append(row(feature, "apply_ms", statistics.median(held), "ms", held, **ends))
        found.append(row(feature, "duration_ms", statistics.median(total), "ms", total, **ends))
    return found


def compile_under_load(load: Load, patience: float) -> list[dict[str, Any]]:
    """Switch ``compiled`` on for the first time and serve until it is there."""
    engine = load.engine
    engine.set_features(0, {**PLAIN, "compiled": False})
    for _ in range(10):
        load.step()
    begin = time.perf_counter()
    held, _ = load.switch({"compiled": True})
    served = 0
    compilation = engine._compilation
    assert compilation is not None
    longest = 0.0
    while compilation.running and time.perf_counter() - begin < patience:
        step = time.perf_counter()
        load.step()
        longest = max(longest, time.perf_counter() - step)
        served += 1
    ready = time.perf_counter() - begin
    print("compiled", compilation.runner is not None, f"after {ready:.1f} s, {served} steps meanwhile", flush=True)
    print(*engine.take_news()[-3:], sep="\n", flush=True)
    if compilation.runner is None:
        return []
    ends = {"from": False, "to": True}
    return [
        row("compiled", "apply_ms", held, "ms", [held], **ends),
        row("compiled", "ready_s", ready, "s", [ready], steps_meanwhile=served, longest_step_ms=longest * 1e3, **ends),
    ]


def pace(load: Load, steps: int = 40) -> float:
    """Milliseconds of a step of the running requests."""
    for _ in range(10):
        load.step()
    begin = time.perf_counter()
    for _ in range(steps):
        load.step()
    return (time.perf_counter() - begin) / steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama8b")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for torch.compile")
    options = parser.parse_args()
    engine = make(options.shape, options.requests)
    keep_what_is_loaded()  # as the engine's process does
    load = Load(engine, options.requests)
    for _ in range(200):  # so that every kernel and graph is there
        load.step()
    known = engine.features.as_dict()
    rows: list[dict[str, Any]] = []
    rows += compile_under_load(load, options.patience)
    ready = bool(rows)
    if ready:
        for name, features in (("eager", {"compiled": False}), ("compiled", {"compiled": True})):
            engine.set_features(0, features)
            ms = pace(load)
            print(f"plain path, {name}: {ms:.2f} ms a step of {options.requests}", flush=True)
            rows.append(row("compiled", "step_ms", ms, "ms", [ms], to=features["compiled"]))
        rows += alternate(load, {**PLAIN, "compiled": False}, {**PLAIN, "compiled": True}, options.rounds)
    engine.set_features(0, {"fast_path": True, "compiled": False})
    for before, after in (*SWITCHES, *ON_A_GPU):
        if set(before) <= set(known):
            rows += alternate(load, before, after, options.rounds)
            engine.set_features(0, {name: value for name, value in known.items() if name in before})
    lost = load.drain()
    engine.check_integrity()
    rows.append(row("all", "requests_lost", lost, "requests", [lost]))
    for each in rows:
        each |= {"shape": options.shape, "requests": options.requests}
        print(f"{each['feature']:24} {each['metric']:12} {each.get('from')!s:>12} → {each.get('to')!s:12} "
              f"{each['value']:10.3f} {each['unit']}")  # fmt: skip
    print(f"{len(load.submitted)} requests, {lost} lost")
    append("switch", rows, device="cuda", hardware=torch.cuda.get_device_name(), packages=("torch", "transformers"))


if __name__ == "__main__":
    main()
