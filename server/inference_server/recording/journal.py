"""The journal: an append-only file of checked records, written by a thread of its own while a recording runs.

A record is its payload's length and CRC-32 (little-endian, four bytes each), then the payload: one MessagePack-encoded
message. A process that dies between two flushes loses what came since the last; a record that was cut off in the
middle, or damaged, ends what can be read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from inference_server.protocol import Event, Message, SamplingParams
from inference_server.recording.format import (
    FORMAT_VERSION,
    JOURNAL_SUFFIX,
    SUFFIX,
    Manifest,
    RecordingError,
    Served,
)

MAGIC = b"\x89IWJOURNAL\r\n\x1a\n"
_FRAME = struct.Struct("<II")
_LONGEST_RECORD = 256 << 20
_MOST_UNWRITTEN = 64 << 20
"""Bytes that wait for the disk before events are left out."""
_ABANDONED_S = 3600
_LEAST_FREE = 256 << 20
"""Bytes of free disk below which a recording ends rather than fill the disk."""


class JournalHead(Message, frozen=True, tag="journal", kw_only=True):
    """First record: everything about the recording that is known when it starts."""

    version: int
    manifest: Manifest


class JournalServed(Message, frozen=True, tag="journal_served", kw_only=True):
    """A model is served from now on."""

    served: Served


class RequestDetail(Message, frozen=True, tag="request_detail", kw_only=True):
    """What a request asked for, so that it can be asked again."""

    request: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    overrides: dict[str, bool | int | str] = msgspec.field(default_factory=dict)
    stops: tuple[str, ...] = ()
    streaming: bool = True


class JournalEnd(Message, frozen=True, tag="journal_end", kw_only=True):
    """Last record of a recording that ended in an orderly way."""

    at_ns: int
    reason: str
    lost_events: int


Record = JournalHead | JournalServed | RequestDetail | JournalEnd | Event


class JournalWriter:
    """Writes a journal. :meth:`append` is for the event loop and never touches the disk.

    Parameters
    ----------
    path
        Must not exist.
    manifest
        For the head.
    max_bytes
        Size at which the recording ends.
    on_end
        Called from the writer's thread, with the reason, when the writer ends the recording by itself.

    Raises
    ------
    OSError
        If the file cannot be made.
    """

    def __init__(
        self, path: Path, manifest: Manifest, *, max_bytes: int, on_end: Callable[[str], None] = lambda _: None
    ) -> None:
        self.path = path
        self.bytes = 0
        """Written or about to be."""
        self.lost = 0
        self.spent_ns = 0
        """Thread time of the writer, in nanoseconds."""
        self._interval_s = manifest.flush_interval_s
        self._max_bytes = max_bytes
        self._on_end = on_end
        self._encoder = msgspec.msgpack.Encoder()
        self._pending: list[bytes] = []
        self._unwritten = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._ended = False
        self._reason = ""
        self._file = path.open("xb")
        # Held for as long as this process lives: nobody else takes the journal for an abandoned one.
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._file.write(MAGIC)
        self.add(JournalHead(version=FORMAT_VERSION, manifest=manifest))
        self._flush()  # a journal that exists can be read
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def add(self, record: Record) -> None:
        """Encode a record and append it."""
        self.append(self._encoder.encode(record))

    def append(self, payload: bytes) -> None:
        """Append an encoded record; what the disk is too slow for is counted as lost."""
        if self._ended:
            return
        size = len(payload) + _FRAME.size
        if self._unwritten + size > _MOST_UNWRITTEN:
            self.lost += 1
            return
        with self._lock:
            self._pending.append(payload)
            self._unwritten += size
        self.bytes += size

    def close(self, reason: str) -> None:
        """Write the end and close the file; waits for the disk, so call it from a thread."""
        self._reason = self._reason or reason
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        failure = ""
        while not self._closing.wait(self._interval_s):
            try:
                self._flush()
                failure = self._limit()
            except OSError as error:
                failure = f"The journal cannot be written: {error.strerror or error}."
            if failure:
                self._reason = failure
                break
        self._ended = True
        with contextlib.suppress(OSError):
            self._flush()
            end = JournalEnd(at_ns=time.monotonic_ns(), reason=self._reason, lost_events=self.lost)
            payload = self._encoder.encode(end)
            self._file.write(_FRAME.pack(len(payload), zlib.crc32(payload)) + payload)
            self._file.flush()
            os.fsync(self._file.fileno())
        with contextlib.suppress(OSError):
            self._file.close()
        if failure:
            self._on_end(failure)

    def _flush(self) -> None:
        begin = time.thread_time_ns()
        with self._lock:
            pending, self._pending = self._pending, []
            size, self._unwritten = self._unwritten, 0
        if pending:
            buffer = bytearray()
            for payload in pending:
                buffer += _FRAME.pack(len(payload), zlib.crc32(payload))
                buffer += payload
            assert len(buffer) == size
            self._file.write(buffer)
            self._file.flush()
        self.spent_ns += time.thread_time_ns() - begin

    def _limit(self) -> str:
        if self.bytes >= self._max_bytes:
            return f"The recording reached its limit of {self._max_bytes / 1e6:,.0f} MB."
        if shutil.disk_usage(self.path.parent).free < _LEAST_FREE:
            return f"The disk has less than {_LEAST_FREE / 1e6:,.0f} MB left."
        return ""


class JournalReader:
    """Reads a journal from the start to its end, or to the first record that is not whole.

    Parameters
    ----------
    path
        Of a journal, whether finished or still being written.

    Raises
    ------
    RecordingError
        If it is no journal, is of a newer version, or does not even have a whole head.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.torn_bytes = 0
        """Bytes after the last whole record, once everything was read."""
        self.good_bytes = len(MAGIC)
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise RecordingError(f"The journal {path} cannot be opened: {error.strerror}.") from error
        self._size = path.stat().st_size
        self._decoder = msgspec.msgpack.Decoder(Record)
        try:
            self.head = self._read_head()
        except BaseException:
            self._file.close()
            raise

    def _read_head(self) -> JournalHead:
        if self._file.read(len(MAGIC)) != MAGIC:
            raise RecordingError(f"{self.path} is no journal of a recording: its first bytes are others.")
        payload = self._next_payload()
        if payload is None:
            raise RecordingError(f"The journal {self.path} has no whole head: nothing in it can be used.")
        version = msgspec.msgpack.decode(payload, type=dict).get("version")
        if version != FORMAT_VERSION:
            raise RecordingError(
                f"The journal {self.path} has format version {version}; this program reads version {FORMAT_VERSION}. "
                "Open it with the version of inference-workbench that wrote it, or a newer one."
            )
        head = self._decode(payload)
        if not isinstance(head, JournalHead):
            raise RecordingError(f"The journal {self.path} does not begin with its head.")
        return head

    def __iter__(self) -> Iterator[Record]:
        """Yield the records after the head, in order."""
        while (payload := self._next_payload()) is not None:
            yield self._decode(payload)
        self.torn_bytes = self._size - self.good_bytes

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _next_payload(self) -> bytes | None:
        frame = self._file.read(_FRAME.size)
        if len(frame) < _FRAME.size:
            return None
        length, checksum = _FRAME.unpack(frame)
        if length > _LONGEST_RECORD:
            return None
        payload = self._file.read(length)
        if len(payload) < length or zlib.crc32(payload) != checksum:
            return None
        self.good_bytes += _FRAME.size + length
        return payload

    def _decode(self, payload: bytes) -> Record:
        try:
            record: Record = self._decoder.decode(payload)
        except msgspec.MsgspecError as error:
            raise RecordingError(
                f"The journal {self.path} has a record that this version does not understand: {error}. "
                "Open it with the version of inference-workbench that wrote it."
            ) from error
        return record


def is_being_written(path: Path) -> bool:
    """Whether a living process holds the journal."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def unfinished(folder: Path) -> list[Path]:
    """Return the journals in a folder that nobody is writing any more, and clear away what a killed finisher left."""
    for left in (*folder.glob(f".*{SUFFIX}.part"), *folder.glob(".iwrec-*")):
        if left.stat().st_mtime < time.time() - _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return [path for path in sorted(folder.glob(f"*{JOURNAL_SUFFIX}")) if not is_being_written(path)]
