"""Keys and values in 8 bits on one GPU: attention alone by precision and tile, whole steps, and what fits.

    python benchmarks/gpu_kv_precision.py               # attention and whole steps
    python benchmarks/gpu_kv_precision.py --attention   # attention alone, with the tiles worth measuring

Weights are random at the shapes of Llama 3.1 8B. Attention is timed in a chain over caches that do not fit into the L2
cache together, recorded as one graph, and compared with float64 of what is stored. Rows go to
benchmarks/results/gpu_quantization.jsonl.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "server"), str(ROOT / "benchmarks")]

from gpu import SHAPES, bandwidth, timed
from gpu_quantization import Served, compiled_together
from rows import append

from inference_server.engine.attention import IN_8_BITS, PagedKVTensors
from inference_server.engine.gpu import kernels

SHAPE = SHAPES["llama8b"]
HEADS, KV, DIM = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"], SHAPE["head_dim"]
PRECISIONS = ("master", *IN_8_BITS)
BLOCK = 16
Tile = tuple[int, int, int, int]
"""Splits, positions, warps and stages."""
TILES = ((128, 4, 2), (128, 4, 3), (128, 8, 2), (64, 4, 3), (64, 2, 2), (64, 2, 3), (256, 8, 2))
CONTEXT = 600
ANSWER = 32
KV_BYTES = 24 << 30


class Contexts:
    """Requests of some lengths, their keys and values in caches of one precision.

    Parameters
    ----------
    precision : str
    lengths : list of int
        Positions of each request, the new ones among them.
    """

    def __init__(self, precision: str, lengths: list[int]) -> None:
        draw = random.Random(0)
        self.lengths = lengths
        device = torch.device("cuda", 0)
        blocks = list(range(sum(-(-length // BLOCK) for length in lengths)))
        size = 2 * len(blocks) * BLOCK * KV * DIM * (2 if precision == "master" else 1)
        self.caches = []
        for _ in range(max(2, min(128, int(1.5e9 // size)))):
            cache = PagedKVTensors(len(blocks), BLOCK, device, torch.bfloat16)
            cache.reserve([(KV, DIM, DIM)])
            cache.store_as(precision)
            self.caches.append(cache)
        slots = torch.arange(len(blocks) * BLOCK, device=device)
        for part in slots.split(1 << 16):
            new = torch.randn(2, len(part), KV, DIM, device=device)
            for cache in self.caches:
                cache.write(0, part, new[0], new[1])
        draw.shuffle(blocks)
        tables = torch.zeros(len(lengths), 256, dtype=torch.int32)
        for seat, length in enumerate(lengths):
            count = -(-length // BLOCK)
            tables[seat, :count] = torch.tensor([blocks.pop() for _ in range(count)])
        self.tables = tables.to(device)
        self.seats = torch.arange(len(lengths), device=device, dtype=torch.int32)
        # Turned by nothing, so that a reference need not turn.
        self.cos, self.sin = torch.ones(4096, DIM // 2, device=device), torch.zeros(4096, DIM // 2, device=device)
        rows = 16 * 32 * KV * max(len(lengths), 16)
        self.partial, self.state = torch.empty(rows * DIM, device=device), torch.empty(2 * rows, device=device)
        self.counters = torch.zeros(KV * len(lengths), dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """What attention to all positions has to read."""
        cache = self.caches[0]
        each = 2 * KV * DIM * cache.keys[0].itemsize + (8 * KV if cache.in_8_bits else 0)
        return sum(self.lengths) * each

    def attended(self, queries: torch.Tensor, seat: int, length: int) -> torch.Tensor:
        """Attention of a query ``[H, D]`` to what is stored of the first positions, float64."""
        places = torch.arange(length, device="cuda")
        slots = self.tables[seat].long()[places // BLOCK] * BLOCK + places % BLOCK
        k, v = (part.repeat_interleave(HEADS // KV, 1) for part in self.caches[0].read(0, slots, torch.float64))
        weights = torch.softmax(torch.einsum("hd,shd->hs", queries.double(), k) * DIM**-0.5, dim=-1)
        return torch.einsum("hs,shd->hd", weights, v)


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A projection, and where its attention goes."""
    qkv = torch.randn(rows, (HEADS + 2 * KV) * DIM, device="cuda", dtype=torch.bfloat16)
    return qkv, torch.full((rows, HEADS * DIM), torch.nan, device="cuda", dtype=torch.bfloat16)


def error_of(contexts: Contexts, qkv: torch.Tensor, out: torch.Tensor, rows: list[tuple[int, int, int]]) -> float:
    """Largest relative error of some rows: their number, seat and length."""
    worst = 0.0
    for row, seat, length in rows:
        expected = contexts.attended(qkv[row].view(-1, DIM)[:HEADS], seat, length).flatten()
        worst = max(worst, float((out[row].double() - expected).norm() / expected.norm()))
    return worst


def report(what: str, precision: str, label: str, seconds: float, contexts: Contexts, peak: float) -> dict[str, Any]:
    share = contexts.nbytes / peak / seconds
    print(f"{what:34} {precision:7} {label:28} {1e6 * seconds:8.1f} us  {share:5.0%} of a copy's bandwidth", flush=True)
    return {"subject": f"KV {precision}", "metric": "attention_us", "case": what, "tile": label, "unit": "us",
            "value": 1e6 * seconds, "bytes": contexts.nbytes}  # fmt: skip


def decode(what: str, lengths: list[int], peak: float, *, tiles: bool) -> list[dict[str, Any]]:
    """One new position of each request."""
    found: list[dict[str, Any]] = []
    batch = len(lengths)
    chosen = kernels.decode_splits(batch, KV)
    order = torch.tensor(sorted(range(batch), key=lambda row: -lengths[row]), device="cuda", dtype=torch.int32)
    best: list[Tile | None] = []
    for precision in PRECISIONS:
        contexts = Contexts(precision, lengths)
        qkv, out = inputs(batch)
        positions = torch.tensor(lengths, device="cuda", dtype=torch.int32) - 1

        def run(cache: PagedKVTensors, tile: Tile | None) -> None:
            splits, block, warps, stages = tile or (chosen, None, None, None)
            kernels.attend_decode(
                qkv, None, None, None, contexts.cos, contexts.sin, positions, contexts.seats, contexts.tables,
                cache.keys[0], cache.values[0], out, contexts.partial, contexts.state, contexts.counters,
                scale=DIM**-0.5, eps=1e-6, block_size=BLOCK, window=0, rotate=True, splits=splits, pdl=True,
                order=order if batch >= 32 else None, scales=cache.scales(0), block=block, warps=warps, stages=stages,
            )  # fmt: skip

        others: list[Tile] = []
        if precision == "int8" and tiles:
            others = [(splits, *tile) for splits in {chosen, max(1, chosen // 2)} for tile in TILES]
        wanted: list[Tile | None] = [None, *others, *(best if precision == "fp8" else [])]
        with compiled_together():
            for tile in wanted:
                run(contexts.caches[0], tile)
        results = []
        for tile in wanted:
            run(contexts.caches[0], tile)
            error = error_of(contexts, qkv, out, [(row, row, lengths[row]) for row in (0, batch // 2, batch - 1)])
            if not error < 1e-2:
                print("WRONG", what, precision, tile, error, flush=True)
                continue
            seconds = timed(lambda tile=tile: [run(cache, tile) for cache in contexts.caches]) / len(contexts.caches)
            results.append((seconds, tile))
        for seconds, tile in [each for each in results if each[1] is None] + sorted(
            (each for each in results if each[1] is not None), key=lambda each: each[0]
        )[:3]:
            label = "as the engine" if tile is None else "splits {} of {}, {} warps, {} st.".format(*tile)
            found.append(report(what, precision, label, seconds, contexts, peak))
        if precision == "int8" and others and results:
            best = [min((each for each in results if each[1] is not None), key=lambda each: each[0])[1]]
    return found


def verify(what: str, lengths: list[int], peak: float) -> list[dict[str, Any]]:
    """Five new positions of each request."""
    found = []
    batch, count = len(lengths), 5
    for precision in PRECISIONS:
        contexts = Contexts(precision, lengths)
        qkv, out = inputs(batch * count)
        begin = torch.tensor(lengths, device="cuda") - count
        positions = (begin[:, None] + torch.arange(count, device="cuda")).flatten().to(torch.int32)
        seats = contexts.seats.repeat_interleave(count)
        segments = torch.stack([count * contexts.seats, torch.full_like(contexts.seats, count)], dim=1).contiguous()

        def run(cache: PagedKVTensors) -> None:
            kernels.attend_verify(
                qkv, None, None, None, contexts.cos, contexts.sin, segments, positions, seats, contexts.tables,
                cache.keys[0], cache.values[0], out, contexts.partial, contexts.state, contexts.counters,
                scale=DIM**-0.5, eps=1e-6, block_size=BLOCK, window=0, rotate=True, depth=8, pdl=True,
                splits=kernels.decode_splits(batch, KV), scales=cache.scales(0),
            )  # fmt: skip

        run(contexts.caches[0])
        rows = [(count - 1, 0, lengths[0]), (count * batch - 2, batch - 1, lengths[-1] - 1)]
        error = error_of(contexts, qkv, out, rows)
        assert error < 1e-2, (what, precision, error)
        seconds = timed(lambda: [run(cache) for cache in contexts.caches]) / len(contexts.caches)
        found.append(report(what, precision, "as the engine", seconds, contexts, peak))
    return found


def prompts(what: str, lengths: list[int], peak: float) -> list[dict[str, Any]]:
    """All positions of each request: written to the cache, then attended to."""
    found = []
    per_tile = kernels.tile_tokens(HEADS, KV)
    tiles, seats, offset = [], [], 0
    for seat, length in enumerate(lengths):
        tiles += [[seat, offset + at, at, min(per_tile, length - at)] for at in range(0, length, per_tile)]
        seats += [seat] * length
        offset += length
    positions = torch.cat([torch.arange(length) for length in lengths]).to("cuda", torch.int32)
    seats_, tiles_ = (torch.tensor(each, device="cuda", dtype=torch.int32) for each in (seats, tiles))
    for precision in PRECISIONS:
        contexts = Contexts(precision, lengths)
        qkv, out = inputs(offset)

        def run(cache: PagedKVTensors, block: int) -> None:
            kernels.rotate_write(
                qkv, None, None, None, contexts.cos, contexts.sin, positions, seats_, contexts.tables, cache.keys[0],
                cache.values[0], eps=1e-6, block_size=BLOCK, rotate=True, scales=cache.scales(0),
            )  # fmt: skip
            kernels.attend_varlen(
                qkv, tiles_, contexts.tables, cache.keys[0], cache.values[0], out, scale=DIM**-0.5, block_size=BLOCK,
                window=0, scales=cache.scales(0), block=block,
            )  # fmt: skip

        for block in (64,) if precision == "master" else (64, 128):
            run(contexts.caches[0], block)
            rows = [(0, 0, 1), (lengths[0] - 1, 0, lengths[0]), (offset - 7, len(lengths) - 1, lengths[-1] - 6)]
            error = error_of(contexts, qkv, out, rows)
            assert error < 1e-2, (what, precision, error)
            seconds = timed(lambda block=block: [run(cache, block) for cache in contexts.caches])
            found.append(report(what, precision, f"of {block}", seconds / len(contexts.caches), contexts, peak))
    return found


def attention(options: argparse.Namespace, peak: float) -> list[dict[str, Any]]:
    """Attention of one layer by precision."""
    draw = random.Random(0)
    mixed = [draw.randint(100, 1500) for _ in range(256)]
    found = []
    cases = {"256 requests of 100..1500": mixed, "32 requests of 1000": [1000] * 32, "1 request of 400": [400]}
    for what, lengths in cases.items():
        found += decode(what, lengths, peak, tiles=not options.no_tiles)
    found += verify("5 positions each, 16 of 400", [400] * 16, peak)
    return found + prompts("prompts, 8 of 1024", [1024] * 8, peak)


def steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole decode steps, what a position takes, and how many fit."""
    begin = time.perf_counter()
    served = Served("llama8b", kv_bytes=KV_BYTES)
    for thread in threading.enumerate():
        if thread.name == "kernels":  # compiles ahead, which would disturb what is measured first
            thread.join()
    print(f"engine started in {time.perf_counter() - begin:.1f} s", flush=True)
    engine = served.engine
    found: list[dict[str, Any]] = []
    for precision in PRECISIONS:
        begin = time.perf_counter()
        served.submit(8, 64, 200, 7)
        applied = served.switch({"kv_cache_dtype": precision}, stepping=True)
        waited = time.perf_counter() - begin
        served.drain()
        per_position, blocks = engine.work.kv_bytes_per_token, engine.cache.pool.num_blocks
        subject = f"KV {precision}"
        rows = [("switch_ms", applied.apply_ns / 1e6, "ms"), ("switch_answered_s", waited, "s"),
                ("bytes_per_position", per_position, "byte"), ("positions_that_fit", blocks * BLOCK, "1")]  # fmt: skip
        found += [{"subject": subject, "metric": name, "value": value, "unit": unit} for name, value, unit in rows]
        told = []
        for batch in options.batches:
            engine.forget_caches()
            served.submit(batch, CONTEXT - ANSWER // 2, ANSWER, batch)
            reports = served.drain()
            of = [each.step.device_ns for each in reports if each.step is not None and len(each.step.request) == batch]
            ms = statistics.median(each / 1e6 for each in of[4:] if each is not None)
            told.append(f"{batch}: {ms:.2f}")
            found.append({"subject": subject, "metric": "step_ms", "batch": batch, "value": ms, "unit": "ms",
                          "context": CONTEXT})  # fmt: skip
        print(f"{subject:10} {per_position} bytes a position, {blocks * BLOCK} fit; step in ms by requests: "
              f"{', '.join(told)}; switch answered after {waited:.1f} s, applied in {applied.apply_ns / 1e6:.1f} ms",
              flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", action="store_true", help="attention alone")
    parser.add_argument("--steps", action="store_true", help="whole steps alone")
    parser.add_argument("--no-tiles", action="store_true", help="attention with the engine's tiles alone")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    peak = bandwidth()
    print(f"copy {peak / 1e12:.3f} TB/s on {torch.cuda.get_device_name()}", flush=True)
    parts: list[Callable[[], list[dict[str, Any]]]] = []
    if options.attention or not options.steps:
        parts.append(lambda: attention(options, peak))
    if options.steps or not options.attention:
        parts.append(lambda: steps(options))
    for part in parts:
        found = part()
        if not options.no_record:
            append("gpu_quantization", [{"shape": "llama8b", "gpus": 1, **row} for row in found], device="cuda",
                   hardware=torch.cuda.get_device_name(), packages=("torch", "triton"))  # fmt: skip
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
