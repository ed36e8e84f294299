"""What verifying proposed tokens costs on a GPU, and what it gains by batch size: random weights at real shapes.

    python benchmarks/gpu_speculation.py [--shape llama8b] [--tokens 4] [--batch 1 2 4 8 16 32 64] [--draft llama1b]

Acceptance is *synthetic*: every proposed token is accepted with a given probability if those before it were, whatever
the model says; proposals cost nothing, unless a draft model makes them (``--draft``, random weights as well). All else
is what a step takes: it is planned, computed, chosen from and booked. Speed is that of decoding alone: tokens that all
requests of a batch say together in steps that follow one another, contexts of 130 and more, over the time of these
steps; plain steps overlap, verifying ones cannot. Time is measured; of the tokens the expectation is taken, so that
luck does not count. Rows go to benchmarks/results/gpu_speculation.jsonl.

    python benchmarks/gpu_speculation.py --adaptive --batch 1 64

measures adaptive speculation alone, beside always and never: from a cold start at an acceptance of 0.1, and over the
steps after acceptance rose to the last of ``--acceptance``, and after it fell again. With

    python benchmarks/gpu_speculation.py --plot docs/images/gpu-speculation.svg

the newest of them become a figure.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "server"), str(ROOT / "benchmarks")]

import torch
from gpu import SHAPES, build, prompt
from rows import RESULTS, append

from inference_server.engine import attention, loader, rejection
from inference_server.engine.core import Engine
from inference_server.engine.rejection import Verified
from inference_server.engine.request import Request
from inference_server.engine.sampler import Tokens
from inference_server.engine.scheduler import Scheduled, StepPlan
from inference_server.engine.speculation.adaptive import Adaptive
from inference_server.features import Features
from inference_server.garbage import keep_what_is_loaded
from inference_server.models.locate import LocatedModel
from inference_server.protocol import EngineConfig, SamplingParams, Submit

# A draft model with the vocabulary of llama8b, in the shape of Llama 3.2 1B.
SHAPES["llama1b"] = SHAPES["llama8b"] | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
}
LONGEST = 2048
WARM = 6
"""Steps before those that are measured: the first of a shape is captured."""
Row = dict[str, Any]


class Free:
    """Proposes anything, at no cost."""

    def wish(self, request: Request, most: int) -> int:
        del request
        return most

    def propose(self, plan: StepPlan, items: list[Scheduled], features: Features) -> list[list[int]]:
        del plan, features
        return [[7] * (item.count - 1) for item in items]

    def forget(self) -> None: ...

    def follow_model(self) -> None: ...


class Coin:
    """Stands in for :func:`rejection.verify`: accepts by chance, after waiting for the tokens as that does."""

    def __init__(self) -> None:
        self.rate = 0.0
        self._draw = random.Random(0)
        self._true = rejection.verify

    def verify(self, logits: torch.Tensor, items: list[Scheduled], greedy: Tokens | None = None) -> Verified:
        if greedy is None or not any(item.drafts for item in items):
            return self._true(logits, items, greedy)
        chosen, row, result = greedy.tolist(), 0, Verified([], [], [])
        for item in items:
            accepted = 0
            while accepted < len(item.drafts) and self._draw.random() < self.rate:
                accepted += 1
            tokens = [*item.drafts[:accepted], chosen[row + accepted]]
            result.tokens.append(tokens)
            result.logprobs.append([None] * len(tokens))
            result.top.append([None] * len(tokens))
            row += item.num_sampled
        return result


def load(shape: str) -> loader.LoadedModel:
    device = torch.device("cuda", 0)
    located = LocatedModel(shape, "random", Path())
    return loader.inspect(build(shape, attention.NAME), located, device, torch.bfloat16, lambda *_: None)


class Bench:
    """An engine, and a coin in place of its rejection sampler."""

    def __init__(self, shape: str, most: int, draft: str | None) -> None:
        loaded, drafting = load(shape), None if draft is None else load(draft)
        features: Row = {"max_num_seqs": most, "prefix_cache_read": False, "adaptive_speculation": False}
        config = EngineConfig(max_num_seqs=most, max_model_len=LONGEST, features=features)
        self.engine = Engine(config, loaded, draft=drafting)
        keep_what_is_loaded()  # as the engine's process does
        self.engine.speculation._proposers["ngram"] = Free()
        self.coin = Coin()
        rejection.verify = self.coin.verify

    def settle(self) -> None:
        """Wait until everything is compiled that is compiled beside the serving."""
        for method in self.engine.speculation._proposers.keys() & {"ngram", "draft"}:
            self.measure(1, 2, rate=1.0, speculation=method, num_speculative_tokens=4)
        for thread in threading.enumerate():
            if thread.name == "kernels":
                thread.join()

    def measure(
        self, batch: int, steps: int, rate: float = 0.0, before: tuple[int, float] | None = None, **features: Any
    ) -> Row:
        """Decode ``batch`` requests; tokens per second of them all together, and the medians of a step.

        So many steps ``before`` are not measured, of another acceptance.
        """
        engine = self.engine
        warm, self.coin.rate = before or (WARM, rate)
        engine.set_features(0, {"speculation": "off", **features})
        for handle in range(batch):
            sampling = SamplingParams(temperature=0.0, max_tokens=LONGEST - 200, ignore_eos=True)
            engine.submit(Submit(requests=(handle,), prompt=tuple(prompt(handle)), sampling=sampling, arrival_ns=0))
        found: list[Any] = []
        said, expected, begin = 0, 0.0, 0.0
        while len(found) < steps:
            report, _ = engine.step()
            assert report is not None
            assert report.step is not None
            if 0 in report.step.kind or len(report.step.request) < batch:  # prompts are read
                continue
            warm -= 1
            if warm > 0:
                continue
            if not begin:
                self.coin.rate, begin = rate, time.perf_counter()
                continue
            found.append(report.step)
            said += len(report.tokens.token_id)
            expected += batch + sum(rate**place for count in report.drafted for place in range(1, count + 1))
        seconds = time.perf_counter() - begin
        for handle in list(engine.requests):
            engine.cancel(handle)
        while engine.has_work():
            engine.step()
        engine.check_integrity()

        def median(name: str) -> float:
            return statistics.median(getattr(step, name) or 0 for step in found) / 1e6

        return {
            "tok_s": expected / seconds,
            "said_tok_s": said / seconds,
            "step_ms": seconds / len(found) * 1e3,
            "device_ms": median("device_ns"),
            "draft_ms": median("draft_ns"),
            "host_ms": {each: median(f"{each}_ns") for each in ("schedule", "prepare", "update", "before")},
            "drafted": sum(sum(step.drafted) for step in found) / len(found),
            "path": found[-1].path,
            "recorded": sum("graph" not in step.path for step in found),  # the first of a shape are
        }


def verify_costs(bench: Bench, base: Row, steps: int, counts: list[int]) -> list[Row]:
    """What verifying at batch 1 takes, beside a plain step, and beside one launched kernel by kernel."""
    plain = bench.measure(1, 4 * steps)
    rows = [
        base | plain | {"batch": 1, "proposed": 0, "metric": "device_ms", "value": plain["device_ms"], "unit": "ms"}
    ]
    for graphs in (True, False):
        for count in counts if graphs else [4]:
            got = bench.measure(1, steps, speculation="ngram", num_speculative_tokens=count, cuda_graphs=graphs)
            ratio = got["device_ms"] / plain["device_ms"]
            row = {"batch": 1, "proposed": count, "metric": "verify_over_plain", "value": ratio, "unit": "1"}
            rows.append(base | got | row | {"wall_ratio": got["step_ms"] / plain["step_ms"], "cuda_graphs": graphs})
    bench.engine.set_features(0, {"cuda_graphs": True})
    return rows


def speeds(
    bench: Bench, base: Row, batches: list[int], steps: int, count: int, method: str, rates: list[float]
) -> list[Row]:
    """Speed with proposals over speed without, by batch size and acceptance."""
    rows = []
    for batch in batches:
        plain = bench.measure(batch, 2 * steps)
        common = base | {"batch": batch, "metric": "speed_up", "unit": "1", "proposer": method}
        for rate in rates:
            got = bench.measure(batch, steps, rate, speculation=method, num_speculative_tokens=count)
            row = got | {"proposed": count, "acceptance": rate, "value": got["tok_s"] / plain["tok_s"]}
            rows.append(common | row | {f"plain_{name}": plain[name] for name in ("tok_s", "step_ms", "device_ms")})
            show(rows[-1])
    return rows


def adaptive(bench: Bench, base: Row, batches: list[int], steps: int, count: int, low: float, high: float) -> list[Row]:
    """Speed where the engine decides how many proposals pay, over the better of always and never."""
    rows = []
    on: Row = {"speculation": "ngram", "num_speculative_tokens": count}
    for batch in batches:
        better = {}
        for rate in (low, high):
            fixed = [bench.measure(batch, steps, rate, (steps // 2, rate), **each)["tok_s"] for each in ({}, on)]
            better[rate] = max(fixed)
        for first, rate in ((low, high), (high, low)):  # so that the shapes of steps were met
            bench.measure(batch, steps // 2, rate, (steps // 4, first), **on, adaptive_speculation=True)
        for first, rate in ((None, low), (low, high), (high, low)):
            bench.engine.speculation._adaptive = Adaptive()
            before = None if first is None else (steps // 2, first)
            got = bench.measure(batch, steps, rate, before, **on, adaptive_speculation=True)
            bench.engine.set_features(0, {"adaptive_speculation": False})
            row = got | {"batch": batch, "proposed": count, "acceptance": rate, "acceptance_before": first}
            value = {
                "metric": "adaptive_over_better",
                "value": got["tok_s"] / better[rate],
                "unit": "1",
                "steps": steps,
            }
            rows.append(base | row | value | {"proposer": "adaptive"})
            show(rows[-1])
    return rows


def show(row: Row) -> None:
    of = " ".join(
        f"{name} {row[name]}"
        for name in ("shape", "batch", "proposer", "proposed", "acceptance_before", "acceptance")
        if name in row
    )
    of_host = ", ".join(f"{name} {ms:.2f}" for name, ms in row["host_ms"].items())
    plain = f", plain {row['plain_step_ms']:.2f} ms" if "plain_step_ms" in row else ""
    print(
        f"{of:56} {row['metric']:20} {row['value']:7.3f}   {row['tok_s']:9.1f} tokens/s, step {row['step_ms']:.2f} ms, "
        f"device {row['device_ms']:.2f}, drafts {row['draft_ms']:.2f}, {of_host}{plain}; {row['path']}",
        flush=True,
    )


COLOURS = {0.3: "#c2410c", 0.6: "#2563eb", 0.8: "#15803d"}


def plot(path: Path) -> None:
    """Draw speed-up by batch size, of every shape and acceptance, from the newest rows."""
    newest: dict[tuple[str, float], dict[int, float]] = {}
    for line in (RESULTS / "gpu_speculation.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["metric"] == "speed_up" and row["proposer"] == "ngram":
            newest.setdefault((row["shape"], row["acceptance"]), {})[row["batch"]] = row["value"]
    batches = sorted({batch for line in newest.values() for batch in line})
    width, height, left, top, high = 640, 320, 48, 16, 3.5

    def x(batch: int) -> float:
        return left + math.log2(batch) / math.log2(batches[-1]) * (width - left - 150)

    def y(value: float) -> float:
        return top + (1 - value / high) * (height - top - 44)

    grey = 'fill="#737373"'
    font = 'font-family="sans-serif" font-size="12"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {font}>']
    for value in range(4):
        stroke = "#737373" if value == 1 else "#d4d4d4"
        parts.append(f'<path d="M{left} {y(value):.1f}H{x(batches[-1]):.1f}" stroke="{stroke}" fill="none"/>')
        parts.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end" {grey}>{value} ×</text>')
    below = f'y="{height - 26}" text-anchor="middle" {grey}'
    parts += [f'<text x="{x(batch):.1f}" {below}>{batch}</text>' for batch in batches]
    middle = (left + x(batches[-1])) / 2
    parts.append(f'<text x="{middle:.1f}" y="{height - 8}" text-anchor="middle" {grey}>requests</text>')
    lowest = float(height)
    for (shape, rate), line in sorted(newest.items(), key=lambda item: item[1][batches[-1]]):
        points = " ".join(f"{x(batch):.1f},{y(value):.1f}" for batch, value in sorted(line.items()))
        dashes = "" if shape == "llama8b" else ' stroke-dasharray="5 4"'
        colour = COLOURS.get(rate, "#737373")
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        lowest = min(y(line[batches[-1]]) + 4, lowest - 14)  # names stand apart
        at = f'x="{x(batches[-1]) + 8:.1f}" y="{lowest:.1f}" fill="{colour}"'
        parts.append(f"<text {at}>{shape}, {rate:g}</text>")
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama8b")
    parser.add_argument("--draft", choices=SHAPES, help="a draft model proposes too; same vocabulary")
    parser.add_argument("--tokens", type=int, default=4, help="proposed per request and step")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.3, 0.6, 0.8])
    parser.add_argument("--steps", type=int, default=40, help="verifying steps that are measured")
    parser.add_argument("--adaptive", action="store_true", help="measure adaptive speculation, beside always and never")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what was measured before, as SVG")
    options = parser.parse_args()
    if options.plot is not None:
        return plot(options.plot)
    bench = Bench(options.shape, max(options.batch), options.draft)
    base = {"shape": options.shape, "weights": "bf16", "gpus": 1, "subject": "ours", "runs": 1}
    bench.settle()
    if options.adaptive:
        low, high = 0.1, options.acceptance[-1]
        rows = adaptive(bench, base, options.batch, 6 * options.steps, options.tokens, low, high)
    else:
        rows = verify_costs(bench, base, options.steps, [1, 2, 4, 7, 8, 16])
        for row in rows:
            show(row)
        found = (options.batch, options.steps, options.tokens)
        rows += speeds(bench, base | {"draft_model": None}, *found, "ngram", options.acceptance)
        if options.draft is not None:
            rows += speeds(bench, base | {"draft_model": options.draft}, *found, "draft", options.acceptance[-2:-1])
    packages = ("torch", "triton", "transformers")
    append("gpu_speculation", rows, device="cuda", hardware=torch.cuda.get_device_name(), packages=packages)
    return None


if __name__ == "__main__":
    main()
