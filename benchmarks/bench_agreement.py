"""Whether ``inference-workbench bench`` and guidellm measure the same: both against one server, in turns.

    python benchmarks/bench_agreement.py --guidellm PATH --url URL --tokenizer FOLDER [--token T] [--rounds 3]

Sends the same prompts and lengths in a closed loop. Figures are compared by what they mean: guidellm's inter-token
latency of a request is our TPOT, and output tokens per second run from the first request's begin to the last one's end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rows import append, cpu_name

import inference_workbench as iw
from inference_workbench.endpoint import Endpoint
from inference_workbench.experiments.bench import bench
from inference_workbench.experiments.target import Target

METRICS = ("ttft_ms", "tpot_ms", "e2e_ms", "output_tokens_per_s")


def ours(target: Target, data: Path, concurrency: int, warm_up: int) -> dict[str, float]:
    """Run our own client."""
    figures = bench(target, iw.from_jsonl(data, concurrency=concurrency), warm_up=warm_up).figures()
    names = dict(zip(METRICS, ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "output_throughput"), strict=True))
    return {metric: float(figures[name] or 0) for metric, name in names.items()}


def theirs(arguments: argparse.Namespace, target: Target, data: Path, count: int) -> dict[str, float]:
    """Run guidellm and take its figures from its report."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        backend = f"kind=openai_http,target={arguments.url},model={target.model},request_format=/v1/completions"
        if arguments.token:
            backend += f",api_key={arguments.token}"
        command = [
            arguments.guidellm, "run", "--disable-console",
            "--backend", backend,
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
    metrics = report["metrics"]
    begin = min(each["request_start_time"] for each in requests)
    end = max(each["request_end_time"] for each in requests)
    return {
        "ttft_ms": metrics["time_to_first_token_ms"]["successful"]["mean"],
        "tpot_ms": metrics["inter_token_latency_ms"]["successful"]["mean"],
        "e2e_ms": metrics["request_latency"]["successful"]["mean"] * 1e3,
        "output_tokens_per_s": sum(each["output_tokens"] for each in requests) / (end - begin),
    }


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
    arguments = parser.parse_args()
    target = Target.probe(Endpoint(token=arguments.token or "", url=arguments.url, authorization=True))
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            pair: dict[str, dict[str, float]] = {}
            order = ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours")
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
                if who == "ours":
                    pair[who] = ours(target, data, arguments.concurrency, 0)
                else:
                    pair[who] = theirs(arguments, target, data, arguments.requests)
            rounds.append((pair["ours"], pair["theirs"]))
    table = Table(title=f"{arguments.server}: medians of {arguments.rounds} rounds")
    for title in ("metric", "bench", "guidellm", "difference"):
        table.add_column(title)
    worst = 0.0
    for metric in METRICS:
        mine = statistics.median(each[0][metric] for each in rounds)
        other = statistics.median(each[1][metric] for each in rounds)
        difference = statistics.median(each[0][metric] / each[1][metric] - 1 for each in rounds)
        worst = max(worst, abs(difference))
        table.add_row(metric, f"{mine:.2f}", f"{other:.2f}", f"{difference:+.1%}")
    Console().print(table)
    row = {
        "subject": "ours",
        "peer": "guidellm",
        "server": arguments.server,
        "concurrency": arguments.concurrency,
        "metric": "max_disagreement_with_peer_client",
        "value": round(worst, 4),
        "unit": "fraction",
        "runs": arguments.rounds,
        "spread": 0,
    }
    append("experiments", [row], device="cpu", hardware=cpu_name(), packages=("inference-workbench", "httpx"))


if __name__ == "__main__":
    main()
