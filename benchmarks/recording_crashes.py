"""Kills each process of a recording server at random moments and looks at what is left.

Every file has to open, and to lack nothing that is older than the flush interval.

``python benchmarks/recording_crashes.py [--times 20] [--victims engine …]``; the processes are a front of its own, a
front that JupyterLab started, the engine, and the process that makes the file.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("server", "workbench", "tests", "tests/server/front", "tests/workbench", "benchmarks")
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]

import crashes  # noqa: E402
import rows  # noqa: E402
from running_front import TOKEN, running  # noqa: E402

from inference_server.recording.file import RecordingFile  # noqa: E402
from tiny_model import build  # noqa: E402

FLUSH_S = 1.0
VICTIMS = ("engine", "front", "jupyter", "finisher")
NAMES = {"engine": "engine", "front": "front", "jupyter": "front that JupyterLab started"}
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def recordings(folder: Path) -> Path:
    return folder / "data" / "inference-workbench" / "recordings"


def front_killed(model: Path, folder: Path, after_s: float) -> crashes.Aftermath:
    with running(folder, {}, "--model", str(model), "--kv-memory", "64M") as front:
        front.wait_for_engine("ready", 120)
        return crashes.kill_front(front.url, HEADERS, TOKEN, front.process.pid, recordings(folder), after_s)


def engine_killed(model: Path, folder: Path, after_s: float) -> crashes.Aftermath:
    with running(folder, {}, "--model", str(model), "--kv-memory", "64M") as front:
        front.wait_for_engine("ready", 120)
        return crashes.kill_engine(front.url, HEADERS, TOKEN, recordings(folder), after_s)


def jupyters_front_killed(model: Path, folder: Path, after_s: float) -> crashes.Aftermath:
    import httpx
    from servers_under_test import TOKEN as JUPYTER_TOKEN
    from servers_under_test import running_jupyter

    environment = {"XDG_DATA_HOME": str(folder / "data"), "INFERENCE_WORKBENCH_MODEL": str(model)}
    with running_jupyter(folder, "inference_workbench.jupyter", **environment) as jupyter:
        deadline = time.monotonic() + 120
        while (
            httpx.get(jupyter.workbench + "info", headers=jupyter.headers, timeout=60).json()["engine"]["state"]
            != "ready"
        ):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        pid = httpx.get(jupyter.workbench + "info", headers=jupyter.headers).json()["server"]["pid"]
        return crashes.kill_front(jupyter.workbench, jupyter.headers, JUPYTER_TOKEN, pid, recordings(folder), after_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=VICTIMS)
    options = parser.parse_args()
    times = options.times
    rng = random.Random(5)
    found: dict[str, list[crashes.Aftermath]] = {}
    victims: dict[str, Callable[[Path, Path, float], crashes.Aftermath]] = {
        "engine": engine_killed, "front": front_killed, "jupyter": jupyters_front_killed,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as base:
        model = build(Path(base) / "tiny-llama")
        for victim, kill in victims.items():
            if victim not in options.victims:
                continue
            for number in range(times):
                folder = Path(base) / f"{victim.split()[0].lower()}-{number}"
                folder.mkdir()
                aftermath = kill(model, folder, rng.uniform(0.2, 4))
                found.setdefault(victim, []).append(aftermath)
                print(victim, number, aftermath, flush=True)
        finished = finisher_killed(model, Path(base) / "finisher", times, rng) if "finisher" in options.victims else 0
    result = []
    for victim, aftermaths in found.items():
        oldest = max(each.oldest_missing_s for each in aftermaths)
        print(
            f"{victim}: {len(aftermaths)} kills, every file opened; oldest missing token {oldest:.2f} s before the kill"
        )
        case = {"subject": "ours", "case": f"kill -9 of the {NAMES[victim]}", "runs": len(aftermaths), "spread": None}
        result.append(case | {"metric": "oldest_missing_s", "value": oldest, "unit": "s"})
    if finished:
        print(f"the process that makes the file: {finished} kills, every file whole afterwards")
        result.append(
        {"subject": "ours", "case": "kill -9 of the process that makes the file", "runs": finished, "spread": None,
         "metric": "rows_lost", "value": 0, "unit": "rows"}
    )  # fmt: skip
    rows.append("recording", result, device="cpu", hardware=rows.cpu_name(), packages=("msgspec", "pyarrow"))


def finisher_killed(model: Path, folder: Path, times: int, rng: random.Random) -> int:
    """Kill the process that makes a file; return how many times the file was whole in the end."""
    folder.mkdir()
    with running(folder, {}, "--model", str(model), "--kv-memory", "64M") as front:
        front.wait_for_engine("ready", 120)
        crashes.kill_front(front.url, HEADERS, TOKEN, front.process.pid, recordings(folder), 3, keep=folder / "kept")
    [journal] = (folder / "kept").iterdir()
    expected = None
    for number in range(times):
        place = folder / str(number)
        place.mkdir()
        copy = Path(shutil.copy(journal, place))
        with RecordingFile(crashes.kill_finisher(copy, rng.uniform(0.05, 1.2))) as file:
            tables = {name: info.sha256 for name, info in file.manifest.tables.items()}
        expected = expected or tables
        assert tables == expected
    return times


if __name__ == "__main__":
    main()
