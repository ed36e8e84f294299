"""One engine process, from spawn to exit: its sockets, its log file and its last words.

Knows nothing of requests or of restarts; :mod:`inference_server.front.supervisor` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from inference_server.lifetime import Lifeline, lifeline
from inference_server.protocol import EngineConfig, FromEngine, ToEngine

_LONGEST_SOCKET_PATH = 103
"""Bytes; the kernel's limit for a Unix socket is 107 on Linux and 103 on macOS."""
_TAIL_BYTES = 16 << 10
_TAIL_LINES = 12
_SECRETS = ("INFERENCE_WORKBENCH_TOKEN",)


class EngineStartError(RuntimeError):
    """The engine process could not even be started."""


def private_folder() -> Path:
    """Make a new folder that only this user can enter, with a path short enough for Unix sockets.

    Raises
    ------
    EngineStartError
        If no folder with a short enough path can be written to.
    """
    for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):  # noqa: S108 -- mkdtemp makes 0700
        if not base or len(os.fsencode(base)) > _LONGEST_SOCKET_PATH - 40:
            continue
        with contextlib.suppress(OSError):
            return Path(tempfile.mkdtemp(prefix="inference-workbench-", dir=base))
    raise EngineStartError(
        "There is no folder for the engine's sockets: XDG_RUNTIME_DIR and the temporary folder cannot be written to, "
        "or their paths are too long. Set TMPDIR to a short path of a folder that you can write to."
    )


class EngineProcess:
    """A running engine process and the two sockets to it. Make one with :meth:`spawn`."""

    def __init__(
        self,
        *,
        process: asyncio.subprocess.Process,
        line: Lifeline,
        folder: Path,
        log_path: Path,
        commands: zmq.asyncio.Socket,
        reports: zmq.asyncio.Socket,
    ) -> None:
        self._process = process
        self._lifeline = line
        self._folder = folder
        self._commands = commands
        self._reports = reports
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._killed_because: str | None = None
        self.log_path = log_path
        """Everything the engine prints."""
        self.pid = process.pid

    @classmethod
    async def spawn(
        cls, command: Sequence[str], config: EngineConfig, *, context: zmq.asyncio.Context, log_path: Path
    ) -> EngineProcess:
        """Start an engine.

        Must run on a thread that lives as long as the front: the kernel ties the child's life to it.

        Parameters
        ----------
        command
            What to run; ``--config``, ``--receive`` and ``--send`` are appended.
        config
            Handed over as JSON.
        context
            ZeroMQ context of the running event loop.
        log_path
            Gets what the process prints.

        Raises
        ------
        EngineStartError
            If the command cannot be run or there is no place for the sockets.
        """
        folder = private_folder()
        commands, reports = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        try:
            for socket in (commands, reports):
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.SNDHWM, 0)
                socket.setsockopt(zmq.RCVHWM, 0)
            receive, send = f"ipc://{folder / 'to-engine'}", f"ipc://{folder / 'from-engine'}"
            commands.bind(receive)
            reports.bind(send)
            arguments = ["--config", msgspec.json.encode(config).decode(), "--receive", receive, "--send", send]
            with lifeline() as line, log_path.open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    *arguments,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(line.child_fd,),
                    env=_environment() | line.environment,
                    start_new_session=True,  # Ctrl-C at a terminal is the front's to handle
                )
        except BaseException as error:  # cancellation too: leaving the lifeline's block has ended a child already there
            commands.close()
            reports.close()
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError | zmq.ZMQError):
                raise EngineStartError(f"The engine ({' '.join(command)}) could not be started: {error}") from error
            raise
        return cls(process=process, line=line, folder=folder, log_path=log_path, commands=commands, reports=reports)

    def send(self, command: ToEngine) -> None:
        """Queue a command; never blocks. What is sent to an engine that is gone is lost."""
        if not self._commands.closed:
            self._commands.send(self._encoder.encode(command))

    async def receive(self) -> FromEngine:
        """Return the engine's next message.

        Raises
        ------
        msgspec.ValidationError
            If the engine speaks another protocol.
        """
        message: FromEngine = self._decoder.decode(await self._reports.recv())
        return message

    async def wait(self) -> int:
        """Return the exit status once the process has ended: negative is the number of a signal."""
        return await self._process.wait()

    def kill(self, because: str) -> None:
        """End the process at once; ``because`` becomes part of :meth:`obituary`."""
        self._killed_because = because
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def end(self, grace_s: float) -> None:
        """Make sure that the process ends: wait for it, then ask it, then kill it."""
        for insist, patience_s in ((None, grace_s), (self._process.terminate, 2.0), (self._process.kill, 2.0)):
            if insist is not None:
                with contextlib.suppress(ProcessLookupError):
                    insist()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), patience_s)
                return

    def close(self) -> None:
        """Release what belongs to the process, once it has ended."""
        self._commands.close()
        self._reports.close()
        self._lifeline.release()
        shutil.rmtree(self._folder, ignore_errors=True)

    def last_words(self) -> str:
        """Return the last lines that the engine printed; empty if it printed none."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(0, self.log_path.stat().st_size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        return "\n".join(lines[-_TAIL_LINES:])

    def obituary(self, status: int) -> str:
        """Say for a person how the process ended and what it last printed."""
        if self._killed_because is not None:
            how = f"was killed: {self._killed_because}"
        elif status < 0:
            how = f"was killed by {_signal_name(-status)}"
            if -status == signal.SIGKILL:
                how += " (out of memory, or somebody's kill -9)"
        else:
            how = f"exited with status {status}"
        message = f"The engine process (pid {self.pid}) {how}."
        if words := self.last_words():
            message += f"\nIts last output:\n{words}"
        return f"{message}\nIts whole output is in {self.log_path}."


def _environment() -> dict[str, str]:
    """Return the engine's environment: no secrets, and last words that are not lost in a buffer."""
    kept = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    return kept | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def new_log_path(folder: Path, *, keep_days: float = 7.0) -> Path:
    """Return a new file name in ``folder`` for an engine's output, and remove logs that are older than a week."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    oldest = time.time() - keep_days * 86_400
    for path in folder.glob("engine-*.log"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()
    return folder / f"engine-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns() % 1_000_000}.log"
