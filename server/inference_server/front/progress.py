"""What the terminal shows of a server: its address, and its engine's progress."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from inference_server.protocol import EngineEvent

_STYLES = {"ready": "green", "failed": "red", "restarting": "yellow", "stopped": "yellow", "asleep": "yellow"}


class EngineProgress:
    """Shows the engine's changes on standard error: a bar while it loads, one line for everything else."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._said = ""

    def announce(self, *, url: str | None, uds: str | None, token: str | None) -> None:
        """Say where the server is."""
        if url is None:
            self._console.print(f"Inference Workbench listens on the Unix socket {uds}")
            return
        self._console.print("Inference Workbench is at", style="bold")
        self._console.print(f"    {url}/?token={token}" if token else f"    {url}", markup=False)
        self._console.print(f"    OpenAI API: {url}/v1 with the token as the API key. Stop with Ctrl-C.", markup=False)

    def show(self, event: EngineEvent) -> None:
        """Show one change of the engine."""
        if event.state == "loading":
            self._show_loading(event)
            return
        self.close()
        if event.state == "starting":
            return
        text = f"Engine {event.state}. {event.message}".strip()
        if text != self._said:
            self._said = text
            self._console.print(text, style=_STYLES.get(event.state), markup=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_loading(self, event: EngineEvent) -> None:
        if not self._console.is_terminal:
            if event.stage != self._said:
                self._said = event.stage
                self._console.print(f"Engine: {event.stage}", markup=False)
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.add_task("", total=None, detail="")
            self._bar.start()
        total = None if event.fraction is None else 1.0
        self._bar.update(
            self._bar.task_ids[0],
            description=event.stage,
            total=total,
            completed=event.fraction or 0.0,
            detail=event.message,
        )
