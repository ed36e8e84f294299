"""How old a token is when it reaches the screen, and what showing it costs, by way of JupyterLab's proxy or a kernel.

    python benchmarks/screens.py panel [--seconds 60]             eight requests of the default model
    python benchmarks/screens.py widget [--seconds 300]           the same, in a notebook widget at 10 repaints a second
    python benchmarks/screens.py busy-panel [--seconds 60]        256 requests, 100 steps a second

``busy-panel`` has an engine that sleeps instead of computing: no model is that fast on a CPU, and everything behind the
engine is real. A token's age is taken on the server's clock after the frame with it was shown, as the page itself
does it. CPU time is the operating system's. Memory is taken halfway and at the end, after a collection.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent
TESTS = ("tests", "tests/browser", "tests/server/front")
sys.path[:0] = [str(ROOT / folder) for folder in ("server", "workbench", *TESTS, "benchmarks")]

import psutil  # noqa: E402
import rows  # noqa: E402
from bpe_tokenizer import train_tokenizer  # noqa: E402
from chromium import FLAGS, find_chromium  # noqa: E402
from jupyterlab import TOKEN, JupyterLab, running_jupyterlab  # noqa: E402
from page_process import main_thread_s, page_memory, page_process  # noqa: E402
from playwright.sync_api import Page, sync_playwright  # noqa: E402
from running_front import scripted_command  # noqa: E402
from streams import Server, stream  # noqa: E402
from workbench_page import open_panel, open_widget, stats  # noqa: E402

WIDGET = "import inference_workbench as iw\nwb = iw.connect()\nwb.panel()"
PACKAGES = ("torch", "jupyterlab", "ipykernel", "bokeh", "playwright")
UNITS = {"_ms": "ms", "_per_s": "1/s", "_cores": "cores", "_heap": "byte"}
FRAMES = """seconds => new Promise(done => {
  const began = performance.now();
  let frames = 0;
  const count = now => {
    frames += 1;
    if (now - began > seconds * 1000) {
      done(frames / ((now - began) / 1000));
    } else {
      requestAnimationFrame(count);
    }
  };
  requestAnimationFrame(count);
})"""


class Load(threading.Thread):
    """So many requests at any time; each token sent for itself or, where only telemetry matters, all in one answer."""

    def __init__(self, lab: JupyterLab, streams: int, tokens: int, *, streaming: bool) -> None:
        super().__init__(daemon=True)
        address = urlsplit(lab.workbench)
        assert address.port is not None
        self._server = Server(address.port, TOKEN, prefix=address.path.rstrip("/"))
        self._streams, self._tokens, self._streaming = streams, tokens, streaming
        self.over = False

    def run(self) -> None:
        """Send until told that it is over."""
        asyncio.run(self._all())

    async def _all(self) -> None:
        await asyncio.gather(*(self._one(number) for number in range(self._streams)))

    async def _one(self, number: int) -> None:
        rng = random.Random(number)
        prompt = [5 + (number * 7 + at) % 8 for at in range(24)]
        while not self.over:
            # Of many lengths, so that they do not all end in the same step.
            tokens = rng.randint(self._tokens // 2, 3 * self._tokens // 2)
            await stream(self._server, prompt, tokens, stream=self._streaming)


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process."""
    return sum(process.cpu_times()[:2])


def processes(lab: JupyterLab) -> dict[str, psutil.Process]:
    """Those that stand between an engine and a page, by name."""
    jupyter = psutil.Process(lab.process.pid)
    found = {"jupyterlab": jupyter}
    engine = lab.engine_pid()
    for child in jupyter.children(recursive=True):
        if "ipykernel_launcher" in child.cmdline():
            found["kernel"] = child
        elif child.pid == engine and (front := child.parent()) is not None:
            found["front"] = front
    return found


def measure(page: Page, lab: JupyterLab, load: Load, seconds: float) -> dict[str, float]:
    """Let it run and return what it cost."""
    renderer, others, session = page_process(), processes(lab), page.context.new_cdp_session(page)
    load.start()
    page.wait_for_timeout(5000)
    page.evaluate("window.inferenceWorkbench.resetStats()")
    begin, busy = time.monotonic(), main_thread_s(renderer)
    before = {name: cpu_s(process) for name, process in others.items()}
    page.evaluate(FRAMES, seconds / 2)
    halfway = page_memory(session)
    fps = page.evaluate(FRAMES, seconds / 2)
    wall = time.monotonic() - begin
    measured = stats(page)
    found = {
        "latency_to_screen_p50_ms": measured["latencyP50Ms"],
        "latency_to_screen_p95_ms": measured["latencyP95Ms"],
        "clock_uncertainty_ms": measured["clockUncertaintyMs"],
        "repaints_per_s": measured["count"] / wall,
        "frames_per_s": fps,
        "dropped_events": measured["dropped"],
        "page_main_thread_cores": (main_thread_s(renderer) - busy) / wall,
    }
    for name, value in page_memory(session).items():
        found |= {f"{name}_halfway": halfway[name], f"{name}_at_the_end": value}
    found |= {f"{name}_cores": (cpu_s(process) - before[name]) / wall for name, process in others.items()}
    load.over = True
    return found


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", choices=("panel", "widget", "busy-panel"))
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    busy = options.home == "busy-panel"
    seconds = options.seconds or (300 if options.home == "widget" else 60)
    requests = options.requests or (256 if busy else 8)
    with tempfile.TemporaryDirectory(prefix="iw-") as folder, sync_playwright() as playwright:
        if busy:
            command = scripted_command(train_tokenizer(Path(folder)), "good", step_s=0.01)
            os.environ["INFERENCE_WORKBENCH_ENGINE_COMMAND"] = command
        home = Path(folder) / "jupyter"
        home.mkdir()
        with running_jupyterlab(home) as lab:
            chromium = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
            page = chromium.new_page(viewport={"width": 1500, "height": 1300})
            if options.home == "widget":
                open_widget(page, lab, [WIDGET])
            else:
                open_panel(page, lab)
            load = Load(lab, requests, 250 if busy else 120, streaming=not busy)
            found = measure(page, lab, load, seconds)
            chromium.close()
    case = {"subject": "ours", "home": options.home, "requests": requests, "seconds": seconds}
    result = []
    for name, value in found.items():
        unit = next((unit for part, unit in UNITS.items() if part in name), "1")
        print(f"{name:>28} {value:,.3f} {unit}")
        result.append(case | {"metric": name, "value": round(value, 3), "unit": unit})
    if not options.no_record:
        print(rows.append("views", result, device="cpu", hardware=rows.cpu_name(), packages=PACKAGES))


if __name__ == "__main__":
    main()
