"""The process in which Chromium runs a page that this one has opened: its work and its memory."""

from __future__ import annotations

import psutil
from playwright.sync_api import CDPSession


def page_process() -> psutil.Process:
    """Return the renderer that works most among the browsers that this process has started: the one with the page."""
    renderers = [
        process
        for process in psutil.Process().children(recursive=True)
        if any("--type=renderer" in argument for argument in process.cmdline())
    ]
    return max(renderers, key=lambda process: sum(process.cpu_times()[:2]))


def main_thread_s(page: psutil.Process) -> float:
    """Return the CPU seconds of a page's main thread; Chromium's own count has waiting for a core in it."""
    return next(thread.user_time + thread.system_time for thread in page.threads() if thread.id == page.pid)


def page_memory(session: CDPSession) -> dict[str, int]:
    """Live bytes of the page's heap, and its DOM nodes, after what nobody holds any more was collected."""
    session.send("HeapProfiler.collectGarbage")
    counters = session.send("Memory.getDOMCounters")
    return {"page_heap": session.send("Runtime.getHeapUsage")["usedSize"], "page_nodes": counters["nodes"]}
