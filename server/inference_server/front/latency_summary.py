"""Percentiles and goodput of this server's requests, over any recent window, without keeping samples.

Percentiles come from DDSketch (Masson et al. 2019): each is within 1 % of the true value, and sketches of several
intervals merge exactly, so a window is the merger of its intervals.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import msgspec
from ddsketch import DDSketch

ACCURACY = 0.01
"""Largest relative error of a percentile."""
INTERVAL_S = 10.0
INTERVALS = 60
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
METRICS = ("ttft", "itl", "tpot", "e2e")


class Slo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request has to keep to count as good, in milliseconds; ``None`` asks nothing."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    itl_ms: float | None = None
    """Of its largest gap between two tokens."""
    e2e_ms: float | None = None

    def problem(self) -> str | None:
        """Say what is wrong with the values, if anything is."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                return f"{name} must be a number of milliseconds above 0, or null; it is {value}."
        return None

    def met(self, *, ttft_ns: int, tpot_ns: float | None, longest_itl_ns: int, e2e_ns: int) -> bool:
        """Whether a request that ended well kept all of it."""
        pairs = (
            (self.ttft_ms, ttft_ns),
            (self.tpot_ms, tpot_ns),
            (self.itl_ms, longest_itl_ns),
            (self.e2e_ms, e2e_ns),
        )
        return all(limit is None or value is None or value <= limit * 1e6 for limit, value in pairs)


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of one metric, in milliseconds; ``None`` where nothing was measured."""

    count: int
    mean_ms: float | None
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None


class LatencySummary(msgspec.Struct, frozen=True, kw_only=True):
    """What ``GET /metrics/summary`` answers."""

    window_s: float
    """How long the counted intervals lasted, up to now."""
    ttft: Percentiles
    itl: Percentiles
    tpot: Percentiles
    e2e: Percentiles
    slo: Slo
    requests: int
    """That ended in the window, well or not."""
    good_requests: int
    """Those that ended well and met every SLO."""
    goodput_per_s: float
    output_tokens: int
    output_tokens_per_s: float
    relative_error: float = ACCURACY


def _sketches() -> dict[str, DDSketch]:
    return {name: DDSketch(relative_accuracy=ACCURACY) for name in METRICS}


@dataclass(slots=True)
class _Interval:
    begin_s: float
    sketches: dict[str, DDSketch] = field(default_factory=_sketches)
    requests: int = 0
    good: int = 0
    tokens: int = 0

    def merge(self, other: _Interval) -> None:
        for name, sketch in self.sketches.items():
            sketch.merge(other.sketches[name])
        self.requests += other.requests
        self.good += other.good
        self.tokens += other.tokens


class LatencyStatistics:
    """Takes in latencies as they happen and summarizes any window of the last ten minutes, or all.

    Parameters
    ----------
    slo
        What makes a request good; see :meth:`set_slo`.
    """

    def __init__(self, slo: Slo) -> None:
        self.slo = slo
        now = time.monotonic()
        self._older = _Interval(now)
        self._recent: deque[_Interval] = deque([_Interval(now)])
        self._since_s = now

    def set_slo(self, slo: Slo) -> None:
        """Judge the requests that end from now on by other objectives; statistics start afresh, so as not to mix."""
        self.__init__(slo)  # type: ignore[misc]

    def token(self, latency_ns: int, *, first: bool) -> None:
        """A token was sent."""
        interval = self._now()
        interval.tokens += 1
        interval.sketches["ttft" if first else "itl"].add(latency_ns / 1e6)

    def request(self, *, ttft_ns: int, tpot_ns: float | None, longest_itl_ns: int, e2e_ns: int) -> None:
        """A request ended well."""
        interval = self._now()
        interval.requests += 1
        if tpot_ns is not None:
            interval.sketches["tpot"].add(tpot_ns / 1e6)
        interval.sketches["e2e"].add(e2e_ns / 1e6)
        interval.good += self.slo.met(ttft_ns=ttft_ns, tpot_ns=tpot_ns, longest_itl_ns=longest_itl_ns, e2e_ns=e2e_ns)

    def failed_request(self) -> None:
        """A request failed."""
        self._now().requests += 1

    def summary(self, window_s: float | None = None) -> LatencySummary:
        """Return percentiles and goodput.

        Parameters
        ----------
        window_s
            Of the last so many seconds, in steps of :data:`INTERVAL_S`; all since the start, or since the SLOs were
            set, if ``None``.
        """
        now = time.monotonic()
        self._now()
        whole = _Interval(now)
        begin = now
        for interval in reversed(self._recent):
            if window_s is not None and interval is not self._recent[-1] and begin <= now - window_s:
                break
            whole.merge(interval)
            begin = interval.begin_s
        if window_s is None:
            whole.merge(self._older)
            begin = self._since_s
        seconds = max(now - begin, 1e-9)
        return LatencySummary(
            window_s=seconds,
            ttft=_percentiles(whole.sketches["ttft"]),
            itl=_percentiles(whole.sketches["itl"]),
            tpot=_percentiles(whole.sketches["tpot"]),
            e2e=_percentiles(whole.sketches["e2e"]),
            slo=self.slo,
            requests=whole.requests,
            good_requests=whole.good,
            goodput_per_s=whole.good / seconds,
            output_tokens=whole.tokens,
            output_tokens_per_s=whole.tokens / seconds,
        )

    def _now(self) -> _Interval:
        now = time.monotonic()
        newest = self._recent[-1]
        if now - newest.begin_s < INTERVAL_S:
            return newest
        newest = _Interval(now)
        self._recent.append(newest)
        if len(self._recent) > INTERVALS:
            self._older.merge(self._recent.popleft())
        return newest


def _percentiles(sketch: DDSketch) -> Percentiles:
    if not sketch.count:
        return Percentiles(count=0, mean_ms=None, p50_ms=None, p90_ms=None, p99_ms=None)
    values = {f"{name}_ms": sketch.get_quantile_value(quantile) for name, quantile in QUANTILES.items()}
    return Percentiles(count=int(sketch.count), mean_ms=sketch.avg, **values)
