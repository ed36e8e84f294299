"""The servers behind the proxy: where each is at this moment, and what to say when it is not there any more.

Two kinds: the one that this Jupyter server starts, and those that announced themselves by a file of this user (see
:mod:`inference_server.discovery`). Nothing else can be reached: a page names an instance, never an address.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import aiohttp

from inference_server.discovery import LOOPBACK, ServerFile, find_server
from inference_workbench.jupyter.front_process import FrontProcess, FrontUnavailableError


class ServerEndedError(RuntimeError):
    """The server that was asked for does not run any more, and will not come back under this name."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens, and its token, which no browser ever sees."""

    token: str
    uds: str | None
    url: str | None
    """Without a slash at the end; ``None`` for a server on a Unix socket."""

    @property
    def base(self) -> str:
        """What paths are appended to. On a Unix socket the host says nothing."""
        return self.url or "http://localhost"

    def connector(self) -> aiohttp.BaseConnector:
        """Return a way to connect; the caller's session closes it."""
        return aiohttp.TCPConnector() if self.uds is None else aiohttp.UnixConnector(self.uds)


class Upstream(Protocol):
    """One server behind the proxy."""

    when_lost: str
    """What to say to whoever was being answered when it ended."""

    async def address(self) -> Address:
        """Return where it is."""

    async def address_anew(self) -> Address:
        """Return where it is after it refused a connection."""


class OwnServer:
    """The server of this Jupyter server: whoever asks for it starts it."""

    when_lost = "Ask again: it is started anew."

    def __init__(self, front: FrontProcess) -> None:
        self._front = front

    async def address(self) -> Address:
        """Start it if it does not run."""
        return Address(token=self._front.token, uds=str(await self._front.ensure()), url=None)

    async def address_anew(self) -> Address:
        """Start another in its place."""
        return Address(token=self._front.token, uds=str(await self._front.replace_silent()), url=None)


class AnnouncedServer:
    """One start of a server that somebody else runs. It is not ours to start again."""

    when_lost = "It is not started again from here."

    def __init__(self, instance: str) -> None:
        self._instance = instance

    async def address(self) -> Address:
        """Read it from its file, each time: what has ended must not get a token that was meant for it.

        Raises
        ------
        ServerEndedError
            If it does not run.
        """
        server = find_server(self._instance)
        if server is None:
            raise ServerEndedError("This inference server has ended. Choose another one.")
        return address_of(server)

    async def address_anew(self) -> Address:
        """Say whether it has ended or only does not listen.

        Raises
        ------
        ServerEndedError, FrontUnavailableError
            Always one of them.
        """
        await self.address()
        raise FrontUnavailableError("This inference server still runs, but it does not answer.")


def address_of(server: ServerFile) -> Address:
    """Take address and token from a server's file.

    Raises
    ------
    FrontUnavailableError
        If the file names another machine: what Jupyter lets a page reach is this machine's.
    """
    if server.url is not None and urlsplit(server.url).hostname not in LOOPBACK:
        raise FrontUnavailableError("This inference server is on another machine, where Jupyter does not reach.")
    return Address(token=server.token, uds=server.uds, url=server.url)
