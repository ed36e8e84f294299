"""Who may talk to the front: the token, the page a browser sends a request from, and what a body may be.

Plain ASGI, so that nothing between the engine and the client buffers a stream. Tokens are compared in constant time and
never logged.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference_server.front.errors import ApiError

TOKEN_HEADER = "x-inference-workbench-token"  # noqa: S105 -- a header's name
PUBLIC_PATHS = frozenset({"/", "/health"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Gate:
    """ASGI middleware that lets a request in or answers it with 401, 403, 413 or 415 and a reason.

    Parameters
    ----------
    app
        What is behind the gate.
    token
        The secret that every request but those of :data:`PUBLIC_PATHS` must carry.
    allowed_origins
        Origins that are welcome besides the host a request was sent to; ``"*"`` welcomes any.
    max_body_bytes
        Longest request body, in bytes.
    """

    def __init__(self, app: ASGIApp, *, token: str, allowed_origins: Iterable[str], max_body_bytes: int) -> None:
        self._app = app
        self._token = token.encode()
        self._allowed_origins = frozenset(origin.rstrip("/").lower() for origin in allowed_origins)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            await refuse(scope, receive, send, error)
            return
        if scope["type"] == "http":
            receive = _bounded(receive, self._max_body_bytes)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self._check_origin(headers)
        if scope["path"] not in PUBLIC_PATHS:
            self._check_token(headers, scope["query_string"])
        if scope["type"] == "http":
            self._check_body(headers)

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or "*" in self._allowed_origins or origin.lower() in self._allowed_origins:
            return
        # A browser sets none of these for a page elsewhere, so whichever a reverse proxy kept may vouch for the page.
        hosts = [headers.get("host", ""), *headers.get("x-forwarded-host", "").split(",")]
        if any(_same_host(origin, host.strip()) for host in hosts if host.strip()):
            return
        raise ApiError(
            403,
            f"A page from {origin!r} may not use this server. If it should, start the server with that origin in "
            "INFERENCE_WORKBENCH_ALLOWED_ORIGINS (a JSON list).",
            code="foreign_origin",
        )

    def _check_token(self, headers: Headers, query_string: bytes) -> None:
        given = _given_token(headers, query_string)
        if given is None:
            raise ApiError(
                401,
                "This server needs its token: send it as 'Authorization: Bearer TOKEN' or '?token=TOKEN'. "
                "'inference-workbench status' prints the URL that carries it.",
                code="missing_token",
            )
        if not hmac.compare_digest(given.encode(), self._token):
            raise ApiError(
                401,
                "The token is not this server's. It changes whenever the server is started without a chosen one; "
                "'inference-workbench status' prints the current URL.",
                code="invalid_api_key",
            )

    def _check_body(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        has_body = length != "0" or "transfer-encoding" in headers
        if not has_body:
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415,
                f"The body is {kind or 'of no stated type'}; this server reads JSON only. "
                "Send 'Content-Type: application/json'.",
                code="unsupported_media_type",
            )
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)


def _given_token(headers: Headers, query_string: bytes) -> str | None:
    """Return the token of a request. The proxy's own header wins: the other two may hold Jupyter's credentials."""
    if (token := headers.get(TOKEN_HEADER)) is not None:
        return token
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value:
        return value.strip()
    values = parse_qs(query_string.decode("latin-1")).get("token")
    return values[0] if values else None


def _same_host(origin: str, host: str) -> bool:
    parts = urlsplit(origin)
    if not parts.hostname:
        return False  # "null", or something that is no origin
    default = _DEFAULT_PORTS.get(parts.scheme)
    try:
        there = urlsplit(f"//{host}")
        ports = parts.port or default, there.port or default
    except ValueError:
        return False
    return parts.hostname == there.hostname and ports[0] == ports[1]


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is longer than {limit:,} bytes, the most this server reads.", code="body_too_large")


def _bounded(receive: Receive, limit: int) -> Receive:
    """Stop reading a body of unstated length once it is too long."""
    total = 0

    async def bounded() -> Message:
        nonlocal total
        message = await receive()
        if message["type"] == "http.request":
            total += len(message.get("body", b""))
            if total > limit:
                error = _too_large(limit)
                # The framework passes this class on as it is, and turns any other into a plain 400.
                raise HTTPException(error.status, error.detail.message)
        return message

    return bounded


async def refuse(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    """Answer a request with an error, whether it asked for HTTP or for a WebSocket."""
    headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if scope["type"] == "websocket":
        await receive()  # the connect message comes before any answer
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": error.detail.message[:120]})
            return
    start = "http.response.start" if scope["type"] == "http" else "websocket.http.response.start"
    body = "http.response.body" if scope["type"] == "http" else "websocket.http.response.body"
    await send({"type": start, "status": error.status, "headers": headers})
    await send({"type": body, "body": error.body()})
