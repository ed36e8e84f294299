"""Hours of work, recorded and watched: does anything grow, in the server or in the page?

``python benchmarks/soak.py --minutes 60`` starts JupyterLab with the default model, opens the panel in Chromium, keeps
32 requests going (prompts of 16 to 400 tokens arrive as others end), records all of it with full instrumentation, and
samples memory: resident sets of the engine, the front and JupyterLab, and of the page its live JavaScript heap after a
collection, its DOM nodes and its renderer's resident set. At the end it prints how each grew from the middle third of
the time to the last, bytes per token of the recording, and whether the parts of every latency still add up.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("server", "workbench", "tests", "tests/browser", "benchmarks")]

import httpx  # noqa: E402
import psutil  # noqa: E402
import rows  # noqa: E402
from chromium import FLAGS, find_chromium  # noqa: E402
from jupyterlab import TOKEN, JupyterLab, running_jupyterlab  # noqa: E402
from page_process import page_memory, page_process  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from recording import attribution  # noqa: E402
from streams import Server, steady_load  # noqa: E402
from workbench_page import open_panel, stats  # noqa: E402

from inference_server.recording.file import RecordingFile  # noqa: E402

PACKAGES = ("torch", "transformers", "msgspec", "pyarrow", "jupyterlab", "bokeh")
#: Seconds between two samples of memory.
SAMPLE_S = 10.0


class Load(threading.Thread):
    """The requests, through JupyterLab's proxy like everybody's, from a thread of its own."""

    def __init__(self, lab: JupyterLab, *, streams: int, until: float) -> None:
        super().__init__(daemon=True)
        address = urlsplit(lab.workbench)
        assert address.port is not None
        self._server = Server(address.port, TOKEN, prefix=address.path.rstrip("/"))
        self._streams = streams
        self._until = until
        self.tokens = 0

    def run(self) -> None:
        """Send until the time is over."""
        seed = 0
        while time.monotonic() < self._until:
            seed += 1
            self.tokens += asyncio.run(steady_load(self._server, streams=self._streams, total_tokens=4_000, seed=seed))


def resident(lab: JupyterLab, renderer: psutil.Process) -> dict[str, int]:
    """Resident sets, bytes, of each process that takes part."""
    found = {"page_renderer": renderer.memory_info().rss}
    jupyter = psutil.Process(lab.process.pid)
    found["jupyterlab"] = jupyter.memory_info().rss
    engine = lab.engine_pid()
    for child in jupyter.children(recursive=True):
        if child.pid == engine:
            found["engine"] = child.memory_info().rss
            parent = child.parent()
            if parent is not None:
                found["front"] = parent.memory_info().rss
    return found


def growth(samples: list[int]) -> tuple[float, float, float]:
    """Median of the middle third, of the last, and how much more the last is."""
    third = len(samples) // 3
    middle, last = statistics.median(samples[third : 2 * third]), statistics.median(samples[2 * third :])
    return middle, last, (last - middle) / middle


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    samples: dict[str, list[int]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="iw-") as folder,
        running_jupyterlab(Path(folder)) as lab,
        sync_playwright() as playwright,
    ):
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        page = chromium.new_page(viewport={"width": 1500, "height": 1300})
        open_panel(page, lab)
        session = page.context.new_cdp_session(page)
        renderer = page_process()
        api = httpx.Client(base_url=lab.workbench, headers=lab.headers, timeout=300)
        identifier = api.post("recordings", json={"name": "soak"}).raise_for_status().json()["id"]
        begin = time.monotonic()
        until = begin + 60 * options.minutes
        load = Load(lab, streams=options.requests, until=until)
        load.start()
        while (now := time.monotonic()) < until:
            for name, value in (page_memory(session) | resident(lab, renderer)).items():
                samples.setdefault(name, []).append(value)
            if len(samples["page_heap"]) % 6 == 1:
                newest = {name: values[-1] for name, values in samples.items()}
                told = ", ".join(
                    f"{name.removeprefix('page_')} {value:,}" if name == "page_nodes" else f"{name} {value >> 20} MiB"
                    for name, value in newest.items()
                )
                print(f"{(now - begin) / 60:5.1f} min, {load.tokens:,} tokens: {told}", flush=True)
            page.wait_for_timeout(1000 * SAMPLE_S)
        load.join(600)
        seconds = time.monotonic() - begin
        measured = stats(page)
        answer = api.post(f"recordings/{identifier}/stop?wait=true", json={}).raise_for_status().json()
        assert answer["state"] == "finished", answer
        path = next(Path(folder).rglob(answer["file"]))
        chromium.close()
        found = report(samples, path, seconds, options.requests)
        print(f"    page: {measured}")
        found += attribution(path, f"soak, {options.requests} requests")
    if not options.no_record:
        rows.append("soak", found, device="cpu", hardware=rows.cpu_name(), packages=PACKAGES)


def report(samples: dict[str, list[int]], path: Path, seconds: float, requests: int) -> list[dict[str, object]]:
    """Print the memory and the recording's size; return rows."""
    with RecordingFile(path) as file:
        tokens, lost = file.manifest.tables["tokens"].rows, file.manifest.lost_events
    size = path.stat().st_size
    print(f"{seconds / 60:.1f} minutes, {requests} requests: {tokens:,} tokens, {size / tokens:.0f} bytes a token")
    print(f"    events lost: {lost}")
    case = {"subject": "ours", "level": "full", "load": f"{requests} requests", "runs": tokens}
    case |= {"wall_s": round(seconds), "spread": None}
    result: list[dict[str, object]] = [case | {"metric": "bytes_per_token", "value": size / tokens, "unit": "byte"}]
    for name, values in samples.items():
        middle, last, more = growth(values)
        unit, divisor = ("", 1) if name == "page_nodes" else (" MiB", 1 << 20)
        print(
            f"    {name}: {values[0] / divisor:,.1f}{unit} at first, {middle / divisor:,.1f} in the middle third, "
            f"{last / divisor:,.1f} in the last ({more:+.2%})"
        )
        result.append(case | {"metric": f"{name}_growth_fraction", "value": more, "unit": "1"})
    return result


if __name__ == "__main__":
    main()
