"""Whether ``inference-workbench bench`` and guidellm measure the same: both against one server, in turns.

    python benchmarks/bench_agreement.py --guidellm PATH --url URL --tokenizer FOLDER [--token T] [--rounds 3]

Sends the same prompts and lengths in a closed loop. Figures are compared by what they mean: guidellm's inter-token
latency of a request is our TPOT, and output tokens per second run from the first request's begin to the last one's end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil
from rich.console import Console
from rich.table import Table
from rows import append, cpu_name

import inference_workbench as iw
from inference_workbench.endpoint import Endpoint, checked
from inference_workbench.errors import RequestError
from inference_workbench.experiments.bench import bench
from inference_workbench.experiments.target import Target

METRICS = ("ttft_ms", "tpot_ms", "e2e_ms", "output_tokens_per_s")
CLIENTS = ("bench", "guidellm")
SAMPLED_EVERY_S = 0.2
Figures = dict[str, float]


class Run(NamedTuple):
    """What one client measured, what the server's clock says of the same requests, and what the client cost."""

    client: Figures
    server: Figures | None
    """``None`` for a server that does not tell."""
    busy: float
    """Processors that the client kept busy while its requests were under way."""
    apart_ms: float
    """Median time from a request's arrival to the nearest other's: requests that come together share a step."""


def ours(arguments: argparse.Namespace, target: Target, data: Path) -> Figures:
    """Run our own client."""
    read = iw.from_jsonl(data, concurrency=arguments.concurrency)
    requests = [msgspec.structs.replace(each, extra=arguments.body) for each in read.requests]
    load = msgspec.structs.replace(read, requests=requests)
    figures = bench(target, load, warm_up=0).figures()
    expect_tokens(arguments, figures["total_output_tokens"] or 0)
    names = dict(zip(METRICS, ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "output_throughput"), strict=True))
    return {metric: float(figures[name] or 0) for metric, name in names.items()}


def theirs(arguments: argparse.Namespace, target: Target, data: Path) -> Figures:
    """Run guidellm and take its figures from its report."""
    count = arguments.requests
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        backend = {
            "kind": "openai_http",
            "target": arguments.url,
            "model": target.model,
            "request_format": "/v1/completions",
            "validate_backend": False,  # it asks for /health, which not every server has
            "extras": {"body": {"temperature": 0, **arguments.body}},
        }
        if arguments.token:
            backend["api_key"] = arguments.token
        command = [
            arguments.guidellm, "run", "--disable-console",
            "--backend", json.dumps(backend),
            "--profile", f"kind=concurrent,streams={arguments.concurrency}",
            "--constraint", f"kind=max_requests,count={count}",
            "--tokenizer", f"kind=huggingface_auto,model={arguments.tokenizer}",
            "--data", f"kind=json_file,path={data}",
            "--output", f"kind=json,path={out}",
        ]  # fmt: skip
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        if run.returncode:
            raise SystemExit(f"guidellm failed:\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}")
        report: dict[str, Any] = json.loads(out.read_text())["benchmarks"][0]
    requests = report["requests"]["successful"]
    assert len(requests) == count, f"guidellm counted {len(requests)} of {count} requests"
    expect_tokens(arguments, sum(each["output_tokens"] for each in requests))
    metrics = report["metrics"]
    begin = min(each["request_start_time"] for each in requests)
    end = max(each["request_end_time"] for each in requests)
    return {
        "ttft_ms": metrics["time_to_first_token_ms"]["successful"]["mean"],
        "tpot_ms": metrics["inter_token_latency_ms"]["successful"]["mean"],
        "e2e_ms": metrics["request_latency"]["successful"]["mean"] * 1e3,
        "output_tokens_per_s": sum(each["output_tokens"] for each in requests) / (end - begin),
    }


def expect_tokens(arguments: argparse.Namespace, counted: float) -> None:
    """Stop where a server ended answers early: the two clients would not have had the same load."""
    asked = arguments.requests * arguments.output_tokens
    assert counted == asked, f"{counted:g} output tokens, not the {asked} that were asked for"


def watched(client: Callable[[argparse.Namespace, Target, Path], Figures], *given: Any) -> Run:
    """Run a client; see what it costs, and ask the server what its own clock said."""
    target: Target = given[1]
    before = {each["id"] for each in told(target)}
    samples: list[tuple[int, float]] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLED_EVERY_S):
            samples.append((time.monotonic_ns(), processor_seconds()))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        figures = client(*given)
    finally:
        over.set()
        sampler.join()
    events = [each for each in told(target) if each["id"] not in before]
    if not events:
        return Run(figures, None, float("nan"), float("nan"))
    assert len(events) == given[0].requests, f"the server tells of {len(events)} requests"
    begin, end = min(each["arrival_ns"] for each in events), max(each["last_token_ns"] for each in events)
    within = [seconds for at, seconds in samples if begin <= at <= end]
    times = [at for at, _ in samples if begin <= at <= end]
    busy = (within[-1] - within[0]) / ((times[-1] - times[0]) / 1e9) if len(times) > 1 else float("nan")
    arrivals = sorted(each["arrival_ns"] for each in events)
    gaps = [float("inf"), *((later - at) / 1e6 for at, later in itertools.pairwise(arrivals)), float("inf")]
    apart_ms = statistics.median(min(before, after) for before, after in itertools.pairwise(gaps))
    output = [each["output_tokens"] for each in events]
    server = {
        "ttft_ms": statistics.fmean(each["first_token_ns"] - each["arrival_ns"] for each in events) / 1e6,
        "tpot_ms": statistics.fmean(
            (each["last_token_ns"] - each["first_token_ns"]) / (each["output_tokens"] - 1) for each in events
        )
        / 1e6,
        "e2e_ms": statistics.fmean(each["last_token_ns"] - each["arrival_ns"] for each in events) / 1e6,
        "output_tokens_per_s": sum(output) / ((end - begin) / 1e9),
    }
    return Run(figures, server, busy, apart_ms)


def told(target: Target) -> list[dict[str, Any]]:
    """Return the requests that a server of ours remembers; none where the server is another."""
    with target.endpoint.http() as http:
        try:
            events: list[dict[str, Any]] = checked(http.get("/requests"))["requests"]
        except (RequestError, msgspec.DecodeError, KeyError, TypeError):
            return []
    return events


def processor_seconds() -> float:
    """Processor time of this process and of all below it that still run."""
    seconds = 0.0
    for process in (own := psutil.Process(), *own.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
    return seconds


def disagreements(runs: list[dict[str, Run]], metric: str) -> dict[str, list[float]]:
    """Return the ratios of a metric in each round, by what is compared."""
    bench_runs, guidellm_runs = ([made[who] for made in runs] for who in CLIENTS)
    ratios = {
        "of_clients": [
            one.client[metric] / other.client[metric] for one, other in zip(bench_runs, guidellm_runs, strict=True)
        ]
    }
    clocks = [(one.server, other.server) for one, other in zip(bench_runs, guidellm_runs, strict=True)]
    under = [one[metric] / other[metric] for one, other in clocks if one is not None and other is not None]
    if len(under) < len(runs):
        return ratios
    ratios["of_bench_to_server"] = [run.client[metric] / run.server[metric] for run in bench_runs if run.server]
    ratios["of_guidellm_to_server"] = [run.client[metric] / run.server[metric] for run in guidellm_runs if run.server]
    ratios["of_server_under_clients"] = under
    # What is left between the clients once each is held against the server: the rulers' own difference.
    ratios["of_rulers"] = [one / other for one, other in zip(ratios["of_clients"], under, strict=True)]
    return ratios


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", required=True, help="its executable")
    parser.add_argument("--url", required=True)
    parser.add_argument("--tokenizer", required=True, help="folder with the model's tokenizer, for guidellm")
    parser.add_argument("--token")
    parser.add_argument("--server", default="ours", help="what the server is, for the row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--body", type=json.loads, default={}, help="more for every request's body, as JSON")
    parser.add_argument("--core", type=int, help="the processor that both clients have to themselves")
    arguments = parser.parse_args()
    hardware = cpu_name()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    target = Target.probe(Endpoint(token=arguments.token or "", url=arguments.url, authorization=True))
    runs: list[dict[str, Run]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            order = CLIENTS if number % 2 == 0 else CLIENTS[::-1]
            made = {}
            for place, who in enumerate(order):
                # Prompts that no run before had: neither tool gets anything from the server's prefix cache.
                data = Path(folder) / f"{number}-{place}.jsonl"
                lines = [
                    {
                        "prompt": f"{number}-{place}-{index}. " + "Tell me about the sea and the ships on it. " * 3,
                        "output_tokens_count": arguments.output_tokens,
                        "ignore_eos": True,
                    }
                    for index in range(arguments.requests)
                ]
                data.write_text("".join(json.dumps(line) + "\n" for line in lines))
                made[who] = watched(ours if who == "bench" else theirs, arguments, target, data)
            runs.append(made)
    report(arguments, runs, hardware)


def report(arguments: argparse.Namespace, runs: list[dict[str, Run]], hardware: str) -> None:
    """Print the tables, and write the rows."""
    table = Table(title=f"{arguments.server}, {arguments.concurrency} at once: medians of {len(runs)} rounds")
    for title in ("metric", *CLIENTS):
        table.add_column(title)
    rows: list[dict[str, Any]] = []
    largest = dict.fromkeys(("of_clients", "of_rulers"), 0.0)
    for metric in METRICS:
        ratios = disagreements(runs, metric)
        found = {name: round(statistics.median(each) - 1, 4) for name, each in ratios.items()}
        medians = [statistics.median(made[who].client[metric] for made in runs) for who in CLIENTS]
        if not rows:
            for name in found:
                table.add_column(name.replace("_", " "))
        table.add_row(metric, *(f"{each:.2f}" for each in medians), *(f"{each:+.1%}" for each in found.values()))
        for name in set(largest) & set(found):
            largest[name] = max(largest[name], abs(found[name]))
        rows.append(
            {
                "metric": f"{metric}_disagreement_with_peer_client",
                "value": found.pop("of_clients"),
                "spread": round(max(ratios["of_clients"]) - min(ratios["of_clients"]), 4),
                **found,
                **dict(zip(CLIENTS, (round(each, 3) for each in medians), strict=True)),
            }
        )
    Console(width=160).print(table)
    clocked = "of_rulers" in rows[0]
    rows.append({"metric": "max_disagreement_with_peer_client", "value": largest["of_clients"], "spread": 0})
    busy: dict[str, float] = {}
    apart: dict[str, float] = {}
    if clocked:
        rows.append({"metric": "max_disagreement_of_rulers", "value": largest["of_rulers"], "spread": 0})
        busy = {who: round(statistics.median(made[who].busy for made in runs), 3) for who in CLIENTS}
        apart = {who: round(statistics.median(made[who].apart_ms for made in runs), 2) for who in CLIENTS}
        print("processors kept busy by the client:", busy)
        print("ms from an arrival to the nearest other, median:", apart)
    common = {
        "subject": "ours",
        "peer": "guidellm",
        "server": arguments.server,
        "concurrency": arguments.concurrency,
        "requests": arguments.requests,
        "output_tokens": arguments.output_tokens,
        "clients_core": arguments.core,
        "client_processors_busy": busy,
        "arrivals_apart_ms": apart,
        "unit": "fraction",
        "runs": len(runs),
    }
    append(
        "experiments",
        [common | row for row in rows],
        device="cpu",
        hardware=hardware,
        packages=("inference-workbench", "httpx"),
    )


if __name__ == "__main__":
    main()
