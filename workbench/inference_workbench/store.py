"""What the server told us, in bounded columns: tokens, steps, each request's share of each step, requests, switches.

Fed by the telemetry thread, read by everybody else. When a table is full its oldest rows are overwritten; a
:class:`~inference_workbench.run.Run` copies its rows when it ends, so it does not lose them later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from inference_server.protocol import (
    PARTS,
    EngineEvent,
    Event,
    FeaturesEvent,
    Frame,
    NoticeEvent,
    RequestEvent,
    Snapshot,
    StepEvent,
    TaskEvent,
    TokensEvent,
)

ENDED = frozenset({"finished", "cancelled", "failed"})
_KEPT_REQUESTS = 10_000

_TOKENS = {
    "request": "int64",
    "index": "int64",
    "token_id": "int64",
    "text": "object",
    "logprob": "float64",
    "sent_ns": "int64",
    "latency_ns": "int64",
    "step": "int64",
    **dict.fromkeys((f"{part}_ns" for part in PARTS), "float64"),
    "origin": "int64",
}
_STEPS = {
    "step": "int64",
    "epoch": "int64",
    "begin_ns": "int64",
    "end_ns": "int64",
    "schedule_ns": "int64",
    "prepare_ns": "int64",
    "forward_ns": "int64",
    "sample_ns": "int64",
    "update_ns": "int64",
    "path": "object",
    "batch_size": "int64",
    "scheduled": "int64",
    "running": "int64",
    "waiting": "int64",
    "idle_slots": "int64",
    "kv_total_blocks": "int64",
    "kv_used_blocks": "int64",
    "kv_cached_blocks": "int64",
    "kv_filled_slots": "int64",
    "kv_block_size": "int64",
    "before_ns": "int64",
    "draft_ns": "int64",
    "device_ns": "float64",
    "attention_ns": "float64",
    "read_bytes": "float64",
    "flops": "float64",
    "speculation": "object",
}
_SHARES = {
    "request": "int64",
    "step": "int64",
    "begin_ns": "int64",
    "start": "int64",
    "scheduled": "int64",
    "kind": "int64",
    "drafted": "int64",
    "accepted": "int64",
}


class RingTable:
    """Columns of equal length that keep the newest ``capacity`` rows."""

    def __init__(self, columns: Mapping[str, str], capacity: int) -> None:
        self._columns: dict[str, npt.NDArray[Any]] = {
            name: np.zeros(capacity, dtype=dtype) for name, dtype in columns.items()
        }
        self._capacity = capacity
        self._total = 0

    def __len__(self) -> int:
        return min(self._total, self._capacity)

    def extend(self, count: int, **values: Sequence[Any] | npt.NDArray[Any] | Any) -> None:
        """Append ``count`` rows; a scalar is repeated."""
        places = (self._total + np.arange(count)) % self._capacity
        for name, column in self._columns.items():
            column[places] = values[name]
        self._total += count

    def frame(self, **equal: int | npt.NDArray[Any]) -> pd.DataFrame:
        """Return a copy of the rows, oldest first, of which each named column equals (or is among) the given value."""
        order = np.arange(self._total - len(self), self._total) % self._capacity
        for name, wanted in equal.items():
            found = self._columns[name][order]
            order = order[np.isin(found, wanted) if isinstance(wanted, np.ndarray) else found == wanted]
        return pd.DataFrame({name: column[order] for name, column in self._columns.items()})


class EventStore:
    """All events of one server since we connected to it (and the history it sent then). Thread-safe.

    Parameters
    ----------
    max_tokens, max_steps
        Rows kept. A share table of four times ``max_steps`` rows says which requests a step worked on.
    """

    def __init__(self, max_tokens: int = 500_000, max_steps: int = 250_000) -> None:
        self._sizes = (max_tokens, max_steps)
        self.changed = threading.Condition()
        """Notified after every message; also the lock of everything here."""
        self._clear(instance=None)

    def _clear(self, instance: str | None) -> None:
        max_tokens, max_steps = self._sizes
        self.instance = instance
        self.dropped = 0
        """Events the server left out because we were slow, plus what was missed while disconnected, if it is known."""
        self._tokens = RingTable(_TOKENS, max_tokens)
        self._steps = RingTable(_STEPS, max_steps)
        self._shares = RingTable(_SHARES, 4 * max_steps)
        self._requests: dict[int, RequestEvent] = {}
        self._handles: dict[str, int] = {}
        self._features: dict[int, FeaturesEvent] = {}
        self.epoch = -1
        self.engine: EngineEvent | None = None
        self.notices: list[NoticeEvent] = []
        """What the engine had to say to a person, oldest first."""
        self._tasks: dict[str, TaskEvent] = {}
        self._newest_begin_ns = -1
        self._known_tokens: dict[int, set[int]] = {}
        self._tokens_seen: dict[int, int] = {}
        self._last_sent_step: dict[int, int] = {}
        self._steps_seen: dict[int, int] = {}

    # -- in ----------------------------------------------------------------------------------------------------------

    def ingest_snapshot(self, snapshot: Snapshot) -> None:
        """Take in the first message of a connection. Another server's replaces everything that was known."""
        with self.changed:
            if snapshot.server.instance != self.instance:
                self._clear(snapshot.server.instance)
            self.engine = snapshot.engine
            if snapshot.features is not None:
                self._add(snapshot.features)
            for request in snapshot.requests:
                self._add(request)
            self._add_all(snapshot.history)
            self.changed.notify_all()

    def ingest_frame(self, frame: Frame) -> None:
        """Take in a batch of events."""
        with self.changed:
            self.dropped += frame.dropped
            self._add_all(frame.events)
            self.changed.notify_all()

    def _add_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self._add(event)

    def _add(self, event: Event) -> None:
        match event:
            case StepEvent():
                self._add_step(event)
            case TokensEvent():
                self._add_tokens(event)
            case RequestEvent():
                self._requests.pop(event.request, None)
                self._requests[event.request] = event
                self._handles[event.id] = event.request
                if len(self._requests) > _KEPT_REQUESTS:
                    self._forget_oldest_request()
            case FeaturesEvent():
                self._features[event.epoch] = event
                # Settling is told later, when a newer switch may be in force already.
                current = self._features.get(self.epoch)
                if current is None or event.applied_ns >= current.applied_ns:
                    self.epoch = event.epoch
            case EngineEvent():
                self.engine = event
            case TaskEvent():
                self._tasks[event.name] = event
            case NoticeEvent():
                if not self.notices or event.at_ns > self.notices[-1].at_ns:  # else known from before a reconnect
                    self.notices.append(event)

    def _add_step(self, event: StepEvent) -> None:
        if event.begin_ns <= self._newest_begin_ns:  # known from before a reconnect
            return
        self._newest_begin_ns = event.begin_ns
        count = len(event.request)
        self._steps.extend(
            1,
            step=event.step,
            epoch=event.epoch,
            begin_ns=event.begin_ns,
            end_ns=event.end_ns,
            schedule_ns=event.schedule_ns,
            prepare_ns=event.prepare_ns,
            forward_ns=event.forward_ns,
            sample_ns=event.sample_ns,
            update_ns=event.update_ns,
            path=event.path,
            batch_size=count,
            scheduled=sum(event.scheduled),
            running=event.running,
            waiting=event.waiting,
            idle_slots=event.idle_slots,
            kv_total_blocks=event.kv.total_blocks,
            kv_used_blocks=event.kv.used_blocks,
            kv_cached_blocks=event.kv.cached_blocks,
            kv_filled_slots=event.kv.filled_slots,
            kv_block_size=event.kv.block_size,
            before_ns=event.before_ns,
            draft_ns=event.draft_ns,
            device_ns=_number(event.device_ns),
            attention_ns=_number(event.attention_ns),
            read_bytes=_number(event.read_bytes),
            flops=_number(event.flops),
            speculation=event.speculation,
        )
        self._shares.extend(
            count,
            request=event.request,
            step=event.step,
            begin_ns=event.begin_ns,
            start=event.start,
            scheduled=event.scheduled,
            kind=event.kind,
            drafted=event.drafted or 0,
            accepted=event.accepted or 0,
        )
        for request in event.request:
            self._steps_seen[request] = event.step

    def _add_tokens(self, event: TokensEvent) -> None:
        # A token may be known from before a reconnect, while others of its step are not.
        places = [
            place
            for place, (request, index) in enumerate(zip(event.request, event.index, strict=True))
            if index not in self._known_tokens.get(request, ())
        ]
        if not places:
            return

        def of(values: Sequence[Any]) -> Sequence[Any]:
            return values if len(places) == len(event.request) else [values[place] for place in places]

        requests, indices = of(event.request), of(event.index)
        self._tokens.extend(
            len(places),
            request=requests,
            index=indices,
            token_id=of(event.token_id),
            text=of(event.text),
            logprob=[_number(value) for value in of(event.logprob)],
            sent_ns=of(event.sent_ns),
            latency_ns=of(event.latency_ns),
            step=event.step,
            **{f"{part}_ns": of(event.parts[at]) if event.parts else np.nan for at, part in enumerate(PARTS)},
            origin=of(event.origin) if event.origin else 0,
        )
        for request, index in zip(requests, indices, strict=True):
            self._known_tokens.setdefault(request, set()).add(index)
            self._tokens_seen[request] = self._tokens_seen.get(request, 0) + 1
            self._last_sent_step[request] = event.step

    def _forget_oldest_request(self) -> None:
        oldest = next((handle for handle, event in self._requests.items() if event.state in ENDED), None)
        if oldest is None:
            return
        event = self._requests.pop(oldest)
        self._handles.pop(event.id, None)
        for known in (self._known_tokens, self._tokens_seen, self._last_sent_step, self._steps_seen):
            known.pop(oldest, None)

    # -- out ---------------------------------------------------------------------------------------------------------

    def tokens(self, request: int | None = None) -> pd.DataFrame:
        """Return the tokens sent, of one request or of all: a row a token, in the order they were sent."""
        with self.changed:
            return self._tokens.frame() if request is None else self._tokens.frame(request=request)

    def shares(self, request: int) -> pd.DataFrame:
        """Return what each step computed for one request: a row a step."""
        with self.changed:
            return self._shares.frame(request=request)

    def steps(self, begin_ns: npt.NDArray[np.int64] | None = None) -> pd.DataFrame:
        """Return engine steps: a row a step; all of them, or those that began at the given times."""
        with self.changed:
            return self._steps.frame() if begin_ns is None else self._steps.frame(begin_ns=begin_ns)

    def request(self, handle: int) -> RequestEvent | None:
        """Return the newest event of a request."""
        with self.changed:
            return self._requests.get(handle)

    def requests(self) -> list[RequestEvent]:
        """Return the newest event of every request known, oldest change first."""
        with self.changed:
            return list(self._requests.values())

    def features(self) -> FeaturesEvent | None:
        """Return the switch that is in force."""
        with self.changed:
            return self._features.get(self.epoch)

    def switches(self) -> list[FeaturesEvent]:
        """Return every switch known, in the order of their epochs."""
        with self.changed:
            return [self._features[epoch] for epoch in sorted(self._features)]

    def wait_for_request(self, request_id: str, timeout_s: float) -> int | None:
        """Wait until all of an ended request's events are here and return its handle; ``None`` if that takes too long.

        All means: it has ended, as many tokens as it says it has are here, and so is the step of the last one.
        """
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while not self._is_complete(request_id):
                left = deadline - time.monotonic()
                if left <= 0 or not self.changed.wait(left):
                    if self._is_complete(request_id):
                        break
                    return None
            return self._handles[request_id]

    def wait_for_tasks(self, timeout_s: float) -> bool:
        """Wait until the engine does nothing beside serving, such as compiling; false if that takes too long."""
        with self.changed:
            return self.changed.wait_for(
                lambda: all(task.fraction == 1 for task in self._tasks.values()), timeout=timeout_s
            )

    def handle(self, request_id: str) -> int | None:
        """Return the handle of a request, if it has been heard of."""
        with self.changed:
            return self._handles.get(request_id)

    def _is_complete(self, request_id: str) -> bool:
        handle = self._handles.get(request_id)
        event = None if handle is None else self._requests.get(handle)
        if handle is None or event is None or event.state not in ENDED:
            return False
        switch = self._features.get(self.epoch)
        if switch is not None and switch.values.get("instrumentation", "full") != "full":
            return True  # its tokens are not told
        if self._tokens_seen.get(handle, 0) < event.output_tokens:
            return False
        return event.output_tokens == 0 or self._steps_seen.get(handle, -1) >= self._last_sent_step.get(handle, 0)


def _number(value: float | None) -> float:
    return np.nan if value is None else value
