"""Which kernel computes a linear layer: measured on this machine for each shape and batch size, and remembered.

No kernel is best by name: torch's float32 product reaches a third of the memory bandwidth for one row and wins for
many; its bfloat16 product is a different library again. So each candidate is timed on the model's own weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from inference_server.models.cache import cache_folder

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512)
"""Row counts that are measured; others use the next larger one's choice."""
ROUNDS = 20
TRUSTED_ROUNDS = 6
"""Rounds that a table needs to be remembered, and a shape to leave the own kernel, which a busy machine slows least."""
BUDGET_SECONDS = 3.0
OWN, TORCH = "own", "torch"
Shape = tuple[int, int]
"""(out features, in features)"""
Clock = Callable[[str, Shape, int], float]
"""Seconds per layer in one pass over some layers, by (kernel, shape, rows)."""
Seconds = dict[Shape, dict[int, dict[str, float]]]
"""Best time of a layer by shape, rows and kernel."""


class Choices:
    """The measured table.

    Attributes
    ----------
    seconds : dict
        By shape, rows and kernel: the best time measured.
    rounds : int
        How many measurements each of them is the best of, at least.
    """

    def __init__(self, seconds: Seconds, rounds: int) -> None:
        self.seconds = seconds
        self.rounds = rounds

    def kernel(self, shape: Shape, rows: int) -> str:
        """The faster kernel for a linear layer of ``shape`` on ``rows`` rows."""
        by_rows = self.seconds[shape]
        batch = next((each for each in BATCHES if each >= rows), BATCHES[-1])
        times = by_rows[batch]
        # A torch call ends the compiled region and starts another; it has to be worth it.
        return TORCH if self.rounds >= TRUSTED_ROUNDS and times[TORCH] < 0.95 * times[OWN] else OWN


def load_or_measure(key: str, shapes: list[Shape], clock: Clock) -> Choices:
    """Return the remembered table for ``key``, or measure it in at most some seconds, and remember the result.

    A remembered table may be of a busy hour: every start adds a round to it, by which it only gets quicker.
    """
    path = cache_folder().parent / "cpu-kernels" / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"
    remembered = _read(path, key, shapes)
    if remembered is not None:
        measured, _ = _measure(shapes, clock, rounds=1, known=remembered)
        _write(path, key, seconds := _without_outliers(measured))
        return Choices(seconds, TRUSTED_ROUNDS)
    measured, rounds = _measure(shapes, clock)
    seconds = _without_outliers(measured)
    if rounds >= TRUSTED_ROUNDS:  # on a machine too busy for that, the next start measures again
        _write(path, key, seconds)
    return Choices(seconds, rounds)


def machine_key(dtype: torch.dtype, threads: int, code: str, shapes: list[Shape]) -> str:
    """All that a measurement depends on, in words."""
    return json.dumps(
        {
            "cpu": cpu_model(),
            "torch": torch.__version__,
            "code": code,
            "threads": threads,
            "dtype": str(dtype),
            "shapes": shapes,
        },
        sort_keys=True,
    )


def cpu_model() -> str:
    """Name, family and model number of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.processor()} {platform.machine()}"
    wanted = ("model name", "cpu family", "model", "CPU part", "CPU implementer")
    found = [line.split(":", 1)[1].strip() for line in lines if line.split(":", 1)[0].strip() in wanted]
    return ", ".join(found) or platform.machine()


def _measure(
    shapes: list[Shape], clock: Clock, rounds: int = ROUNDS, known: Seconds | None = None
) -> tuple[Seconds, int]:
    """Best times of as many rounds as :data:`BUDGET_SECONDS` allow (at least one), and how many rounds that were.

    Rounds are interleaved and the best counts: what else runs on the machine hits all candidates alike, or is left out.
    Times that are ``known`` are improved upon.
    """
    seconds: Seconds = {
        shape: {
            rows: dict(known[shape][rows]) if known else {OWN: float("inf"), TORCH: float("inf")} for rows in BATCHES
        }
        for shape in shapes
    }
    deadline = time.perf_counter() + BUDGET_SECONDS
    done = 0
    for done in range(rounds):
        for shape, by_rows in seconds.items():
            for rows, times in by_rows.items():
                for kernel, best in times.items():
                    if done and (time.perf_counter() > deadline):
                        return seconds, done
                    # What is far behind after some tries will not win.
                    if done < 3 or best < 1.5 * min(times.values()):
                        times[kernel] = min(best, clock(kernel, shape, rows))
    return seconds, done + 1


def _without_outliers(seconds: Seconds) -> Seconds:
    """Fewer rows never take longer: what says otherwise was disturbed."""
    result: Seconds = {}
    for shape, by_rows in seconds.items():
        result[shape] = {}
        least = {OWN: float("inf"), TORCH: float("inf")}
        for rows in sorted(by_rows, reverse=True):
            least = {kernel: min(time, by_rows[rows][kernel]) for kernel, time in least.items()}
            result[shape][rows] = least
    return result


def _read(path: Path, key: str, shapes: list[Shape]) -> Seconds | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        return {
            shape: {int(rows): times for rows, times in content["seconds"][f"{shape[0]}x{shape[1]}"].items()}
            for shape in shapes
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, key: str, seconds: Seconds) -> None:
    content = {"key": key, "seconds": {f"{shape[0]}x{shape[1]}": table for shape, table in seconds.items()}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(file.name, path)  # noqa: PTH105 - complete or absent, whoever else writes it
    except OSError:
        pass  # measured again next time; nothing else is lost
