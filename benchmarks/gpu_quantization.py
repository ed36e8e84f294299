"""Packed weights on one GPU: products alone by tile, whole steps by precision and batch size, and flips under load.

    python benchmarks/gpu_quantization.py --products [--out FILE]   # every tile worth measuring, one JSON line each
    python benchmarks/gpu_quantization.py                           # the engine: single stream, crossover, flips

Weights are random at the shapes of Llama 3.1 8B. A product is timed in a chain over matrices that do not fit into the
cache, recorded as one graph, as in a decode step; it is compared with float64 of the weights that it reads. Rows of the
engine go to benchmarks/results/gpu_quantization.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "server"), str(ROOT / "benchmarks")]

from gpu import bandwidth, build, timed
from gpu_linears import matrices
from rows import append

from inference_server.engine import attention, loader
from inference_server.engine.core import Engine
from inference_server.engine.gpu import kernels, packed
from inference_server.engine.gpu.linear import linear
from inference_server.engine.gpu.packed_tiles import PackedTile, VectorTile
from inference_server.engine.gpu.tiles import choose_tile
from inference_server.engine.quantization import planes
from inference_server.engine.quantization.packing import Scheme
from inference_server.models.locate import LocatedModel
from inference_server.protocol import CommandFailed, EngineConfig, FeaturesApplied, SamplingParams, Submit

SCHEMES = {
    "int8": Scheme(8),
    "fp8": Scheme(8, grid="float"),
    "int4 g128 symmetric": Scheme(4, 128, "symmetric"),
    "int4 g32 minimum": Scheme(4, 32, "minimum"),
    "int8 g32": Scheme(8, 32),
}
CHAIN = 3e8
"""Bytes that a chain reads: several times the cache."""


class Deadline:
    """Says whether there is time left for another part."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def passed(self) -> bool:
        return time.monotonic() > self._end


def chain_of(n: int, k: int, scheme: Scheme) -> list[planes.PlaneMatrix]:
    """Packed matrices of random weights; the scales are those of the first."""
    weight = torch.randn(n, k, device="cuda") * k**-0.5
    first = planes.quantize(weight, scheme)
    made = [first]
    for _ in range(max(2, min(40, int(CHAIN // first.nbytes))) - 1):
        data = first.data.clone()
        other = planes.PlaneMatrix(data, n, k, scheme)
        if scheme.grid == "float":  # not all bits are numbers
            other.units.copy_(first.units[torch.randperm(n, device="cuda")])
        else:
            other.units.view(torch.int32).random_(-(2**31), 2**31 - 1)
        made.append(other)
    return made


def vector_tiles(*, gated: bool) -> list[VectorTile]:
    """Tiles worth measuring for one vector: by rows and pieces of a thread, and warps."""
    each = [(8, 128, 4), (4, 128, 4), (16, 128, 4), (8, 64, 2), (4, 64, 2), (16, 64, 2), (8, 64, 4), (16, 64, 4),
            (4, 32, 1), (8, 32, 1), (16, 32, 1), (8, 32, 2), (16, 32, 2), (16, 32, 4), (32, 32, 4), (8, 128, 8),
            (16, 128, 8), (8, 256, 8)]  # fmt: skip
    return [VectorTile(rows // 2 if gated else rows, vectors, warps) for rows, vectors, warps in each]


def packed_tiles(n: int, k: int, m: int, scheme: Scheme, *, gated: bool) -> list[PackedTile]:
    """Tiles worth measuring for ``m`` rows."""
    blocks = -(-k // (512 // scheme.stored_bits))
    least = next(each for each in (16, 32, 64, 128, 256) if each >= m)
    found = []
    for rows in sorted({least, min(least, 64), min(least, 128)}):
        for columns, warps in ((64, 4), (128, 4), (128, 8)):
            for after, pair in ((False, False), (False, True), (True, False)):
                registers = rows * columns * (2 if gated else 1) * (2 if after else 1) // (32 * warps)
                if (after and not scheme.group) or (pair and rows > 64) or registers > 128:
                    continue
                wanted = 264 / (-(-n // columns) * -(-m // rows))
                splits = {max(1, min(round(wanted * f), blocks // 4, 8)) for f in (0.5, 1, 2)}
                for split in sorted({1} if gated or n > 16384 else splits):
                    for stages in (2, 3, 4):
                        step = rows * 1024 // scheme.stored_bits + columns * 64 * (2 if gated else 1)
                        if stages * step * (2 if pair else 1) < 200_000:
                            found.append(PackedTile(rows, columns, split, stages, warps, after, pair))
    return found


@contextlib.contextmanager
def compiled_together() -> Iterator[None]:
    """Compile what is called within; what does not compile says so when it is launched."""
    try:
        with kernels.compiling():
            yield
    except Exception as error:
        print("compiling:", repr(error)[:300], flush=True)


def products(options: argparse.Namespace) -> None:
    """Tiles of one product after the other."""
    deadline = Deadline(options.seconds)
    file = options.out.open("a", encoding="utf-8") if options.out else None
    peak = bandwidth()
    print(f"copy {peak / 1e12:.3f} TB/s on {torch.cuda.get_device_name()}", flush=True)
    for m in options.rows:
        for scheme_name in options.schemes:
            scheme = SCHEMES[scheme_name]
            for name, (n, k, gated) in matrices("llama8b").items():
                if (name == "head") != (scheme_name == "int8 g32") and scheme_name != "int8":
                    continue
                if options.matrix and name not in options.matrix:
                    continue
                if deadline.passed():
                    print("time is up before", m, scheme_name, name, flush=True)
                    return
                try:
                    product(m, scheme_name, scheme, name, n, k, gated, peak, file)
                except Exception as error:
                    print("FAILED", m, scheme_name, name, repr(error)[:400], flush=True)


def product(
    m: int, scheme_name: str, scheme: Scheme, name: str, n: int, k: int, gated: bool, peak: float, file: Any
) -> None:
    height = n * (2 if gated else 1)
    chain = chain_of(height, k, scheme)
    count = len(chain)
    weight = torch.cat([chain[0].dequantize(a, min(a + 4096, height)) for a in range(0, height, 4096)])
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    gain = (1 + 0.1 * torch.randn(k, device="cuda")).bfloat16()
    norm = name in {"qkv", "gate_up", "head"}
    copy = torch.empty(n, device="cuda", dtype=torch.bfloat16)
    residual = torch.zeros(n, device="cuda")
    row = torch.empty(n, device="cuda", dtype=torch.bfloat16)
    parts = torch.empty(8 * m * n, device="cuda", dtype=torch.bfloat16 if name == "head" or gated else torch.float32)
    tiles: list[Any] = vector_tiles(gated=gated) if m == 1 else packed_tiles(n, k, m, scheme, gated=gated)
    inputs = x.double()
    if m == 1 and norm:
        inputs = inputs * (inputs.pow(2).mean() + 1e-5).rsqrt() * gain.double()
    expected = torch.cat([inputs @ part.double().T for part in weight.split(8192)], dim=1)
    if gated:
        gate, up = expected.chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up

    def run(matrix: planes.PlaneMatrix, tile: Any) -> torch.Tensor:
        if m > 1:
            shape = (m, n) if gated else (tile.splits, m, n)
            out = parts[: torch.Size(shape).numel()].view(shape)
            packed.linear(x, matrix, out, tile, gated=gated, pdl=True)
            return out if gated else out.float().sum(0) if not graphed else out
        if norm:
            packed.gemv(x[0], matrix, out=row, gain=gain, eps=1e-5, gated=gated, tile=tile, pdl=True)
            return row[None]
        packed.gemv(x[0], matrix, residual=residual, copy=copy, tile=tile, pdl=True)
        return residual[None]

    graphed = True
    with compiled_together():
        for tile in tiles:
            run(chain[0], tile)
    graphed = False
    rows: list[tuple[float, str]] = []
    floor = chain[0].nbytes / peak
    for tile in tiles:
        try:
            residual.zero_()
            parts.fill_(torch.nan)
            got = run(chain[0], tile)
            error = float((got.double() - expected).norm() / expected.norm())
            if not error < 1e-2:
                print("WRONG", m, scheme_name, name, tuple(tile), error, flush=True)
                continue
            graphed = True

            def all_of_them(tile: Any = tile) -> None:
                for matrix in chain:
                    run(matrix, tile)

            taken = timed(all_of_them, 5) / count
        except Exception as error_:
            print("FAILED", m, scheme_name, name, tuple(tile), repr(error_)[:200], flush=True)
            continue
        finally:
            graphed = False
        extra = tile.splits * m * n * 4 / 3e12 if m > 1 and not gated and name != "head" else 0.0
        rows.append((taken + extra, json.dumps(list(tile))))
        if file is not None:
            line = {"matrix": name, "m": m, "scheme": scheme_name, "tile": list(tile), "us": 1e6 * taken,
                    "score": 1e6 * (taken + extra), "share": floor / taken, "error": error}  # fmt: skip
            file.write(json.dumps(line) + "\n")
            file.flush()
    rows.sort()
    told = " | ".join(f"{1e6 * t:.1f} {label}" for t, label in rows[:4])
    print(f"{scheme_name} {name} m={m} floor {1e6 * floor:.1f}: {told}", flush=True)


def rounded_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in 8-bit floating point, and their scales ``[rows, 1]``."""
    scale = (x.float().abs().amax(1, keepdim=True) / 448).clamp(min=1e-12)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def scaled_products(weights: list[torch.Tensor], x: torch.Tensor, expected: torch.Tensor) -> str:
    """torch's product of rows and weights in 8-bit floating point, a scale for each row and output: time and error.

    Rounding the rows is not in it: the norm or the product before would do it.
    """
    narrow = [rounded_rows(w) for w in weights]
    rows, scales = rounded_rows(x)

    def multiply() -> list[torch.Tensor]:
        return [torch._scaled_mm(rows, w.t(), scales, s.t(), out_dtype=torch.bfloat16) for w, s in narrow]

    seconds = timed(multiply, 5) / len(weights)
    error = float((multiply()[0].double() - expected).norm() / expected.norm())
    return f"fp8 {1e6 * seconds:.1f} (off by {error:.3f})"


def baselines(options: argparse.Namespace) -> None:
    """The same products with master weights, in 8-bit floating point by torch, and expanding, in the same run."""
    for name, (n, k, gated) in matrices("llama8b").items():
        height = n * (2 if gated else 1)
        weights = [
            torch.randn(height, k, device="cuda", dtype=torch.bfloat16)
            for _ in range(max(2, int(3e8 // (2 * height * k))))
        ]
        told = []
        for m in (1, *options.rows):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            out = torch.empty(m, height, device="cuda", dtype=torch.bfloat16)
            tile = choose_tile(n, k, m, gated=gated)
            parts = torch.empty(8, m, n, device="cuda")

            def cublas(x: Any = x, out: Any = out) -> None:
                for w in weights:
                    torch.mm(x, w.t(), out=out)

            def own(x: Any = x, tile: Any = tile, parts: Any = parts) -> None:
                for w in weights:
                    if gated:
                        linear(x, w, parts[0], tile, gated=True, pdl=True)
                    else:
                        linear(x, w, parts[: tile.splits], tile, pdl=True)

            told.append(f"m={m} cublas {1e6 * timed(cublas, 5) / len(weights):.1f}")
            if tile is not None:
                told.append(f"own {1e6 * timed(own, 5) / len(weights):.1f}")
            if options.fp8 and m >= 16:
                told.append(scaled_products(weights, x, x.double() @ weights[0].double().T))
        if name in {"gate_up", "down"}:
            for scheme_name in ("int8", "int4 g128 symmetric", "int4 g32 minimum"):
                chain = chain_of(height, k, SCHEMES[scheme_name])
                target = weights[0]

                def expand(chain: Any = chain, target: Any = target) -> None:
                    for matrix in chain:
                        packed.expand(matrix, target)

                told.append(f"expand {scheme_name} {1e6 * timed(expand, 5) / len(chain):.1f}")
        print("master", name, ", ".join(told), flush=True)


PRECISIONS: dict[str, dict[str, Any]] = {
    "master": {"weight_precision": "master"},
    "int8": {"weight_precision": "int8"},
    "fp8": {"weight_precision": "fp8"},
    "int4 g128 symmetric": {"weight_precision": "int4", "int4_group": "128", "int4_grid": "symmetric"},
    "int4 g32 minimum": {"weight_precision": "int4", "int4_group": "32", "int4_grid": "minimum"},
}
ANSWER = 257


class Served:
    """An engine and what it has answered."""

    def __init__(self, shape: str, kv_bytes: int = 16 << 30) -> None:
        model = build(shape, attention.NAME)
        device = torch.device("cuda", 0)
        loaded = loader.inspect(model, LocatedModel(shape, "random", Path()), device, torch.bfloat16, lambda *_: None)
        features: dict[str, Any] = {"max_num_seqs": 256, "max_num_batched_tokens": 8192}
        config = EngineConfig(
            max_num_seqs=256, max_model_len=2048, kv_bytes=kv_bytes, packed_bytes=20 << 30, features=features
        )
        self.engine = Engine(config, loaded)
        self.outputs: dict[int, list[int]] = {}
        self.handles = 0

    def submit(self, count: int, length: int, answer: int, seed: int) -> list[int]:
        draw = random.Random(seed)
        handles = []
        for _ in range(count):
            prompt = tuple(draw.randrange(10, 30_000) for _ in range(length))
            sampling = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
            handles.append(self.handles)
            self.engine.submit(Submit(requests=(self.handles,), prompt=prompt, sampling=sampling, arrival_ns=0))
            self.handles += 1
        return handles

    def step(self) -> Any:
        report, _ = self.engine.step()
        if report is not None:
            for handle, token in zip(report.tokens.request, report.tokens.token_id, strict=True):
                self.outputs.setdefault(handle, []).append(token)
        return report

    def drain(self) -> list[Any]:
        reports = []
        while self.engine.has_work():
            reports.append(self.step())
        return [report for report in reports if report is not None]

    def switch(self, values: dict[str, Any], *, stepping: bool = False) -> Any:
        """Throw switches; return how they were applied, once they are."""
        (applied, *_) = self.engine.set_features(0, values) or [None]
        while applied is None:
            if stepping and self.engine.has_work():
                self.step()
            else:
                time.sleep(0.002)
            for news in self.engine.take_news():
                if isinstance(news, CommandFailed):
                    raise TypeError(news.message)
                if isinstance(news, FeaturesApplied):
                    applied = news
        return applied


def single(served: Served, name: str) -> dict[str, float]:
    """One request: milliseconds from one token to the next."""
    found = []
    for turn in range(4):
        served.engine.forget_caches()
        served.submit(1, 128, ANSWER, turn)
        first = None
        while served.engine.has_work():
            report = served.step()
            if first is None and report is not None and report.tokens.token_id:
                first = time.perf_counter()
        assert first is not None
        found.append(1e3 * (time.perf_counter() - first) / (ANSWER - 1))
    work = served.engine.work
    row = {"ms_per_token": statistics.median(found[1:]), "bytes_per_step": work.body_bytes + work.head_bytes}
    print(
        f"{name}: single {row['ms_per_token']:.3f} ms a token ({', '.join(f'{each:.3f}' for each in found)})",
        flush=True,
    )
    return row


def crossover(served: Served, name: str, batches: list[int]) -> dict[int, float]:
    """Milliseconds of device time of a decode step by batch size; contexts of 64 to 96."""
    found = {}
    for batch in batches:
        served.engine.forget_caches()
        served.submit(batch, 64, 32, batch)
        reports = served.drain()
        steps = [r.step.device_ns for r in reports if r.step is not None and len(r.step.request) == batch]
        times = [each / 1e6 for each in steps[4:] if each is not None]
        found[batch] = statistics.median(times)
    print(name, "device ms a step:", {batch: round(ms, 3) for batch, ms in found.items()}, flush=True)
    return found


def flips(served: Served, count: int) -> dict[str, float]:
    """Throw the switch under load; see that nothing is lost, answers are those of before, and memory comes back."""
    names = list(PRECISIONS)
    engine = served.engine

    def answers() -> list[list[int]]:
        engine.forget_caches()
        handles = served.submit(4, 32, 16, 1)
        served.drain()
        return [served.outputs.pop(handle) for handle in handles]

    def in_use() -> int:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free

    expected = {}
    served.switch(PRECISIONS["master"])
    engine.weights.drop()
    expected["master"] = answers()
    before = in_use()
    for name in names[1:]:
        begin = time.perf_counter()
        served.submit(8, 64, 400, 7)
        applied = served.switch(PRECISIONS[name], stepping=True)
        seconds, ms = time.perf_counter() - begin, applied.apply_ns / 1e6
        print(f"{name} packed under load in {seconds:.1f} s, applied in {ms:.2f} ms", flush=True)
        served.drain()
        expected[name] = answers()
    served.outputs.clear()
    wanted: dict[int, int] = {}
    took = []
    draw = random.Random(0)
    for turn in range(count):
        for index in range(2):
            (handle,) = served.submit(1, 24, 8 + 24 * index, turn)
            wanted[handle] = 8 + 24 * index
        for _ in range(draw.randrange(1, 4)):
            served.step()
        name = names[draw.randrange(len(names))]
        took.append(served.switch(PRECISIONS[name], stepping=True).apply_ns / 1e6)
        served.step()
        if turn % 10 == 9:
            served.drain()
            assert answers() == expected[name], f"after flip {turn} {name} says something else"
    served.drain()
    engine.check_integrity()
    assert {handle: len(served.outputs[handle]) for handle in wanted} == wanted, "a request is incomplete"
    held = in_use()
    served.switch(PRECISIONS["master"])
    packed_bytes = engine.weights.nbytes
    engine.weights.drop()
    after = in_use()
    assert answers() == expected["master"]
    print(
        f"{count} flips under load, {len(wanted)} requests, none lost: {statistics.median(took):.2f} ms each, longest "
        f"{max(took):.2f}; memory {before / 1e6:.0f} MB before, {held / 1e6:.0f} with {packed_bytes / 1e6:.0f} of "
        f"copies, {after / 1e6:.0f} after",
        flush=True,
    )
    return {
        "flip_ms": statistics.median(took),
        "flip_ms_max": max(took),
        "memory_before": before,
        "memory_with_copies": held,
        "memory_after": after,
        "packed_bytes": packed_bytes,
    }


def whole_engine(options: argparse.Namespace) -> None:
    """Single stream, crossover and flips."""
    peak = bandwidth()
    begin = time.perf_counter()
    served = Served("llama8b")
    for thread in threading.enumerate():
        if thread.name == "kernels":  # compiles ahead, which would disturb what is measured first
            thread.join()
    print(f"engine started in {time.perf_counter() - begin:.1f} s; copy {peak / 1e12:.3f} TB/s", flush=True)
    rows: list[dict[str, Any]] = [{"subject": "floor", "metric": "copy_bandwidth", "value": peak, "unit": "byte/s"}]
    chosen = {name: PRECISIONS[name] for name in options.precisions}
    steps: dict[str, dict[int, float]] = {}
    try:
        for name, values in chosen.items():
            begin = time.perf_counter()
            served.switch(values)
            print(f"{name} ready in {time.perf_counter() - begin:.1f} s", flush=True)
            row = single(served, name)
            floor = 1e3 * row["bytes_per_step"] / peak
            rows.append(
                {"subject": name, "metric": "ms_per_token", "value": row["ms_per_token"], "unit": "ms", "floor": floor}
            )
            rows.append({"subject": name, "metric": "bytes_per_step", "value": row["bytes_per_step"], "unit": "byte"})
        for name, values in chosen.items():
            served.switch(values)
            steps[name] = crossover(served, name, options.batches)
            rows += [
                {"subject": name, "metric": "step_ms", "batch": batch, "value": ms, "unit": "ms"}
                for batch, ms in steps[name].items()
            ]
        if options.flips:
            for metric, value in flips(served, options.flips).items():
                unit = "ms" if "ms" in metric else "byte"
                rows.append({"subject": f"{options.flips} flips", "metric": metric, "value": value, "unit": unit})
    finally:
        if options.out is not None:
            options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if not options.no_record:
            append("gpu_quantization", [{"shape": "llama8b", "gpus": 1, **row} for row in rows], device="cuda",
                   hardware=torch.cuda.get_device_name(), packages=("torch", "triton"))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--baselines", action="store_true", help="products with master weights, and expanding to them")
    parser.add_argument("--fp8", action="store_true", help="with --baselines: products in 8-bit floating point as well")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--matrix", nargs="+")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so long")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--flips", type=int, default=100, help="under load; 0 for none")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    run: list[Callable[[argparse.Namespace], None]] = []
    run += [products] * options.products + [baselines] * options.baselines
    run = run or [whole_engine]
    for each in run:
        each(options)


if __name__ == "__main__":
    main()
