"""What watching costs: compares counters of the engine and the front, about once a second."""

from __future__ import annotations

import time
from dataclasses import dataclass

from inference_server.protocol import Heartbeat, TelemetryCostEvent

_WINDOW_NS = 900_000_000


@dataclass(frozen=True, slots=True)
class FrontCost:
    """The front's counters, all since its start."""

    front_ns: int
    journal_ns: int
    events: int
    bytes: int


class TelemetryCost:
    """Turns counters that only rise into the cost of the last second."""

    def __init__(self) -> None:
        self._before: tuple[int, Heartbeat, FrontCost] | None = None

    def measure(self, heartbeat: Heartbeat, front: FrontCost, level: str) -> TelemetryCostEvent | None:
        """Compare with the time before; ``None`` within a second of it, after a restart, or when no step ran."""
        now = time.monotonic_ns()
        before = self._before
        if before is None or heartbeat.steps < before[1].steps:
            self._before = (now, heartbeat, front)
            return None
        then, engine, ours = before
        if now - then < _WINDOW_NS:
            return None
        self._before = (now, heartbeat, front)
        if heartbeat.steps == engine.steps:
            return None
        return TelemetryCostEvent(
            at_ns=now,
            window_ns=now - then,
            level=level,
            steps=heartbeat.steps - engine.steps,
            step_ns=heartbeat.busy_ns - engine.busy_ns,
            engine_ns=heartbeat.telemetry_ns - engine.telemetry_ns,
            encode_ns=heartbeat.encode_ns - engine.encode_ns,
            front_ns=front.front_ns - ours.front_ns,
            journal_ns=front.journal_ns - ours.journal_ns,
            events=front.events - ours.events,
            bytes=front.bytes - ours.bytes,
        )
