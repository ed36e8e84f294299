"""Runs a front: its socket, its info file, its place in the terminal, and its end.

The socket is open before anything else, so that a port in use is said at once and a client that was started at the
same time can connect while the engine is loading.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import msgspec
import structlog
import uvicorn

from inference_server import discovery
from inference_server.discovery import ServerFile
from inference_server.front.app import Front, create_app
from inference_server.front.progress import EngineProgress
from inference_server.front.settings import DEFAULT_PORT, Settings, SettingsError
from inference_server.lifetime import die_with_parent

_GRACE_S = 3
_LAST_RESORT_S = 20.0
_LONGEST_UDS = 107


class ServeError(RuntimeError):
    """The server cannot be started. The message says why and what to do."""


def run(settings: Settings) -> None:
    """Serve until told to stop (SIGINT, SIGTERM).

    Raises
    ------
    ServeError
        If the address cannot be listened on or the settings are wrong.
    """
    if settings.origin != "cli":
        # There is an engine to end and a file to remove; a timer sees to it that this cannot take for ever. A notebook
        # may have started us from a thread that ends long before it does.
        die_with_parent(signal.SIGTERM, even_if_hung=False)
    # Uvicorn ends by raising the signal again; without a handler that would skip everything below that tidies up.
    signal.signal(signal.SIGTERM, _exit_on_signal)
    sys.stderr = _UnbreakableStream(sys.stderr)
    configure_logging(settings.log_level)
    with _listening(settings) as listener:
        url = None if settings.uds else f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            progress = EngineProgress()
            front = Front(settings, progress.show)
        except SettingsError as error:
            raise ServeError(str(error)) from error
        except msgspec.ValidationError as error:
            raise ServeError(f"The settings are wrong: {error}.") from error
        server = _Server(
            uvicorn.Config(
                create_app(front),
                log_config=None,
                access_log=False,  # it would show the token of every request
                lifespan="on",
                ws="websockets-sansio",
                ws_per_message_deflate=False,
                ws_max_size=1 << 20,
                timeout_graceful_shutdown=_GRACE_S,
                timeout_keep_alive=75,
                server_header=False,
            ),
            front,
        )
        info = discovery.publish(
            ServerFile(
                url=url,
                uds=settings.uds,
                token=settings.token,
                pid=os.getpid(),
                version=front.server.version,
                instance=front.server.instance,
                started=time.time(),
                origin=settings.origin,
                process_start=discovery.process_start(os.getpid()),
            )
        )
        try:
            # What Jupyter or a kernel starts writes into their logs, where the token has no place.
            progress.announce(url=url, uds=settings.uds, token=settings.token if settings.origin == "cli" else None)
            server.run(sockets=[listener])
        finally:
            discovery.withdraw(info)
            progress.close()


def configure_logging(level: str) -> None:
    """Send the logs of the server and of its libraries to standard error.

    Raises
    ------
    ServeError
        If there is no such level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ServeError(f"There is no log level {level!r}. The levels are debug, info, warning and error.")
    logging.basicConfig(level=max(number, logging.WARNING), format="%(levelname)s %(name)s: %(message)s")
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


class _UnbreakableStream(io.TextIOBase):
    """Standard error for a process that may outlive whoever reads it: what cannot be written is dropped.

    Without this, a message to a closed pipe or terminal would end the very code that has an engine to end.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the stream behind."""
        return self._stream.encoding

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Everything is flushed when it is written."""

    def isatty(self) -> bool:
        """Whether a person sees it."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor of the stream behind."""
        return self._stream.fileno()


def _exit_on_signal(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


class _Server(uvicorn.Server):
    """Uvicorn that ends the engine, and with it every stream, when told to stop; for good if that takes too long."""

    def __init__(self, config: uvicorn.Config, front: Front) -> None:
        super().__init__(config)
        self._front = front

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell whoever waits for the engine that it ends, then close the connections."""
        await self._front.supervisor.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: object) -> None:
        """Handle SIGINT and SIGTERM."""
        timer = threading.Timer(_LAST_RESORT_S, os._exit, (1,))
        timer.daemon = True
        timer.start()
        super().handle_exit(sig, frame)  # type: ignore[arg-type]


@contextlib.contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    if settings.uds is not None:
        listener = _listen_on_path(Path(settings.uds))
    elif settings.port is not None:
        listener = _listen_on_port(settings.port)
    else:
        try:
            listener = _listen_on_port(DEFAULT_PORT)
        except ServeError:
            listener = _listen_on_port(0)
    try:
        yield listener
    finally:
        listener.close()
        if settings.uds is not None:
            Path(settings.uds).unlink(missing_ok=True)


def _listen_on_port(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ServeError(
            f"Port {port} on 127.0.0.1 cannot be used: {error.strerror}. Choose another with --port N, let the system "
            "choose with --port 0, or see with 'inference-workbench status' whether a server is running already."
        ) from error
    return listener


def _listen_on_path(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > _LONGEST_UDS:
        raise ServeError(f"{path} is too long for a Unix socket ({_LONGEST_UDS} bytes at most). Choose a shorter path.")
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise ServeError(f"{path} exists and is no socket. Choose another path.")
    if path.exists() and _is_answered(path):
        raise ServeError(f"Another server listens on {path}. Choose another path, or stop it.")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        before = os.umask(0o177)  # readable and writable by this user alone from the start
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ServeError(f"The Unix socket {path} cannot be made: {error.strerror}.") from error
    return listener


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
