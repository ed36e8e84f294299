"""Recordings of a server, as its client handles them: start, stop, list, fetch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from inference_server.protocol import RecordingEvent
from inference_server.recording.format import SUFFIX
from inference_workbench.endpoint import refusal
from inference_workbench.errors import WorkbenchError
from inference_workbench.progress import ProgressLine
from inference_workbench.recording import Recording, open_recording

_ASK_EVERY_S = 0.1
Call = Callable[..., Any]


class Recordings:
    """The recordings of one server: one at a time is made, any number lie in the server's folder.

    Get it as ``wb.recordings``; for the usual case there is ``wb.record(path)``.
    """

    def __init__(self, call: Call, client: Callable[[], httpx.Client]) -> None:
        self._call = call
        self._client = client

    def start(self, name: str = "", note: str = "") -> RecordingEvent:
        """Begin to record everything that happens on the server.

        Raises
        ------
        RequestError
            If a recording is being made already, or the server cannot write.
        """
        return _event(self._call("POST", "/recordings", json={"name": name, "note": note}))

    def stop(self, recording: RecordingEvent | str | None = None, *, wait: bool = True) -> RecordingEvent:
        """End a recording and return it.

        Parameters
        ----------
        recording
            Which; the one that runs unless given.
        wait
            Whether to wait until the file is there.

        Raises
        ------
        WorkbenchError
            If none runs, or the file could not be made.
        """
        if recording is None:
            recording = self.active
            if recording is None:
                raise WorkbenchError("Nothing is being recorded on this server.")
        id_ = recording if isinstance(recording, str) else recording.id
        event = _event(self._call("POST", f"/recordings/{id_}/stop", json={}))
        return self.wait(event) if wait else event

    def wait(self, recording: RecordingEvent | str) -> RecordingEvent:
        """Wait until a recording that was stopped is a file, showing how far it is.

        Raises
        ------
        WorkbenchError
            If it could not be made into one; the message is the server's.
        """
        id_ = recording if isinstance(recording, str) else recording.id
        line = ProgressLine("Recording")
        while (event := _event(self._call("GET", f"/recordings/{id_}"))).state in {"recording", "finishing"}:
            line.update(event.state, event.fraction)
            time.sleep(_ASK_EVERY_S)
        if event.state == "failed":
            raise WorkbenchError(event.message or f"The recording {event.name!r} failed.")
        line.done(f"Recording ready: {event.file}")
        return event

    @property
    def active(self) -> RecordingEvent | None:
        """What is being recorded now, by whomever."""
        active = self._call("GET", "/recordings")["active"]
        return None if active is None else _event(active)

    @property
    def folder(self) -> str:
        """Where the files lie, on the server's machine."""
        return str(self._call("GET", "/recordings")["folder"])

    def list(self) -> list[RecordingEvent]:
        """Return the recordings in the server's folder, newest first."""
        return [_event(each) for each in self._call("GET", "/recordings")["recordings"]]

    def download(self, recording: RecordingEvent | str, path: str | Path | None = None) -> Path:
        """Fetch a finished recording and return its path.

        Parameters
        ----------
        recording
            The event that told of it, or its id.
        path
            File or folder to write to; the current folder, under the recording's own name, unless given.

        Raises
        ------
        RequestError
            If there is none of that id, or it is not finished.
        """
        id_ = recording if isinstance(recording, str) else recording.id
        target = Path(path) if path is not None else Path()
        if target.is_dir():
            target /= f"{id_}{SUFFIX}"
        partial = target.with_name(f".{target.name}.part")
        try:
            with self._client().stream("GET", f"/recordings/{id_}/download") as answer:
                if answer.is_error:
                    answer.read()
                    raise refusal(answer)
                with partial.open("wb") as file:
                    for piece in answer.iter_bytes(1 << 20):
                        file.write(piece)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return target

    def delete(self, recording: RecordingEvent | str) -> None:
        """Remove a finished recording from the server's folder."""
        id_ = recording if isinstance(recording, str) else recording.id
        self._call("DELETE", f"/recordings/{id_}")

    @contextlib.contextmanager
    def record(self, path: str | Path | None = None, *, name: str = "", note: str = "") -> Iterator[Recorded]:
        """Record while the block runs; afterwards the file is at ``path`` (else only in the server's folder)."""
        made = Recorded(self.start(name or (Path(path).stem if path is not None else ""), note))
        try:
            yield made
        finally:
            made.event = self.stop(made.event)
            made.path = None if path is None else self.download(made.event, path)


class Recorded:
    """What a ``with wb.record(…)`` block made.

    Attributes
    ----------
    event
        What the server says of the recording.
    path
        Of the file, after the block; ``None`` where none was asked for.
    """

    def __init__(self, event: RecordingEvent) -> None:
        self.event = event
        self.path: Path | None = None

    def open(self) -> Recording:
        """Open the file.

        Raises
        ------
        WorkbenchError
            If the block still runs, or no path was given.
        """
        if self.path is None:
            raise WorkbenchError(
                "There is no file yet: it is there after the 'with' block, if that was given a path. "
                "A recording without one can be fetched with wb.recordings.download()."
            )
        return open_recording(self.path)


def _event(answer: dict[str, Any]) -> RecordingEvent:
    return msgspec.convert({"t": "recording", **answer}, RecordingEvent)
