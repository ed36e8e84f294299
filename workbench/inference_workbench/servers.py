"""Finds the server to talk to, starts one where none runs, and brings it back when it has died.

In this order: what the caller (by instance or address) or the environment names; the server of the Jupyter server that
runs this kernel (asked for through its proxy, so that notebook and panel look at the same one); the newest one whose
info file is there; else a new one, started as a child that ends with this process.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
import msgspec
from jupyter_core.paths import jupyter_runtime_dir

from inference_server.discovery import ServerFile, find_server, list_servers
from inference_server.lifetime import lifeline
from inference_workbench.endpoint import Endpoint, gone
from inference_workbench.errors import ServerNotFoundError, ServerStartError
from inference_workbench.sockets import new_socket_path

_PROXY_NAME = "inference-workbench"
_START_TIMEOUT_S = 120.0
_KEPT_LINES = 30


class Server(Protocol):
    """One server, and how to have it back."""

    @property
    def endpoint(self) -> Endpoint:
        """Where it is now."""

    def revive(self) -> None:
        """Make it answer again, or raise an error that says why that is impossible."""

    def close(self) -> None:
        """Let go of it; ends it only if this process started it."""


@dataclass(slots=True)
class RunningServer:
    """A server that somebody else runs."""

    endpoint: Endpoint

    def revive(self) -> None:
        """Somebody else's server is not ours to start: say that it is gone, unless it answers again."""
        try:
            with self.endpoint.http(timeout=5) as client:
                client.get("/")
        except httpx.TransportError as error:
            raise gone(self.endpoint, error) from error

    def close(self) -> None:
        """Do nothing: it goes on for others."""


class _JupyterFile(msgspec.Struct):
    """The part of a Jupyter server's info file that is needed to call it."""

    url: str
    token: str
    pid: int


class JupyterServer:
    """The server behind the Jupyter server that runs this kernel. Asking for it starts it."""

    def __init__(self, jupyter: _JupyterFile) -> None:
        self._jupyter = jupyter
        self._proxy = Endpoint(
            token=jupyter.token, url=f"{jupyter.url.rstrip('/')}/{_PROXY_NAME}", authorization=bool(jupyter.token)
        )
        self.endpoint = self._locate()

    def revive(self) -> None:
        """Let the Jupyter server start it again."""
        self.endpoint = self._locate()

    def close(self) -> None:
        """Do nothing: it belongs to the Jupyter server."""

    def _locate(self) -> Endpoint:
        """Start it if need be, and prefer its socket to the detour through Jupyter."""
        with self._proxy.http(timeout=_START_TIMEOUT_S) as client:
            answer = client.get("/health")
        if answer.status_code in {401, 403, 404, 405}:
            raise LookupError(f"{self._proxy.place} answered {answer.status_code}")
        if answer.is_error:
            with contextlib.suppress(msgspec.DecodeError, KeyError, TypeError):
                raise ServerStartError(msgspec.json.decode(answer.content)["error"]["message"])
            raise ServerStartError(f"{self._proxy.place} answered {answer.status_code}: {answer.text[:300]}")
        instance = msgspec.json.decode(answer.content).get("instance")
        server = find_server(instance)
        return self._proxy if server is None else Endpoint.of(server)


class ChildServer:
    """A server that this process starts, and that ends with it."""

    def __init__(self, arguments: tuple[str, ...] = ()) -> None:
        if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("torch") is None:
            raise ServerNotFoundError(
                "No inference server runs, and none can be started here because its packages are not installed. "
                'Install them with pip install "inference-workbench[server]", or start a server elsewhere and pass '
                "its address: connect(url=…, token=…)."
            )
        self._arguments = arguments
        self._socket = new_socket_path()
        self._process: subprocess.Popen[str] | None = None
        self._lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        self._token = ""
        self._start()

    @property
    def endpoint(self) -> Endpoint:
        """Its socket stays the same when it is started again."""
        return Endpoint(token=self._token, uds=str(self._socket))

    def revive(self) -> None:
        """Start it again if it has ended."""
        process = self._process
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
        if process is None or process.poll() is not None:
            self._start()

    def close(self) -> None:
        """End it."""
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._socket.unlink(missing_ok=True)

    def _start(self) -> None:
        import secrets  # noqa: PLC0415 -- only where a server is started

        self._token = self._token or secrets.token_urlsafe(32)
        self._socket.unlink(missing_ok=True)
        self._lines.clear()
        spawned = threading.Event()
        # The kernel takes the end of the *thread* that spawned a child for the end of its parent, so that thread has to
        # live for as long as the child: it reads the child's output.
        threading.Thread(target=self._spawn_and_read, args=(spawned,), name="inference-server", daemon=True).start()
        spawned.wait()
        deadline = time.monotonic() + _START_TIMEOUT_S
        with self.endpoint.http(timeout=5) as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    client.get("/")
                    return
                if self._process is None or self._process.poll() is not None:
                    raise ServerStartError(f"The inference server ended while starting. Its last words: {self._tail()}")
                if time.monotonic() > deadline:
                    self.close()
                    raise ServerStartError(
                        f"The inference server did not answer within {_START_TIMEOUT_S:.0f} s. "
                        f"Its last words: {self._tail()}"
                    )
                time.sleep(0.05)

    def _spawn_and_read(self, spawned: threading.Event) -> None:
        command = [sys.executable, "-m", "inference_server.cli", "serve", "--uds", str(self._socket)]
        command += ["--origin", "kernel", *self._arguments]
        try:
            with lifeline() as line:
                self._process = process = subprocess.Popen(  # noqa: S603 -- our own module
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    pass_fds=(line.child_fd,),
                    env={**os.environ, **line.environment, "INFERENCE_WORKBENCH_TOKEN": self._token},
                    # Interrupting a notebook cell signals the kernel's whole group: the server must not hear it.
                    start_new_session=True,
                )
        except OSError as error:
            self._lines.append(str(error))
            return
        finally:
            spawned.set()
        assert process.stdout is not None
        with process.stdout as output:
            for text in output:
                self._lines.append(text.rstrip())
        process.wait()
        line.release()

    def _tail(self) -> str:
        return "\n".join(self._lines).strip() or "(none)"


def find_or_start(
    url: str | None = None,
    token: str | None = None,
    uds: str | Path | None = None,
    *,
    instance: str | None = None,
    start: bool = True,
    arguments: tuple[str, ...] = (),
) -> Server:
    """Return a server that answers. See the module's first lines for the order of the search.

    Raises
    ------
    ServerNotFoundError
        If none runs and ``start`` is false or a server's packages are missing, or if ``instance`` has ended.
    ServerStartError
        If one was started and ended.
    ServerGoneError
        If a server was named and does not answer.
    """
    url = url or os.environ.get("INFERENCE_WORKBENCH_URL")
    if instance is not None or url is not None or uds is not None:
        endpoint = _named_endpoint(url, token, uds) if instance is None else _endpoint_of_instance(instance)
        named = RunningServer(endpoint)
        named.revive()
        return named
    if start and arguments:  # a server of one's own was asked for
        return ChildServer(arguments)
    jupyter = _own_jupyter_server()
    if jupyter is not None:
        # No proxy there, or it cannot be called from here: look elsewhere.
        with contextlib.suppress(LookupError, httpx.TransportError):
            return JupyterServer(jupyter)
    for server in list_servers():
        candidate = RunningServer(Endpoint.of(server))
        with contextlib.suppress(Exception):
            candidate.revive()
            return candidate
    if not start:
        raise ServerNotFoundError(
            "No inference server runs for this user. Start one with: inference-workbench serve, "
            "or call connect() without start=False."
        )
    return ChildServer(arguments)


def _endpoint_of_instance(instance: str) -> Endpoint:
    """Find one start of a server: another start, even of the same server, would have other switches and requests."""
    server = find_server(instance)
    if server is not None:
        return Endpoint.of(server)
    running = ", ".join(f"{each.instance} ({each.origin}, pid {each.pid})" for each in list_servers())
    raise ServerNotFoundError(
        f"The inference server with the instance {instance!r} has ended, or is not on this machine. "
        + (f"These run: {running}." if running else "None runs. Start one with: inference-workbench serve")
    )


def _named_endpoint(url: str | None, token: str | None, uds: str | Path | None) -> Endpoint:
    """Complete an address that the caller gave; the token may be in the URL, as ``serve`` prints it."""
    address = None
    if url is not None:
        parsed = httpx.URL(url)
        token = token or parsed.params.get("token")
        address = str(parsed.copy_with(query=None, fragment=None)).rstrip("/").removesuffix("/v1")
    token = token or os.environ.get("INFERENCE_WORKBENCH_TOKEN") or _token_of(address, uds)
    if token is None:
        raise ServerNotFoundError(
            f"A token is needed for {address or uds}: pass token=…, or the URL with ?token=… as the server printed it."
        )
    return Endpoint(token=token, url=address, uds=None if uds is None else str(uds))


def _token_of(url: str | None, uds: str | Path | None) -> str | None:
    def matches(server: ServerFile) -> bool:
        return (url is not None and server.url == url) or (uds is not None and server.uds == str(uds))

    return next((server.token for server in list_servers() if matches(server)), None)


def _own_jupyter_server() -> _JupyterFile | None:
    """Return the info file of the Jupyter server whose kernel this process is, if it is one."""
    parent = os.environ.get("JPY_PARENT_PID")
    if not parent:
        return None
    try:
        content = (Path(jupyter_runtime_dir()) / f"jpserver-{int(parent)}.json").read_bytes()
        return msgspec.json.decode(content, type=_JupyterFile)
    except (OSError, ValueError):
        return None
