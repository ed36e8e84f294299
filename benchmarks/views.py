"""What the views cost in Chromium while much happens: a recording of many requests, played at its own speed.

    python benchmarks/views.py [--requests 256] [--steps-per-second 100] [--blocks 20000] [--seconds 20] [--layout all]

The recording is synthetic (``tests/synthetic_recording.py``), its events are those of a server. While it plays, the
pointer moves over the figures once a frame, as a reader's does; frames are counted. The main thread's time is the
operating system's, and beside it Chromium's own, which counts waiting for a core too. The heap is taken after a
collection, at the beginning and at the end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from page_process import main_thread_s, page_process
from playwright.sync_api import Browser, CDPSession, sync_playwright
from rows import append, cpu_name

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests/browser")]

from chromium import FLAGS, find_chromium  # noqa: E402 -- found by the line above

from inference_workbench.recording import open_recording  # noqa: E402
from synthetic_recording import write_recording  # noqa: E402 -- found by the line above

# Moves the pointer over every figure on the screen, one place a frame; resolves to the time of each frame. Events go
# to the element that a mouse would meet there, also in the shadows of Bokeh.
WATCH = """seconds => new Promise(done => {
  const frames = [];
  const began = performance.now();
  const targets = [...document.querySelectorAll('.iw-plots .iw-plot')].filter(each => {
    const box = each.getBoundingClientRect();
    return box.height > 0 && box.top >= 0 && box.bottom <= innerHeight;
  });
  const deepest = (x, y) => {
    let found = null;
    for (let next = document.elementFromPoint(x, y); next && next !== found; ) {
      found = next;
      next = found.shadowRoot?.elementFromPoint(x, y);
    }
    return found;
  };
  const move = now => {
    frames.push(now);
    if (performance.now() - began > seconds * 1000) {
      done(frames);
      return;
    }
    const box = targets[Math.floor(frames.length / 30) % targets.length].getBoundingClientRect();
    const at = {
      clientX: box.left + ((frames.length * 7) % box.width),
      clientY: box.top + ((frames.length * 3) % box.height),
      bubbles: true,
      cancelable: true,
      composed: true,
      pointerType: 'mouse'
    };
    const target = deepest(at.clientX, at.clientY);
    target.dispatchEvent(new PointerEvent('pointermove', at));
    target.dispatchEvent(new MouseEvent('mousemove', at));
    requestAnimationFrame(move);
  };
  requestAnimationFrame(move);
})"""


def counters(session: CDPSession) -> dict[str, float]:
    return {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}


def heap(session: CDPSession) -> float:
    session.send("HeapProfiler.collectGarbage")
    return counters(session)["JSHeapUsedSize"]


def measure(browser: Browser, page_path: Path, seconds: float, layout: str) -> dict[str, float]:
    page = browser.new_context(viewport={"width": 1500, "height": 1300}, offline=True).new_page()
    page.goto(page_path.as_uri())
    page.locator(".iw-transport").wait_for(timeout=120_000)
    page.locator(f"[data-layout={layout}]").click()
    page.locator(".iw-plots").scroll_into_view_if_needed()
    page.wait_for_timeout(2000)
    page.evaluate("inferenceWorkbench.replay().source.seek(0)")
    page.evaluate("inferenceWorkbench.replay().source.play()")
    page.wait_for_timeout(2000)
    process = page_process()
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    session.send("HeapProfiler.enable")
    heap_before, before, busy = heap(session), counters(session), main_thread_s(process)
    frames = page.evaluate(WATCH, seconds)
    busy, after = main_thread_s(process) - busy, counters(session)
    playing = page.evaluate("inferenceWorkbench.replay().source.playing")
    assert playing, "the recording ended before the measurement did"
    heap_after = heap(session)
    page.context.close()
    gaps = [later - sooner for sooner, later in pairwise(frames)]
    wall = after["Timestamp"] - before["Timestamp"]
    return {
        "interaction_fps": 1000 * len(gaps) / sum(gaps),
        "frame_p95_ms": statistics.quantiles(gaps, n=20)[-1],
        "main_thread_cores": busy / wall,
        "main_thread_wall_cores": (after["TaskDuration"] - before["TaskDuration"]) / wall,
        "script_cores": (after["ScriptDuration"] - before["ScriptDuration"]) / wall,
        "heap_bytes": heap_after,
        "heap_growth_bytes_per_s": (heap_after - heap_before) / wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps-per-second", type=float, default=100)
    parser.add_argument("--blocks", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--layout", default="all")
    arguments = parser.parse_args()
    # Opening, two seconds to settle, and the garbage collections come on top of what is measured.
    tokens = int(arguments.requests * arguments.steps_per_second * (arguments.seconds + 12))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = write_recording(
            Path(folder) / "busy.iwrec",
            tokens=tokens,
            parallel=arguments.requests,
            tokens_per_request=250,
            step_ms=1000 / arguments.steps_per_second - 0.8,
            blocks=arguments.blocks,
        )
        with open_recording(path) as recording:
            html = recording.to_html(Path(folder) / "busy.html")
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        found = measure(browser, html, arguments.seconds, arguments.layout)
        chromium = browser.version
        browser.close()
    units = {"interaction_fps": "1/s", "frame_p95_ms": "ms", "heap_bytes": "B", "heap_growth_bytes_per_s": "B/s"}
    common = {
        "subject": "ours",
        "host": "html, played at real time",
        "requests": arguments.requests,
        "steps_per_second": arguments.steps_per_second,
        "blocks": arguments.blocks,
        "layout": arguments.layout,
        "seconds": arguments.seconds,
        "browser": chromium,
    }
    rows: list[dict[str, Any]] = [
        {**common, "metric": name, "value": round(value, 3), "unit": units.get(name, "cores")}
        for name, value in found.items()
    ]
    for row in rows:
        print(f"{row['metric']:>24} {row['value']:,} {row['unit']}")
    print(append("views", rows, device="cpu", hardware=cpu_name(), packages=("bokeh", "playwright")))


if __name__ == "__main__":
    main()
