"""``GET <base_url>/inference-workbench-servers``: the inference servers of this user that run, for a page to choose.

Tokens, addresses and paths stay here: the page names an instance and the proxy finds the rest.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import aiohttp
import msgspec
from tornado import web

from inference_server.discovery import Origin, ServerFile, list_servers
from inference_workbench.jupyter.front_process import FrontProcess, FrontUnavailableError
from inference_workbench.jupyter.guard import Guarded
from inference_workbench.jupyter.handler import TOKEN_HEADER
from inference_workbench.jupyter.upstream import address_of

_ANSWER_TIMEOUT_S = 2.0
"""A server answers in milliseconds; one that is stopped in a debugger must not hide the others for long."""


class ListedServer(msgspec.Struct, frozen=True, kw_only=True):
    """What a page may know about one server."""

    instance: str
    origin: Origin
    own: bool
    """Whether this Jupyter server started it: it is the one at ``inference-workbench/``."""
    kind: Literal["url", "uds"]
    pid: int
    version: str
    started: float
    """Seconds since the epoch."""
    model: str | None
    """``None`` while it is loaded, and where the server does not answer."""
    engine: str | None
    """State of the engine; ``None`` where the server does not answer."""


class ServersHandler(Guarded):
    """Lists the servers. Starts none, and does not count as activity: a page asks again and again."""

    def initialize(self, front: FrontProcess) -> None:
        """Receive the front, to tell its server from the others."""
        self._front = front

    @web.authenticated
    async def get(self) -> None:
        """Answer ``{"servers": [ListedServer]}``, newest first."""
        servers = await asyncio.gather(*(self._describe(server) for server in list_servers()))
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        self.finish(msgspec.json.encode({"servers": servers}))

    async def _describe(self, server: ServerFile) -> ListedServer:
        info = await _info(server)
        return ListedServer(
            instance=server.instance,
            origin=server.origin,
            own=server.uds == str(self._front.socket),
            kind="url" if server.uds is None else "uds",
            pid=server.pid,
            version=server.version,
            started=server.started,
            model=(info.get("model") or {}).get("name"),
            engine=(info.get("engine") or {}).get("state"),
        )


async def _info(server: ServerFile) -> dict[str, Any]:
    """Ask a server what it serves; nothing if it does not say."""
    try:
        address = address_of(server)
        timeout = aiohttp.ClientTimeout(total=_ANSWER_TIMEOUT_S)
        async with (
            aiohttp.ClientSession(connector=address.connector(), timeout=timeout) as session,
            session.get(f"{address.base}/info", headers={TOKEN_HEADER: address.token}) as answer,
        ):
            info = json.loads(await answer.read())
    except (FrontUnavailableError, aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}
