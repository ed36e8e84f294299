"""Opens a recording file with care: whatever is wrong with it, an error says so. Imports pyarrow only for a table."""

from __future__ import annotations

import hashlib
import io
import tempfile
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

from inference_server.recording.format import (
    FORMAT,
    FORMAT_VERSION,
    JOURNAL_SUFFIX,
    MANIFEST,
    SUFFIX,
    TABLES,
    Manifest,
    RecordingError,
)

if TYPE_CHECKING:
    import pyarrow as pa


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
            from inference_server.recording.convert import snapshot  # noqa: PLC0415 -- imports pyarrow

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
        import pyarrow as pa  # noqa: PLC0415 -- takes a third of a second
        import pyarrow.parquet as pq  # noqa: PLC0415

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
