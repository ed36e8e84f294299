"""What each precision is worth on a CPU: decoding speed, bandwidth reached, memory, and quality, in one run.

    python benchmarks/quantization.py                      # speed of every precision, float32 and bfloat16
    python benchmarks/quantization.py --quality --gptq     # also quality; GPTQ at 4 and 3 bits (some minutes each)
    python benchmarks/quantization.py --peer-python llama.cpp=/path/to/python --gguf Q8_0.gguf --gguf Q4_1.gguf

Precisions of one dtype are switches of one engine, thrown in turn within each round, so that a busy moment hits all of
them. Peers are processes of their own in the same rounds. A table is printed, and rows go to
benchmarks/results/quantization.jsonl.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from cpu import DTYPES, ROOT, Ours, Worker, read_bandwidth

PRECISIONS: dict[str, dict[str, str]] = {
    "master": {"weight_precision": "master"},
    "int8": {"weight_precision": "int8"},
    "int4 g32 minimum": {"weight_precision": "int4", "int4_group": "32", "int4_grid": "minimum"},
    "int4 g64 symmetric": {"weight_precision": "int4", "int4_group": "64", "int4_grid": "symmetric"},
    "int4 g128 zero-point": {"weight_precision": "int4", "int4_group": "128", "int4_grid": "zero-point"},
}
QUALITY: list[dict[str, str]] = [
    {"weight_precision": "master", "kv_cache_dtype": "int8"},
    *({"kv_cache_dtype": "master", **values} for values in PRECISIONS.values()),
    {"weight_precision": "int8", "kv_cache_dtype": "int8"},
    {"weight_precision": "int3", "int4_group": "64", "int4_grid": "symmetric", "kv_cache_dtype": "master"},
]
GPTQ = [
    {"weight_precision": f"int{bits}", "int4_group": "64", "int4_grid": "symmetric", "int4_rounding": "gptq"}
    for bits in (4, 3)
]


def switch(engine: Any, values: dict[str, str]) -> None:
    """Throw switches and wait until they are in force."""
    engine.set_features(0, values)
    engine.weights.wait()
    engine.take_news()
    assert all(getattr(engine.features, name) == value for name, value in values.items()), values


def measure_speed(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    engines = {weights: Ours(arguments.model, weights, fast=True) for weights in arguments.dtypes}
    peers = []
    for peer in arguments.peer_python:
        _, _, python = peer.partition("=")
        peers += [Worker(f"llama.cpp {Path(gguf).stem.rpartition('.')[2]}", python, gguf) for gguf in arguments.gguf]
    answers: dict[tuple[str, int], list[dict[str, float]]] = {}
    work: dict[str, Any] = {}
    bandwidths = []
    for turn in range(arguments.rounds + 1):
        bandwidths.append(read_bandwidth())
        for batch in arguments.batches:
            for weights, ours in engines.items():
                for name, values in PRECISIONS.items():
                    switch(ours.engine, values)
                    answer = ours.run(batch, arguments.tokens, turn)
                    subject = f"{name}, {weights}"
                    work[subject] = ours.engine.work
                    if turn:  # the first round packs and warms up
                        answers.setdefault((subject, batch), []).append(answer)
            for worker in peers:
                answer = worker.ask(batch=batch, count=arguments.tokens, turn=turn)
                if turn and answer:
                    answers.setdefault((worker.subject, batch), []).append(answer)
        print(f"round {turn} of {arguments.rounds}", file=sys.stderr, flush=True)
    for worker in peers:
        worker.close()
    bandwidth = max(bandwidths)
    print(f"\nOutput tokens per second: median (lowest to highest) of {arguments.rounds} rounds, best step.")
    print(f"Best read bandwidth of the run {bandwidth / 1e9:.0f} GB/s.\n")
    for (subject, batch), found in answers.items():
        values_ = [answer["tokens_per_s"] for answer in found]
        line = f"{subject:32} batch {batch:2}: {statistics.median(values_):7.1f}"
        line += f" ({min(values_):.1f} to {max(values_):.1f})"
        case = {"subject": subject, "batch": batch, "runs": len(found)}
        spread = max(values_) - min(values_)
        rows.append(
            {**case, "metric": "tokens_per_s", "value": statistics.median(values_), "unit": "token/s", "spread": spread}
        )
        if "step_ms" in found[0]:
            steps = [answer["step_ms"] for answer in found]
            rows.append(
                {**case, "metric": "step_ms", "value": min(steps), "unit": "ms", "spread": max(steps) - min(steps)}
            )
            line += f"  step {min(steps):6.2f} ms"
            if batch == 1:
                bytes_ = work[subject].body_bytes + work[subject].head_bytes
                share = bytes_ / (min(steps) / 1e3) / bandwidth
                line += f", {bytes_ / 1e6:.0f} MB, {share:.0%} of the bandwidth"
                rows.append({**case, "metric": "bytes_per_step", "value": bytes_, "unit": "byte", "spread": None})
                rows.append({**case, "metric": "bandwidth_fraction", "value": share, "unit": "1", "spread": None})
        print(line)
    rows.append({"subject": "floor", "metric": "read_bandwidth", "value": bandwidth, "unit": "byte/s", "spread": None})


def measure_quality(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    ours = Ours(arguments.model, "fp32", fast=True)
    engine = ours.engine
    text = Path(arguments.text).read_text(encoding="utf-8") if arguments.text else None
    wanted = [*QUALITY, *([{**values, "kv_cache_dtype": "master"} for values in GPTQ] if arguments.gptq else [])]
    print("\nQuality, float32 activations, against the master:\n")
    for values in wanted:
        number = engine.precision.measure(text, {"int4_rounding": "nearest", **values})["number"]
        engine.weights.wait()
        while engine.precision.has_work:
            engine.precision.advance()
        status = engine.precision.status()
        (result,) = [each for each in status["results"] if each["number"] == number]
        print(
            f"{result['label']:28} perplexity {result['perplexity']:8.3f} (master {result['perplexity_master']:.3f})  "
            f"KL {result['divergence']:.2e}  same top-1 {result['same_top1']:.1%}"
        )
        about = {"subject": result["label"], "unit": "1", "spread": None}
        told = {"tokens": result["tokens"], "text": result["text"], "baseline": result["baseline"]}
        rows += [
            {**about, **told, "metric": metric, "value": result[metric]}
            for metric in ("perplexity", "perplexity_master", "divergence", "divergence_max", "same_top1")
        ]
        for variant in status["variants"]:
            if variant["label"] != result["label"] or not variant["layer_errors"]:
                continue
            ratios = [each["gptq"] / each["nearest"] for each in variant["layer_errors"]]
            found = {"error_ratio_median": statistics.median(ratios), "error_ratio_max": max(ratios)}
            print(
                f"{'':28} squared output error of its {len(ratios)} matrices over rounding to nearest: "
                f"median {found['error_ratio_median']:.2f}, largest {found['error_ratio_max']:.2f}"
            )
            rows += [{**about, "metric": metric, "value": value} for metric, value in found.items()]


def measure_flips(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Throw the switch a hundred times while requests run; see that all end, and that the memory comes back."""
    import psutil

    from inference_server.protocol import SamplingParams, Submit

    ours = Ours(arguments.model, "fp32", fast=True)
    engine, process = ours.engine, psutil.Process()
    names = list(PRECISIONS)
    wanted: dict[int, int] = {}
    got: dict[int, int] = {}
    apply_ms: list[float] = []

    def load(turn: int) -> None:
        for index in range(2):
            handle, count = 2 * turn + index, 8 + 24 * index
            wanted[handle] = count
            sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
            prompt = tuple((7919 * (handle + 1) * (i + 3)) % 49_000 for i in range(24))
            engine.submit(Submit(requests=(handle,), prompt=prompt, sampling=sampling, arrival_ns=0))

    def step() -> None:
        report, _ = engine.step()
        for handle in report.tokens.request if report is not None else ():
            got[handle] = got.get(handle, 0) + 1

    load(0)
    while engine.has_work():
        step()
    start = process.memory_info().rss
    for turn in range(1, 101):
        load(turn)
        step()
        (applied, *_) = engine.set_features(0, PRECISIONS[names[turn % len(names)]]) or [None]
        while applied is None:
            step()
            applied = next((news for news in engine.take_news() if hasattr(news, "apply_ns")), None)
        apply_ms.append(applied.apply_ns / 1e6)
        step()
    held = process.memory_info().rss
    while engine.has_work():
        step()
    engine.check_integrity()
    assert got == wanted, "a request is incomplete"
    switch(engine, PRECISIONS["master"])
    packed = engine.weights.nbytes
    freed = engine.weights.drop()
    end = process.memory_info().rss
    print(
        f"\n100 flips under load: {len(wanted)} requests, none lost; a flip took {statistics.median(apply_ms):.2f} ms "
        f"(median; longest {max(apply_ms):.2f}). Resident memory {start / 1e6:.0f} MB before, {held / 1e6:.0f} MB with "
        f"{packed / 1e6:.0f} MB of copies, {end / 1e6:.0f} MB after {freed / 1e6:.0f} MB were dropped."
    )
    for metric, value, unit in (
        ("flip_ms", statistics.median(apply_ms), "ms"),
        ("flip_ms_max", max(apply_ms), "ms"),
        ("rss_before", start, "byte"),
        ("rss_with_copies", held, "byte"),
        ("rss_after", end, "byte"),
        ("packed_bytes", packed, "byte"),
    ):
        rows.append({"subject": "100 flips", "metric": metric, "value": value, "unit": unit, "spread": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="output tokens per request")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--model", default="default")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--gptq", action="store_true", help="with --quality")
    parser.add_argument("--flips", action="store_true", help="100 switches under load, and the memory afterwards")
    parser.add_argument("--text", help="file to measure quality on, in place of the built-in text")
    parser.add_argument("--peer-python", action="append", default=[], metavar="llama.cpp=PYTHON")
    parser.add_argument("--gguf", action="append", default=[], help="model files for llama.cpp")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if not arguments.no_speed:
        measure_speed(arguments, rows)
    if arguments.quality:
        measure_quality(arguments, rows)
    if arguments.flips:
        measure_flips(arguments, rows)
    if arguments.no_record:
        return
    from inference_server.engine.cpu.choices import cpu_model

    common = {
        "benchmark": "quantization",
        "model": arguments.model,
        "hardware": f"{cpu_model()}; {os.cpu_count()} cores",
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=ROOT).strip(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }
    with (ROOT / "benchmarks" / "results" / "quantization.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**common, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
