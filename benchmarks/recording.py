"""What recording costs, and whether the parts of a latency add up: on the default model, a whole server in front of it.

``python benchmarks/recording.py overhead`` compares full instrumentation while recording with instrumentation off, in
pairs of short rounds in alternating order, and quotes the median of the pairs' ratios with its 95 % interval.
``… attribution`` puts 8, then 32 requests on the server, prompts arriving all the time, records it, and looks at the
recorded parts. ``… front`` puts a scripted engine behind the front, which gives it more tokens in two minutes than a
small machine computes in an hour, and watches the front's memory; ``soak.py`` watches everybody's.
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
import psutil  # noqa: E402
import rows  # noqa: E402
from bpe_tokenizer import train_tokenizer  # noqa: E402
from running_front import TOKEN, RunningFront, running, scripted_command  # noqa: E402
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


def front_memory(minutes: float) -> list[dict[str, object]]:
    """32 streams of a scripted engine, recorded; return how the front's memory grew in the second half."""
    with tempfile.TemporaryDirectory() as folder:
        command = scripted_command(train_tokenizer(Path(folder)), "good", step_s=0.006)
        with running(Path(folder), {"INFERENCE_WORKBENCH_ENGINE_COMMAND": command}) as front:
            front.wait_for_engine("ready")
            server, process = server_of(front), psutil.Process(front.process.pid)
            identifier, begin, tokens = start(front), time.monotonic(), 0
            sizes: list[int] = []
            while time.monotonic() < begin + 60 * minutes:
                tokens += asyncio.run(endless_load(server, time.monotonic() + 5))
                sizes.append(process.memory_info().rss)
            size = stop(front, identifier).stat().st_size
    half, last = sizes[len(sizes) // 2], sizes[-1]
    growth = (last - half) / half
    print(
        f"{tokens:,} tokens: front {half / 2**20:.1f} MiB at half time, {last / 2**20:.1f} at the end ({growth:+.2%})"
    )
    case = {
        "subject": "ours",
        "level": "full",
        "load": "32 streams of a scripted engine",
        "runs": tokens,
        "spread": None,
    }
    return [
        case | {"metric": "front_rss_growth_fraction", "value": growth, "unit": "1"},
        case | {"metric": "bytes_per_token", "value": size / tokens, "unit": "byte"},
    ]


async def endless_load(server: Server, until: float) -> int:
    async def client() -> int:
        got = 0
        while time.monotonic() < until:
            got += await stream(server, [70, 71, 72], 200)
        return got

    return sum(await asyncio.gather(*(client() for _ in range(32))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "attribution", "front"))
    parser.add_argument("--model", default="default")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--streams", type=int, nargs="+", default=None)
    parser.add_argument("--tokens", type=int, default=None, help="per stream (overhead) or in all (attribution)")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    results: dict[str, list[dict[str, object]]] = {}
    if options.what == "front":
        found = front_memory(options.minutes)
        if not options.no_record:
            rows.append("recording", found, device="cpu", hardware=rows.cpu_name(), packages=PACKAGES)
        return
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), {}, "--model", options.model) as front:
        front.wait_for_engine("ready", 600)
        model = front.client.models.list().data[0].id
        if options.what == "overhead":
            for streams in options.streams or [8]:
                found = overhead(front, pairs=options.pairs, streams=streams, tokens=options.tokens or 64)
                results.setdefault("recording", []).extend(found)
        else:
            for streams in options.streams or [8, 32]:
                identifier = start(front)
                asyncio.run(steady_load(server_of(front), streams=streams, total_tokens=options.tokens or 10_500))
                path = stop(front, identifier)
                results.setdefault("attribution", []).extend(attribution(path, f"{streams} requests"))
    if not options.no_record:
        for name, found in results.items():
            case = [{"model": model, **row} for row in found]
            rows.append(name, case, device="cpu", hardware=rows.cpu_name(), packages=PACKAGES)


if __name__ == "__main__":
    main()
