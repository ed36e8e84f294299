"""Opens an experiment's file as the result that it is, and goes on with one that was interrupted."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from inference_workbench.experiments.ablation import Ablation
from inference_workbench.experiments.capacity import Capacity
from inference_workbench.experiments.compare import Comparison
from inference_workbench.experiments.crossover import Crossover
from inference_workbench.experiments.experiment import Options, ProgressWish, Result, conduct, site_of
from inference_workbench.experiments.journal import SUFFIX, ExperimentFileError, Journal, experiments_folder

if TYPE_CHECKING:
    from inference_workbench.client import Workbench
    from inference_workbench.experiments.target import Target

_KINDS: dict[str, type[Result]] = {each.kind: each for each in (Comparison, Ablation, Crossover, Capacity)}


def open_result(path: str | Path) -> Result:
    """Open the file of an experiment, finished or not.

    Raises
    ------
    ExperimentFileError
        If it is missing, or no experiment.
    """
    return _kind(journal := Journal.read(path))(journal)


def resume(
    path: str | Path | None = None,
    *,
    wb: Workbench | Target | None = None,
    progress: ProgressWish = True,
    cancel: Event | None = None,
) -> Result:
    """Go on with an experiment that was interrupted, by a person or by a crash, and return its result.

    The runs that were done are kept; only what is missing is made, with the very same requests.

    Parameters
    ----------
    path
        Its file. Without it, the newest in the user's data folder that is not complete.
    wb
        The connection; without it, one is made.
    progress, cancel
        As of :func:`compare`.

    Raises
    ------
    ExperimentFileError
        If there is nothing to go on with, or the server has another model now.
    """
    journal = Journal.read(path) if path is not None else _newest_incomplete()
    with site_of(wb) as site:
        before, found = journal.manifest.environment.model, site.environment().model
        if found != before:
            raise ExperimentFileError(f"{journal.path} was begun with {before}; the server has {found} now.")
        return conduct(_kind(journal), journal, site, Options(progress=progress, cancel=cancel))


def _kind(journal: Journal) -> type[Result]:
    kind = _KINDS.get(journal.manifest.kind)
    if kind is None:
        raise ExperimentFileError(
            f"{journal.path} holds a {journal.manifest.kind!r}, which this version does not know."
        )
    return kind


def _newest_incomplete() -> Journal:
    folder = experiments_folder()
    for path in sorted(folder.glob(f"*{SUFFIX}"), reverse=True):
        journal = Journal.read(path)
        if not _kind(journal)(journal).complete:
            return journal
    raise ExperimentFileError(f"No interrupted experiment is in {folder}. Name the file: resume('….iwexp').")
