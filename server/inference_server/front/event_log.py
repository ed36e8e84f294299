"""The front's event log: everything that happened, newest kept, each event encoded once.

Two memories: a ring of the newest events of every kind, bounded in number and in bytes, and the *state* (the newest
event of every request, of the engine and of the switches, and who holds which KV block), which a client needs even if
it missed the event itself.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable

import msgspec

from inference_server.front.kv_state import KvState
from inference_server.protocol import (
    CeilingsEvent,
    DeviceEvent,
    EngineEvent,
    Event,
    FeaturesEvent,
    KvEvents,
    NoticeEvent,
    RecordingEvent,
    RequestEvent,
    RequestState,
    StepEvent,
    TokensEvent,
    TrafficEvent,
)

Tap = Callable[[Event, bytes], None]
"""Gets every event and its encoding, on the event loop; must not block."""
_CACHELESS = {"starting", "restarting", "failed", "stopped"}
"""States in which the engine's process, and with it the KV cache, is not there."""
ENDED: frozenset[RequestState] = frozenset({"finished", "cancelled", "failed"})
_RECENT_REQUESTS = 200
_RECENT_RECORDINGS = 20


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One logged event in its place. There are many, and none for the garbage collector to look through."""

    position: int
    encoded: msgspec.Raw
    is_history: bool
    """A step, its tokens or a notice, as opposed to a change of state."""
    is_kv: bool
    """What happened to KV blocks: worth nothing to who missed some of it."""
    size: int
    """Encoded bytes."""


class EventLog:
    """Append-only sequence of events with bounded memory.

    Parameters
    ----------
    max_events, max_bytes
        Bounds of the ring; the oldest events leave it first.
    """

    def __init__(self, *, max_events: int, max_bytes: int) -> None:
        self._ring: deque[Entry] = deque()
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._bytes = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._next = 0
        self._requests: OrderedDict[int, tuple[Entry, RequestEvent]] = OrderedDict()
        self._ended: deque[int] = deque()
        self._engine: tuple[Entry, EngineEvent] | None = None
        self._features: tuple[Entry, FeaturesEvent] | None = None
        self._ceilings: tuple[Entry, CeilingsEvent] | None = None
        self._traffic: tuple[Entry, TrafficEvent] | None = None
        self._device: DeviceEvent | None = None
        self._recordings: dict[str, tuple[Entry, RecordingEvent]] = {}
        self._kv = KvState()
        self._listeners: set[Callable[[], None]] = set()
        self._tap: Tap | None = None
        self.spent_ns = 0
        """What appending has cost so far."""
        self.appended_bytes = 0
        """Encoded bytes of all events so far."""

    @property
    def end(self) -> int:
        """Position of the event that comes next."""
        return self._next

    @property
    def start(self) -> int:
        """Position of the oldest event in the ring."""
        return self._next - len(self._ring)

    @property
    def size_bytes(self) -> int:
        """Encoded bytes in the ring."""
        return self._bytes

    @property
    def engine(self) -> EngineEvent | None:
        """The engine's newest state."""
        return self._engine[1] if self._engine else None

    @property
    def features(self) -> FeaturesEvent | None:
        """The newest switch."""
        return self._features[1] if self._features else None

    @property
    def ceilings(self) -> CeilingsEvent | None:
        """What the machine can do at best, once measured."""
        return self._ceilings[1] if self._ceilings else None

    @property
    def kv(self) -> KvEvents | None:
        """Operations that lead from nothing to the KV cache as it is now; ``None`` while no block is logged."""
        return self._kv.describe()

    @property
    def device(self) -> DeviceEvent | None:
        """The newest sample of the hardware."""
        return self._device

    @property
    def traffic(self) -> TrafficEvent | None:
        """What the load generator does, or did last."""
        return self._traffic[1] if self._traffic else None

    @property
    def recordings(self) -> list[RecordingEvent]:
        """The newest event of the latest recordings, oldest first."""
        return [event for _, event in self._recordings.values()]

    @property
    def requests(self) -> list[RequestEvent]:
        """The newest event of every active request and of the most recent ended ones, oldest request first."""
        return [event for _, event in self._requests.values()]

    def knows(self, identifier: str) -> bool:
        """Return whether an active or recent request has this id (that of all its choices too) or handle."""
        own_or_choice = re.compile(re.escape(identifier) + r"(-\d+)?")
        return any(
            identifier == str(handle) or own_or_choice.fullmatch(event.id)
            for handle, (_, event) in self._requests.items()
        )

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call ``listener`` after every append, on the event loop; return the function that ends it."""
        self._listeners.add(listener)
        return lambda: self._listeners.discard(listener)

    def tap(self, tap: Tap | None) -> None:
        """Give every event from now on to ``tap`` as well; ``None`` ends that."""
        self._tap = tap

    def append(self, event: Event) -> None:
        """Add an event and wake the listeners. Takes some microseconds and never blocks."""
        begin = time.monotonic_ns()
        encoded = self._encoder.encode(event)
        entry = Entry(
            position=self._next,
            encoded=msgspec.Raw(encoded),
            is_history=isinstance(event, StepEvent | TokensEvent | NoticeEvent),
            is_kv=isinstance(event, KvEvents),
            size=len(encoded),
        )
        self._next += 1
        self._ring.append(entry)
        self._bytes += entry.size
        while len(self._ring) > self._max_events or (self._bytes > self._max_bytes and len(self._ring) > 1):
            self._bytes -= self._ring.popleft().size
        if not entry.is_history:
            self._keep_state(entry, event)
        if self._tap is not None:
            self._tap(event, encoded)
        self.appended_bytes += entry.size
        self.spent_ns += time.monotonic_ns() - begin
        for listener in self._listeners:
            listener()

    def since(self, position: int, *, max_bytes: int) -> list[Entry]:
        """Return the events from ``position`` on, oldest first: all of them, or the newest that fit (one at least)."""
        entries: list[Entry] = []
        size = 0
        for entry in reversed(self._ring):
            size += entry.size
            if entry.position < position or (entries and size > max_bytes):
                break
            entries.append(entry)
        entries.reverse()
        return entries

    def history(self, *, max_events: int, max_bytes: int) -> list[Entry]:
        """Return the newest steps and tokens, oldest first, within both bounds."""
        entries: list[Entry] = []
        size = 0
        for entry in reversed(self._ring):
            if not entry.is_history:
                continue
            size += entry.size
            if len(entries) >= max_events or size > max_bytes:
                break
            entries.append(entry)
        entries.reverse()
        return entries

    def state_between(self, begin: int, end: int) -> list[Entry]:
        """Return the newest state events whose position is in ``[begin, end)``, oldest first.

        A client that missed that stretch of the log knows every state again once it has these.
        """
        entries = [entry for entry, _ in self._requests.values()]
        entries += [
            kept[0] for kept in (self._engine, self._features, self._ceilings, self._traffic) if kept is not None
        ]
        entries += [entry for entry, _ in self._recordings.values()]
        return sorted((e for e in entries if begin <= e.position < end), key=lambda entry: entry.position)

    def _keep_state(self, entry: Entry, event: Event) -> None:
        if isinstance(event, RequestEvent):
            known = self._requests.get(event.request)
            self._requests[event.request] = (entry, event)
            if event.state in ENDED and (known is None or known[1].state not in ENDED):
                self._ended.append(event.request)
                while len(self._ended) > _RECENT_REQUESTS:
                    self._requests.pop(self._ended.popleft(), None)
        elif isinstance(event, KvEvents):
            self._kv.apply(event)
        elif isinstance(event, EngineEvent):
            self._engine = (entry, event)
            if event.state in _CACHELESS:
                self._kv.forget()
        elif isinstance(event, FeaturesEvent):
            self._features = (entry, event)
            if event.values.get("instrumentation", "full") != "full":
                self._kv.forget()  # nobody tells any more what happens to the blocks
        elif isinstance(event, CeilingsEvent):
            self._ceilings = (entry, event)
        elif isinstance(event, TrafficEvent):
            self._traffic = (entry, event)
        elif isinstance(event, DeviceEvent):
            self._device = event
        elif isinstance(event, RecordingEvent):
            self._recordings[event.id] = (entry, event)
            while len(self._recordings) > _RECENT_RECORDINGS:
                del self._recordings[next(iter(self._recordings))]
