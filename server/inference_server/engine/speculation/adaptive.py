"""Decides how many tokens to propose, by what that was worth so far: measured acceptance and measured step times.

With ``k`` proposed tokens, each accepted with probability ``a`` if those before it were, a step says
``1 + a + … + a^k`` tokens of a request (Leviathan et al. 2022, equation 1). The step takes as long as steps of so many
positions took before, and proposing as long as it took before. Among all proposals, likeliest first, as many are made
as give the most tokens per second; none, where steps without any do. Pure Python.

What is not tried cannot be known: now and then a step is plain though proposals pay, and the other way round. The
longer nothing changes, the rarer that is.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

from inference_server.engine.request import Request
from inference_server.engine.scheduler import Scheduled
from inference_server.protocol import Kind

PRIOR_ACCEPTANCE = 0.6
PRIOR_WEIGHT = 4.0
"""What all requests of a method have seen counts for each of them as so many proposed tokens of its own."""
MEMORY = 0.97
"""What an observation of acceptance still counts after the next one."""
NEWEST = 9
"""Step times remembered per number of positions; the median counts."""
WORTH = 1.03
"""Proposals have to promise so many times the tokens per second of plain steps."""
PROBE_AFTER = 24
"""Steps after which the other way is tried first, and twice as many each time that it changes nothing …"""
PROBE_RARELY = 384
"""… up to so many."""
PROBED = 2
"""While proposals do not pay they are tried on so many requests …"""
PROBED_TOKENS = 3
"""… with at most so many tokens each."""


class _Acceptance:
    """How often a proposed token is accepted, if those before it were; old observations fade."""

    __slots__ = ("accepted", "tried")

    def __init__(self) -> None:
        self.accepted = self.tried = 0.0

    def rate(self, prior: float) -> float:
        """The estimate; ``prior`` is what it would be without any observation."""
        return (self.accepted + prior * PRIOR_WEIGHT) / (self.tried + PRIOR_WEIGHT)

    def observe(self, drafted: int, accepted: int) -> None:
        tried = min(accepted + 1, drafted)  # nothing is learnt of what stands behind the first that was rejected
        fade = MEMORY**tried
        self.accepted = self.accepted * fade + accepted
        self.tried = self.tried * fade + tried


class StepCost:
    """How long steps take, by number of positions, in nanoseconds."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._newest: dict[int, deque[int]] = {}

    def learn(self, positions: int, time_ns: int) -> None:
        """Take in a step."""
        newest = self._newest.get(positions)
        if newest is None:
            newest = self._newest[positions] = deque(maxlen=NEWEST)
            insort(self._sizes, positions)
        newest.append(time_ns)

    def known(self, positions: int) -> bool:
        """Whether a step of exactly so many positions was seen."""
        return positions in self._newest

    def estimate(self, positions: int) -> float | None:
        """Between the nearest sizes that are known, or as the nearest; ``None`` if none is."""
        if not self._sizes:
            return None
        place = bisect_left(self._sizes, positions)
        if place == len(self._sizes):
            return self._median(self._sizes[-1])
        above = self._sizes[place]
        if above == positions or place == 0:
            return self._median(above)
        below = self._sizes[place - 1]
        low, high = self._median(below), self._median(above)
        return low + max(high - low, 0.0) * (positions - below) / (above - below)

    def _median(self, positions: int) -> float:
        values = sorted(self._newest[positions])
        return float(values[len(values) // 2])


class Adaptive:
    """Measures, and decides for each step how many tokens to propose for each request."""

    def __init__(self) -> None:
        self._cost = StepCost()
        self._methods: dict[str, _Acceptance] = {}
        self._pass_ns: dict[str, float] = {}
        self._requests: dict[int, tuple[Request, str, _Acceptance]] = {}
        self._speculating = True
        self._since_probe = 0
        self._patience = PROBE_AFTER

    @property
    def resting(self) -> bool:
        """Whether proposals do not pay, and the next step is not to find out if they do again."""
        return not self._speculating and self._since_probe < self._patience

    def rest(self) -> None:
        """Count a step for which nobody was asked, since :attr:`resting`."""
        self._since_probe += 1

    def forget_costs(self) -> None:
        """Steps take another time from now on: a switch was thrown."""
        self._cost = StepCost()
        self._patience, self._since_probe = PROBE_AFTER, 0

    def forget_method(self, method: str) -> None:
        """Somebody proposes otherwise from now on."""
        self._methods.pop(method, None)
        self._pass_ns.pop(method, None)
        self._requests.clear()

    def observe(
        self,
        items: Sequence[Scheduled],
        verified: Sequence[tuple[Scheduled, str, int]],
        step_ns: int | None,
        draft_ns: int,
    ) -> None:
        """Take in a step.

        Parameters
        ----------
        items : sequence of Scheduled
            All of the step's.
        verified : sequence
            Those of them for which tokens were proposed, by whom, and how many of these were accepted.
        step_ns : int or None
            How long the step took without proposing; ``None`` where that says nothing about other steps.
        draft_ns : int
            How long proposing took.
        """
        depths: dict[str, int] = {}
        for item, method, count in verified:
            depths[method] = max(depths.get(method, 0), len(item.drafts))
            self._of(item.request, method).observe(len(item.drafts), count)
            self._methods.setdefault(method, _Acceptance()).observe(len(item.drafts), count)
        if step_ns is not None and all(item.kind in {Kind.DECODE, Kind.VERIFY} for item in items):
            self._cost.learn(sum(item.count for item in items), step_ns)
        if len(depths) == 1:
            ((method, depth),) = depths.items()
            before = self._pass_ns.get(method)
            now = draft_ns / depth
            self._pass_ns[method] = now if before is None else 0.8 * before + 0.2 * now

    def decide(self, wanted: Sequence[tuple[Request, str, int]], plain: int) -> dict[int, int]:
        """How many tokens to propose for each request in the next step, by handle.

        Parameters
        ----------
        wanted : sequence
            Requests about to decode for which tokens may be proposed, by whom, and how many at most.
        plain : int
            Requests that decode besides.
        """
        most = {request.handle: count for request, _, count in wanted}
        rows = len(wanted) + plain
        base = self._cost.estimate(rows)
        if base is None or not self._cost.known(rows):
            return dict.fromkeys(most, 0)  # a plain step first: everything is compared with it
        counts = self._best(wanted, rows, base)
        speculating = any(counts.values())
        if speculating != self._speculating:
            # After a probe that changed the verdict the next ones come soon again.
            self._speculating, self._patience, self._since_probe = speculating, PROBE_AFTER, 0
        self._since_probe += 1
        if self._since_probe > self._patience:
            self._since_probe = 0
            self._patience = min(2 * self._patience, PROBE_RARELY)
            if speculating:
                return dict.fromkeys(most, 0)
            tried = list(most)[:PROBED]
            return {handle: min(most[handle], PROBED_TOKENS) if handle in tried else 0 for handle in most}
        return counts

    def _best(self, wanted: Sequence[tuple[Request, str, int]], rows: int, base: float) -> dict[int, int]:
        common = {
            method: self._methods.setdefault(method, _Acceptance()).rate(PRIOR_ACCEPTANCE) for _, method, _ in wanted
        }
        gains: list[tuple[float, int, int, str]] = []
        for request, method, count in wanted:
            rate = self._of(request, method).rate(common[method])
            gain = 1.0
            for place in range(1, count + 1):
                gain *= rate
                gains.append((-gain, place, request.handle, method))
        gains.sort()
        depths: dict[str, int] = {}
        tokens, positions = float(rows), rows
        best, best_rate = 0, tokens / base * WORTH
        drafting = 0.0
        for number, (gain, place, _, method) in enumerate(gains, 1):
            tokens -= gain
            positions += 1
            if place > depths.get(method, 0):
                depths[method] = place
                drafting += self._pass_ns.get(method, 0.0)
            step = self._cost.estimate(positions)
            assert step is not None
            speed = tokens / (max(step, base) + drafting)
            if speed > best_rate:
                best, best_rate = number, speed
        counts = dict.fromkeys((request.handle for request, _, _ in wanted), 0)
        for _, place, handle, _ in gains[:best]:
            counts[handle] = max(counts[handle], place)
        return counts

    def _of(self, request: Request, method: str) -> _Acceptance:
        known = self._requests.get(request.handle)
        if known is None or known[0] is not request or known[1] != method:
            ended = [handle for handle, (each, _, _) in self._requests.items() if each.finish_reason is not None]
            for handle in ended:
                del self._requests[handle]
            known = self._requests[request.handle] = (request, method, _Acceptance())
        return known[2]
