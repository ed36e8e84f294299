"""The recording file: a ZIP of a manifest and Parquet tables. Makes one from a journal, and opens one with care."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from inference_server.protocol import Ceilings, CeilingsEvent, RecordingEvent
from inference_server.recording import weights
from inference_server.recording.format import (
    FORMAT,
    FORMAT_VERSION,
    JOURNAL_SUFFIX,
    MANIFEST,
    SUFFIX,
    TABLES,
    Manifest,
    RecordingError,
    Served,
    TableInfo,
)
from inference_server.recording.journal import JournalEnd, JournalHead, JournalReader, JournalServed, is_being_written
from inference_server.recording.tables import TablesWriter

Progress = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1."""
_REPORT_EVERY = 2_000
_ABANDONED_S = 3600
_TIMES = ("end_ns", "at_ns", "applied_ns")


def finish(journal: Path, target: Path | None = None, progress: Progress = lambda _: None) -> Path:
    """Turn a journal into a recording, whatever state it was left in, and remove the journal.

    Parameters
    ----------
    journal
        Of a recording that has ended, or whose writer is gone.
    target
        File to make; the journal's name with ``.iwrec`` unless given.
    progress
        Is told how far it is.

    Returns
    -------
    pathlib.Path
        The finished file.

    Raises
    ------
    RecordingError
        If the journal is being written or finished by somebody, or cannot be read.
    """
    target = target or journal.with_suffix(SUFFIX)
    try:
        lock = journal.open("rb")
    except OSError as error:
        raise RecordingError(f"The journal {journal} cannot be opened: {error.strerror}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordingError(f"The journal {journal} is in use: it is being recorded or finished.") from error
        partial = target.with_name(f".{target.name}.part")
        try:
            _convert(journal, partial, progress)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        journal.unlink()
    return target


def snapshot(journal: Path, target: Path) -> Path:
    """Make a recording of what a journal holds so far, and leave the journal alone.

    Raises
    ------
    RecordingError
        If the journal cannot be read.
    """
    _convert(journal, target, lambda _: None)
    return target


def _convert(journal: Path, target: Path, progress: Progress) -> None:
    reader = JournalReader(journal)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".iwrec-") as folder:
        tables = TablesWriter(Path(folder))
        end: JournalEnd | None = None
        models: list[Served] = []
        ceilings: list[Ceilings] = []
        last_ns = reader.head.manifest.started_ns
        size = max(1, journal.stat().st_size)
        for number, record in enumerate(reader):
            match record:
                case JournalEnd():
                    end = record
                case JournalServed():
                    models.append(record.served)
                case CeilingsEvent():
                    ceilings.append(record.ceilings)
                case JournalHead() | RecordingEvent():
                    pass
                case _:
                    tables.add(record)
                    for name in _TIMES:
                        last_ns = max(last_ns, getattr(record, name, 0))
            if number % _REPORT_EVERY == 0:
                progress(0.8 * reader.good_bytes / size)
        reader.close()
        tables.close()
        progress(0.8)
        written = {
            name: TableInfo(
                file=table.path.name, rows=table.rows, bytes=table.path.stat().st_size, sha256=_sha256(table.path)
            )
            for name, table in tables.tables.items()
        }
        manifest = msgspec.structs.replace(
            reader.head.manifest,
            ended_ns=end.at_ns if end else last_ns,
            end_reason=end.reason if end else "The server was gone before the recording was stopped.",
            recovered=end is None,
            torn_bytes=reader.torn_bytes,
            lost_events=end.lost_events if end else 0,
            models=tuple(_with_weights(served) for served in models),
            ceilings=tuple(ceilings),
            tables=written,
        )
        progress(0.9)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
            for table in tables.tables.values():
                archive.write(table.path, table.path.name)
        with target.open("rb") as file:
            os.fsync(file.fileno())
    progress(1.0)


def _with_weights(served: Served) -> Served:
    return msgspec.structs.replace(served, weights=weights.identify(Path(served.model.path)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RecordingFile:
    """A recording, opened. A context manager.

    Parameters
    ----------
    path
        Of an ``.iwrec`` file, or of a journal: then of all that had been flushed into it by now.

    Raises
    ------
    RecordingError
        If it is missing, damaged, truncated, something else, or of a newer version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        file = self.path
        if file.suffix == JOURNAL_SUFFIX:
            self._folder = tempfile.TemporaryDirectory(prefix="iwrec-")
            file = snapshot(self.path, Path(self._folder.name) / f"{self.path.stem}{SUFFIX}")
        try:
            self._archive = zipfile.ZipFile(file)
        except FileNotFoundError as error:
            raise RecordingError(f"There is no recording at {self.path}.") from error
        except OSError as error:
            raise RecordingError(f"The recording {self.path} cannot be opened: {error.strerror}.") from error
        except zipfile.BadZipFile as error:
            raise RecordingError(self._no_zip()) from error
        try:
            self.manifest = self._read_manifest()
        except BaseException:
            self.close()
            raise

    def _no_zip(self) -> str:
        with self.path.open("rb") as file:
            begin = file.read(4)
        if begin == b"PK\x03\x04":
            return (
                f"The recording {self.path} is not whole: its end is missing, so it was truncated, perhaps by an "
                "interrupted copy or download. Copy it again."
            )
        return f"{self.path} is no recording: it is not a ZIP file."

    def _read_manifest(self) -> Manifest:
        try:
            raw = self._read(MANIFEST)
        except KeyError as error:
            raise RecordingError(f"{self.path} is a ZIP file but no recording: it has no {MANIFEST}.") from error
        try:
            found = msgspec.json.decode(raw, type=dict[str, object])
        except msgspec.MsgspecError as error:
            raise RecordingError(f"The {MANIFEST} of {self.path} is damaged: {error}.") from error
        if found.get("format") != FORMAT:
            raise RecordingError(f"{self.path} is no recording: its {MANIFEST} is of format {found.get('format')!r}.")
        version = found.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION or version < 1:
            raise RecordingError(
                f"The recording {self.path} has format version {version}; this program reads versions up to "
                f"{FORMAT_VERSION}. Install a newer inference-workbench to open it."
            )
        try:
            manifest = msgspec.json.decode(raw, type=Manifest)
        except msgspec.MsgspecError as error:
            raise RecordingError(f"The {MANIFEST} of {self.path} is damaged: {error}.") from error
        if missing := sorted(set(TABLES) - set(manifest.tables)):
            raise RecordingError(f"The recording {self.path} lacks the tables {', '.join(missing)}.")
        names = set(self._archive.namelist())
        if absent := sorted(info.file for info in manifest.tables.values() if info.file not in names):
            raise RecordingError(f"The recording {self.path} is damaged: {', '.join(absent)} is missing.")
        return manifest

    def _read(self, name: str) -> bytes:
        try:
            return self._archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
            raise RecordingError(f"The recording {self.path} is damaged in {name}: {error}.") from error

    def table_bytes(self, name: str) -> bytes:
        """Return a table as a Parquet file, after checking it against the manifest.

        Raises
        ------
        RecordingError
            If there is no such table, or its content is not what was recorded.
        """
        info = self.manifest.tables.get(name)
        if info is None:
            raise RecordingError(f"There is no table {name!r}. The tables are {', '.join(self.manifest.tables)}.")
        data = self._read(info.file)
        if hashlib.sha256(data).hexdigest() != info.sha256:
            raise RecordingError(f"The table {name!r} of {self.path} is damaged: its checksum is another one.")
        return data

    def table(self, name: str) -> pa.Table:
        """Return a table.

        Raises
        ------
        RecordingError
            As :meth:`table_bytes`.
        """
        try:
            return pq.read_table(io.BytesIO(self.table_bytes(name)))
        except pa.ArrowException as error:
            raise RecordingError(f"The table {name!r} of {self.path} cannot be read: {error}.") from error

    def close(self) -> None:
        """Close the file."""
        if hasattr(self, "_archive"):
            self._archive.close()
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def unfinished(folder: Path) -> list[Path]:
    """Return the journals in a folder that nobody is writing any more, and clear away what a killed finisher left."""
    for left in (*folder.glob(f".*{SUFFIX}.part"), *folder.glob(".iwrec-*")):
        if left.stat().st_mtime < time.time() - _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return [path for path in sorted(folder.glob(f"*{JOURNAL_SUFFIX}")) if not is_being_written(path)]
