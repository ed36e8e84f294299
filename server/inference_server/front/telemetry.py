"""The telemetry WebSocket: each client reads the event log at its own pace.

A client is a cursor into the log, not a queue, so that a slow one costs no memory and delays nobody: when it comes
back for more, it gets the newest events that fit into a frame and the number of those it missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from inference_server.features import presets
from inference_server.front.event_log import EventLog
from inference_server.protocol import (
    PROTOCOL_VERSION,
    Capacity,
    Ceilings,
    ClientMessage,
    ClockReply,
    ClockRequest,
    Credit,
    DeviceEvent,
    EngineEvent,
    FeaturePreset,
    FeaturesEvent,
    FeatureSpec,
    KvEvents,
    Message,
    ModelInfo,
    RecordingEvent,
    RequestEvent,
    ServerError,
    ServerInfo,
    Subscribe,
    TrafficEvent,
)

_FRAME_BYTES = 1 << 20
"""Most event bytes in a frame; what is over it goes to the next one."""
_BACKLOG_BYTES = 4 << 20
"""How far a client may lag before its oldest events are dropped. Proxies refuse messages of 10 MiB."""
_NEW_S = 0.01
"""An event that was logged so short a time ago may go: nobody sees the difference."""
_MAX_CREDITS = 256
_MAX_INTERVAL_MS = 10_000
_SILENCE_S = 20.0
_SUBSCRIBE_WITHIN_S = 30.0


class _RawSnapshot(Message, frozen=True, tag="snapshot", kw_only=True):
    """:class:`~inference_server.protocol.Snapshot` whose history is encoded already."""

    seq: int
    now_ns: int
    server: ServerInfo
    engine: EngineEvent
    model: ModelInfo | None
    capacity: Capacity | None
    specs: tuple[FeatureSpec, ...]
    features: FeaturesEvent | None
    requests: list[RequestEvent]
    history: list[msgspec.Raw]
    recordings: list[RecordingEvent]
    traffic: TrafficEvent | None
    device: DeviceEvent | None
    ceilings: Ceilings | None
    presets: tuple[FeaturePreset, ...]
    kv: KvEvents | None


class _RawFrame(Message, frozen=True, tag="frame", kw_only=True):
    """:class:`~inference_server.protocol.Frame` whose events are encoded already."""

    seq: int
    now_ns: int
    dropped: int
    events: list[msgspec.Raw]


@dataclass(frozen=True, slots=True)
class Served:
    """What a snapshot says about the server at this moment."""

    server: ServerInfo
    engine: EngineEvent
    model: ModelInfo | None
    capacity: Capacity | None
    specs: tuple[FeatureSpec, ...]


class TelemetryHub:
    """Serves the event log to any number of WebSocket clients.

    Parameters
    ----------
    log
        What is served.
    served
        Describes the server for a snapshot.
    """

    def __init__(self, log: EventLog, served: Callable[[], Served]) -> None:
        self._log = log
        self._served = served
        self.spent_ns = 0
        """What making frames has cost so far."""

    async def handle(self, websocket: WebSocket) -> None:
        """Serve one accepted connection until it ends."""
        client = _Client(websocket, self._log, self._count_cost)
        try:
            subscribe = await asyncio.wait_for(client.first_message(), _SUBSCRIBE_WITHIN_S)
            await client.send(self._snapshot(client, subscribe))
        except TimeoutError:
            await websocket.close(1008, "No subscribe message came.")
            return
        except WebSocketDisconnect:
            return
        stop_listening = self._log.listen(client.wake)
        sender = asyncio.create_task(client.send_frames())
        receiver = asyncio.create_task(client.receive_messages())
        try:
            await asyncio.wait({sender, receiver}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop_listening()
            for task in (sender, receiver):
                task.cancel()
            await asyncio.gather(sender, receiver, return_exceptions=True)

    def _count_cost(self, spent_ns: int) -> None:
        self.spent_ns += spent_ns

    def _snapshot(self, client: _Client, subscribe: Subscribe) -> bytes:
        """Make the snapshot and put the client's cursor right behind it."""
        client.accept(subscribe, self._log.end)
        history = self._log.history(max_events=subscribe.history, max_bytes=_BACKLOG_BYTES)
        served = self._served()
        snapshot = _RawSnapshot(
            seq=0,
            now_ns=time.monotonic_ns(),
            server=served.server,
            engine=served.engine,
            model=served.model,
            capacity=served.capacity,
            specs=served.specs,
            features=self._log.features,
            requests=self._log.requests,
            history=[entry.encoded for entry in history],
            recordings=self._log.recordings,
            traffic=self._log.traffic,
            device=self._log.device,
            ceilings=self._log.ceilings.ceilings if self._log.ceilings else None,
            presets=presets(served.specs),
            kv=self._log.kv,
        )
        return msgspec.msgpack.encode(snapshot)


class _Client:
    """One connection: its cursor, its credits and its pace."""

    def __init__(self, websocket: WebSocket, log: EventLog, count_cost: Callable[[int], None]) -> None:
        self._websocket = websocket
        self._count_cost = count_cost
        self._log = log
        self._decoder = msgspec.msgpack.Decoder(ClientMessage)
        self._encoder = msgspec.msgpack.Encoder()
        self._wake = asyncio.Event()
        self._cursor = 0
        self._credits = 0
        self._logged_at = 0.0
        self._interval_s = 0.0
        self._seq = 0
        self._lost_kv = False

    def wake(self) -> None:
        """Something was logged."""
        self._logged_at = time.monotonic()
        self._wake.set()

    def accept(self, subscribe: Subscribe, cursor: int) -> None:
        """Start from a subscription."""
        self._cursor = cursor
        self._credits = min(max(subscribe.credits, 0), _MAX_CREDITS)
        self._interval_s = min(max(subscribe.min_interval_ms, 0), _MAX_INTERVAL_MS) / 1000

    async def send(self, data: bytes) -> None:
        """Send one binary message; waits while the connection is congested."""
        try:
            await self._websocket.send_bytes(data)
        except (RuntimeError, OSError) as error:  # the connection ended under our hands
            raise WebSocketDisconnect(1006) from error

    async def first_message(self) -> Subscribe:
        """Return the subscription, answering the clock and complaining about anything else meanwhile."""
        while True:
            message = await self._receive()
            if isinstance(message, Subscribe):
                if message.protocol == PROTOCOL_VERSION:
                    return message
                older, cure = (
                    ("client", "Reload the page, or restart the kernel, so that it runs the installed version")
                    if message.protocol < PROTOCOL_VERSION
                    else ("server", "Restart the server so that it runs the installed version")
                )
                await self._complain(
                    f"This server speaks telemetry protocol {PROTOCOL_VERSION}, the client speaks {message.protocol}: "
                    f"the {older} is too old. {cure}; if that does not help, install the same version of "
                    "inference-workbench on both sides."
                )
            elif isinstance(message, ClockRequest):
                await self._tell_time(message)
            elif message is not None:
                await self._complain("Say 'subscribe' first.")

    async def receive_messages(self) -> None:
        """Handle what the client says until it leaves."""
        try:
            while True:
                message = await self._receive()
                if isinstance(message, Credit):
                    self._credits = min(self._credits + max(message.frames, 0), _MAX_CREDITS)
                    self._wake.set()
                elif isinstance(message, ClockRequest):
                    await self._tell_time(message)
                elif isinstance(message, Subscribe):
                    await self._complain("This connection has subscribed already; open another one.")
        except WebSocketDisconnect:
            return

    async def send_frames(self) -> None:
        """Send frames whenever there is something to say, a credit, and the interval has passed."""
        try:
            while True:
                await self._wait_for_something()
                self._credits -= 1
                await self.send(self._next_frame())
                if self._interval_s:
                    await asyncio.sleep(self._interval_s)
                    await self._wait_for_news()
        except WebSocketDisconnect:
            return

    async def _wait_for_news(self) -> None:
        """Where the newest event is no longer new, let the next ones come too, for one more interval at most.

        A client that wants few frames would be shown tokens that are up to a step old, though others follow at once.
        """
        end = self._log.end
        if self._cursor == end or time.monotonic() - self._logged_at <= _NEW_S:
            return
        deadline = time.monotonic() + self._interval_s
        while self._log.end == end and (left := deadline - time.monotonic()) > 0:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), left)
        # A step's tokens follow its record one by one, as their connections take them.
        await asyncio.sleep(_NEW_S / 2)

    async def _wait_for_something(self) -> None:
        deadline = time.monotonic() + _SILENCE_S
        while True:
            self._wake.clear()
            silent = time.monotonic() >= deadline
            if self._credits > 0 and (self._cursor < self._log.end or silent):
                return
            try:
                await asyncio.wait_for(self._wake.wait(), None if silent else deadline - time.monotonic())
            except TimeoutError:
                continue

    def _next_frame(self) -> bytes:
        """Encode the next events, and move the cursor behind them."""
        begin = time.monotonic_ns()
        pending = self._log.since(self._cursor, max_bytes=_BACKLOG_BYTES)
        events: list[msgspec.Raw] = []
        dropped = 0
        if pending and (missed := pending[0].position - self._cursor):
            states = self._log.state_between(self._cursor, pending[0].position)
            events += [entry.encoded for entry in states]
            dropped = missed - len(states)
            self._lost_kv = True
        size = 0
        for entry in pending:
            size += entry.size
            if size > _FRAME_BYTES and entry is not pending[0]:
                break
            if not (entry.is_kv and self._lost_kv):
                events.append(entry.encoded)
            self._cursor = entry.position + 1
        if self._lost_kv and self._cursor == self._log.end:
            # Operations say something only to who knows all before them: the whole state, now that nothing is pending.
            self._lost_kv = False
            if (kv := self._log.kv) is not None:
                events.append(msgspec.Raw(self._encoder.encode(kv)))
        self._seq += 1
        now = time.monotonic_ns()
        frame = self._encoder.encode(_RawFrame(seq=self._seq, now_ns=now, dropped=dropped, events=events))
        self._count_cost(time.monotonic_ns() - begin)
        return frame

    async def _receive(self) -> ClientMessage | None:
        """Return the next message, or ``None`` after complaining about one that cannot be understood."""
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        data = message.get("bytes")
        if data is None:
            await self._complain("Messages are binary MessagePack, not text.")
            return None
        try:
            decoded: ClientMessage = self._decoder.decode(data)
        except msgspec.MsgspecError as error:
            await self._complain(f"That message could not be understood: {error}")
            return None
        return decoded

    async def _complain(self, message: str) -> None:
        await self.send(self._encoder.encode(ServerError(message)))

    async def _tell_time(self, request: ClockRequest) -> None:
        await self.send(self._encoder.encode(ClockReply(request.client_time, time.monotonic_ns())))
