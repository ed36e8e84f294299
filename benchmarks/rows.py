"""Result rows of all benchmarks: one JSON line a figure, appended to ``benchmarks/results/<name>.jsonl``."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def cpu_name() -> str:
    """Model name of the CPU and the number of cores that this process may use."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def versions(*names: str) -> dict[str, str]:
    """Installed versions of the given distributions, those that are there."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Commit that was measured, with ``+`` if the tree had changes.

    Of a copy without its history, what the variable ``BENCHMARK_COMMIT`` says.
    """
    if given := os.environ.get("BENCHMARK_COMMIT"):
        return given
    where = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=where, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=where, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty else "")


def append(
    benchmark: str, rows: list[dict[str, Any]], *, device: str, hardware: str, packages: tuple[str, ...]
) -> Path:
    """Append rows to a benchmark's results, with what every row needs to be traced; return the file."""
    common = {
        "benchmark": benchmark,
        "device": device,
        "hardware": hardware,
        "versions": versions(*packages),
        "commit": commit(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**common, **row}) + "\n")
    return path
