"""Whole decode steps on one GPU by the tiles of their products: where the table in ``tiles.py`` comes from.

    python benchmarks/gpu_linears.py --out linears.jsonl       # products alone
    python benchmarks/gpu_steps.py linears.jsonl --out FILE    # the best of these in a step of eight layers

A product that is fastest alone need not be so between its neighbours, whose ends it overlaps. So, for each number of
rows, the best tiles by themselves take turns in a recorded step of eight layers (contexts of 300), one matrix after
another, and cuBLAS with them; whatever makes the step shortest stays.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "server"), str(ROOT / "benchmarks")]

from gpu import SHAPES, timed
from gpu_linears import matrices

from inference_server.engine.attention import PagedKVTensors
from inference_server.engine.gpu import kernels, runner
from inference_server.engine.gpu.linear import linear
from inference_server.engine.gpu.tiles import Tile, choose_tile
from inference_server.engine.llama import Architecture, Layer

LAYERS, CONTEXT, BLOCK = 8, 300, 16
Choice = dict[tuple[int, int, bool], Tile | None]


def build(shape: str) -> runner.GpuRunner:
    """A runner around eight layers of random weights."""
    s = SHAPES[shape]
    sizes = matrices(shape)

    def weight(name: str) -> torch.Tensor:
        n, k, gated = sizes[name]
        return torch.randn(n * (2 if gated else 1), k, device="cuda", dtype=torch.bfloat16) * k**-0.5

    hidden, dim = s["hidden_size"], s["head_dim"]
    ones, narrow = torch.ones(hidden, device="cuda"), torch.ones(dim, device="cuda")
    norm = narrow if s["model_type"] == "qwen3" else None
    layers = [
        Layer(ones, weight("qkv"), None, norm, norm, weight("output"), ones, weight("gate_up"), weight("down"), 0, True)
        for _ in range(LAYERS)
    ]
    head = weight("head")
    angles = torch.rand(4096, dim // 2, device="cuda")
    architecture = Architecture(
        hidden, s["intermediate_size"], s["num_attention_heads"], s["num_key_value_heads"], dim, s["vocab_size"],
        s["rms_norm_eps"], dim**-0.5, torch.bfloat16, head, ones, head, layers, angles, angles,
    )  # fmt: skip
    tensors = PagedKVTensors(256 * (CONTEXT // BLOCK + 1), BLOCK, torch.device("cuda", 0), torch.bfloat16)
    tensors.reserve([(s["num_key_value_heads"], dim, dim)] * LAYERS)
    for cache in (*tensors.keys, *tensors.values):
        cache.normal_()
    made = runner.GpuRunner(architecture, SimpleNamespace(tensors=tensors), 4096, 256)
    made._buffers.qkv_parts = torch.empty(8 * 256 * sizes["qkv"][0], device="cuda")
    made._buffers.delta_parts = torch.empty(8 * 256 * hidden, device="cuda")
    return made


def fill(made: runner.GpuRunner, rows: int) -> None:
    """Inputs of a decode step."""
    stride = -(-rows // 4) * 4
    blocks = torch.randperm(256 * (CONTEXT // BLOCK + 1))[: rows * (CONTEXT // BLOCK + 1)].view(rows, -1)
    made._tables[:rows, : blocks.shape[1]] = blocks.to("cuda", torch.int32)
    columns = (torch.full((rows,), 7), torch.full((rows,), CONTEXT), torch.arange(rows), torch.arange(rows))
    for part, column in enumerate(columns):
        made._buffers.inputs[part * stride : part * stride + rows] = column.to("cuda", torch.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("alone", type=Path, help="rows of gpu_linears.py")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64, 96, 128, 160, 192, 224, 256])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    alone = [json.loads(line) for line in options.alone.read_text(encoding="utf-8").splitlines()]
    for shape in options.shape or list(SHAPES):
        runner.choose_tile = choose_tile
        made = build(shape)
        for m in options.rows:
            tune(made, shape, m, alone, options.out)


def tune(made: runner.GpuRunner, shape: str, m: int, alone: list[dict[str, Any]], out: Path | None) -> None:
    fill(made, m)
    measured = min((row["m"] for row in alone if row["m"] >= m), default=256)
    sizes = matrices(shape)
    choice: Choice = {}
    runner.choose_tile = lambda n, k, rows, *, gated=False: choice[n, k, gated]
    options: dict[str, list[Tile | None]] = {}
    for name, key in sizes.items():
        rows = [r for r in alone if (r["shape"], r["matrix"], r["m"]) == (shape, name, measured)]
        tiles = [Tile(*json.loads(r["tile"])) for r in sorted(rows, key=lambda r: r["score"]) if r["tile"] != "cublas"]
        tiles = [t for t in tiles if t.ahead == 2 and t.bulk][: 1 if name == "head" else 5]
        small = [t for t in tiles if t.stages * (t.rows + t.more + t.columns * (1 + key[2])) * t.depth * 2 < 115_000]
        more = [t._replace(ahead=a) for t in (tiles[:1] + small[:1]) for a in (0, 8, 16)]
        options[name] = [*tiles, *(more if name != "head" else []), None]
        choice[key] = tiles[0]
        if name != "head":
            with kernels.compiling():
                weight = getattr(made.architecture.layers[0], {"qkv": "qkv", "output": "output", "gate_up": "gate_up",
                                                               "down": "down"}[name])  # fmt: skip
                x = torch.empty(m, key[1], device="cuda", dtype=torch.bfloat16)
                for t in options[name]:
                    if t is not None:
                        shape_ = (m, key[0]) if key[2] else (t.splits, m, key[0])
                        like = torch.bfloat16 if key[2] else torch.float32
                        linear(x, weight, torch.empty(shape_, device="cuda", dtype=like), t, gated=key[2], pdl=True)

    def step() -> float:
        return timed(lambda: made._decode(made._buffers, m), 7) * 1e6

    log: dict[str, Any] = {"shape": shape, "m": m, "layers": LAYERS}
    best = step()
    log["alone"] = best
    for name in ("gate_up", "down", "qkv", "output", "head"):
        key = sizes[name]
        kept = choice[key]
        for tile in options[name]:
            if tile == kept:
                continue
            choice[key] = tile
            t = step()
            if t < best * 0.9985:
                best, kept = t, tile
        choice[key] = kept
        log[name] = list(kept) if kept is not None else None
    log["best"] = step()
    chosen = dict(choice)
    choice.update({key: choose_tile(*key[:2], m, gated=key[2]) for key in choice})
    log["chosen"] = step()
    choice.update(dict.fromkeys(choice))
    log["cublas"] = step()
    choice.update({**chosen, sizes["qkv"]: None, sizes["output"]: None})
    log["cublas qkv and output"] = step()
    print(json.dumps(log), flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(log) + "\n")


if __name__ == "__main__":
    main()
