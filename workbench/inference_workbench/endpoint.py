"""Where one server is and how to be let in: makes HTTP clients and WebSockets, and turns refusals into exceptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import websockets.sync.client as websocket_client

from inference_server.discovery import LOOPBACK, ServerFile
from inference_workbench.errors import RequestError, ServerGoneError


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address and credentials of a server, over TCP (``url``) or a Unix socket (``uds``)."""

    token: str
    url: str | None = None
    uds: str | None = None
    authorization: bool = False
    """The token is a Jupyter server's, in front of ours: send it as ``Authorization``."""

    @classmethod
    def of(cls, server: ServerFile) -> Endpoint:
        """Take address and token from an info file."""
        return cls(token=server.token, url=server.url, uds=server.uds)

    def __repr__(self) -> str:
        """Name the address; never show the token."""
        return f"Endpoint({self.place!r})"

    @property
    def place(self) -> str:
        """The address in words."""
        return self.url or f"unix socket {self.uds}"

    @property
    def headers(self) -> dict[str, str]:
        """What every request has to carry."""
        if not self.token:
            return {}
        if self.authorization:
            return {"Authorization": f"Bearer {self.token}"}
        return {"X-Inference-Workbench-Token": self.token}

    @property
    def _is_local(self) -> bool:
        return self.url is None or urlsplit(self.url).hostname in LOOPBACK

    def http(self, timeout: float | None = 30.0) -> httpx.Client:
        """Return a new HTTP client for this server; the caller closes it.

        Parameters
        ----------
        timeout
            Seconds without any byte before giving up; ``None`` waits for ever.
        """
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
        times = httpx.Timeout(timeout, connect=10.0)
        if self.uds is not None:
            transport = httpx.HTTPTransport(uds=self.uds, limits=limits)
            return httpx.Client(transport=transport, base_url="http://localhost", headers=self.headers, timeout=times)
        base = self.url or ""
        return httpx.Client(
            base_url=base, headers=self.headers, timeout=times, limits=limits, trust_env=not self._is_local
        )

    def websocket(self, path: str) -> websocket_client.ClientConnection:
        """Open a WebSocket; the caller closes it."""
        options: dict[str, Any] = {
            "additional_headers": self.headers,
            "open_timeout": 10,
            "close_timeout": 2,
            "compression": None,
            "max_size": 64 << 20,
        }
        if self._is_local:
            options["proxy"] = None
        if self.uds is not None:
            uri = f"ws://localhost{path}"
            over_socket: websocket_client.ClientConnection = websocket_client.unix_connect(self.uds, uri, **options)
            return over_socket
        connection: websocket_client.ClientConnection = websocket_client.connect(
            f"ws{(self.url or '').removeprefix('http')}{path}", **options
        )
        return connection


def checked(answer: httpx.Response) -> Any:
    """Return the decoded JSON of an answer.

    Raises
    ------
    RequestError
        If the server refused; the message is the server's own.
    """
    if answer.is_error:
        raise refusal(answer)
    return msgspec.json.decode(answer.content)


def refusal(answer: httpx.Response) -> RequestError:
    """Turn an error answer, whose body has been read, into an exception."""
    try:
        error = msgspec.json.decode(answer.content)["error"]
        message, code = error["message"], error.get("code")
    except (msgspec.DecodeError, KeyError, TypeError):
        message, code = answer.text.strip()[:500] or answer.reason_phrase, None
    return RequestError(message, status=answer.status_code, code=code)


def gone(endpoint: Endpoint, error: Exception) -> ServerGoneError:
    """Say that a server does not answer any more."""
    return ServerGoneError(
        f"The inference server at {endpoint.place} does not answer ({error}). "
        "Call inference_workbench.connect() again to find or start one."
    )
