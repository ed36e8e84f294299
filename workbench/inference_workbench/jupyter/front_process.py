"""The one inference server of a Jupyter server: starts it on demand, notices its death, and says why it did not start.

Owns the child process, its socket and its token. Does not own what the child does: engine restarts, model loading and
dying together with the parent are the front's.
"""

from __future__ import annotations

import asyncio
import atexit
import collections
import contextlib
import os
import secrets
import sys
import time
from logging import Logger, LoggerAdapter
from pathlib import Path

import aiohttp

from inference_server.garbage import keep_what_is_loaded
from inference_server.lifetime import Lifeline, lifeline
from inference_workbench.sockets import new_socket_path

READY_TIMEOUT_S = 90.0
"""A front answers about a second after its start; a cold disk or a busy login node can take far longer."""
_KEPT_LINES = 30
_EXIT_GRACE_S = 5.0


class FrontUnavailableError(RuntimeError):
    """The inference server could not be started. The message says why, in words meant for a person."""


class FrontProcess:
    """Starts ``inference-workbench serve`` on a private Unix socket, once for all requests of a Jupyter server.

    Parameters
    ----------
    log
        Where to say that the process started or ended.
    command
        What to run, without ``serve --uds PATH``, which is appended.
    recording_folder
        Where the server puts its recordings, unless its user has said otherwise.
    """

    def __init__(
        self,
        log: Logger | LoggerAdapter[Logger],
        command: tuple[str, ...] | None = None,
        recording_folder: Path | None = None,
    ) -> None:
        self._log = log
        self._recording_folder = recording_folder
        self._command = command or (sys.executable, "-m", "inference_server.cli")
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._last_lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        self._reader: asyncio.Task[None] | None = None
        self.token = secrets.token_urlsafe(32)
        """Known to this Jupyter server and its child alone (and to the info file that ``connect()`` reads)."""
        self.socket = new_socket_path()
        """Where the front listens: the same after a restart, so that clients find the new one by reconnecting."""
        self._lifeline: Lifeline | None = None
        atexit.register(self._terminate_at_exit)

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def ensure(self) -> Path:
        """Return the socket of the running front, starting it first if there is none.

        Raises
        ------
        FrontUnavailableError
            If it ended before it answered, or did not answer in time.
        """
        async with self._lock:
            if not self.running:
                await self._start()
            return self.socket

    async def replace_silent(self) -> Path:
        """Return the socket of a new front, in place of one that refuses connections (it is ended if it still runs).

        Of several requests that noticed, the first one replaces it; the others find that the new one answers.
        """
        async with self._lock:
            process = self._process
            if process is not None and not await self._answers():
                try:
                    await asyncio.wait_for(process.wait(), _EXIT_GRACE_S)
                except TimeoutError:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
            if not self.running:
                await self._start()
            return self.socket

    async def stop(self) -> None:
        """End the process, politely first."""
        async with self._lock:
            process = self._process
            if process is None or process.returncode is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _EXIT_GRACE_S)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def _start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self._last_lines.clear()
        if self._lifeline is not None:
            self._lifeline.release()
        with lifeline() as line:
            self._process = process = await asyncio.create_subprocess_exec(
                *self._command,
                "serve",
                "--uds",
                str(self.socket),
                "--origin",
                "jupyter",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(line.child_fd,),
                env={
                    **self._preferences(),
                    **os.environ,
                    **line.environment,
                    "INFERENCE_WORKBENCH_TOKEN": self.token,
                },
            )
            self._lifeline = line
        self._reader = asyncio.create_task(self._read_output(process))
        self._log.info("Inference Workbench: started its server (process %s).", process.pid)
        # All telemetry goes through this process. It has to wait for the new one anyway.
        keep_what_is_loaded()
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not await self._answers():
            if process.returncode is not None:
                await self._reader
                raise FrontUnavailableError(self._why_it_ended(process.returncode))
            if time.monotonic() > deadline:
                process.kill()
                await process.wait()
                raise FrontUnavailableError(
                    f"The inference server did not answer within {READY_TIMEOUT_S:.0f} s and was stopped. "
                    f"Its last words: {self._tail()}"
                )
            await asyncio.sleep(0.05)

    def _preferences(self) -> dict[str, str]:
        """Settings that the user's environment overrides."""
        if self._recording_folder is None:
            return {}
        return {"INFERENCE_WORKBENCH_RECORDING_FOLDER": str(self._recording_folder)}

    def _why_it_ended(self, returncode: int) -> str:
        how = f"was killed by signal {-returncode}" if returncode < 0 else f"ended with exit status {returncode}"
        text = f"The inference server {how} before it could answer."
        if any("No module named" in line for line in self._last_lines):
            text += ' A package is missing: install the server with pip install "inference-workbench[server]".'
        return f"{text} Its last words: {self._tail()}"

    def _tail(self) -> str:
        return "\n".join(self._last_lines).strip() or "(none)"

    async def _read_output(self, process: asyncio.subprocess.Process) -> None:
        """Pass the child's output on to this process's standard error and keep the last lines for error messages."""
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # a line longer than the reader's limit
                continue
            if not line:
                break
            text = line.decode(errors="replace").rstrip()
            self._last_lines.append(text)
            print(text, file=sys.stderr)
        returncode = await process.wait()
        self._log.info("Inference Workbench: its server (process %s) ended with status %s.", process.pid, returncode)

    async def _answers(self) -> bool:
        timeout = aiohttp.ClientTimeout(total=2)
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.socket)), timeout=timeout) as session:
            try:
                async with session.get("http://localhost/"):
                    return True
            except (aiohttp.ClientError, TimeoutError, OSError):
                return False

    def _terminate_at_exit(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
        self.socket.unlink(missing_ok=True)
