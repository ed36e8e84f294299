"""How fast a recording opens and how smoothly it scrubs in Chromium, as the standalone HTML file.

    python benchmarks/replay.py [--tokens 100000] [--recording FILE.iwrec]

Without a recording one of so many tokens is made (``tests/synthetic_recording.py``): 16 requests at once. Opening is
from the navigation to the first picture; scrubbing moves the track over the whole recording and counts the frames
in which the view showed another moment.
"""

from __future__ import annotations

import argparse
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
sys.path += [str(ROOT / "tests"), str(ROOT / "tests/browser")]

from chromium import FLAGS, find_chromium  # noqa: E402 -- found by the line above

from inference_workbench.recording import open_recording  # noqa: E402
from synthetic_recording import write_recording  # noqa: E402 -- found by the line above

SCRUB_S = 5.0

# Moves the track once a frame, over all of the recording and back, and resolves to when each frame came that showed
# another moment than the one before. In the page, because a browser that is driven from outside waits between moves.
SCRUB = """seconds => new Promise(done => {
  const source = window.inferenceWorkbench.replay().source;
  const track = document.querySelector('.iw-track');
  const frames = [];
  const began = performance.now();
  let shown = source.nowNs;
  const move = at => {
    if (source.nowNs !== shown) {
      shown = source.nowNs;
      frames.push(at);
    }
    const passed = (performance.now() - began) / 1000;
    if (passed > seconds) {
      done(frames);
      return;
    }
    track.value = String(Number(track.max) * (0.5 - 0.5 * Math.cos(2 * passed)));
    track.dispatchEvent(new Event('input'));
    requestAnimationFrame(move);
  };
  requestAnimationFrame(move);
})"""


def measure(browser: Browser, page_path: Path) -> dict[str, float]:
    page = browser.new_context(viewport={"width": 1500, "height": 1300}, offline=True).new_page()
    began = time.perf_counter()
    page.goto(page_path.as_uri())
    page.locator(".iw-plot-attribution canvas").first.wait_for(timeout=60_000)
    opened = time.perf_counter() - began
    page.wait_for_timeout(1500)
    frames = page.evaluate(SCRUB, SCRUB_S)
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
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = arguments.recording or write_recording(
            Path(folder) / "long.iwrec", tokens=arguments.tokens, parallel=16, tokens_per_request=250
        )
        with open_recording(path) as recording:
            html = recording.to_html(Path(folder) / "long.html")
            tokens = recording.summary().tokens
        sizes = {"recording_bytes_per_token": path.stat().st_size / tokens, "html_bytes": html.stat().st_size}
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
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
