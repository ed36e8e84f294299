"""What recording costs, and whether the parts of a latency add up: on the default model, a whole server in front of it.

``python benchmarks/recording.py overhead`` compares full instrumentation while recording with instrumentation off, in
pairs of short rounds in alternating order, and quotes the median of the pairs' ratios with its 95 % interval.
``… attribution`` puts 8, then 32 requests on the server, prompts arriving all the time, records it, and looks at the
recorded parts. ``… soak`` does the same for minutes and watches memory.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("server", "tests", "tests/server/front", "benchmarks")]

import numpy as np  # noqa: E402
import rows  # noqa: E402
from running_front import TOKEN, RunningFront, running  # noqa: E402
from streams import Server, random_prompt, steady_load, stream  # noqa: E402

from inference_server.recording.file import RecordingFile  # noqa: E402
from inference_server.recording.format import PART_COLUMNS  # noqa: E402

PACKAGES = ("torch", "transformers", "msgspec", "pyarrow")


def server_of(front: RunningFront) -> Server:
    return Server(int(front.url.rpartition(":")[2]), TOKEN)


def folder_of(front: RunningFront) -> Path:
    return front.folder / "data" / "inference-workbench" / "recordings"


def start(front: RunningFront) -> str:
    return front.http.post("/recordings", json={"name": "benchmark"}).raise_for_status().json()["id"]


def stop(front: RunningFront, identifier: str) -> Path:
    answer = front.http.post(f"/recordings/{identifier}/stop?wait=true", json={}, timeout=300).json()
    assert answer["state"] == "finished", answer
    return folder_of(front) / answer["file"]


# -- overhead ----------------------------------------------------------------------------------------------------------


async def round_of(server: Server, prompts: list[list[int]], tokens: int) -> float:
    """All streams at once; return tokens per second."""
    begin = time.perf_counter()
    got = sum(await asyncio.gather(*(stream(server, prompt, tokens, temperature=0) for prompt in prompts)))
    return got / (time.perf_counter() - begin)


def overhead(front: RunningFront, *, pairs: int, streams: int, tokens: int) -> list[dict[str, object]]:
    server, rng = server_of(front), random.Random(1)
    prompts = [random_prompt(rng, 12, 12) for _ in range(streams)]
    speeds: dict[str, list[float]] = {"off": [], "full": []}
    costs: list[dict[str, int]] = []
    for pair in range(pairs + 1):
        for level in ("off", "full") if pair % 2 else ("full", "off"):
            front.http.patch("/features", json={"instrumentation": level}).raise_for_status()
            identifier = start(front) if level == "full" else None
            speed = asyncio.run(round_of(server, prompts, tokens))
            if identifier is not None:
                with RecordingFile(stop(front, identifier)) as file:
                    costs += file.table("telemetry_cost").to_pylist()
            if pair:  # the first warms up
                speeds[level].append(speed)
    ratios = [full / off for full, off in zip(speeds["full"], speeds["off"], strict=True)]
    overheads = sorted(1 - ratio for ratio in ratios)
    median = statistics.median(overheads)
    low, high = bootstrap(overheads)
    engine = sum(cost["engine_ns"] for cost in costs) / sum(cost["step_ns"] for cost in costs)
    front_share = sum(cost["front_ns"] + cost["journal_ns"] for cost in costs) / sum(
        cost["window_ns"] for cost in costs
    )
    print(
        f"{streams} streams, {pairs} pairs: off {statistics.median(speeds['off']):.1f} tokens/s, "
        f"full recording {statistics.median(speeds['full']):.1f}"
    )
    print(f"overhead {median:.2%} (95 % interval of the median {low:.2%} to {high:.2%})")
    print(f"measured by the server: engine thread {engine:.3%} of its steps, front {front_share:.2%} of a core")
    case = {"subject": "ours", "level": "full", "streams": streams, "runs": pairs}
    return [
        case | {"metric": "overhead_fraction", "value": median, "unit": "1", "spread": [low, high]},
        case | {"metric": "engine_telemetry_fraction", "value": engine, "unit": "1", "spread": None},
        case | {"metric": "front_telemetry_cores", "value": front_share, "unit": "cores", "spread": None},
    ]


def bootstrap(values: list[float], draws: int = 4000) -> tuple[float, float]:
    """95 % interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (draws, len(values))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(low), float(high)


# -- attribution -------------------------------------------------------------------------------------------------------


def attribution(path: Path, load: str) -> list[dict[str, object]]:
    with RecordingFile(path) as file:
        tokens = file.table("tokens").to_pandas()
        size = path.stat().st_size
    tokens = tokens[tokens.latency_ns > 0]
    parts = tokens[list(PART_COLUMNS)]
    error = ((parts.sum(axis=1) - tokens.latency_ns).abs() / tokens.latency_ns).max()
    residual = tokens.unexplained_ns / tokens.latency_ns
    p50, p99, worst = (float(residual.quantile(q)) for q in (0.5, 0.99, 1.0))
    print(f"{load}: {len(tokens):,} tokens, {size / len(tokens):.0f} bytes a token")
    print(f"    largest error of the sum {error:.2%}, unexplained median {p50:.3%}, p99 {p99:.3%}, most {worst:.2%}")
    shares = parts.sum() / tokens.latency_ns.sum()
    print(
        "    " + ", ".join(f"{name.removesuffix('_ns')} {share:.1%}" for name, share in shares.items() if share > 5e-4)
    )
    case = {"subject": "ours", "load": load, "runs": len(tokens), "spread": None}
    return [
        case | {"metric": "sum_error_fraction", "value": float(error), "unit": "1"},
        case | {"metric": "residual_p50_fraction", "value": p50, "unit": "1"},
        case | {"metric": "residual_p99_fraction", "value": p99, "unit": "1"},
    ]


def soak(path: Path, seconds: float) -> list[dict[str, object]]:
    with RecordingFile(path) as file:
        tokens = file.manifest.tables["tokens"].rows
        memory = file.table("device_processes").to_pandas()
        manifest = file.manifest
    size = path.stat().st_size
    result: list[dict[str, object]] = []
    print(f"soak of {seconds / 60:.1f} minutes: {tokens:,} tokens, {size / tokens:.0f} bytes a token")
    print(f"    events lost: {manifest.lost_events}")
    case = {
        "subject": "ours",
        "level": "full",
        "load": "32 requests",
        "runs": 1,
        "wall_s": round(seconds),
        "spread": None,
    }
    result.append(case | {"metric": "bytes_per_token", "value": size / tokens, "unit": "byte"})
    for name, rss in memory.groupby("process").rss:
        third = len(rss) // 3
        middle, last = rss.iloc[third : 2 * third].median(), rss.iloc[2 * third :].median()
        growth = (last - middle) / middle
        print(
            f"    {name}: {rss.iloc[0] >> 20} MiB at first, {middle / 2**20:.0f} in the middle third, "
            f"{last / 2**20:.0f} in the last ({growth:+.2%})"
        )
        result.append(case | {"metric": f"{name}_rss_growth_fraction", "value": float(growth), "unit": "1"})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "attribution", "soak"))
    parser.add_argument("--model", default="default")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--streams", type=int, nargs="+", default=None)
    parser.add_argument("--tokens", type=int, default=None, help="per stream (overhead) or in all (attribution)")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    results: dict[str, list[dict[str, object]]] = {}
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), {}, "--model", options.model) as front:
        front.wait_for_engine("ready", 600)
        model = front.client.models.list().data[0].id
        if options.what == "overhead":
            for streams in options.streams or [8]:
                found = overhead(front, pairs=options.pairs, streams=streams, tokens=options.tokens or 64)
                results.setdefault("recording", []).extend(found)
        elif options.what == "attribution":
            for streams in options.streams or [8, 32]:
                identifier = start(front)
                asyncio.run(steady_load(server_of(front), streams=streams, total_tokens=options.tokens or 10_500))
                path = stop(front, identifier)
                results.setdefault("attribution", []).extend(attribution(path, f"{streams} requests"))
        else:
            identifier, begin = start(front), time.monotonic()
            until = begin + 60 * options.minutes
            seed = 0
            while time.monotonic() < until:
                asyncio.run(steady_load(server_of(front), streams=32, total_tokens=4_000, seed=(seed := seed + 1)))
            path = stop(front, identifier)
            results["recording"] = soak(path, time.monotonic() - begin)
            results["attribution"] = attribution(path, "soak, 32 requests")
    if not options.no_record:
        for name, found in results.items():
            case = [{"model": model, **row} for row in found]
            rows.append(name, case, device="cpu", hardware=rows.cpu_name(), packages=PACKAGES)


if __name__ == "__main__":
    main()
