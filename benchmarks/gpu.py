"""Decoding on one GPU: this engine beside transformers and vLLM, same shapes, same workloads, interleaved.

    python benchmarks/gpu.py                                  # ours and transformers, both shapes
    python benchmarks/gpu.py --vllm-tree DIR --rounds 2       # and vLLM from a prepared tree of packages
    python benchmarks/gpu.py --kernels                        # the kernels of batch 1 alone: bytes, floor, share

Weights are random and built on the device, since speed does not depend on their values. Workloads: *single* is one
request, 128 tokens in, 256 out, ms per token = (t(257) − t(1)) / 256, median of 3; *batch* is 256 requests at once,
lengths uniform in 100…1024 in and out, end of sequence ignored. Every subject is a process of its own that is loaded
once; the subjects take turns, since a GPU holds one at a time. The floor is bytes that a token must read over the
bandwidth of a copy, measured in the same run. Rows go to benchmarks/results/gpu.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START = time.perf_counter()
ROOT = Path(__file__).resolve().parent.parent
COMMON: dict[str, Any] = {
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama8b": COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "qwen06b": COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
}
PROMPT, ANSWER = 128, 257
WORDS = 30_000


def work(seed: int, count: int = 256, low: int = 100, high: int = 1024) -> list[tuple[list[int], int]]:
    """Prompts and output lengths of the batch workload."""
    draw = random.Random(seed)
    return [
        ([draw.randrange(10, WORDS) for _ in range(draw.randint(low, high))], draw.randint(low, high))
        for _ in range(count)
    ]


def prompt(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(10, WORDS) for _ in range(PROMPT)]


def build(shape: str, attention: str) -> Any:
    """A model with random weights on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPES[shape])
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention).eval()
    with torch.no_grad():
        # As GPT-2 starts, and embeddings of size 1: otherwise rounding grows with the depth.
        model.model.embed_tokens.weight.mul_(50)
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_((2 * len(model.model.layers)) ** -0.5)
    return model


# -- subjects: each process prints JSON lines --------------------------------------------------------------------------


def emit(**row: Any) -> None:
    print("ROW " + json.dumps(row), flush=True)


class Sink:
    """Takes reports as the engine process does: another thread encodes them."""

    def __init__(self) -> None:
        import msgspec

        self.bytes = 0
        self._encode = msgspec.msgpack.Encoder().encode
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def put(self, report: Any) -> None:
        self._queue.put(report)

    def _run(self) -> None:
        while True:
            self.bytes += len(self._encode(self._queue.get()))


PHASE = 25
"""Steps between two changes of the telemetry."""


def watched(engine: Any, serve: Callable[..., list[float]], seed: int) -> dict[str, Any]:
    """What full telemetry costs a step: the same requests twice, on and off by turns of :data:`PHASE` steps.

    Where the first run has it on the second has it off, so that every step is measured both ways, a moment apart from
    others of its size. The interval is that of the mean over the phases, which are independent of one another.
    """
    times: list[list[float]] = []
    for run in range(2):

        def at_step(index: int, run: int = run) -> None:
            if index % PHASE == 0:
                on = (index // PHASE + run) % 2 == 0
                engine.set_features(0, {"instrumentation": "full" if on else "off"})

        engine.set_features(0, {"prefix_cache_read": False})
        times.append(serve(work(seed=seed), at_step))
    engine.set_features(0, {"instrumentation": "full", "prefix_cache_read": True})
    phases = []
    for begin in range(0, min(map(len, times)) - PHASE + 1, PHASE):
        first, second = (sum(run[begin + 2 : begin + PHASE]) for run in times)
        on, off = (first, second) if (begin // PHASE) % 2 == 0 else (second, first)
        phases.append(on / off - 1)
    # The runs differ a little as wholes: phases that the first had on and those that the second had on weigh the same.
    pairs = [(a + b) / 2 for a, b in zip(phases[::2], phases[1::2], strict=False)]
    mean = statistics.fmean(pairs)
    half = 1.96 * statistics.stdev(pairs) / len(pairs) ** 0.5
    return {"overhead": mean, "low": mean - half, "high": mean + half, "pairs": len(pairs)}


def run_ours(shape: str, rounds: int, features: dict[str, Any], only: str | None, telemetry: int) -> None:
    sys.path[:0] = [str(ROOT / "server")]
    from inference_server.engine import lean_imports

    lean_imports.start_device("cuda")
    with lean_imports.unused_hidden():
        from inference_server.engine import attention, loader
        from inference_server.engine.core import Engine
    import torch

    from inference_server.garbage import keep_what_is_loaded
    from inference_server.models.locate import LocatedModel
    from inference_server.protocol import EngineConfig, SamplingParams, Submit

    emit(what="imported", s=time.perf_counter() - START)
    model = build(shape, attention.NAME)
    emit(what="built", s=time.perf_counter() - START)
    loaded = loader.inspect(
        model, LocatedModel(shape, "random", Path()), torch.device("cuda", 0), torch.bfloat16, lambda *_: None
    )
    emit(what="checked", s=time.perf_counter() - START)
    config = EngineConfig(
        max_num_seqs=256,
        max_model_len=4096,
        features={"max_num_seqs": 256, "max_num_batched_tokens": 8192, **features},
    )
    engine = Engine(config, loaded)
    keep_what_is_loaded()  # as the engine's process does
    emit(what="ready", s=time.perf_counter() - START, specs=[s.name for s in engine.specs if not s.available])
    sink = Sink()

    def serve(requests: list[tuple[list[int], int]], watch: list[Any] | None = None) -> float:
        begin = time.perf_counter()
        for handle, (tokens, count) in enumerate(requests):
            sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
            engine.submit(Submit(requests=(handle,), prompt=tuple(tokens), sampling=sampling, arrival_ns=0))
        while engine.has_work():
            report, _ = engine.step()
            if report is not None:
                sink.put(report)
                if watch is not None:
                    watch.append(report.step)
        return time.perf_counter() - begin

    def serve_timed(requests: list[tuple[list[int], int]], at_step: Callable[[int], None]) -> list[float]:
        """Serve, calling ``at_step`` before each step; return the time that each step took."""
        times: list[float] = []
        for handle, (tokens, count) in enumerate(requests):
            sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
            engine.submit(Submit(requests=(handle,), prompt=tuple(tokens), sampling=sampling, arrival_ns=0))
        before = time.perf_counter()
        while engine.has_work():
            at_step(len(times))
            report, _ = engine.step()
            if report is not None:
                sink.put(report)
                now = time.perf_counter()
                times.append(now - before)
                before = now
        return times

    serve([(prompt(0), 1)])
    emit(what="first token", s=time.perf_counter() - START)
    serve([(prompt(1), 64)])
    # Requests that end one after another: a graph of every batch size is captured, as vLLM does before it is ready.
    for seed in (1000, 1001):
        serve([(tokens[:24], 1 + i // 2) for i, (tokens, _) in enumerate(work(seed=seed))])
    emit(what="full speed", s=time.perf_counter() - START)
    for turn in range(rounds):
        if only != "batch":
            steps: list[Any] = []
            each = [
                (serve([(prompt(10 * turn + i), ANSWER)], steps) - serve([(prompt(100 * turn + i), 1)])) / (ANSWER - 1)
                for i in (3, 4, 5)
            ]
            # Steps of one position, past the first of each answer.
            late = [step for step in steps if step.scheduled == [1]][8:]
            emit(
                what="single",
                ms=1e3 * statistics.median(each),
                spread=1e3 * (max(each) - min(each)),
                device_ms=statistics.median([step.device_ns or 0 for step in late]) / 1e6,
                schedule_us=statistics.median([step.schedule_ns for step in late]) / 1e3,
                prepare_us=statistics.median([step.prepare_ns for step in late]) / 1e3,
                update_us=statistics.median([step.update_ns for step in late]) / 1e3,
                path=late[-1].path,
            )
        if only != "single":
            steps = []
            requests = work(seed=turn)
            s = serve(requests, steps)
            count = sum(length for _, length in requests)
            mixed = [step for step in steps if max(step.scheduled) > 1]
            emit(
                what="batch",
                tok_s=count / s,
                s=s,
                device_s=sum(step.device_ns or 0 for step in steps) / 1e9,
                mixed_s=sum(step.device_ns or 0 for step in mixed) / 1e9,
                steps=len(steps),
                mixed=len(mixed),
                schedule_s=sum(step.schedule_ns for step in steps) / 1e9,
                prepare_s=sum(step.prepare_ns for step in steps) / 1e9,
                forward_s=sum(step.forward_ns for step in steps) / 1e9,
                sample_s=sum(step.sample_ns for step in steps) / 1e9,
                update_s=sum(step.update_ns for step in steps) / 1e9,
            )
    if only != "single":
        for pair in range(telemetry):
            emit(what="telemetry", **watched(engine, serve_timed, seed=50 + pair))
    emit(what="memory", GiB=torch.cuda.max_memory_allocated() / 2**30)


def run_transformers(shape: str, rounds: int, only: str | None, *, continuous: bool) -> None:
    import torch

    model = build(shape, "sdpa")
    ids = torch.tensor([prompt(0)], device="cuda")

    def generate(count: int, **options: Any) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, **options)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    if continuous and only != "single":
        run_continuous(model)
    modes = (("eager", {}), ("static cache, compiled", {"cache_implementation": "static"}))
    for mode, options in modes if only != "batch" else ():
        generate(32, **options)
        generate(ANSWER, **options)
        for _ in range(rounds):
            each = [(generate(ANSWER, **options) - generate(1, **options)) / (ANSWER - 1) for _ in range(3)]
            emit(what="single", mode=mode, ms=1e3 * statistics.median(each), spread=1e3 * (max(each) - min(each)))


def run_continuous(model: Any, patience: float = 60.0) -> None:
    """transformers' continuous batching on the batch workload, given up after ``patience`` seconds."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    generation = GenerationConfig(max_new_tokens=1024, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(max_memory_percent=0.8)
    requests = work(seed=0)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=batching
    ) as manager:
        begin = time.perf_counter()
        for index, (tokens, count) in enumerate(requests):
            manager.add_request(tokens, request_id=f"r{index}", max_new_tokens=count)
        done = produced = 0
        while done < len(requests) and time.perf_counter() - begin < patience:
            result = manager.get_result(timeout=5)
            if result is not None and result.is_finished():
                done += 1
                produced += len(result.generated_tokens)
        s = time.perf_counter() - begin
    if done:
        emit(what="batch", mode="continuous batching", tok_s=produced / s, s=s, requests=done)


def run_vllm(shape: str, rounds: int, only: str | None) -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=4096,
        gpu_memory_utilization=0.85,
        dtype="bfloat16",
        seed=0,
    )
    emit(what="ready", s=time.perf_counter() - START)

    def serve(requests: list[tuple[list[int], int]]) -> float:
        begin = time.perf_counter()
        llm.generate(
            [{"prompt_token_ids": tokens} for tokens, _ in requests],
            [
                SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
                for _, count in requests
            ],
            use_tqdm=False,
        )
        return time.perf_counter() - begin

    serve([(prompt(0), 1)])
    emit(what="first token", s=time.perf_counter() - START)
    serve([(prompt(1), 64)])
    for turn in range(rounds):
        if only != "batch":
            each = [(serve([(prompt(i), ANSWER)]) - serve([(prompt(50 + i), 1)])) / (ANSWER - 1) for i in (3, 4, 5)]
            emit(what="single", ms=1e3 * statistics.median(each), spread=1e3 * (max(each) - min(each)))
        if only != "single":
            requests = work(seed=turn)
            s = serve(requests)
            emit(what="batch", tok_s=sum(count for _, count in requests) / s, s=s)


# -- the device --------------------------------------------------------------------------------------------------------


def timed(function: Callable[[], Any], count: int = 10) -> float:
    """Seconds of one call, by events around ``count`` replays of a graph of it."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    times = []
    for _ in range(count):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes per second of a large copy, read plus written."""
    import torch

    x = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    times = []
    for _ in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        y.copy_(x)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * x.numel() / statistics.median(times)


def run_device() -> None:
    import torch

    emit(what="device", name=torch.cuda.get_device_name(), bandwidth=bandwidth())


def run_kernels(shape: str) -> None:
    """Every matrix of one decode step at batch 1, by tile, with and without early launch, beside cuBLAS."""
    import torch

    sys.path[:0] = [str(ROOT / "server")]
    from inference_server.engine.gpu import kernels

    peak = bandwidth()
    s = SHAPES[shape]
    hidden, wide = s["hidden_size"], s["intermediate_size"]
    heads, kv, dim = s["num_attention_heads"], s["num_key_value_heads"], s["head_dim"]
    matrices = {
        "qkv": ((heads + 2 * kv) * dim, hidden),
        "output": (hidden, heads * dim),
        "gate_up": (2 * wide, hidden),
        "down": (hidden, wide),
        "head": (s["vocab_size"], hidden),
    }
    tiles = [(2, 1024, 4), (2, 2048, 4), (4, 512, 4), (4, 1024, 4), (4, 1024, 8), (4, 2048, 8), (8, 512, 4)]
    tiles += [(8, 1024, 8), (16, 512, 8), (1, 2048, 4), (2, 512, 2)]
    for name, (n, k) in matrices.items():
        layers = 1 if name == "head" else min(s["num_hidden_layers"], max(4, int(1.5e9 // (2 * n * k))))
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
        x = torch.randn(k, device="cuda", dtype=torch.float32)
        narrow = x.bfloat16()
        gain, residual = torch.ones(k, device="cuda"), torch.zeros(n, device="cuda")
        out = torch.empty(n, device="cuda", dtype=torch.bfloat16)
        half = torch.empty(n // 2, device="cuda", dtype=torch.bfloat16)

        def ours(tile: Any, pdl: bool) -> None:
            for w in weights:
                if name == "gate_up":
                    kernels.gemv_gate_up(x, gain, 1e-5, w, half, tile=tile, pdl=pdl)
                elif name in {"output", "down"}:
                    kernels.gemv(narrow, w, residual=residual, tile=tile, pdl=pdl)
                else:
                    kernels.gemv(x, w, out=out, gain=gain, eps=1e-5, tile=tile, pdl=pdl)

        def cublas() -> None:
            for w in weights:
                torch.mv(w, narrow, out=out)

        size = 2 * n * k
        floor = size / peak
        rows = [("cublas", timed(cublas) / layers)]
        for tile in tiles:
            for pdl in (False, True) if tile == tiles[3] else (True,):
                try:
                    rows.append((f"{tile} pdl={pdl}", timed(lambda: ours(tile, pdl)) / layers))
                except Exception as error:  # a tile that does not fit
                    print(name, tile, pdl, repr(error)[:200])
        rows.append(("chosen", timed(lambda: ours(None, True)) / layers))
        rows.sort(key=lambda row: row[1])
        for label, t in [*rows[:4], *(row for row in rows[4:] if row[0] in {"cublas", "chosen"})]:
            emit(what="kernel", matrix=name, n=n, k=k, MB=size / 1e6, kernel=label, us=1e6 * t, share=floor / t)


def run_attention(shape: str) -> None:
    """Decode attention of one layer by tile, at batch 256 and 1: bytes of keys and values over time."""
    import torch

    sys.path[:0] = [str(ROOT / "server")]
    from inference_server.engine.gpu import kernels

    peak = bandwidth()
    s = SHAPES[shape]
    heads, kv, dim = s["num_attention_heads"], s["num_key_value_heads"], s["head_dim"]
    draw = random.Random(0)
    for batch, lengths in ((256, [draw.randint(100, 1500) for _ in range(256)]), (32, [1000] * 32), (1, [400])):
        slots = 16 * sum(-(-length // 16) for length in lengths)
        copies = max(2, min(32, int(6e9 // (slots * kv * dim * 4))))
        caches = [torch.randn(2, slots, kv, dim, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        blocks = list(range(slots // 16))
        draw.shuffle(blocks)
        tables = torch.zeros(batch, 256, dtype=torch.int32)
        for seat, length in enumerate(lengths):
            count = -(-length // 16)
            tables[seat, :count] = torch.tensor([blocks.pop() for _ in range(count)])
        tables = tables.cuda()
        qkv = torch.randn(batch, (heads + 2 * kv) * dim, device="cuda", dtype=torch.bfloat16)
        gain = torch.ones(dim, device="cuda")
        cos = sin = torch.rand(4096, dim // 2, device="cuda")
        positions = torch.tensor(lengths, device="cuda", dtype=torch.int32) - 1
        seats = torch.arange(batch, device="cuda", dtype=torch.int32)
        out = torch.empty(batch, heads * dim, device="cuda", dtype=torch.bfloat16)
        scratch = batch * kv * 32 * kernels.padded_group(heads // kv)
        partial, state = torch.empty(scratch * dim, device="cuda"), torch.empty(scratch * 2, device="cuda")
        counters = torch.zeros(batch * kv, device="cuda", dtype=torch.int32)
        norm = gain if s["model_type"] == "qwen3" else None
        rows = []
        splits = {256: (1, 2, 4), 32: (1, 2, 4, 8), 1: (8, 16, 32)}[batch]
        for split in splits:
            for block, warps, stages in (
                (32, 2, 3),
                (32, 4, 3),
                (64, 4, 2),
                (64, 4, 3),
                (128, 4, 2),
                (128, 8, 2),
                (64, 2, 3),
            ):

                def run() -> None:
                    for keys, values in caches:
                        kernels.attend_decode(
                            qkv, None, norm, norm, cos, sin, positions, seats, tables, keys, values, out, partial,
                            state, counters, scale=dim**-0.5, eps=1e-6, block_size=16, window=0, rotate=True,
                            splits=split, block=block, warps=warps, stages=stages, pdl=True,
                        )  # fmt: skip

                rows.append((timed(run) / copies, split, block, warps, stages))
        size = sum(lengths) * kv * dim * 4
        for t, *tile in sorted(rows)[:5] + [row for row in rows if row[1:] == (splits[0], 64, 4, 3)]:
            emit(what="attention", batch=batch, MB=size / 1e6, tile=tile, us=1e6 * t, share=size / peak / t)


# -- the benchmark -----------------------------------------------------------------------------------------------------


def subject(*arguments: str, tree: str | None = None) -> list[dict[str, Any]]:
    """Run a subject in a process of its own; return its rows."""
    environment = dict(os.environ)
    if tree is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [tree, environment.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    rows, log = [], []
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ROW "):
            rows.append(json.loads(line[4:]))
            print(" ".join(arguments[:3]), line.strip(), flush=True)
        else:
            log.append(line)
    if process.wait():
        print("".join(log[-30:]), file=sys.stderr)
        rows.append({"what": "failed", "code": process.returncode})
    return rows


def report(shape: str, results: dict[str, list[dict[str, Any]]], device: dict[str, Any]) -> list[dict[str, Any]]:
    """Figures of one shape as result rows."""
    s = SHAPES[shape]
    hidden, wide, dim = s["hidden_size"], s["intermediate_size"], s["head_dim"]
    heads, kv = s["num_attention_heads"], s["num_key_value_heads"]
    layer = hidden * dim * (2 * heads + 2 * kv) + 3 * hidden * wide
    floor = 2 * (layer * s["num_hidden_layers"] + s["vocab_size"] * hidden) / device["bandwidth"] * 1e3
    base = {"shape": shape, "weights": "bf16", "gpus": 1}
    rows: list[dict[str, Any]] = [
        base | {"subject": "floor", "workload": "single", "metric": "ms_per_token", "value": floor, "unit": "ms"}
    ]

    def add(name: str, workload: str, metric: str, unit: str, values: list[float], **more: Any) -> None:
        if values:
            rows.append(
                base
                | {"subject": name, "workload": workload, "metric": metric, "value": statistics.median(values)}
                | {"unit": unit, "runs": len(values), "spread": max(values) - min(values)}
                | more
            )

    for name, found in results.items():
        for mode in sorted({row.get("mode", "") for row in found if row["what"] == "single"}):
            single = [row["ms"] for row in found if row["what"] == "single" and row.get("mode", "") == mode]
            more = {"mode": mode} if mode else {}
            add(name, "single", "ms_per_token", "ms", single, **more)
            add(name, "single", "floor_fraction", "1", [floor / each for each in single], **more)
        for mode in sorted({row.get("mode", "") for row in found if row["what"] == "batch"}):
            batch = [row["tok_s"] for row in found if row["what"] == "batch" and row.get("mode", "") == mode]
            add(name, "batch", "tokens_per_s", "1/s", batch, **({"mode": mode} if mode else {}))
        for row in found:
            if row["what"] == "telemetry":
                interval = {"low": row["low"], "high": row["high"], "pairs": row["pairs"]}
                add(name, "batch", "telemetry_overhead_fraction", "1", [row["overhead"]], **interval)
        for what, metric in (
            ("imported", "start_to_imported_s"),
            ("first token", "start_to_first_token_s"),
            ("full speed", "start_to_full_speed_s"),
        ):
            add(name, "single", metric, "s", [row["s"] for row in found if row["what"] == what])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: both")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each workload by each subject")
    parser.add_argument("--only", choices=("single", "batch"))
    parser.add_argument("--telemetry", type=int, default=1, help="pairs of runs with telemetry on and off by turns")
    parser.add_argument("--continuous", action="store_true", help="transformers' continuous batching too: minutes")
    parser.add_argument("--features", default="{}", help="feature values of ours, as JSON")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--vllm-tree", help="folder of packages with vLLM")
    parser.add_argument("--kernels", action="store_true", help="measure the matrix kernels instead")
    parser.add_argument("--subject", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = options.shape or list(SHAPES)
    if options.subject == "device":
        return run_device()
    if options.subject == "ours":
        features = json.loads(options.features)
        return run_ours(shapes[0], options.rounds, features, options.only, options.telemetry)
    if options.subject == "transformers":
        return run_transformers(shapes[0], options.rounds, options.only, continuous=options.continuous)
    if options.subject == "vllm":
        return run_vllm(shapes[0], options.rounds, options.only)
    if options.kernels:
        for shape in shapes:
            run_kernels(shape)
            run_attention(shape)
        return None
    device = subject("--subject", "device")[0]
    sys.path.insert(0, str(Path(__file__).parent))
    import rows as result_rows

    every: list[dict[str, Any]] = []
    for shape in shapes:
        arguments = ["--shape", shape, "--rounds", str(options.rounds), "--telemetry", str(options.telemetry)]
        if options.only:
            arguments += ["--only", options.only]
        results = {"ours": subject("--subject", "ours", *arguments, "--features", options.features)}
        if options.vllm_tree:
            results["vllm"] = subject("--subject", "vllm", *arguments, tree=options.vllm_tree)
        if not options.no_transformers and (options.only != "batch" or options.continuous):
            more = ["--continuous"] if options.continuous else []
            results["transformers"] = subject("--subject", "transformers", *arguments, *more)
        every += report(shape, results, device)
    for row in every:
        print(f"{row['shape']:8} {row['workload']:7} {row['subject']:13} {row.get('mode', ''):24} "
              f"{row['metric']:28} {row['value']:12.3f} {row['unit']}")  # fmt: skip
    packages = ("torch", "triton", "transformers", "vllm")
    result_rows.append("gpu", every, device="cuda", hardware=device["name"], packages=packages)
    return None


if __name__ == "__main__":
    main()
