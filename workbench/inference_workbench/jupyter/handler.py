"""Forwards HTTP and WebSockets to an inference server, for users whom Jupyter knows.

``<base_url>/inference-workbench/…`` is the server of this Jupyter server, which is started when it is first asked for;
``<base_url>/inference-workbench-servers/INSTANCE/…`` is any other one of this user that runs.

Authentication, base URL, JupyterHub and the WebSocket relay are jupyter-server-proxy's. HTTP is forwarded here, because
that package streams an answer only for one exact ``Accept`` header (the ``openai`` client sends another), goes on
reading when the browser has left (so the engine would generate for nobody), and cannot tell why its child is dead.

What must not travel on: the user's Jupyter credentials (``Authorization``, cookies, ``?token=``). What replaces them is
the server's own token, which no browser ever sees.
"""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import parse_qsl, urlencode

import aiohttp
from jupyter_server_proxy.handlers import NamedLocalProxyHandler
from tornado import httputil, web
from tornado.http1connection import HTTP1Connection
from tornado.iostream import StreamClosedError
from yarl import URL

from inference_workbench.jupyter import PROXY_NAME, SERVERS_NAME
from inference_workbench.jupyter.front_process import FrontUnavailableError
from inference_workbench.jupyter.guard import Guarded
from inference_workbench.jupyter.upstream import Address, AnnouncedServer, ServerEndedError, Upstream

TOKEN_HEADER = "X-Inference-Workbench-Token"  # noqa: S105 -- a header's name
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


class _ServerProxyHandler(Guarded, NamedLocalProxyHandler):  # type: ignore[misc]
    """One request to a server, on behalf of an authenticated Jupyter user."""

    port = 0
    upstream: Upstream
    _token: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._forwarding: asyncio.Task[None] | None = None
        super().__init__(*args, **kwargs)

    async def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Refuse who may not ask, and keep Jupyter's token out of what travels on."""
        if self.request.headers.get("Upgrade", "").lower() == "websocket":
            # A panel that is merely open must not keep an idle Jupyter server from being culled.
            self.update_last_activity = False
        await super().prepare(*args, **kwargs)
        self.request.query = _without_token(self.request.query)

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
        except ServerEndedError as error:
            self._finish_with_error(410, str(error), "server_ended")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if self._headers_written:
                raise
            message = f"The inference server ended while it was answering ({error}). {self.upstream.when_lost}"
            self._finish_with_error(502, message, "server_gone")
        finally:
            self._forwarding = None
            self._record_activity()

    async def _forward(self) -> None:
        address = await self.upstream.address()
        try:
            await self._forward_to(address)
        except aiohttp.ClientConnectorError:
            # It died since, and nothing was sent: safe to ask its successor.
            await self._forward_to(await self.upstream.address_anew())

    async def _forward_to(self, address: Address) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        self._token = address.token
        headers = self.proxy_request_headers()
        async with (
            aiohttp.ClientSession(connector=address.connector(), timeout=timeout, auto_decompress=False) as session,
            session.request(
                self.request.method,
                self._target(address),
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
        connection = self.request.connection
        return connection.stream.closed() if isinstance(connection, HTTP1Connection) else True

    # -- WebSocket ---------------------------------------------------------------------------------------------------

    async def open(self, path: str) -> None:
        """Relay a WebSocket; a server that cannot be reached closes it with the reason."""
        try:
            address = await self.upstream.address()
        except (FrontUnavailableError, ServerEndedError) as error:
            self.log.warning("Inference Workbench: %s", error)
            # A close frame holds 123 bytes of reason.
            self.close(1013, str(error).encode()[:120].decode(errors="ignore"))
            return
        self._token = address.token
        if address.uds is not None:
            self.unix_socket = address.uds
            await super().open(path)
            return
        target = URL(address.base)
        self.host_allowlist = [target.host]  # of this machine: see address_of
        try:
            await self.proxy_open(target.host, target.port, path)
        except OSError as error:
            self.close(1013, f"The inference server does not answer: {error}".encode()[:120].decode(errors="ignore"))

    # -- both --------------------------------------------------------------------------------------------------------

    def proxy_request_headers(self) -> httputil.HTTPHeaders:
        """Return the client's headers without Jupyter's credentials, and with the server's token."""
        headers = httputil.HTTPHeaders()
        for name, value in self.request.headers.get_all():
            if name.lower() not in _NOT_FORWARDED:
                headers.add(name, value)
        headers[TOKEN_HEADER] = self._token
        headers["X-Forwarded-Prefix"] = self._prefix
        return headers

    @property
    def _prefix(self) -> str:
        """Of the path, what the server behind does not know."""
        return f"{self.base_url.rstrip('/')}/{self.proxy_base}"

    def _target(self, address: Address) -> URL:
        path = self.request.path[len(self._prefix) :] or "/"
        query = f"?{self.request.query}" if self.request.query else ""
        return URL(f"{address.base}{path}{query}", encoded=True)


class WorkbenchProxyHandler(_ServerProxyHandler):
    """One request to this Jupyter server's own server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.proxy_base = PROXY_NAME

    def initialize(self, upstream: Upstream) -> None:
        """Receive the server that all requests share."""
        self.upstream = upstream


class OtherServerProxyHandler(_ServerProxyHandler):
    """One request to a server that announced itself; the path says which."""

    async def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Say at once, also to a WebSocket, that a server has ended: a browser is told no other way."""
        root = f"{self.base_url.rstrip('/')}/{SERVERS_NAME}/"
        instance = self.request.path[len(root) :].partition("/")[0]
        self.proxy_base = f"{SERVERS_NAME}/{instance}"
        self.upstream = AnnouncedServer(instance)
        await super().prepare(*args, **kwargs)
        if not self._finished:
            try:
                await self.upstream.address()
            except ServerEndedError as error:
                self._finish_with_error(410, str(error), "server_ended")
            except FrontUnavailableError as error:
                self._finish_with_error(503, str(error), "server_unavailable")


def _without_token(query: str) -> str:
    """Drop Jupyter's ``token`` from a query string: it would end up in logs on the way."""
    if "token=" not in query:
        return query
    return urlencode([(name, value) for name, value in parse_qsl(query, keep_blank_values=True) if name != "token"])
