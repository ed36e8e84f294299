"""Estimates how long a step takes: a plain one by its requests, and what proposals add to it, by their number.

A step may be slow by accident, but never much faster than it can be. So what is far above an estimate counts little,
and what is far below replaces it. Between the sizes that were measured times are interpolated, and they rise with size;
what was measured seldom is taken for a little less than it was, so that it is measured again. Pure Python.
"""

from __future__ import annotations

from bisect import bisect_left
from math import sqrt

SIZES = (1, 2, 3, *(each << power for power in range(10) for each in (4, 6)))
"""Sizes for which times are kept; those between are interpolated. Numbers of proposals are chosen among them."""
GAIN = 0.08
"""What a measurement counts for an estimate that rests on many."""
NOISE = 0.1
"""How far a single measurement may be off, relative."""
MANY = 25
"""After so many measurements more of them make an estimate no better."""


def nearest(size: int) -> int:
    """The one of :data:`SIZES` that is nearest."""
    place = bisect_left(SIZES, size)
    if place == len(SIZES):
        return SIZES[-1]
    above, below = SIZES[place], SIZES[max(place - 1, 0)]
    return above if above - size <= size - below else below


class Time:
    """An estimate of how long something takes, or what it adds to something that takes longer."""

    __slots__ = ("_doubted", "_whole", "count", "value")

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0
        self._whole, self._doubted = 0.0, False

    def learn(self, value: float, whole: float, expected: float | None = None) -> None:
        """Take in a measurement.

        Parameters
        ----------
        value : float
        whole : float
            About how long all of it takes.
        expected : float, optional
            What was thought while nothing was measured. A first measurement far above it has to come twice.
        """
        self._whole = whole
        surprise = value - self.value
        if self.count == 0:
            if expected is not None and value - expected > whole / 2 and not self._doubted:
                self._doubted = True
                return
            self.value, self.count = value, 1
        elif surprise < -whole / 3:
            self.value, self.count = value, 1
        else:
            self.count += 1
            self.value += max(1 / self.count, GAIN) * min(surprise, whole / 4)

    @property
    def least(self) -> float:
        """What it may well be, seldom as it was measured: so that it is measured again rather than given up."""
        doubt = max(1 / sqrt(self.count) - 1 / sqrt(MANY), 0.0)
        return self.value - self._whole * NOISE * doubt


class _Curve:
    """Times by size, of what takes no less time when there is more of it."""

    def __init__(self, *origin: tuple[int, float]) -> None:
        self._times: dict[int, Time] = {}
        self._origin = list(origin)
        self._points = self._origin

    def count(self, size: int) -> int:
        """How often about this size was measured."""
        known = self._times.get(nearest(size))
        return 0 if known is None else known.count

    def learn(self, size: int, value: float, whole: float) -> None:
        """Take in a measurement; see :meth:`Time.learn`."""
        node, expected = nearest(size), None
        if self._points != self._origin:
            expected = self.at(node)
            value += expected - self.at(size)  # as it would have been at the node
        self._times.setdefault(node, Time()).learn(value, whole, expected)
        known = [(each, time.least, time.count) for each, time in sorted(self._times.items()) if time.count]
        self._points = self._origin + rising(known)

    def at(self, size: int) -> float:
        """Between the nearest sizes that are known, or as the nearest; 0 if none is."""
        points = self._points
        if not points:
            return 0.0
        place = bisect_left(points, (size,))
        if place == len(points):
            return points[-1][1]
        above, high = points[place]
        if place == 0 or above == size:
            return high
        below, low = points[place - 1]
        return low + (high - low) * (size - below) / (above - below)


def rising(points: list[tuple[int, float, int]]) -> list[tuple[int, float]]:
    """Make times rise with size: where a larger size takes less, both take their mean (isotonic regression).

    Parameters
    ----------
    points : list of tuple
        Size, time, and how often that was measured, by size.

    Returns
    -------
    list of tuple
        Sizes and times.
    """
    groups: list[tuple[float, int, list[int]]] = []
    for size, time, count in points:
        value, weight, sizes = time, min(count, MANY), [size]
        while groups and groups[-1][0] > value:
            before, other, smaller = groups.pop()
            value = (value * weight + before * other) / (weight + other)
            weight, sizes = weight + other, smaller + sizes
        groups.append((value, weight, sizes))
    return [(size, value) for value, _, sizes in groups for size in sizes]


class StepCost:
    """How long steps take, in nanoseconds."""

    def __init__(self) -> None:
        self.overlaps = False
        """Plain steps are launched ahead of each other; what they take is known from such only."""
        self._plain = _Curve()
        self._added = _Curve((0, 0.0))
        self._alone = Time()

    def learn(self, requests: int, proposed: int, time_ns: int, *, ahead: bool) -> None:
        """Take in a step of so many requests with so many proposed tokens; ``ahead`` if it was launched ahead."""
        if ahead and not self.overlaps:
            self.overlaps, self._plain = True, _Curve()
        expected = self.step(requests, proposed)
        if proposed:
            if self.known(requests):
                self._added.learn(proposed, time_ns - self._plain.at(requests), expected)
        elif self.overlaps and not ahead and self.measured(requests):
            self._alone.learn(time_ns - expected, expected)
        else:
            self._plain.learn(requests, time_ns, expected or time_ns)

    def measured(self, requests: int) -> bool:
        """Whether plain steps of about so many requests were measured."""
        return self._plain.count(requests) > 1

    def known(self, requests: int) -> bool:
        """Whether plain steps of so many requests can be judged, at least by those of half or twice as many."""
        return any(map(self.measured, (requests, requests // 2, 2 * requests)))

    def step(self, requests: int, proposed: int) -> float:
        """How long a step of so many requests with so many proposed tokens takes."""
        return self._plain.at(requests) + (max(self._added.at(proposed), 0.0) if proposed else 0.0)

    @property
    def alone(self) -> float:
        """What a plain step takes more that was not launched ahead."""
        return max(self._alone.value, 0.0) if self.overlaps else 0.0
