"""How a client on this machine finds a running server: one small file per server, readable by its user alone.

The files lie in Jupyter's runtime folder. Imports neither the web stack nor torch, so that any client can use it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Literal

import msgspec

Origin = Literal["jupyter", "cli", "kernel"]
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine: a server listens on no other."""
_PREFIX = "inference-workbench-"


class ServerFile(msgspec.Struct, frozen=True, kw_only=True):
    """Where one server is and how to be let in."""

    url: str | None
    """Base URL without a slash at the end, for a server on TCP."""
    uds: str | None
    """Path of the Unix socket, for a server on one."""
    token: str
    pid: int
    version: str
    instance: str
    """Changes with every start."""
    started: float
    """Seconds since the epoch."""
    origin: Origin
    """Who started it: a Jupyter server, a person at a command line, or a notebook's kernel."""
    process_start: int | None = None
    """The kernel's start time of the process where it can be known: a process id alone may have been reused."""


def runtime_dir() -> Path:
    """Return the folder of the info files: Jupyter's runtime folder, wherever Jupyter would put it."""
    try:
        from jupyter_core.paths import jupyter_runtime_dir  # noqa: PLC0415 -- optional here
    except ImportError:
        return _runtime_dir_without_jupyter()
    return Path(jupyter_runtime_dir())


def _runtime_dir_without_jupyter() -> Path:
    """Follow the rules of ``jupyter_core`` 5 on a machine that has no Jupyter."""
    if chosen := os.environ.get("JUPYTER_RUNTIME_DIR"):
        return Path(chosen)
    if data := os.environ.get("JUPYTER_DATA_DIR"):
        return Path(data) / "runtime"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Jupyter" / "runtime"
    share = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(share) / "jupyter" / "runtime"


def process_start(pid: int) -> int | None:
    """Return when a process started, in the kernel's clock ticks since boot.

    ``None`` where that cannot be known, and for one that has ended and was not waited for.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *numbers = text.rpartition(")")[2].split()  # the name in parentheses may hold spaces
    return None if state == "Z" else int(numbers[18])


def publish(server: ServerFile) -> Path:
    """Write the info file of this process and return its path. Mode 0600; a reader never sees half of it."""
    folder = runtime_dir()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{_PREFIX}{server.pid}.json"
    descriptor, temporary = tempfile.mkstemp(prefix=".inference-workbench-", dir=folder)  # mkstemp's mode is 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(server), indent=2))
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def withdraw(path: Path) -> None:
    """Remove an info file, if it is still there."""
    with contextlib.suppress(OSError):
        path.unlink()


def list_servers() -> list[ServerFile]:
    """Return the servers that are alive, newest first. Files that dead ones left behind are removed.

    A file of another user is not believed: whoever follows it would send a token to where that user says.
    """
    servers: list[ServerFile] = []
    for path in runtime_dir().glob(f"{_PREFIX}*.json"):
        try:
            server = msgspec.json.decode(_own_bytes(path), type=ServerFile)
        except (OSError, msgspec.MsgspecError):
            continue  # gone meanwhile, or of another version: not ours to judge
        if _is_alive(server):
            servers.append(server)
        else:
            withdraw(path)
    return sorted(servers, key=lambda server: server.started, reverse=True)


def _own_bytes(path: Path) -> bytes:
    """Read a file that belongs to this user, and is no link to something else."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to another user.")
        return file.read()


def find_server(instance: str) -> ServerFile | None:
    """Return the server of one start, if it still runs."""
    return next((server for server in list_servers() if server.instance == instance), None)


def _is_alive(server: ServerFile) -> bool:
    try:
        os.kill(server.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return False  # the id now belongs to another user's process
    return server.process_start is None or process_start(server.pid) == server.process_start
