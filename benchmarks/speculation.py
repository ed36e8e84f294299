"""What speculation is worth on this machine: each proposer beside none, interleaved, on texts nobody was trained on.

    python benchmarks/speculation.py                      # the default model, float32 and bfloat16, batch 1
    python benchmarks/speculation.py --batches 1 4 16     # where it stops paying
    python benchmarks/speculation.py --verify             # what verifying costs, by the number of tokens
    python benchmarks/speculation.py --mix                # adaptive beside on and off, over a day of prompts and loads

One process and one engine a precision; for each prompt every method runs in turn, so that a busy moment hits all of
them. Greedy. Tokens per second are of decoding alone: from the first token to the last. ``speedup`` is the median over
the prompts of the method's tokens per second over those without speculation on the same prompt. A table is printed, and
rows go to benchmarks/results/speculation.jsonl.

The day of ``--mix`` has phases. In each, so many requests at once are answered, one after another in each seat; the
kinds of prompts differ. Without speculation, with each method always, and with each adaptive, the same work is done
phase by phase, in turn; every adaptive one knows only what it saw itself.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import random
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "server"))

PROMPTS: dict[str, list[str]] = tomllib.loads(
    (ROOT / "benchmarks" / "speculation_prompts.toml").read_text(encoding="utf-8")
)
METHODS: dict[str, dict[str, Any]] = {
    "off": {"speculation": "off"},
    "ngram": {"speculation": "ngram"},
    "early_exit": {"speculation": "early_exit"},
    "eagle": {"speculation": "eagle"},
}


def engine_of(model: str, dtype: str, head: str | None) -> Any:
    from inference_server.engine.core import Engine
    from inference_server.protocol import EngineConfig

    config = EngineConfig(model=model, dtype=dtype, kv_bytes=1 << 28, eagle_head=head)
    return Engine.load(config, lambda *_: None)


def encode(engine: Any, text: str) -> tuple[int, ...]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(engine.loaded.located.path)
    messages = [{"role": "user", "content": text}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer.encode(whole, add_special_tokens=False))


def decode(engine: Any, prompts: list[tuple[int, ...]], count: int) -> dict[str, Any]:
    """Answer some prompts at once; return the tokens, the time of decoding, and what became of proposals."""
    from inference_server.protocol import SamplingParams, Submit

    sampling = SamplingParams(temperature=0.0, max_tokens=count)
    for handle, prompt in enumerate(prompts):
        engine.submit(Submit(requests=(handle,), prompt=prompt, sampling=sampling, arrival_ns=0))
    outputs: dict[int, list[int]] = {handle: [] for handle in range(len(prompts))}
    begin, first = None, 0
    drafts = drafted = 0
    accepted_at = [0] * 16
    draft_ns = 0
    while engine.has_work():
        report, _ = engine.step()
        for handle, token in zip(report.tokens.request, report.tokens.token_id, strict=True):
            outputs[handle].append(token)
        if begin is None and all(outputs.values()):
            begin, first = time.perf_counter(), sum(map(len, outputs.values()))
        drafts += len(report.verified)
        drafted += sum(report.drafted)
        draft_ns += report.step.draft_ns
        for accepted in report.accepted:
            for place in range(accepted):
                accepted_at[place] += 1
    assert begin is not None
    seconds = time.perf_counter() - begin
    tokens = sum(map(len, outputs.values())) - first
    return {
        "outputs": outputs,
        "tokens_per_s": tokens / seconds,
        "drafts": drafts,
        "drafted": drafted,
        "accepted_at": accepted_at,
        "draft_share": draft_ns / 1e9 / seconds,
    }


def compare(
    engine: Any, methods: dict[str, dict[str, Any]], batch: int, k: int, count: int, repeats: int
) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {
        name: {"speeds": [], "drafts": 0, "drafted": 0, "accepted_at": [0] * 16, "shares": []} for name in methods
    }
    texts = [(kind, encode(engine, text)) for kind, several in PROMPTS.items() for text in several]
    groups = [[prompt for _, prompt in texts[place:] + texts[:place]] for place in range(len(texts))]
    groups = [(group * (batch // len(group) + 1))[:batch] for group in groups]
    if batch >= len(texts):
        groups = groups[:2]
    engine.set_features(0, {"prefix_cache_read": False, "num_speculative_tokens": k})
    differing = 0
    for group in groups:
        best: dict[str, float] = {}
        for _ in range(repeats):
            plain = None
            for name, features in methods.items():
                engine.set_features(0, {"adaptive_speculation": False, **features})
                result = decode(engine, group, count)
                best[name] = max(best.get(name, 0.0), result["tokens_per_s"])
                plain = plain or result["outputs"]
                differing += result["outputs"] != plain
                own = found[name]
                own["drafts"] += result["drafts"]
                own["drafted"] += result["drafted"]
                own["accepted_at"] = [a + b for a, b in zip(own["accepted_at"], result["accepted_at"], strict=True)]
                own["shares"].append(result["draft_share"])
        for name, speed in best.items():
            found[name]["speeds"].append((speed, speed / best["off"]))
    for own in found.values():
        own["tokens_per_s"] = statistics.median(speed for speed, _ in own["speeds"])
        ratios = [ratio for _, ratio in own["speeds"]]
        own["speedup"], own["spread"] = statistics.median(ratios), max(ratios) - min(ratios)
        own["runs"] = len(ratios) * repeats
        accepted = sum(own["accepted_at"])
        own["mean_acceptance_length"] = 1 + accepted / own["drafts"] if own["drafts"] else None
        own["acceptance_rate"] = accepted / own["drafted"] if own["drafted"] else None
        own["per_position"] = [round(each / own["drafts"], 3) for each in own["accepted_at"][:k] if own["drafts"]]
        own["draft_share"] = statistics.median(own["shares"])
    return {"methods": found, "differing": differing}


DAY: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ("chat", "story")),
    (2, ("code", "chat")),
    (8, ("chat", "code", "summary", "story")),
    (4, ("summary", "code")),
    (1, ("code",)),
)
"""Phases: requests at once, and the kinds of their prompts."""


def work_of(engine: Any, place: int, rounds: int) -> list[tuple[tuple[int, ...], int]]:
    """Prompts of a phase, and how many tokens each is answered with."""
    draw = random.Random(place)
    requests, kinds = DAY[place]
    texts = [text for kind in kinds for text in PROMPTS[kind]]
    return [(encode(engine, draw.choice(texts)), draw.randrange(60, 140)) for _ in range(rounds * requests)]


def serve(engine: Any, work: list[tuple[tuple[int, ...], int]], requests: int) -> tuple[float, int]:
    """Answer some prompts, so many at once; return seconds and tokens proposed."""
    from inference_server.protocol import SamplingParams, Submit

    waiting = list(enumerate(work))
    drafted = 0
    begin = time.perf_counter()
    while waiting or engine.has_work():
        while waiting and len(engine.requests) < requests:
            handle, (prompt, count) = waiting.pop(0)
            sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
            engine.submit(Submit(requests=(handle,), prompt=prompt, sampling=sampling, arrival_ns=0))
        report, _ = engine.step()
        drafted += sum(report.drafted)
    return time.perf_counter() - begin, drafted


def live(engine: Any, methods: list[str], k: int, rounds: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Live through the day; give rows as soon as there are any."""
    from inference_server.engine.speculation.adaptive import Adaptive

    modes: dict[str, dict[str, Any]] = {"off": METHODS["off"]}
    for method in methods:
        modes[f"{method} on"] = {**METHODS[method], "adaptive_speculation": False}
        modes[f"{method} adaptive"] = {**METHODS[method], "adaptive_speculation": True}
    known = {mode: Adaptive() for mode in modes}
    engine.set_features(0, {"prefix_cache_read": False, "num_speculative_tokens": k})
    for features in modes.values():  # whatever is compiled or allocated first
        engine.set_features(0, features)
        serve(engine, [(prompt, 8) for prompt, _ in work_of(engine, 0, 2)], 2)
    took: dict[str, list[float]] = {mode: [0.0] * len(DAY) for mode in modes}
    for place, (requests, kinds) in enumerate(DAY):
        work = work_of(engine, place, rounds * repeats)
        part = len(work) // repeats
        for turn in range(repeats):
            for mode in list(modes) if turn % 2 == 0 else reversed(modes):
                engine.set_features(0, modes[mode])
                engine.speculation._adaptive = known[mode]  # noqa: SLF001 - what one learns is not the others'
                seconds, _ = serve(engine, work[turn * part : (turn + 1) * part], requests)
                took[mode][place] += seconds
        tokens = sum(count for _, count in work)
        line = f"{requests:3} at once, {' '.join(kinds):26} {tokens:6} tokens, off {tokens / took['off'][place]:6.1f}/s"
        for method in methods:
            on, off, own = (took[mode][place] for mode in (f"{method} on", "off", f"{method} adaptive"))
            line += f" | {method} {off / on:.2f}, adaptive {min(on, off) / own:.3f} of the better"
            case = {"method": method, "batch": requests, "k": k, "prompts": " ".join(kinds), "tokens": tokens}
            case |= {"phase": place, "runs": repeats, "speedup": off / on, "unit": "ratio"}
            yield {**case, "metric": "mix_adaptive_over_better", "value": min(on, off) / own}
        print(line, flush=True)
    for method in methods:
        on, off, own = (sum(took[mode]) for mode in (f"{method} on", "off", f"{method} adaptive"))
        print(f"whole day, {method}: off {off:.1f} s, on {on:.1f} s, adaptive {own:.1f} s")
        case = {"method": method, "k": k, "phase": "all", "runs": repeats, "speedup": off / on, "unit": "ratio"}
        yield {**case, "metric": "mix_adaptive_over_better", "value": min(on, off) / own}


def verify_cost(engine: Any, rounds: int = 25) -> dict[int, float]:
    """Median time of a step that verifies so many tokens over that of a plain one, context 200."""
    from inference_server.engine.request import Request
    from inference_server.engine.scheduler import Scheduled, StepPlan
    from inference_server.protocol import Kind, SamplingParams

    tokens = [(7919 * place) % 49_000 for place in range(201)]
    request = Request(0, 200, tokens, SamplingParams(max_tokens=1), 0, 0)
    request.blocks = list(range(40))
    times: dict[int, list[float]] = {k: [] for k in (0, 1, 2, 3, 4, 5, 7, 8, 15)}
    step = 0
    for _ in range(rounds):
        for k, own in times.items():
            step += 1
            item = Scheduled(request, 200, 1 + k, Kind.DECODE, sample=True)
            item.propose([5] * k)
            plan = StepPlan(step, [item], use_cache=True)
            begin = time.perf_counter()
            packed = engine.fast.prepare(plan)
            engine.fast.forward(plan, packed)
            own.append(time.perf_counter() - begin)
    plain = statistics.median(times[0])
    return {k: statistics.median(own) / plain for k, own in times.items() if k}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="default")
    parser.add_argument("--head")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--k", nargs="+", type=int, default=[4])
    parser.add_argument("--tokens", type=int, default=160, help="of an answer, at most")
    parser.add_argument("--repeats", type=int, default=2, help="of each prompt, of which the fastest counts")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--adaptive", action="store_true", help="each method once more, adaptive")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--mix", action="store_true")
    parser.add_argument("--rounds", type=int, default=2, help="requests of a seat, phase and turn, with --mix")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dry", action="store_true", help="write no rows")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for dtype in arguments.dtypes:
        engine = engine_of(arguments.model, dtype, arguments.head)
        spec = next(spec for spec in engine.specs if spec.name == "speculation")
        methods = {
            name: METHODS[name] for name in dict.fromkeys(["off", *arguments.methods])
            if METHODS[name]["speculation"] not in spec.unavailable_choices
        }  # fmt: skip
        if arguments.adaptive:
            methods |= {
                f"{name} adaptive": {**features, "adaptive_speculation": True}
                for name, features in methods.items()
                if name != "off"
            }
        common = {"model": engine.loaded.located.name, "weights": {"float32": "fp32"}.get(dtype, "bf16")}
        if arguments.verify:
            for k, ratio in verify_cost(engine).items():
                print(f"{dtype}: verifying {k} tokens takes {ratio:.2f} times a plain step")
                rows.append(
                    {**common, "metric": "verify_cost_ratio", "k": k, "batch": 1, "value": ratio, "unit": "ratio"}
                )
            write(rows, dry=arguments.dry)
            continue
        if arguments.mix:
            proposing = [name for name in methods if name in arguments.methods and name != "off"]
            for row in live(engine, proposing, arguments.k[0], arguments.rounds, arguments.repeats):
                write([{**common, **row}], dry=arguments.dry)
            continue
        for batch in arguments.batches:
            for k in arguments.k:
                result = compare(engine, methods, batch, k, arguments.tokens, arguments.repeats)
                print(f"\n{dtype}, batch {batch}, k = {k} ({result['differing']} outputs differ from plain ones)")
                print("| method | tokens/s | speed-up | acceptance length | per position | drafting |")
                print("|---|---|---|---|---|---|")
                for name, own in result["methods"].items():
                    length = own["mean_acceptance_length"]
                    said = "" if length is None else f"{length:.2f}"
                    print(
                        f"| {name} | {own['tokens_per_s']:.1f} | {own['speedup']:.2f} | "
                        f"{said} | {own['per_position']} | {own['draft_share']:.0%} |"
                    )
                    case = {**common, "method": name, "batch": batch, "k": k, "prompts": "held out"}
                    case |= {"runs": own["runs"], "spread": own["spread"]}
                    if "eagle" in name and arguments.head:
                        case["head"] = Path(arguments.head).name
                    rows.append({**case, "metric": "tokens_per_s", "value": own["tokens_per_s"], "unit": "token/s"})
                    rows.append({**case, "metric": "speedup", "value": own["speedup"], "unit": "ratio"})
                    if length is not None:
                        unit = {"unit": "token/step", "per_position": own["per_position"]}
                        rows.append({**case, "metric": "mean_acceptance_length", "value": length, **unit})
                write(rows, dry=arguments.dry)
        del engine


def write(rows: list[dict[str, Any]], *, dry: bool) -> None:
    """Append rows as soon as there are some: a run that is cut off keeps them."""
    sys.stdout.flush()
    if not dry:
        with (ROOT / "benchmarks" / "results" / "speculation.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**about(), **row}) + "\n" for row in rows)
    rows.clear()


def about() -> dict[str, Any]:
    from inference_server.engine.cpu.choices import cpu_model

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "benchmark": "speculation",
        "subject": "ours",
        "device": "cpu",
        "hardware": f"{cpu_model()}; {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "numba")},
        "commit": commit,
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "runs": 1,
        "spread": 0.0,
    }


if __name__ == "__main__":
    main()
