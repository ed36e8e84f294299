"""The file of an experiment: its definition, the requests, and every finished run, each written as soon as it is known.

One JSON object a line. A line that a crash cut off is ignored when the file is read; so a crash costs the run it fell
into and no other. The same file is the saved result.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from platformdirs import user_data_path

from inference_server.features import FeatureValue
from inference_workbench.errors import WorkbenchError
from inference_workbench.experiments.sender import Answer
from inference_workbench.experiments.workloads import Load

FORMAT = 1
SUFFIX = ".iwexp"

Features = dict[str, FeatureValue]


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where an experiment ran."""

    server: str
    """Version of the server."""
    client: str
    model: str
    model_source: str
    dtype: str
    device: str
    weights: str = ""
    """What the weights were before, e.g. ``Q4_1``: then the baseline itself is not full precision."""
    capacity: dict[str, Any] = {}
    platform: str = ""
    cores: int = 0


class Manifest(msgspec.Struct, frozen=True, kw_only=True, tag="manifest", tag_field="t"):
    """What was asked, and where."""

    kind: str
    arguments: dict[str, Any]
    """What the function was called with, in full."""
    settings: dict[str, Features]
    """All switches of each setting."""
    environment: Environment
    features_before: Features
    """To be put back when the experiment ends."""
    created: str
    format: int = FORMAT


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="load", tag_field="t"):
    """The requests of one load."""

    name: str
    load: Load


class ServerSide(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the server told of one run; ``None`` where it did not."""

    ttft_ms: float | None = None
    """Arrival → first token sent, mean."""
    queue_ms: float | None = None
    """Arrival → begin of the first step, mean."""
    tpot_ms: float | None = None
    steps: int | None = None
    step_ms: float | None = None
    batch_size: float | None = None
    """Requests in a step, mean."""
    kv_peak: float | None = None
    """Largest share of the KV blocks that was in use."""
    cached_tokens: int | None = None
    preemptions: int | None = None
    others: int = 0
    """Requests of somebody else that were computed meanwhile."""


class RunRecord(msgspec.Struct, frozen=True, kw_only=True, tag="run", tag_field="t"):
    """One finished run."""

    key: str
    setting: str
    load: str
    block: int
    place: int
    """Order within the experiment."""
    warm_up: bool
    started: str
    seconds: float
    lag_ms: float
    answers: list[Answer]
    server: ServerSide | None = None


class Probe(msgspec.Struct, frozen=True, kw_only=True, tag="probe", tag_field="t"):
    """The most likely tokens at the place where two outputs part, under the baseline's settings."""

    request: int
    position: int
    first: int
    second: int
    """The two tokens: the baseline's, the candidate's."""
    gap: float | None
    """Logarithm of how much likelier the first is; ``None`` if the second is not among the likeliest."""


Record = Manifest | Loaded | RunRecord | Probe
_decoder = msgspec.json.Decoder(Record)
_encoder = msgspec.json.Encoder()


class ExperimentFileError(WorkbenchError):
    """A file that holds no experiment, or another one."""


class Journal:
    """An experiment's file, open for appending or only read.

    Attributes
    ----------
    path : Path
    manifest : Manifest
    loads : dict
        The requests by the name of the load.
    runs : dict
        The finished runs by key.
    probes : dict
        By request.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.loads: dict[str, Load] = {}
        self.runs: dict[str, RunRecord] = {}
        self.probes: dict[int, Probe] = {}

    @classmethod
    def create(cls, path: Path, manifest: Manifest) -> Journal:
        """Begin a file.

        Raises
        ------
        ExperimentFileError
            If it cannot be written.
        """
        journal = cls(path, manifest)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb"):
                pass
        except OSError as error:
            raise ExperimentFileError(f"{path} cannot be written: {error.strerror or error}.") from error
        journal._write(manifest)
        return journal

    @classmethod
    def read(cls, path: str | Path) -> Journal:
        """Read a file, as far as it is whole.

        Raises
        ------
        ExperimentFileError
            If it is missing, or no experiment, or of a newer format.
        """
        source = Path(path)
        try:
            content = source.read_bytes()
        except OSError as error:
            raise ExperimentFileError(f"{source} cannot be read: {error.strerror or error}.") from error
        lines = content.split(b"\n")
        first = lines[0]
        try:
            known = msgspec.json.decode(first)
            newer = known["format"] > FORMAT
            manifest = None if newer else msgspec.convert(known, Manifest)
        except (msgspec.MsgspecError, KeyError, TypeError) as error:
            raise ExperimentFileError(f"{source} is no experiment ({SUFFIX} file): {error}.") from error
        if manifest is None:
            raise ExperimentFileError(
                f"{source} has format {known['format']}; this version reads up to {FORMAT}. Update the package."
            )
        journal = cls(source, manifest)
        for line in lines[1:]:
            try:
                record = _decoder.decode(line)
            except msgspec.MsgspecError:
                continue  # cut off by a crash; what follows was written by whoever resumed
            journal._take(record)
        return journal

    def append(self, record: Loaded | RunRecord | Probe) -> None:
        """Write a record and make sure that it is on the disk."""
        self._take(record)
        self._write(record)

    def copy(self, path: str | Path) -> Path:
        """Write all that is known to another file, and return its path."""
        target = Path(path)
        records: list[Record] = [self.manifest]
        records += [Loaded(name=name, load=load) for name, load in self.loads.items()]
        records += [*self.runs.values(), *self.probes.values()]
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            scratch.write_bytes(b"".join(_encoder.encode(record) + b"\n" for record in records))
            scratch.replace(target)
        except OSError as error:
            raise ExperimentFileError(f"{target} cannot be written: {error.strerror or error}.") from error
        return target

    def measured(self) -> list[RunRecord]:
        """Return the runs that count, in the order they were made."""
        return sorted((run for run in self.runs.values() if not run.warm_up), key=lambda run: run.place)

    def _take(self, record: Record) -> None:
        match record:
            case Loaded():
                self.loads[record.name] = record.load
            case RunRecord():
                self.runs[record.key] = record
            case Probe():
                self.probes[record.request] = record
            case Manifest():
                pass

    def _write(self, record: Record) -> None:
        line = _encoder.encode(record) + b"\n"
        with self.path.open("ab") as file:
            if file.tell() and not _ends_whole(self.path):
                line = b"\n" + line  # after what a crash cut off
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def default_path(kind: str) -> Path:
    """Return a new path in the user's folder of experiments."""
    folder = experiments_folder()
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    path = folder / f"{stamp}-{kind}{SUFFIX}"
    while path.exists():
        time.sleep(0.01)
        path = folder / f"{stamp}-{kind}-{time.time_ns() % 10**6}{SUFFIX}"
    return path


def experiments_folder() -> Path:
    """Return where experiments go that were given no path."""
    return user_data_path("inference-workbench", appauthor=False) / "experiments"


def now() -> str:
    """Return the time in ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names whose values differ."""
    return sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
