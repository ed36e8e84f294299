"""Estimates how often a request's proposals are accepted, ready to find that this has changed.

What was observed is counted, together with what the other requests have seen (*partial pooling*), and fades with time.
Beside it runs a second count: of late observations, since another rate explains them better than the first count does.
When it does so by far, nothing but they count (Page 1954, *Continuous inspection schemes*). So an estimate can rest on
many observations and yet turn after few; and the longer ago they were made, the fewer it takes. Pure Python.
"""

from __future__ import annotations

from math import exp, log

PRIOR = 0.6
"""The estimate while nothing was observed."""
PRIOR_WEIGHT = 3.0
"""What the other requests have seen counts for a request as so many observations of its own."""
MEMORY = 0.99
"""What an observation still counts after the next one …"""
STAYS = 1 - 1 / 300
"""… and after the next step: how likely a request's acceptance is to stay what it was."""
POOL_MEMORY = 0.95
"""What an observation of all requests still counts after the next one."""


class Pool:
    """What the requests of a method have in common: how often the first proposals for each of them are accepted."""

    __slots__ = ("_accepted", "_tried")

    def __init__(self) -> None:
        self._accepted = self._tried = 0.0

    @property
    def rate(self) -> float:
        """How often a proposal is accepted, if those before it were."""
        return (self._accepted + PRIOR * PRIOR_WEIGHT) / (self._tried + PRIOR_WEIGHT)

    def observe(self, tried: int, accepted: int, weight: float) -> None:
        """Count what became of proposals, by how much that is news."""
        fade = POOL_MEMORY ** (tried * weight)
        self._accepted = self._accepted * fade + accepted * weight
        self._tried = self._tried * fade + tried * weight


class Acceptance:
    """How often the proposals for one request are accepted, if those before them were.

    Parameters
    ----------
    pool : Pool
        That it belongs to.
    now : int
        The step.
    """

    __slots__ = ("_accepted", "_evidence", "_late_accepted", "_late_tried", "_pool", "_seen", "_tried")

    def __init__(self, pool: Pool, now: int) -> None:
        self._pool = pool
        self._seen = now
        self._accepted = self._tried = self._late_accepted = self._late_tried = 0.0
        self._evidence = 0.0
        """Logarithm of how much likelier the late observations are at a rate of their own."""

    def known(self, now: int) -> float:
        """How many observations of its own the estimate rests on."""
        return self._tried * STAYS ** (now - self._seen)

    def rate(self, now: int) -> float:
        """The estimate."""
        fade = STAYS ** (now - self._seen)
        return (self._accepted * fade + self._pool.rate * PRIOR_WEIGHT) / (self._tried * fade + PRIOR_WEIGHT)

    def observe(self, drafted: int, accepted: int, now: int) -> None:
        """Take in what became of a step's proposals."""
        tried = min(accepted + 1, drafted)  # nothing is learnt of what stands behind the first that was rejected
        stayed = STAYS ** (now - self._seen)
        self._seen = now
        self._accepted *= stayed
        self._tried *= stayed
        before = _likelihood(
            self._accepted + self._pool.rate * PRIOR_WEIGHT, self._tried + PRIOR_WEIGHT, drafted, accepted
        )
        late = _likelihood(self._late_accepted + 1, self._late_tried + 2, drafted, accepted)
        self._evidence += log(late / before)
        self._late_accepted += accepted
        self._late_tried += tried
        turned = exp(-self._evidence) < 1 - stayed
        if turned:
            self._accepted = self._tried = 0.0
        self._pool.observe(tried, accepted, PRIOR_WEIGHT / (PRIOR_WEIGHT + self._tried))
        fade = MEMORY**tried
        self._accepted = self._accepted * fade + (self._late_accepted if turned else accepted)
        self._tried = self._tried * fade + (self._late_tried if turned else tried)
        if turned or self._evidence <= 0:
            self._evidence = self._late_accepted = self._late_tried = 0.0


def _likelihood(accepted_before: float, tried_before: float, drafted: int, accepted: int) -> float:
    """How likely it is after such observations that of ``drafted`` proposals the first ``accepted`` are accepted."""
    result = 1.0
    for place in range(accepted):
        result *= (accepted_before + place) / (tried_before + place)
    if accepted < drafted:
        result *= (tried_before - accepted_before) / (tried_before + accepted)
    return result
