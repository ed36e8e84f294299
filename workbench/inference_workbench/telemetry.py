"""The background thread that keeps one WebSocket open and the event store up to date.

Owns connecting, credits, the clock offset and coming back after a failure. Knows nothing of what the events mean.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from typing import Literal

import msgspec
import websockets.sync.client as websocket_client
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from inference_server.protocol import (
    PROTOCOL_VERSION,
    ClockReply,
    ClockRequest,
    Credit,
    Event,
    Frame,
    ServerError,
    ServerMessage,
    Snapshot,
    Subscribe,
)
from inference_workbench.endpoint import Endpoint
from inference_workbench.store import EventStore

ConnectionState = Literal["connecting", "open", "closed"]
_CREDITS = 64
_SILENCE_S = 60.0
"""The server says something every 20 s; three of those missing mean that nobody is there."""
_BACK_OFF_S = (0.1, 5.0)
_CLOCK_SAMPLES = 5

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ServerMessage)


class Telemetry:
    """Follows one server's telemetry until closed.

    Parameters
    ----------
    endpoint
        Called for each attempt to connect: the address may change when a server is started again.
    store
        What to feed.
    min_interval_ms
        The server's pause between two frames: bounds the work, and delays what is known by as much.
    """

    def __init__(self, endpoint: Callable[[], Endpoint], store: EventStore, min_interval_ms: int = 20) -> None:
        self._endpoint = endpoint
        self._store = store
        self._min_interval_ms = min_interval_ms
        self._closing = threading.Event()
        self._opened = threading.Event()
        self._socket: websocket_client.ClientConnection | None = None
        self._listeners: list[Callable[[Snapshot | list[Event]], None]] = []
        self._clock: list[tuple[int, int]] = []
        self.state: ConnectionState = "connecting"
        self.reason = ""
        """Why the connection is not open, for a person."""
        self.connections = 0
        """How often it was opened: more than one means that it was lost and found again."""
        self._thread = threading.Thread(target=self._run, name="inference-telemetry", daemon=True)
        self._thread.start()

    def wait_open(self, timeout_s: float) -> bool:
        """Wait for the connection's first snapshot; whether it came."""
        return self._opened.wait(timeout_s)

    def listen(self, listener: Callable[[Snapshot | list[Event]], None]) -> Callable[[], None]:
        """Call ``listener`` on the telemetry thread with each snapshot and batch of events; returns how to stop it."""
        self._listeners.append(listener)

        def stop() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return stop

    @property
    def clock_offset_ns(self) -> int | None:
        """Server's clock minus this process's ``time.monotonic_ns()``, or ``None`` while unknown.

        From the exchange with the quickest round trip, as NTP does it; the error is at most half of that.
        """
        return min(self._clock)[1] if self._clock else None

    def close(self) -> None:
        """Close the connection and end the thread."""
        self._closing.set()
        socket = self._socket
        if socket is not None:
            with contextlib.suppress(WebSocketException, OSError):
                socket.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)

    def _run(self) -> None:
        shortest, longest = _BACK_OFF_S
        delay = shortest
        while not self._closing.is_set():
            try:
                with self._endpoint().websocket("/telemetry") as socket:
                    self._socket = socket
                    self._follow(socket)
            except InvalidStatus as error:
                self.reason = f"the server refused the telemetry connection ({error.response.status_code})"
            except (WebSocketException, OSError, TimeoutError, msgspec.MsgspecError) as error:
                self.reason = str(error) or type(error).__name__
            finally:
                self._socket = None
            if self.state == "open":
                delay = shortest
            self.state = "closed"
            self._opened.clear()
            with self._store.changed:
                self._store.changed.notify_all()
            self._closing.wait(delay * random.uniform(0.5, 1.0))  # noqa: S311 -- spreads reconnects, hides nothing
            delay = min(longest, delay * 2)

    def _follow(self, socket: websocket_client.ClientConnection) -> None:
        subscribe = Subscribe(protocol=PROTOCOL_VERSION, credits=_CREDITS, min_interval_ms=self._min_interval_ms)
        socket.send(_encoder.encode(subscribe))
        self._clock.clear()
        while not self._closing.is_set():
            try:
                raw = socket.recv(timeout=_SILENCE_S)
            except ConnectionClosed as closed:
                self.reason = closed.rcvd.reason if closed.rcvd and closed.rcvd.reason else "the server ended"
                return
            if isinstance(raw, str):
                continue
            received = time.monotonic_ns()
            match _decoder.decode(raw):
                case Snapshot() as snapshot:
                    self._store.ingest_snapshot(snapshot)
                    self.state, self.reason = "open", ""
                    self.connections += 1
                    self._opened.set()
                    self._tell(snapshot)
                    self._ask_clock(socket)
                case Frame() as frame:
                    self._store.ingest_frame(frame)
                    socket.send(_encoder.encode(Credit(1)))
                    self._tell(frame.events)
                case ClockReply() as reply:
                    sent = int(reply.client_time)
                    self._clock.append((received - sent, reply.now_ns - (sent + received) // 2))
                    if len(self._clock) < _CLOCK_SAMPLES:
                        self._ask_clock(socket)
                case ServerError() as error:
                    self.reason = error.message

    def _tell(self, news: Snapshot | list[Event]) -> None:
        for listener in tuple(self._listeners):
            listener(news)

    @staticmethod
    def _ask_clock(socket: websocket_client.ClientConnection) -> None:
        socket.send(_encoder.encode(ClockRequest(float(time.monotonic_ns()))))
