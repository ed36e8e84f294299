"""How fast a recording opens and how smoothly it scrubs in Chromium, as the standalone HTML file.

    python benchmarks/replay.py [--tokens 100000] [--recording FILE.iwrec]

Without a recording one of so many tokens is made (``tests/synthetic_recording.py``): 16 requests at once. Opening is
from the navigation to the first picture; scrubbing drags the track by mouse over the whole recording and counts the
frames in which the view showed another moment.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.table import Table
from rows import append, cpu_name

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests")]

from inference_workbench.recording import open_recording  # noqa: E402
from synthetic_recording import write_recording  # noqa: E402 -- found by the line above

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SCRUB_S = 5.0

# Frames whose picture differs from the one before, and how long each took to come.
COUNT_FRAMES = """() => {
  const source = window.inferenceWorkbench.replay().source;
  window.frames_ = [];
  let shown = source.nowNs;
  const look = at => {
    if (source.nowNs !== shown) {
      shown = source.nowNs;
      window.frames_.push(at);
    }
    requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
}"""


def measure(browser: Browser, page_path: Path) -> dict[str, float]:
    page = browser.new_context(viewport={"width": 1500, "height": 1300}, offline=True).new_page()
    began = time.perf_counter()
    page.goto(page_path.as_uri())
    page.locator(".iw-plot-attribution canvas").first.wait_for(timeout=60_000)
    opened = time.perf_counter() - began
    page.wait_for_timeout(1500)
    box = page.locator(".iw-track").bounding_box()
    assert box
    left, width, y = box["x"] + 4, box["width"] - 8, box["y"] + box["height"] / 2
    page.mouse.move(left, y)
    page.mouse.down()
    page.evaluate(COUNT_FRAMES)
    begin = time.perf_counter()
    while (at := time.perf_counter() - begin) < SCRUB_S:
        page.mouse.move(left + width * (0.5 - 0.5 * math.cos(2 * at)), y)
    page.mouse.up()
    frames = page.evaluate("window.frames_")
    page.context.close()
    gaps = [after - before for before, after in pairwise(frames)]
    return {
        "open_s": opened,
        "scrub_fps": 1000 * len(gaps) / sum(gaps),
        "scrub_frame_p95_ms": statistics.quantiles(gaps, n=20)[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--recording", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    executable = next((path for name in NAMES if (path := shutil.which(name))), None)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = arguments.recording or write_recording(
            Path(folder) / "long.iwrec", tokens=arguments.tokens, parallel=16, tokens_per_request=250
        )
        with open_recording(path) as recording:
            html = recording.to_html(Path(folder) / "long.html")
            tokens = recording.summary().tokens
        sizes = {"recording_bytes_per_token": path.stat().st_size / tokens, "html_bytes": html.stat().st_size}
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        runs = [measure(browser, html) for _ in range(arguments.runs)]
        chromium = browser.version
        browser.close()
    units = {"open_s": "s", "scrub_fps": "1/s", "scrub_frame_p95_ms": "ms"}
    rows: list[dict[str, Any]] = []
    for metric, unit in units.items():
        values = [run[metric] for run in runs]
        spread = max(values) - min(values)
        rows.append({"metric": metric, "value": round(statistics.median(values), 3), "unit": unit, "spread": spread})
    rows += [{"metric": name, "value": round(value, 1), "unit": "B", "spread": 0} for name, value in sizes.items()]
    common = {"subject": "ours", "host": "html", "tokens": tokens, "browser": chromium, "runs": len(runs)}
    table = Table(title=f"Replay of {tokens:,} tokens in Chromium {chromium}")
    table.add_column("figure")
    table.add_column("median", justify="right")
    for row in rows:
        table.add_row(row["metric"], f"{row['value']:,} {row['unit']}")
    Console().print(table)
    path = append(
        "views",
        [{**common, **row} for row in rows],
        device="cpu",
        hardware=cpu_name(),
        packages=("bokeh", "playwright"),
    )
    print(path)


if __name__ == "__main__":
    main()
