"""How far an experiment is, with the time left and a way to cancel: a widget in a notebook, a line in a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

import msgspec


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How far it is."""

    done: int
    total: int
    name: str
    """Of the run under way."""
    left_s: float | None
    """Seconds that the rest will take, going by the runs so far."""

    def __str__(self) -> str:
        left = "" if self.left_s is None else f" · {duration(self.left_s)} left"
        return f"{self.done} of {self.total} runs · {self.name}{left}"


class Progress(Protocol):
    """Shows it to somebody."""

    def report(self, report: Report) -> None:
        """A run ended, or the next begins."""

    def requests(self, ended: int, total: int) -> None:
        """A request of the run under way ended. Called in another thread."""

    def close(self, last_words: str) -> None:
        """It is over."""


class Silent:
    """Shows nothing; hands each report to a function, if one is given.

    Parameters
    ----------
    on_report
        Called with each report.
    """

    def __init__(self, on_report: Callable[[Report], object] | None = None) -> None:
        self._on_report = on_report

    def report(self, report: Report) -> None:
        """Hand it on."""
        if self._on_report is not None:
            self._on_report(report)

    def requests(self, ended: int, total: int) -> None:
        """Nothing to show."""

    def close(self, last_words: str) -> None:
        """Nothing to show."""


class TerminalProgress:
    """A bar in a terminal."""

    def __init__(self, title: str) -> None:
        from rich.console import Console  # noqa: PLC0415 -- only where it is shown
        from rich.progress import BarColumn, TextColumn  # noqa: PLC0415
        from rich.progress import Progress as RichProgress  # noqa: PLC0415

        self._console = Console(stderr=True, highlight=False)
        self._bar = RichProgress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"), console=self._console
        )
        self._task = self._bar.add_task(title, total=None, words="")
        self._report: Report | None = None
        self._bar.start()

    def report(self, report: Report) -> None:
        """Move the bar."""
        self._report = report
        self._bar.update(self._task, total=report.total, completed=report.done, words=str(report))

    def requests(self, ended: int, total: int) -> None:
        """Move it by a part of a run."""
        if self._report is not None:
            self._bar.update(self._task, completed=min(self._report.done + ended / total, self._report.total))

    def close(self, last_words: str) -> None:
        """Leave a last line."""
        self._bar.stop()
        self._console.print(last_words, markup=False)


class NotebookProgress:
    """A bar and a button under a notebook's cell.

    The button is heard while the cell runs where comm messages have a thread of their own (ipykernel ≥ 7); elsewhere
    interrupt the kernel, which does the same.
    """

    def __init__(self, title: str, cancel: threading.Event) -> None:
        import ipywidgets  # noqa: PLC0415 -- only where it is shown
        from IPython.display import display  # noqa: PLC0415

        self._bar: Any = ipywidgets.FloatProgress(min=0, max=1, description=title)
        self._words: Any = ipywidgets.Label()
        self._button: Any = ipywidgets.Button(description="Cancel", icon="stop")
        self._button.on_click(lambda _: cancel.set())
        self._report: Report | None = None
        self._shown = 0.0
        show: Callable[..., object] = display
        show(ipywidgets.HBox([self._bar, self._words, self._button]))

    def report(self, report: Report) -> None:
        """Move the bar."""
        self._report = report
        self._bar.max = report.total
        self._bar.value = report.done
        self._words.value = str(report)

    def requests(self, ended: int, total: int) -> None:
        """Nothing to show: a widget is updated by the thread that made it."""

    def close(self, last_words: str) -> None:
        """Leave the last words."""
        self._button.layout.display = "none"
        self._words.value = last_words


def progress_for(wanted: bool | Callable[[Report], object], title: str, cancel: threading.Event) -> Progress:
    """Return what shows progress here: a widget, a bar, a function's call, or nothing."""
    if callable(wanted):
        return Silent(wanted)
    if not wanted:
        return Silent()
    if _in_notebook():
        return NotebookProgress(title, cancel)
    return TerminalProgress(title) if sys.stderr.isatty() else Silent()


def duration(seconds: float) -> str:
    """Write a time in a person's units."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and getattr(shell, "kernel", None) is not None
