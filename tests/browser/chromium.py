"""Which Chromium the tests, the benchmarks and the screenshots drive, and how it is started."""

from __future__ import annotations

import shutil

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_chromium() -> str | None:
    """Return the machine's Chromium; None stands for the one that `playwright install chromium` fetched."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)
