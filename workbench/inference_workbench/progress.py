"""One line of text that is rewritten in place, in a notebook's output or a terminal, while somebody has to wait."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_BAR = 24
_MIN_INTERVAL_S = 0.25


class ProgressLine:
    """Shows a stage, an optional bar and the seconds so far. Say nothing for waits shorter than ``patience_s``.

    Parameters
    ----------
    title
        First words of the line.
    patience_s
        Seconds before the line appears.
    stream
        Where to write; standard output, which a notebook shows under the cell.
    """

    def __init__(self, title: str, patience_s: float = 0.3, stream: TextIO | None = None) -> None:
        self._title = title
        self._begin = time.monotonic()
        self._patience_s = patience_s
        self._stream = stream or sys.stdout
        self._written_at = 0.0
        self._width = 0

    def update(self, stage: str, fraction: float | None = None) -> None:
        """Rewrite the line, at most four times a second."""
        now = time.monotonic()
        if now - self._begin < self._patience_s or now - self._written_at < _MIN_INTERVAL_S:
            return
        self._written_at = now
        bar = ""
        if fraction is not None:
            filled = round(_BAR * min(max(fraction, 0.0), 1.0))
            bar = f" [{'█' * filled}{'░' * (_BAR - filled)}] {fraction:4.0%}"
        self._write(f"{self._title}: {stage}{bar} · {now - self._begin:.0f} s")

    def done(self, text: str) -> None:
        """Replace the line by a last word, if it ever appeared."""
        if self._written_at:
            self._write(f"{text} ({time.monotonic() - self._begin:.1f} s)")
            self._stream.write("\n")
            self._stream.flush()

    def _write(self, line: str) -> None:
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)
