"""A telemetry client in a thread of its own that remembers when it heard of what, whatever happens to the server."""

from __future__ import annotations

import contextlib
import threading
import time
from types import TracebackType

import msgspec
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from inference_server.protocol import (
    PROTOCOL_VERSION,
    Credit,
    Event,
    Frame,
    ServerMessage,
    Snapshot,
    Subscribe,
    TokensEvent,
)


class Watcher:
    """Subscribes to a server; ``heard`` has every event with the moment at which it came."""

    def __init__(self, url: str, token: str) -> None:
        self.heard: list[tuple[float, Event]] = []
        self.dropped = 0
        self._stack = contextlib.ExitStack()
        address = f"{url.rstrip('/').replace('http', 'ws', 1)}/telemetry?token={token}"
        self._socket = self._stack.enter_context(connect(address, max_size=32 << 20, close_timeout=0.2))
        self._socket.send(msgspec.msgpack.encode(Subscribe(protocol=PROTOCOL_VERSION, credits=200, history=0)))
        self.snapshot = msgspec.msgpack.decode(self._socket.recv(20), type=ServerMessage)
        assert isinstance(self.snapshot, Snapshot)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        decoder = msgspec.msgpack.Decoder(ServerMessage)
        try:
            while True:
                message = decoder.decode(self._socket.recv())
                now = time.monotonic()
                if isinstance(message, Frame):
                    self.dropped += message.dropped
                    self.heard += [(now, event) for event in message.events]
                    self._socket.send(msgspec.msgpack.encode(Credit(1)))
        except (WebSocketException, OSError):
            return  # the server is gone, or we are

    def events(self, kind: type) -> list:
        return [event for _, event in list(self.heard) if isinstance(event, kind)]

    def tokens(self) -> dict[tuple[int, int], float]:
        """When each token, by request and index, was heard of."""
        return {
            (request, index): moment
            for moment, event in list(self.heard)
            if isinstance(event, TokensEvent)
            for request, index in zip(event.request, event.index, strict=True)
        }

    def close(self) -> None:
        self._stack.close()
        self._thread.join(5)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
