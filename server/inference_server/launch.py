"""What happens before JupyterLab opens: the model is fetched in plain sight, the port is free, the lessons exist."""

from __future__ import annotations

import importlib.resources
import importlib.util
import os
import shutil
import socket
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

FIRST_LESSON = "01-first-tokens.ipynb"
TEACHING_URL = "/inference-workbench-teach"
"""Without a query: Jupyter appends its token to it where it prints the address."""


class LaunchError(Exception):
    """JupyterLab cannot be opened. The message says why and what to do."""


def fetch_default_model(console: Console) -> Path:
    """Fetch and convert the default model, with a progress bar; return its folder at once if it is there.

    Raises
    ------
    LaunchError
        If it cannot be had.
    """
    from inference_server.models import default_model  # noqa: PLC0415 - part of the server extra
    from inference_server.models.errors import ModelError  # noqa: PLC0415

    if default_model.folder().exists():
        return default_model.folder()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("the default model", total=None, detail="")

        def show(stage: str, fraction: float | None, detail: str) -> None:
            bar.update(
                task,
                description=stage,
                total=None if fraction is None else 1.0,
                completed=fraction or 0.0,
                detail=detail,
            )

        try:
            path = default_model.fetch(show)
        except ModelError as error:
            raise LaunchError(str(error)) from error
    console.print(f"{default_model.NAME} is ready in {path}")
    return path


def open_jupyterlab(console: Console, port: int | None, arguments: list[str]) -> None:
    """Replace this process with JupyterLab, opened on the first lesson beside the live views.

    Parameters
    ----------
    port : int or None
        The port to insist on; ``None`` lets JupyterLab take 8888 or the next free one.
    arguments : list of str
        Handed to ``jupyter lab`` unchanged.

    Raises
    ------
    LaunchError
        If JupyterLab is not installed or the port is taken.
    """
    if importlib.util.find_spec("jupyterlab") is None:
        raise LaunchError(
            'JupyterLab is not installed here. Install it with: pip install "inference-workbench[server,lab]"'
        )
    if port is not None:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise LaunchError(
                    f"port {port} is taken ({error.strerror}). Choose another, or leave it out and JupyterLab finds one"
                ) from error
    root = lessons_root(console)
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={root}",
        f"--LabApp.default_url={TEACHING_URL}",
        *([f"--ServerApp.port={port}", "--ServerApp.port_retries=0"] if port is not None else []),
        *(["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
        *arguments,
    ]
    os.execv(sys.executable, command)  # noqa: S606 - our own interpreter, and signals must reach JupyterLab itself


def lessons_root(console: Console) -> Path:
    """Folder to open: this one if it holds the lessons (as a checkout does), else one with a copy of them."""
    here = Path.cwd()
    for folder in (here / "notebooks", here):
        if (folder / FIRST_LESSON).is_file():
            return here
    target = here / "inference-workbench-lessons"
    source = importlib.resources.files("inference_workbench") / "lessons"
    if not target.exists() and source.is_dir():
        with importlib.resources.as_file(source) as lessons:
            shutil.copytree(lessons, target)
        console.print(f"The lessons were copied to {target}")
    return target if target.exists() else here
