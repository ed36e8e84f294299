"""What all results have in common: a file, a manifest, code that reproduces them, and how they are run and resumed."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import msgspec
import pandas as pd

from inference_server.workloads.workload import PRESETS
from inference_workbench.errors import WorkbenchError
from inference_workbench.experiments.conductor import CancelledError, Conductor, Slot
from inference_workbench.experiments.figures import requests_table, run_figures
from inference_workbench.experiments.journal import (
    SUFFIX,
    ExperimentFileError,
    Features,
    Journal,
    Loaded,
    Manifest,
    RunRecord,
    ServerSide,
    default_path,
    differing,
    now,
)
from inference_workbench.experiments.progress import Report, progress_for
from inference_workbench.experiments.sites import AnyServer, OwnServer, Site
from inference_workbench.experiments.statistics import pairs_for
from inference_workbench.experiments.target import Target
from inference_workbench.experiments.workloads import AnyWorkload, RequestSet, from_plain, plan

if TYPE_CHECKING:
    from inference_workbench.client import Workbench

R = TypeVar("R", bound="Result")
ProgressWish = bool | Callable[[Report], object]

DEFAULT_REQUESTS = 24
"""Of one run, where neither the workload nor the caller says."""


@dataclass(frozen=True, slots=True)
class Options:
    """How an experiment is run, whatever it asks."""

    site: Workbench | Target | None = None
    """The server; without it, a connection is made."""
    path: str | Path | None = None
    progress: ProgressWish = True
    cancel: threading.Event | None = None


class Result:
    """A finished, or interrupted, experiment. Subclasses say what it found.

    Attributes
    ----------
    journal
        The file and all that is in it.
    """

    kind: ClassVar[str]
    function: ClassVar[str]
    """Name of the function that makes it."""
    tolerant: ClassVar[bool] = False
    """Whether failed requests are part of the result."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Arguments that the function calls otherwise than the file."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    @property
    def manifest(self) -> Manifest:
        """What was asked, under which settings, where and when."""
        return self.journal.manifest

    @property
    def arguments(self) -> dict[str, Any]:
        """What the function was called with, in full."""
        return self.manifest.arguments

    @property
    def workload(self) -> AnyWorkload:
        """What was sent."""
        return from_plain(self.arguments["workload"])

    @property
    def path(self) -> Path:
        """The file that holds the result."""
        return self.journal.path

    @classmethod
    def slots(cls, arguments: Mapping[str, Any]) -> list[Slot]:
        """Return the runs that the experiment consists of, in order."""
        raise NotImplementedError

    @classmethod
    def settings(cls, arguments: Mapping[str, Any]) -> dict[str, Features]:
        """Return the switches of each setting, where they differ from what all have in common."""
        raise NotImplementedError

    @classmethod
    def loads(cls, arguments: Mapping[str, Any]) -> dict[str, AnyWorkload]:
        """Return what is sent, by name."""
        return {"workload": from_plain(arguments["workload"])}

    def work(self, conductor: Conductor) -> None:
        """Make the runs, and ask the server what else there is to ask."""
        conductor.run(self.slots(self.arguments))

    @property
    def enough(self) -> bool:
        """Whether the runs that were made amount to a result."""
        return self.complete

    @property
    def complete(self) -> bool:
        """Whether all runs were made."""
        return all(slot.key in self.journal.runs for slot in self.slots(self.arguments))

    def to_frame(self) -> pd.DataFrame:
        """Return a row a run: its setting, its figures as the client saw them, and the server's (``server_…``)."""
        return pd.DataFrame([self._run_row(run) for run in self.journal.measured()])

    @property
    def requests(self) -> pd.DataFrame:
        """A row a request of every run that counts."""
        frames = [
            requests_table(run.answers).assign(run=run.key, setting=run.setting, load=run.load)
            for run in self.journal.measured()
        ]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def save(self, path: str | Path) -> Path:
        """Write the result to a file that :func:`open_result` and :func:`resume` read, and return its path."""
        target = Path(path)
        return self.journal.copy(target if target.suffix else target.with_suffix(SUFFIX))

    def cell(self) -> str:
        """Return the code that makes this result again, in a fresh kernel."""
        environment = self.manifest.environment
        # A server of ours is described; of others only the address is known.
        server = "iw.connect()" if environment.dtype else f"iw.target({environment.server!r})"
        lines = ["import inference_workbench as iw", "", f"wb = {server}"]
        lines += [f"result = iw.{self.function}({self._call_text()})", "result"]
        return "\n".join(lines)

    def rerun(
        self,
        *,
        wb: Workbench | Target | None = None,
        path: str | Path | None = None,
        progress: ProgressWish = True,
    ) -> Agreement:
        """Run the same again, with the very same requests, and say within what tolerance it agrees."""
        with site_of(wb) as server:
            manifest = msgspec.structs.replace(
                self.manifest, environment=server.environment(), features_before=server.switches(), created=now()
            )
            journal = Journal.create(Path(path) if path is not None else default_path(self.kind), manifest)
            for name, load in self.journal.loads.items():
                journal.append(Loaded(name=name, load=load))
            again = conduct(type(self), journal, server, Options(progress=progress))
        return self.agreement(again)

    def agreement(self, again: Self) -> Agreement:
        """Compare this result with another of the same experiment."""
        mine, theirs = self.estimates(), again.estimates()
        rows = []
        for name in mine:
            if name not in theirs:
                continue
            (one, one_half), (other, other_half) = mine[name], theirs[name]
            tolerance = float((one_half**2 + other_half**2) ** 0.5)
            rows.append(
                {
                    "figure": name,
                    "before": one,
                    "again": other,
                    "difference": other - one,
                    "tolerance": tolerance,
                    "agrees": abs(other - one) <= tolerance,
                }
            )
        changed = differing(
            msgspec.to_builtins(self.manifest.environment), msgspec.to_builtins(again.manifest.environment)
        )
        return Agreement(table=pd.DataFrame(rows), again=again, environment_changes=changed)

    def estimates(self) -> dict[str, tuple[float, float]]:
        """Return the figures that a rerun should find again, each with half the width of its interval."""
        raise NotImplementedError

    def caveats(self) -> list[str]:
        """Return what a reader has to know about these runs."""
        runs = self.journal.measured()
        said = []
        if not self.complete:
            total = len(self.slots(self.arguments))
            said.append(f"Interrupted: {len(self.journal.runs)} of {total} runs were made.")
        others = sum(run.server.others for run in runs if run.server is not None)
        if others:
            said.append(f"{others} requests of somebody else were computed meanwhile.")
        lag = max((run.lag_ms for run in runs), default=0.0)
        if lag > 20:
            said.append(f"The client was late by up to {lag:.0f} ms: something else used its processor.")
        if any(load.estimated_lengths for load in self.journal.loads.values()):
            said.append("Prompt lengths are estimates: the server does not tokenize.")
        weights = self.manifest.environment.weights
        if weights:
            said.append(f"The model's weights were {weights} before: the baseline is not full precision.")
        return said

    def summary(self) -> str:
        """Return the finding in words."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        return f"<pre style='white-space:pre-wrap'>{html.escape(self.summary())}</pre>"

    # -- for subclasses ------------------------------------------------------------------------------------------------

    def _run_row(self, run: RunRecord) -> dict[str, Any]:
        server = ServerSide() if run.server is None else run.server
        told = {f"server_{name}": getattr(server, name) for name in ServerSide.__struct_fields__}
        row = {"run": run.key, "setting": run.setting, "load": run.load, "block": run.block, "started": run.started}
        return row | run_figures(run.answers) | {"seconds": run.seconds, "lag_ms": run.lag_ms} | told

    def _runs(self, setting: str, load: str | None = None) -> dict[int, RunRecord]:
        """Runs that count of a setting, by block."""
        return {
            run.block: run
            for run in self.journal.measured()
            if run.setting == setting and (load is None or run.load == load)
        }

    def _call_text(self) -> str:
        shown = []
        for name, value in self.arguments.items():
            if name == "workload":
                shown.append(f"workload={workload_text(self.workload, self.path)}")
            else:
                shown.append(f"{self.renamed.get(name, name)}={value!r}")
        return "\n    " + ",\n    ".join([*shown, "wb=wb"]) + ",\n"


def blocks_needed(confidence: float) -> int:
    """Return how many blocks it takes at least for anything to be found.

    Raises
    ------
    WorkbenchError
        If there is no such confidence.
    """
    if not 0.5 <= confidence < 1:
        raise WorkbenchError(f"The confidence is between 0.5 and 1, such as 0.95, not {confidence}.")
    return pairs_for(confidence)


class BlockedResult(Result):
    """A result of runs in blocks, each of which has every setting: what it says is paired, block by block."""

    @property
    def blocks(self) -> list[int]:
        """Numbers of the blocks of which all runs were made."""
        raise NotImplementedError

    @property
    def confidence(self) -> float:
        """Of the intervals."""
        return float(self.arguments["confidence"])

    @property
    def enough(self) -> bool:
        """Whether there are blocks enough for intervals."""
        return len(self.blocks) >= pairs_for(self.confidence)


@dataclass(frozen=True, slots=True, repr=False)
class Agreement:
    """Whether a rerun found the same.

    Attributes
    ----------
    table
        A row a figure: before, again, their difference, the tolerance (both intervals' half-widths, added as
        independent errors), and whether the difference is within it.
    again
        The new result.
    environment_changes
        What is no longer the same about the server, the model or the machine.
    """

    table: pd.DataFrame
    again: Result
    environment_changes: list[str]

    @property
    def agrees(self) -> bool:
        """Whether every figure is within its tolerance."""
        return bool(self.table["agrees"].all())

    def __repr__(self) -> str:
        words = "Agrees" if self.agrees else "Does not agree"
        off = self.table[~self.table["agrees"].astype(bool)]["figure"].tolist()
        told = f"{words} within the stated tolerance" + (f", except for {', '.join(off)}" if off else "") + "."
        if self.environment_changes:
            told += f" Not the same as before: {', '.join(self.environment_changes)}."
        return f"{told}\n{self.table.to_string(index=False)}"


def make(kind: type[R], arguments: dict[str, Any], options: Options) -> R:
    """Run an experiment from its beginning, or go on with the one that its file holds, and return the result.

    Raises
    ------
    ExperimentFileError
        If the file holds another experiment.
    CancelledError
        If it was cancelled before there was enough for a result.
    """
    with site_of(options.site) as site:
        if options.path is not None and Path(options.path).exists():
            journal = Journal.read(options.path)
            # Switches in common that were not given were filled in when the file was begun.
            asked = {
                name: value for name, value in _plain(arguments).items() if name != "features" or value is not None
            }
            changed = differing(journal.manifest.arguments, {**journal.manifest.arguments, **asked})
            if journal.manifest.kind != kind.kind or changed:
                different = f"; different here: {', '.join(changed)}" if changed else ""
                raise ExperimentFileError(
                    f"{options.path} holds another experiment ({journal.manifest.kind}{different}). "
                    "Choose another path, or delete the file."
                )
        else:
            path = Path(options.path) if options.path is not None else default_path(kind.kind)
            journal = _created(kind, arguments, path, site)
        return conduct(kind, journal, site, options)


def conduct(kind: type[R], journal: Journal, site: Site, options: Options) -> R:
    """Make the runs that a journal does not hold yet, and return the result."""
    site.cancel = cancel = options.cancel or threading.Event()
    progress = progress_for(options.progress, kind.function, cancel)
    conductor = Conductor(site, journal, progress=progress, tolerant=kind.tolerant)
    result = kind(journal)
    last_words = "Stopped."
    try:
        with conductor.switches_restored():
            result.work(conductor)
        last_words = f"{len(journal.runs)} runs, kept in {journal.path}"
    except KeyboardInterrupt:
        last_words = f"Interrupted; {len(journal.runs)} runs are kept. Go on with iw.resume({str(journal.path)!r})"
        raise
    finally:
        progress.close(last_words)
    if cancel.is_set() and not result.enough:
        raise CancelledError(
            f"Cancelled after {len(journal.runs)} runs, too few for a result. "
            f"They are kept: go on with resume({str(journal.path)!r})."
        )
    return result


def _created(kind: type[Result], arguments: dict[str, Any], path: Path, site: Site) -> Journal:
    """Write an experiment's definition and its requests to a new file."""
    before, defaults = site.switches(), site.defaults()
    if arguments.get("features") is None:
        # What stands otherwise than by default belongs to the definition, or it could not be repeated elsewhere.
        arguments["features"] = {name: value for name, value in before.items() if value != defaults[name]}
    settings = {
        name: site.check({**defaults, **arguments["features"], **values})
        for name, values in kind.settings(arguments).items()
    }
    target = site.target()
    count = arguments.get("requests")
    loads = {}
    for name, what in kind.loads(arguments).items():
        wanted = count if count is not None or _ends(what) else DEFAULT_REQUESTS
        loads[name] = plan(what, target, requests=wanted)
    manifest = Manifest(
        kind=kind.kind,
        arguments=_plain(arguments),
        settings=settings,
        environment=site.environment(),
        features_before=before,
        created=now(),
    )
    journal = Journal.create(path, manifest)
    for name, load in loads.items():
        journal.append(Loaded(name=name, load=load))
    return journal


def _ends(what: AnyWorkload) -> bool:
    return isinstance(what, RequestSet) or what.count is not None


@contextmanager
def site_of(where: Workbench | Target | None) -> Iterator[Site]:
    """Use a server, or connect to one for as long as it takes."""
    if isinstance(where, Target):
        yield AnyServer(where)
    elif where is not None:
        yield OwnServer(where)
    else:
        from inference_workbench.client import connect  # noqa: PLC0415 -- only for who brings no connection

        with connect() as own:
            yield OwnServer(own)


def workload_text(what: AnyWorkload, path: Path) -> str:
    """Return code that makes a workload: in full where it is short, else by the file of the experiment."""
    if isinstance(what, RequestSet):
        return f"iw.open_result({str(path)!r}).workload"
    base = PRESETS.get(what.name, PRESETS["chat"])[1]
    changes = {
        name: value for name, value in msgspec.to_builtins(what).items() if value != msgspec.to_builtins(base)[name]
    }
    given = "".join(f", {name}={value!r}" for name, value in changes.items())
    return f"iw.workload({base.name!r}{given})"


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(arguments))
    return plain
