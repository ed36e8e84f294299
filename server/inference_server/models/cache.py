"""The user's model cache: one folder per model, complete or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock

Progress = Callable[[str, float | None, str], None]
"""Called with (stage, fraction done or None, detail)."""


def cache_folder() -> Path:
    """Folder for fetched and converted models; ``INFERENCE_WORKBENCH_CACHE`` moves it."""
    override = os.environ.get("INFERENCE_WORKBENCH_CACHE")
    root = Path(override) if override else Path(platformdirs.user_cache_dir("inference-workbench", appauthor=False))
    folder = root / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Build a model folder so that it is complete or absent, whoever else is building it and whatever fails.

    Yields a temporary folder that becomes ``target`` at the end. If ``target`` exists by the time the lock is held,
    yields it as it is: check with ``folder == target``.
    """
    with FileLock(f"{target}.lock"):
        if target.exists():
            yield target
            return
        temporary = target.with_name(f"{target.name}.building-{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
