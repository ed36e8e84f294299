"""Makes the recording file from a journal: Parquet tables and a manifest, in a ZIP. Memory stays flat."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from inference_server.protocol import Ceilings, CeilingsEvent, RecordingEvent
from inference_server.recording import weights
from inference_server.recording.format import MANIFEST, SUFFIX, RecordingError, Served, TableInfo
from inference_server.recording.journal import JournalEnd, JournalHead, JournalReader, JournalServed
from inference_server.recording.tables import TablesWriter

Progress = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1."""
_REPORT_EVERY = 2_000
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
