"""What the switches are worth on this machine: effects with intervals, and where a gain turns into a loss.

    python benchmarks/effects.py compare [FOLDER] [--only NAME …] [--pairs 8]
    python benchmarks/effects.py crossover [FOLDER] [--only NAME …] [--pairs 8]

Each switch is compared on the default model under a load that it is meant for, speculation also under one that it is
not. Experiments are kept in FOLDER as they run, and the same command goes on there. Tables are printed, and rows go to
benchmarks/results/experiments.jsonl.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table
from rows import append, cpu_name

import inference_workbench as iw
from inference_server.features import FeatureValue
from inference_workbench.experiments.workloads import AnyWorkload

PAIRS = 8
SHOWN = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2e_ms": "E2E", "output_tokens_per_s": "output tokens/s"}


class Case(NamedTuple):
    """Two settings under a load, and what the load is; for a crossover also what is varied."""

    load: str
    baseline: Mapping[str, FeatureValue]
    candidate: Mapping[str, FeatureValue]
    workload: AnyWorkload
    requests: int
    over: str = ""
    values: tuple[int, ...] = ()


NGRAM = ({"speculation": "off"}, {"speculation": "ngram"})
STUBBORN: dict[str, FeatureValue] = {
    "speculation": "ngram",
    "adaptive_speculation": False,
    "num_speculative_tokens": 16,
}
COMPARED = {
    "KV cache": Case(
        "short questions, two at once",
        {"kv_cache": False},
        {"kv_cache": True},
        iw.workload("chat", concurrency=2, output_tokens=32, ignore_eos=True),
        2,
    ),
    "prefix cache": Case(
        "400 tokens of instructions before every question, one at a time",
        {"prefix_cache_read": False},
        {"prefix_cache_read": True},
        iw.workload("shared prefix", concurrency=1, output_tokens=8, ignore_eos=True),
        4,
    ),
    "continuous batching": Case(
        "short questions, eight at once",
        {"batching": "single"},
        {"batching": "continuous"},
        iw.workload("chat", concurrency=8, output_tokens=(8, 24), ignore_eos=True),
        12,
    ),
    "speculation, repetitive": Case(
        "functions to mend, one at a time: answers repeat the prompt",
        *NGRAM,
        iw.workload("code", concurrency=1, output_tokens=64, ignore_eos=True),
        3,
    ),
    "speculation, chat": Case(
        "short questions, one at a time",
        *NGRAM,
        iw.workload("chat", concurrency=1, output_tokens=64, ignore_eos=True),
        3,
    ),
}
CROSSED = {
    "speculation over concurrency": Case(
        "functions to mend, 16 tokens proposed whether that pays or not",
        {"speculation": "off"},
        STUBBORN,
        iw.workload("code", output_tokens=24, ignore_eos=True),
        32,
        "concurrency",
        (2, 8, 32),
    ),
}


def compare(name: str, case: Case, wb: iw.Workbench, path: Path, pairs: int) -> list[dict[str, Any]]:
    """Make one comparison, print it, and return a row a metric."""
    result = iw.compare(
        case.baseline,
        case.candidate,
        case.workload,
        features={},
        pairs=pairs,
        requests=case.requests,
        wb=wb,
        path=path,
    )
    print(f"{result.summary()}\n", flush=True)
    outputs = result.outputs
    common = described(name, case, len(result.pairs)) | {
        "outputs": outputs.verdict,
        "outputs_identical": f"{outputs.identical} of {outputs.requests}",
    }
    return [
        common
        | measured(metric, finding.effect.ratio, finding.effect.ratio_low, finding.effect.ratio_high)
        | {
            "p": round(finding.p, 4),
            "verdict": finding.verdict,
            "baseline": round(finding.baseline, 3),
            "candidate": round(finding.candidate, 3),
        }
        for metric, finding in result.findings.items()
    ]


def crossover(name: str, case: Case, wb: iw.Workbench, path: Path, pairs: int) -> list[dict[str, Any]]:
    """Look where one gain turns into a loss, print it, and return a row a metric and value, and one a crossing."""
    result = iw.crossover(
        baseline=case.baseline,
        candidate=case.candidate,
        over=case.over,
        values=case.values,
        workload=case.workload,
        features={},
        pairs=pairs,
        requests=case.requests,
        wb=wb,
        path=path,
    )
    print(f"{result.summary()}\n", flush=True)
    common = described(name, case, len(result.blocks)) | {"over": case.over}
    rows: list[dict[str, Any]] = []
    for metric, title in SHOWN.items():
        for value, found in result.effects(metric).iterrows():
            row = measured(metric, found["ratio"], found["low"], found["high"])
            rows.append(common | row | {"at": value, "p": round(found["p"], 4), "verdict": found["verdict"]})
        crossing = result.crossing(metric)
        if crossing is not None:
            print(f"{title}: {crossing}")
            ends = {
                end: round(at, 3) if math.isfinite(at) else None
                for end, at in (("low", crossing.low), ("high", crossing.high))
            }
            rows.append(
                common
                | {"metric": f"{metric}_crossing", "unit": case.over, "value": round(crossing.value, 3), **ends}
                | {"spread": None if None in ends.values() else round(crossing.high - crossing.low, 3)}
                | {"share": round(crossing.share, 4), "turns": crossing.turns}
            )
    return rows


def described(name: str, case: Case, pairs: int) -> dict[str, Any]:
    """Return what every row of a case says about it."""
    return {
        "subject": "ours",
        "case": name,
        "baseline_features": dict(case.baseline),
        "candidate_features": dict(case.candidate),
        "workload": msgspec.to_builtins(case.workload),
        "requests": case.requests,
        "pairs": pairs,
        "runs": 2 * pairs,
    }


def measured(metric: str, ratio: float, low: float, high: float) -> dict[str, Any]:
    """Return what a row says about an effect."""
    return {
        "metric": f"{metric}_ratio",
        "unit": "candidate / baseline",
        "value": round(ratio, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "spread": round(high - low, 4),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print all effects as a table: a row a case, and where something was varied a row a value of it."""
    table = Table(title="candidate / baseline, with 95 % intervals; * differs")
    for title in ("case", "at", *SHOWN.values(), "outputs"):
        table.add_column(title)
    lines: dict[tuple[str, Any], dict[str, Any]] = {}
    for row in rows:
        if row["metric"].endswith("_ratio"):
            lines.setdefault((row["case"], row.get("at", "")), {})[row["metric"].removesuffix("_ratio")] = row
    for (case, at), line in lines.items():
        cells = [
            f"{row['value']:.3f} ({row['low']:.3f}–{row['high']:.3f})"
            + ("" if row["verdict"] == "no difference found" else " *")
            for row in (line[metric] for metric in SHOWN)
        ]
        table.add_row(case, str(at), *cells, next(iter(line.values())).get("outputs", ""))
    Console(width=160).print(table)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["compare", "crossover"])
    parser.add_argument("folder", type=Path, nargs="?", help="where the experiments are kept; else a temporary one")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {[*COMPARED, *CROSSED]}")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    arguments = parser.parse_args()
    run, cases = (compare, COMPARED) if arguments.action == "compare" else (crossover, CROSSED)
    unknown = sorted({*(arguments.only or ())} - {*cases})
    if unknown:
        parser.error(f"there is no {unknown}; there are {[*cases]}")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="effects-"))
    rows: list[dict[str, Any]] = []
    with iw.connect(model="default") as wb:
        for name in arguments.only or cases:
            print(f"{name}: {cases[name].load}\n", flush=True)
            path = folder / f"{name.replace(',', '').replace(' ', '-')}.iwexp"
            rows += run(name, cases[name], wb, path, arguments.pairs)
    show(rows)
    packages = ("inference-workbench", "torch", "numpy")
    append("experiments", rows, device="cpu", hardware=cpu_name(), packages=packages)


if __name__ == "__main__":
    main()
