"""The EAGLE-style heads that come with this package."""

from __future__ import annotations

from pathlib import Path

from inference_server.models.locate import LocatedModel

FOLDER = Path(__file__).parent / "heads"
"""Has one folder for each model, called as the folder of its converted weights in the cache is."""


def packaged(located: LocatedModel) -> Path | None:
    """Folder of the head that comes with this package for a model; ``None`` where there is none."""
    folder = FOLDER / located.path.name
    return folder if located.path.name and folder.is_dir() else None
