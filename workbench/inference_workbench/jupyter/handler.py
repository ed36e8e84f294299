"""Forwards ``<base_url>/inference-workbench/…`` to the front, HTTP and WebSocket, for users whom Jupyter knows.

Authentication, base URL, JupyterHub and the WebSocket relay are jupyter-server-proxy's. HTTP is forwarded here, because
that package streams an answer only for one exact ``Accept`` header (the ``openai`` client sends another), goes on
reading when the browser has left (so the engine would generate for nobody), and cannot tell why its child is dead.

What must not travel on: the user's Jupyter credentials (``Authorization``, cookies, ``?token=``). What replaces them is
the front's own token, which no browser ever sees.
"""

from __future__ import annotations

import asyncio
import json
import re
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlparse

import aiohttp
from jupyter_server.base.handlers import JupyterHandler
from jupyter_server_proxy.handlers import NamedLocalProxyHandler
from tornado import httputil, web
from tornado.iostream import StreamClosedError
from yarl import URL

from inference_workbench.jupyter import PROXY_NAME
from inference_workbench.jupyter.front_process import FrontProcess, FrontUnavailableError

TOKEN_HEADER = "X-Inference-Workbench-Token"  # noqa: S105 -- a header's name
_UNKNOWN_USER = "Jupyter does not know this user: send its token as 'Authorization: Bearer TOKEN'."
_NOT_FORWARDED = frozenset(
    {
        # hop by hop (RFC 9110, 7.6.1)
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        # set anew by whoever sends the next hop
        "content-length",
        # Jupyter's business, and secret
        "authorization",
        "cookie",
        "set-cookie",
        "x-xsrftoken",
        "origin",
        TOKEN_HEADER.lower(),
    }
)


class WorkbenchProxyHandler(NamedLocalProxyHandler):  # type: ignore[misc]
    """One request to the front, on behalf of an authenticated Jupyter user."""

    proxy_base = PROXY_NAME
    port = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._forwarding: asyncio.Task[None] | None = None
        super().__init__(*args, **kwargs)
        self.proxy_base = PROXY_NAME

    def initialize(self, front: FrontProcess) -> None:
        """Receive the front that all requests of this Jupyter server share."""
        self.front = front

    # -- who may ask -------------------------------------------------------------------------------------------------

    async def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Refuse foreign pages and unknown users before anything is started.

        A foreign ``Origin`` is refused even with a valid token, unless Jupyter's own ``allow_origin`` settings admit
        it, because a page elsewhere has no business driving somebody's GPU.
        """
        if not self._origin_is_welcome():
            message = (
                f"A page from {self.request.headers['Origin']} may not use this Jupyter server's inference "
                "server. Allow it with ServerApp.allow_origin if it should."
            )
            self._finish_with_error(403, message, "foreign_origin")
            return
        if self.request.headers.get("Upgrade", "").lower() == "websocket":
            # A panel that is merely open must not keep an idle Jupyter server from being culled.
            self.update_last_activity = False
        await super().prepare(*args, **kwargs)
        self.request.query = _without_token(self.request.query)

    def get_login_url(self) -> str:
        """Answer 401 instead of sending an API client to a login page."""
        raise web.HTTPError(401, _UNKNOWN_USER)

    def check_xsrf_cookie(self) -> None:
        """Keep Jupyter's own protection, which the base class turns off; token-authenticated requests need none."""
        if getattr(self, "_jupyter_current_user", self) is None:
            raise web.HTTPError(401, _UNKNOWN_USER)
        JupyterHandler.check_xsrf_cookie(self)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer in OpenAI's error shape: whoever asks here is a program."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        message = (error.log_message if isinstance(error, web.HTTPError) else None) or HTTPStatus(status_code).phrase
        self.set_header("Content-Type", "application/json")
        self.finish(_error_body(message, "proxy_error", None))

    def check_origin(self, origin: str | None = None) -> bool:
        """Whether a WebSocket of a page from ``origin`` is accepted."""
        del origin  # the same as the header's
        return self._origin_is_welcome()

    def _origin_is_welcome(self) -> bool:
        origin = self.request.headers.get("Origin")
        if origin is None or self.allow_origin in {"*", origin}:
            return True
        if urlparse(origin).netloc.lower() == self.request.headers.get("Host", "").lower():
            return True
        return bool(self.allow_origin_pat and re.match(self.allow_origin_pat, origin))

    # -- HTTP --------------------------------------------------------------------------------------------------------

    async def proxy(self, port: int, path: str) -> None:
        """Forward this HTTP request and stream the answer back as it comes."""
        del port, path
        self._record_activity()
        self._forwarding = asyncio.create_task(self._forward())
        try:
            await self._forwarding
        except asyncio.CancelledError:
            if not self._client_left():
                raise
        except StreamClosedError:
            pass
        except FrontUnavailableError as error:
            self.log.warning("Inference Workbench: %s", error)
            self._finish_with_error(503, str(error), "server_unavailable")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if self._headers_written:
                raise
            message = f"The inference server ended while it was answering ({error}). Ask again: it is started anew."
            self._finish_with_error(502, message, "server_gone")
        finally:
            self._forwarding = None
            self._record_activity()

    async def _forward(self) -> None:
        socket = await self.front.ensure()
        try:
            await self._forward_to(socket)
        except aiohttp.ClientConnectorError:
            # It died since, and nothing was sent: safe to ask its successor.
            await self._forward_to(await self.front.replace_silent())

    async def _forward_to(self, socket: Path) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        connector = aiohttp.UnixConnector(str(socket))
        headers = self.proxy_request_headers()
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session,
            session.request(
                self.request.method,
                self._target("http"),
                headers=list(headers.get_all()),
                data=self.request.body or None,
                allow_redirects=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            ) as answer,
        ):
            self.set_status(answer.status, answer.reason)
            self._headers = httputil.HTTPHeaders()
            for name, value in answer.headers.items():
                if name.lower() not in _NOT_FORWARDED:
                    self.add_header(name, value)
            async for chunk in answer.content.iter_any():
                self.write(chunk)
                # Waiting here is what gives the sender back-pressure.
                # (The WebSocket mixin hides the future that RequestHandler.flush returns.)
                await web.RequestHandler.flush(self)

    def on_connection_close(self) -> None:
        """End the request at the front too when the client leaves, so that nothing is generated for nobody."""
        if self._forwarding is not None:
            self._forwarding.cancel()
        super().on_connection_close()

    def _client_left(self) -> bool:
        return bool(self.request.connection.stream.closed()) if self.request.connection is not None else True

    def _finish_with_error(self, status: int, message: str, code: str) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.finish(_error_body(message, "proxy_error", code))

    # -- WebSocket ---------------------------------------------------------------------------------------------------

    async def open(self, path: str) -> None:
        """Relay a WebSocket; a front that cannot be started closes it with the reason."""
        try:
            self.unix_socket = str(await self.front.ensure())
        except FrontUnavailableError as error:
            self.log.warning("Inference Workbench: %s", error)
            # A close frame holds 123 bytes of reason.
            self.close(1013, str(error).encode()[:120].decode(errors="ignore"))
            return
        await super().open(path)

    # -- both --------------------------------------------------------------------------------------------------------

    def proxy_request_headers(self) -> httputil.HTTPHeaders:
        """Return the client's headers without Jupyter's credentials, and with the front's token."""
        headers = httputil.HTTPHeaders()
        for name, value in self.request.headers.get_all():
            if name.lower() not in _NOT_FORWARDED:
                headers.add(name, value)
        headers[TOKEN_HEADER] = self.front.token
        headers["X-Forwarded-Prefix"] = f"{self.base_url.rstrip('/')}/{PROXY_NAME}"
        return headers

    def _target(self, scheme: str) -> URL:
        prefix = f"{self.base_url.rstrip('/')}/{PROXY_NAME}"
        path = self.request.path[len(prefix) :] or "/"
        query = f"?{self.request.query}" if self.request.query else ""
        return URL(f"{scheme}://localhost{path}{query}", encoded=True)


def _error_body(message: str, kind: str, code: str | None) -> str:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


def _without_token(query: str) -> str:
    """Drop Jupyter's ``token`` from a query string: it would end up in logs on the way."""
    if "token=" not in query:
        return query
    return urlencode([(name, value) for name, value in parse_qsl(query, keep_blank_values=True) if name != "token"])
