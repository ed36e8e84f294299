"""Recordings of this server: one at a time is written, any number lie in a folder.

The event loop only hands encoded events to the journal's thread; turning a finished journal into a file is the work of
a child process. Journals that a crash left behind are finished when the server starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import platform
import re
import sys
import time
from collections.abc import Coroutine
from pathlib import Path

import msgspec
import psutil
import structlog

from inference_server.front.errors import ApiError
from inference_server.front.event_log import EventLog
from inference_server.front.requests import RequestTable
from inference_server.protocol import Event, Ready, RecordingEvent, RecordingState, ServerInfo, TokensEvent
from inference_server.recording.file import RecordingFile
from inference_server.recording.format import JOURNAL_SUFFIX, SUFFIX, Clock, Manifest, RecordingError, Served
from inference_server.recording.journal import JournalReader, JournalServed, JournalWriter, unfinished

_log = structlog.get_logger(__name__)
_TELL_EVERY_S = 1.0
_LISTED = 200
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Recorder:
    """Starts, ends, lists and removes recordings.

    Parameters
    ----------
    folder
        Where they lie; made when the first one starts.
    flush_s
        How often the journal reaches the disk: what a crash can cost.
    max_bytes
        Of a journal; a recording ends there.
    server
        Who we are.
    log
        What is recorded.
    requests
        Knows what each request asked for.
    """

    def __init__(
        self, folder: Path, *, flush_s: float, max_bytes: int, server: ServerInfo, log: EventLog, requests: RequestTable
    ) -> None:
        self.folder = folder
        self._flush_s = flush_s
        self._max_bytes = max_bytes
        self._server = server
        self._log = log
        self._requests = requests
        self._writer: JournalWriter | None = None
        self._active: RecordingEvent | None = None
        self._served: Served | None = None
        self._loop: asyncio.AbstractEventLoop
        self._rows = self._tokens = self._bytes = self._lost = 0
        self._journal_ns = 0
        self._ticker: asyncio.Task[None] | None = None
        self._work: set[asyncio.Task[RecordingEvent]] = set()
        self._known: dict[Path, tuple[float, RecordingEvent]] = {}
        self._states: dict[str, RecordingEvent] = {}

    @property
    def active(self) -> RecordingEvent | None:
        """What is being recorded now."""
        return self._active

    @property
    def journal_ns(self) -> int:
        """What the journal's thread has spent so far, over all recordings."""
        return self._journal_ns + (self._writer.spent_ns if self._writer else 0)

    # -- the engine's news -------------------------------------------------------------------------------------------

    def ready(self, ready: Ready, versions: dict[str, str]) -> None:
        """Note which model is served from now on."""
        self._served = Served(
            since_ns=time.monotonic_ns(),
            model=ready.model,
            capacity=ready.capacity,
            specs=ready.specs,
            versions=versions,
        )
        if self._writer is not None:
            self._writer.add(JournalServed(served=self._served))

    # -- start and stop ----------------------------------------------------------------------------------------------

    def start(self, name: str = "", note: str = "") -> RecordingEvent:
        """Begin a recording.

        Raises
        ------
        ApiError
            409 if one is running, 507 if the folder cannot be written to.
        """
        if self._active is not None:
            raise ApiError(
                409,
                f"{self._active.name!r} is being recorded. Stop it first: POST /recordings/{self._active.id}/stop.",
                code="recording_runs",
            )
        now = dt.datetime.now().astimezone()
        name = name.strip() or f"Recording of {now:%Y-%m-%d %H:%M:%S}"
        started_ns = time.monotonic_ns()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            identifier = self._new_id(name, now)
            self._writer = JournalWriter(
                self.folder / f"{identifier}{JOURNAL_SUFFIX}",
                Manifest(
                    id=identifier,
                    name=name,
                    note=note,
                    created=now.isoformat(timespec="seconds"),
                    clock=Clock(monotonic_ns=time.monotonic_ns(), wall_ns=time.time_ns()),
                    started_ns=started_ns,
                    flush_interval_s=self._flush_s,
                    instance=self._server.instance,
                    versions={"inference-workbench": self._server.version, "python": platform.python_version()},
                    hardware=_hardware(),
                    features=self._log.features,
                ),
                max_bytes=self._max_bytes,
                on_end=self._ended_by_itself,
            )
        except OSError as error:
            raise ApiError(
                507, f"The recording cannot be written to {self.folder}: {error.strerror}.", code="recording_folder"
            ) from error
        self._rows = self._tokens = self._lost = 0
        self._bytes = self._writer.bytes
        self._active = RecordingEvent(
            id=identifier, name=name, note=note, state="recording", at_ns=started_ns, started_ns=started_ns,
            bytes=self._writer.bytes, rows=0, tokens=0, seconds=0.0,
        )  # fmt: skip
        self._record_state()
        self._log.tap(self._tap)
        self._requests.on_detail = self._writer.add
        self._loop = asyncio.get_running_loop()
        self._ticker = asyncio.create_task(self._tick())
        self._tell(self._active)
        return self._active

    def stop(self, identifier: str, reason: str = "It was stopped.") -> asyncio.Task[RecordingEvent]:
        """End a recording; the task returned makes its file and gives the last event.

        Raises
        ------
        ApiError
            404 if it is not the one that runs.
        """
        active = self._active
        if active is None or active.id != identifier:
            raise ApiError(404, f"{identifier!r} is not being recorded.", code="recording_not_found")
        writer = self._detach()
        assert writer is not None
        self._states[identifier] = self._grown(active, "finishing", fraction=0.0, message=reason)
        self._tell(self._states[identifier])
        return self._in_background(self._close_and_finish(writer, reason, self._states[identifier]))

    async def close(self) -> None:
        """End what runs, quickly: the file is made by a process that outlives this one."""
        if self._active is not None:
            active, writer = self._active, self._detach()
            assert writer is not None
            await asyncio.to_thread(writer.close, "The server was stopped.")
            self._tell(self._grown(active, "finishing", message="The server was stopped."))
            await self._spawn(writer.path, wanted_output=False)
        for task in self._work:
            task.cancel()

    def recover(self) -> None:
        """Finish the journals that others left behind."""
        if not self.folder.is_dir():
            return
        for journal in unfinished(self.folder):
            try:
                reader = JournalReader(journal)
            except RecordingError as error:
                _log.warning("a journal cannot be recovered", error=str(error))
                continue
            reader.close()
            manifest = reader.head.manifest
            known = self._states.get(manifest.id)
            if known is not None and known.state == "finishing":
                continue
            event = RecordingEvent(
                id=manifest.id, name=manifest.name, note=manifest.note, state="finishing", at_ns=time.monotonic_ns(),
                started_ns=time.monotonic_ns(), bytes=journal.stat().st_size, rows=0, tokens=0, seconds=0.0,
                fraction=0.0, message="It was left behind by a server that is gone, and is being recovered.",
            )  # fmt: skip
            self._tell(event)
            self._in_background(self._finish(journal, event))

    # -- what there is -----------------------------------------------------------------------------------------------

    def list(self) -> list[RecordingEvent]:
        """Return every recording, newest first."""
        found: dict[str, RecordingEvent] = {}
        files = sorted(self.folder.glob(f"*{SUFFIX}"), reverse=True)[:_LISTED] if self.folder.is_dir() else []
        for path in files:
            with contextlib.suppress(FileNotFoundError):  # removed a moment ago
                found[path.name.removesuffix(SUFFIX)] = self._describe(path)
        states, active = dict(self._states), self._active  # this may run beside the event loop
        found |= {identifier: event for identifier, event in states.items() if event.state != "finished"}
        if active is not None:
            found[active.id] = active
        return sorted(found.values(), key=lambda event: event.id, reverse=True)

    def get(self, identifier: str) -> RecordingEvent:
        """Return how one recording is.

        Raises
        ------
        ApiError
            404 if there is none of that id.
        """
        if self._active is not None and self._active.id == identifier:
            return self._active
        event = self._states.get(identifier)
        if event is not None and event.state != "finished":
            return event
        return self._describe(self.file(identifier))

    def file(self, identifier: str) -> Path:
        """Return the path of a finished recording.

        Raises
        ------
        ApiError
            404 if there is none of that id, 409 if it is not finished.
        """
        if _ID.fullmatch(identifier) and (path := self.folder / f"{identifier}{SUFFIX}").is_file():
            return path
        event = self._active if self._active and self._active.id == identifier else self._states.get(identifier)
        if event is not None:
            raise ApiError(409, f"{event.name!r} is not a file yet: it is {event.state}.", code="recording_unfinished")
        raise ApiError(404, f"There is no recording {identifier!r}.", code="recording_not_found")

    def delete(self, identifier: str) -> None:
        """Remove a finished recording.

        Raises
        ------
        ApiError
            404 if there is none of that id, 409 if it is not finished.
        """
        self.file(identifier).unlink(missing_ok=True)
        self._states.pop(identifier, None)

    # -- private -----------------------------------------------------------------------------------------------------

    def _new_id(self, name: str, now: dt.datetime) -> str:
        slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:40].strip("-")
        base = identifier = f"{now:%Y%m%d-%H%M%S}-{slug or 'recording'}"
        number = 1
        while any((self.folder / f"{identifier}{suffix}").exists() for suffix in (SUFFIX, JOURNAL_SUFFIX)):
            number += 1
            identifier = f"{base}-{number}"
        return identifier

    def _record_state(self) -> None:
        """Write down what is the case now, as if it happened when the recording starts."""
        writer = self._writer
        assert writer is not None
        if self._served is not None:
            writer.add(JournalServed(served=self._served))
        for event in (self._log.engine, self._log.features, self._log.ceilings, self._log.kv):
            if event is not None:
                writer.add(event)
        details = self._requests.details()
        active = {detail.request for detail in details}
        for request in self._log.requests:
            if request.request in active:
                writer.add(request)
        for detail in details:
            writer.add(detail)

    def _tap(self, event: Event, encoded: bytes) -> None:
        if isinstance(event, RecordingEvent) or self._writer is None:
            return
        self._rows += 1
        if isinstance(event, TokensEvent):
            self._tokens += len(event.request)
        self._writer.append(encoded)

    def _detach(self) -> JournalWriter | None:
        """Stop writing; return the writer, to be closed."""
        writer, self._writer, self._active = self._writer, None, None
        self._log.tap(None)
        self._requests.on_detail = None
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        if writer is not None:
            self._bytes, self._lost = writer.bytes, writer.lost
        return writer

    def _ended_by_itself(self, reason: str) -> None:
        """Called from the journal's thread."""

        def end() -> None:
            if self._active is not None:
                self.stop(self._active.id, reason)

        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is ending anyway
            self._loop.call_soon_threadsafe(end)

    async def _tick(self) -> None:
        while self._active is not None and self._writer is not None:
            await asyncio.sleep(_TELL_EVERY_S)
            self._bytes, self._lost = self._writer.bytes, self._writer.lost
            self._active = self._grown(self._active, "recording")
            self._tell(self._active)

    def _grown(
        self, event: RecordingEvent, state: RecordingState, *, fraction: float | None = None, message: str = ""
    ) -> RecordingEvent:
        now = time.monotonic_ns()
        return msgspec.structs.replace(
            event, state=state, at_ns=now, bytes=self._bytes, rows=self._rows, tokens=self._tokens, lost=self._lost,
            seconds=(now - event.started_ns) / 1e9, fraction=fraction, message=message,
        )  # fmt: skip

    def _tell(self, event: RecordingEvent) -> None:
        self._states[event.id] = event
        self._log.append(event)

    def _in_background(self, work: Coroutine[None, None, RecordingEvent]) -> asyncio.Task[RecordingEvent]:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    async def _close_and_finish(self, writer: JournalWriter, reason: str, event: RecordingEvent) -> RecordingEvent:
        await asyncio.to_thread(writer.close, reason)
        self._journal_ns += writer.spent_ns
        return await self._finish(writer.path, event)

    async def _finish(self, journal: Path, event: RecordingEvent) -> RecordingEvent:
        """Have the file made, telling how far it is."""
        process = await self._spawn(journal, wanted_output=True)
        assert process.stdout is not None
        said: dict[str, object] = {}
        async for line in process.stdout:
            with contextlib.suppress(msgspec.DecodeError):
                said = msgspec.json.decode(line, type=dict[str, object])
                if isinstance(fraction := said.get("fraction"), float):
                    self._tell(msgspec.structs.replace(event, at_ns=time.monotonic_ns(), fraction=fraction))
        status = await process.wait()
        now = time.monotonic_ns()
        if status == 0 and isinstance(name := said.get("file"), str):
            described = self._describe(self.folder / name)
            event = msgspec.structs.replace(described, at_ns=now, started_ns=event.started_ns, message=event.message)
        else:
            problem = said.get("error") or f"its process ended with status {status}"
            event = msgspec.structs.replace(
                event, state="failed", at_ns=now,
                message=f"The recording could not be made into a file: {problem}. What was recorded is in {journal}; "
                f"try 'inference-workbench recover {journal}'.",
            )  # fmt: skip
            _log.error("a recording could not be finished", problem=str(problem), journal=str(journal))
        self._tell(event)
        return event

    async def _spawn(self, journal: Path, *, wanted_output: bool) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "inference_server.recording.finish",
            str(journal),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if wanted_output else asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # it finishes even when the terminal's Ctrl-C ends the server
        )

    def _describe(self, path: Path) -> RecordingEvent:
        """Return a finished file as an event, from its manifest."""
        facts = path.stat()
        known = self._known.get(path)
        if known is not None and known[0] == facts.st_mtime:
            return known[1]
        identifier = path.name.removesuffix(SUFFIX)
        event = RecordingEvent(
            id=identifier, name=identifier, note="", state="failed", at_ns=time.monotonic_ns(), started_ns=0,
            bytes=facts.st_size, rows=0, tokens=0, seconds=0.0, file=path.name,
        )  # fmt: skip
        try:
            with RecordingFile(path) as file:
                manifest = file.manifest
        except RecordingError as error:
            event = msgspec.structs.replace(event, message=str(error))
        else:
            rows = {name: info.rows for name, info in manifest.tables.items()}
            event = msgspec.structs.replace(
                event, name=manifest.name, note=manifest.note, state="finished", started_ns=manifest.started_ns,
                rows=sum(rows.values()), tokens=rows["tokens"], lost=manifest.lost_events,
                seconds=((manifest.ended_ns or manifest.started_ns) - manifest.started_ns) / 1e9,
                message=manifest.end_reason,
            )  # fmt: skip
        self._known[path] = (facts.st_mtime, event)
        return event


def _hardware() -> dict[str, str | int]:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": psutil.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
    }
