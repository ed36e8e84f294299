"""Products of 2 to 256 rows on one GPU: the own kernel by tile beside cuBLAS and the floor, one JSON row a case.

    python benchmarks/gpu_linears.py [--shape llama8b] [--rows 16 64 256] [--out FILE]

A case is a chain of products over matrices that do not fit into the cache, recorded as one graph, as in a decode step.
``us`` is one product's time; ``score`` adds the time in which a reader sums the parts (their bytes at 3 TB/s).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "server"), str(ROOT / "benchmarks")]

from gpu import SHAPES, bandwidth, timed

from inference_server.engine.gpu import kernels
from inference_server.engine.gpu.linear import linear
from inference_server.engine.gpu.tiles import SHARED_MEMORY, Tile, choose_tile, cut_rows, stages_of

READ = 3e12
"""Bytes per second at which the next kernel reads parts, most of them from the cache."""


def matrices(shape: str) -> dict[str, tuple[int, int, bool]]:
    """Outputs, inputs and whether it is gate and up, of every matrix of a layer and of the head."""
    s = SHAPES[shape]
    hidden, wide, dim = s["hidden_size"], s["intermediate_size"], s["head_dim"]
    heads, kv = s["num_attention_heads"], s["num_key_value_heads"]
    return {
        "qkv": ((heads + 2 * kv) * dim, hidden, False),
        "output": (hidden, heads * dim, False),
        "gate_up": (wide, hidden, True),
        "down": (hidden, wide, False),
        "head": (s["vocab_size"], hidden, False),
    }


def candidates(n: int, k: int, m: int, *, gated: bool) -> list[Tile]:
    """Tiles worth measuring."""
    cuts = {cut_rows(m)}
    if m > 128:
        cuts.add((128, 0))  # two programs share the weights through the cache
    if m > 64:
        cuts.add((64, 0) if m <= 128 else (128, 0))
    found = []
    for rows, more in sorted(cuts):
        for columns in (64, 128):
            if columns * (2 if gated else 1) * (rows + more) > 256 * 128:
                continue
            for depth in (64, 128):
                programs = -(-n // columns) * -(-m // (rows + more))
                splits = [s for s in (1, 2, 3, 4, 6, 8) if 70 <= programs * s <= 300 and k // s >= 256] or [1]
                if gated or n > 16384:
                    splits = [1]
                for split in splits:
                    for together in (1, 2):
                        stages = stages_of(rows + more, columns, depth, gated=gated, programs=together)
                        step = (rows + more + columns * (2 if gated else 1)) * depth * 2
                        if stages * step > SHARED_MEMORY or (together == 2 and stages < 3):
                            continue
                        warps = 8 if (rows + more) * columns * (2 if gated else 1) > 64 * 128 else 4
                        found.append(Tile(rows, more, columns, depth, split, stages, warps, True, 2))
    return list(dict.fromkeys(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64, 96, 128, 160, 192, 256])
    parser.add_argument("--matrix", nargs="+")
    parser.add_argument("--chosen", action="store_true", help="only what the engine chooses, and cuBLAS")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    file = options.out.open("a", encoding="utf-8") if options.out else None
    peak = bandwidth()
    for shape in options.shape or list(SHAPES):
        for name, (n, k, gated) in matrices(shape).items():
            if options.matrix and name not in options.matrix:
                continue
            measure(shape, name, n, k, gated, options, peak, file)


def measure(shape: str, name: str, n: int, k: int, gated: bool, options: Any, peak: float, file: Any) -> None:
    height = n * (2 if gated else 1)
    count = max(2, min(24, int(5e8 // (2 * height * k))))
    weights = [torch.randn(height, k, device="cuda", dtype=torch.bfloat16) * k**-0.5 for _ in range(count)]
    cases = []
    for m in options.rows:
        chosen = choose_tile(n, k, m, gated=gated)
        tiles = [] if options.chosen else candidates(n, k, m, gated=gated)
        # The chosen one too without asking ahead and without the bulk copy engine: what each is worth.
        more = [chosen, chosen._replace(ahead=0), chosen._replace(bulk=False)] if chosen else []
        cases.append((m, list(dict.fromkeys([*more, *tiles]))))
    space = max((m * n * tile.splits for m, tiles in cases for tile in tiles), default=0)
    parts = torch.empty(max(space, 256 * n), device="cuda")
    wide = torch.empty(256 * height, device="cuda", dtype=torch.bfloat16)
    narrow = torch.empty(256 * n, device="cuda", dtype=torch.bfloat16)
    x256 = torch.randn(256, k, device="cuda", dtype=torch.bfloat16)

    def target(m: int, tile: Tile) -> torch.Tensor:
        if gated:
            return narrow[: m * n].view(m, n)
        if name == "head":
            return narrow[: m * n].view(1, m, n)
        return parts[: tile.splits * m * n].view(tile.splits, m, n)

    with kernels.compiling():
        for m, tiles in cases:
            for tile in tiles:
                linear(x256[:m], weights[0], target(m, tile), tile, gated=gated, pdl=True)
    for m, tiles in cases:
        x = x256[:m]
        both, active = wide[: m * height].view(m, height), narrow[: m * n].view(m, n)
        if gated:
            gate, up = (x.float() @ weights[0].float().T).chunk(2, dim=1)
            expected = torch.nn.functional.silu(gate) * up
        else:
            expected = x.float() @ weights[0].float().T

        def cublas() -> None:
            for w in weights:
                torch.mm(x, w.t(), out=both)
                if gated:
                    kernels.silu_mul(both, active, pdl=True)

        def ours(tile: Tile) -> None:
            for w in weights:
                linear(x, w, target(m, tile), tile, gated=gated, pdl=True)

        rows = [(timed(cublas, 5) / count, 0.0, "cublas")]
        for tile in tiles:
            try:
                got = target(m, tile).fill_(torch.nan)
                linear(x, weights[0], got, tile, gated=gated, pdl=True)
                got = got.float() if gated else got.float().sum(0)
                error = float((got - expected).norm() / expected.norm())
                t = timed(lambda: ours(tile), 5) / count
            except Exception as error_:
                print(shape, name, m, tile, repr(error_)[:200], flush=True)
                continue
            if not error < 1e-2:
                print("WRONG", shape, name, m, tile, error, flush=True)
                continue
            extra = tile.splits * m * n * 4 / READ if not gated and name != "head" else 0.0
            rows.append((t, extra, json.dumps(list(tile))))
        floor = 2 * height * k / peak
        for t, extra, label in rows:
            line = {"shape": shape, "matrix": name, "n": n, "k": k, "m": m, "tile": label, "us": 1e6 * t,
                    "score": 1e6 * (t + extra), "share": floor / t}  # fmt: skip
            if file is not None:
                file.write(json.dumps(line) + "\n")
        ranked = sorted(rows, key=lambda row: row[0] + row[1])
        best = ranked[0]
        flat = {label: t for t, _, label in rows}
        chosen = [f"{1e6 * flat[json.dumps(list(t))]:.1f}" for t in tiles[:3] if json.dumps(list(t)) in flat]
        print(f"{shape} {name} m={m} floor {1e6 * floor:.1f} cublas {1e6 * rows[0][0]:.1f} best {1e6 * best[0]:.1f} "
              f"{best[2]} ({floor / best[0]:.0%}) chosen/no-ahead/no-bulk {chosen}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
