"""What ``inference-workbench distill`` runs, in a process of its own since the command line does without torch."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

EXIT_STOPPED = 130


def main() -> int:
    """Run until done, or until Ctrl-C, after which the same command goes on."""
    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopping.append(number))
    parser = argparse.ArgumentParser(prog="inference_server.distill")
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--device")
    parser.add_argument("--kind", choices=("head", "student"))
    for name in ("--tokens", "--epochs", "--draft-vocab", "--layers", "--seed"):
        parser.add_argument(name, type=int)
    given = vars(parser.parse_args())
    # Imported here: it takes seconds, and an interrupt meanwhile ends the run as orderly as any other.
    from inference_server.distill.run import Options, Progress, distill, say  # noqa: PLC0415
    from inference_server.garbage import keep_what_is_loaded  # noqa: PLC0415
    from inference_server.models.errors import ModelError  # noqa: PLC0415

    keep_what_is_loaded()
    options = Options(**{name: value for name, value in given.items() if value is not None})
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"), TimeElapsedColumn())
    try:
        with Bars(*columns, console=console) as bars:
            tasks: dict[str, TaskID] = {}

            def show(progress: Progress) -> None:
                if progress.stage not in tasks:
                    tasks[progress.stage] = bars.add_task(progress.stage, total=1.0, detail="")
                bars.update(tasks[progress.stage], completed=progress.share, detail=progress.detail)

            outcome = distill(options, show, lambda: bool(stopping))
    except ModelError as error:
        Console(stderr=True).print(str(error), style="red", markup=False)
        return 1
    if not outcome.finished:
        console.print(f"Stopped. The same command goes on; {options.folder} has what is done.", markup=False)
        return EXIT_STOPPED
    use = f"--model {options.model} --eagle-head" if options.kind == "head" else "--model"
    console.print(f"{outcome.checkpoint}, on held-out text: {say(outcome.held_out)}", markup=False, soft_wrap=True)
    console.print(f"Use it: inference-workbench serve {use} {outcome.checkpoint}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
