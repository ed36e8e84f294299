"""The offset between an engine's monotonic clock and the front's, from Ping and Pong."""

from __future__ import annotations

from collections import deque

_SAMPLES = 16


class EngineClock:
    """Converts an engine's times to the front's clock.

    Every Ping/Pong says: the engine's clock showed ``engine`` at some moment between ``sent`` and ``received`` here, so
    the offset (front minus engine) lies in ``[sent - engine, received - engine]``. The newest samples are intersected.
    Where zero is possible the two clocks are taken for one and the same, which on one machine they are: no conversion
    then adds noise to a measured time.
    """

    def __init__(self) -> None:
        self._bounds: deque[tuple[int, int]] = deque(maxlen=_SAMPLES)
        self.offset_ns = 0
        """To be added to an engine's time."""
        self.uncertainty_ns: int | None = None
        """Half the width of what is possible; ``None`` before the first answer."""

    def sample(self, *, sent_ns: int, engine_ns: int, received_ns: int) -> None:
        """Take in one Ping/Pong."""
        self._bounds.append((sent_ns - engine_ns, received_ns - engine_ns))
        low = max(bound[0] for bound in self._bounds)
        high = min(bound[1] for bound in self._bounds)
        if low > high:  # the clocks drifted apart: only the newest sample counts
            low, high = self._bounds[-1]
            self._bounds = deque([(low, high)], maxlen=_SAMPLES)
        self.offset_ns = 0 if low <= 0 <= high else (low + high) // 2
        self.uncertainty_ns = (high - low) // 2
