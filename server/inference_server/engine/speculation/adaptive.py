"""Decides how many tokens to propose, by what that was worth so far: measured acceptance and measured step times.

With ``k`` proposed tokens, each accepted with probability ``a`` if those before it were, a step says
``1 + a + … + a^k`` tokens of a request (Leviathan et al. 2022, equation 1). It takes what a plain step takes, what so
many proposals add to that, and the proposer's passes. Among all requests' proposals, likeliest first, as many are made
as give the most tokens per second; none, where plain steps do.

What is not tried cannot be known, so trying has a budget of its own: a hundredth of the time. It pays for proposals
that would not pay by what is known, those first of which least is known, and for plain steps while proposals pay. A
trial is charged what it is estimated to take, and its accepted tokens are paid back: where trials succeed they go on at
once, until it is known that they do. Pure Python.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from heapq import nsmallest

from inference_server.engine.request import Request
from inference_server.engine.scheduler import Scheduled
from inference_server.engine.speculation.acceptance import Acceptance, Pool
from inference_server.engine.speculation.step_cost import SIZES, StepCost, Time
from inference_server.protocol import Kind

Wanted = tuple[Request, str, int]
"""A request about to decode, who may propose tokens for it, and how many at most."""

WORTH = 1.01
"""Proposals have to promise so many times the tokens per second of plain steps."""
BUDGET = 0.01
"""Share of the time that is for trying. All further amounts are in plain steps."""
SAVINGS = 3.0
"""The most of it that is saved up, …"""
CREDIT = 1.0
"""… or, while proposals do not pay, so much, or the price of a trial; and so much is lent for a request that is new."""
TRIED = 32
"""Proposals of a trial, at most, …"""
TRIED_DEPTH = 4
"""… and of one request in it."""
RECHECK = 64
"""Steps after which what a plain step takes is to be seen again …"""
PLAIN_STEPS = 3
"""… in so many, the first of which may not have been launched ahead."""
RECENT = 0.9
"""What a step still counts after the next one, for whether proposals pay at present."""
NOTHING = 0.005
"""A gain of less is none."""


class Adaptive:
    """Measures, and decides for each step how many tokens to propose for each request."""

    def __init__(self) -> None:
        self._now = 0
        self._cost = StepCost()
        self._passes: dict[str, Time] = {}
        """What a pass of a proposer takes, in nanoseconds."""
        self._pools: dict[str, Pool] = {}
        self._requests: dict[int, tuple[Request, str, Acceptance]] = {}
        self._gain = 0.0
        """What is saved by looking for proposals, lately and per step."""
        self._looked = 0
        self._arrived = False
        """A prompt was read since."""
        self._savings = SAVINGS
        self._price = 0.0
        """Of the next trial."""
        self._trial: Mapping[int, int] = {}
        """The one that is under way."""
        self._tried = False
        """There was one in the last step."""
        self._plain_steps = 0
        """So many are to come, to see what they take."""
        self._plain_seen = 0

    @property
    def resting(self) -> bool:
        """Whether proposals do not pay, and the next step is not to find out if they do again."""
        if self._plain_steps:
            return True
        return not self._paying and not self._arrived and self._price > self._savings

    @property
    def _paying(self) -> bool:
        return self._gain > NOTHING

    def forget_costs(self) -> None:
        """Steps take another time from now on: a switch was thrown."""
        self._cost = StepCost()
        self._passes.clear()
        self._savings, self._price = SAVINGS, 0.0

    def forget_method(self, method: str) -> None:
        """Somebody proposes otherwise from now on."""
        self._pools.pop(method, None)
        self._passes.pop(method, None)
        self._requests.clear()

    def observe(
        self,
        items: Sequence[Scheduled],
        verified: Sequence[tuple[Scheduled, str, int]],
        step_ns: int | None,
        draft_ns: int,
        *,
        ahead: bool,
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
        ahead : bool
            Whether the step was launched before the one before it was done.
        """
        self._now += 1
        proposed, won = 0, 0
        depths: dict[str, int] = {}
        for item, method, count in verified:
            drafted = len(item.drafts)
            proposed += drafted
            depths[method] = max(depths.get(method, 0), drafted)
            self._of(item.request, method).observe(drafted, count, self._now)
            won += min(count, self._trial.get(item.request.handle, 0))
        self._tried, self._trial = bool(self._trial), {}
        if any(item.kind not in {Kind.DECODE, Kind.VERIFY} for item in items):
            self._arrived = True
        elif step_ns is not None:
            self._cost.learn(len(items), proposed, step_ns, ahead=ahead)
            if not proposed and (ahead or not self._cost.overlaps):
                self._plain_seen = self._now
        if len(depths) == 1:
            ((method, depth),) = depths.items()
            each = draft_ns / depth
            self._passes.setdefault(method, Time()).learn(each, self._cost.step(len(items), 0) + each)
        self._plain_steps = max(self._plain_steps - 1, 0)
        most = SAVINGS if self._paying else max(CREDIT, self._price)
        self._savings = min(self._savings + BUDGET + won / len(items), most)

    def decide(self, wanted: Sequence[Wanted], plain: int) -> dict[int, int]:
        """How many tokens to propose for each request in the next step, by handle.

        Parameters
        ----------
        wanted : sequence
            Requests about to decode for which tokens may be proposed, by whom, and how many at most.
        plain : int
            Requests that decode besides.
        """
        self._arrived = False
        none = dict.fromkeys((request.handle for request, _, _ in wanted), 0)
        number = len(wanted) + plain
        if self._plain_steps or not number:
            return none
        if not self._cost.known(number):
            self._plain_steps = PLAIN_STEPS  # first: everything is compared with them
            return none
        base, alone = self._cost.step(number, 0), self._cost.alone
        # While proposals pay, no step is launched ahead; elsewhere the plain step after this one would have been.
        counts, tokens, time = self._best(wanted, number, base + (alone if self._paying else 0.0))
        if not any(counts.values()):
            time = base + alone
        fade = RECENT ** (self._now - self._looked)
        self._looked = self._now
        self._gain = self._gain * fade + (tokens / number - time / base) * (1 - fade)
        if self._now - self._plain_seen > RECHECK or not self._cost.measured(number):
            price = PLAIN_STEPS * max(1 - number / tokens * time / base, 0.0)
            if price <= self._savings:
                self._savings -= price
                self._plain_steps = PLAIN_STEPS
                return none
        elif all(counts.values()):
            if not wanted and not self._paying:  # it was looked for proposals in vain
                self._savings -= alone / base
        elif not (self._tried and any(counts.values())):  # what pays is also to be seen by itself
            trial, price, new = self._choose_trial(wanted, number, counts, 0.0 if self._paying else alone)
            self._price = price / base
            if self._price <= self._savings + CREDIT * new:
                self._savings -= self._price
                self._trial = trial
                return counts | trial
        return counts

    def _best(self, wanted: Sequence[Wanted], number: int, plain: float) -> tuple[dict[int, int], float, float]:
        """The proposals that give the most tokens per time, in a step of ``number`` requests; its tokens, its time."""
        gains: list[tuple[float, int, int, str]] = []
        for request, method, most in wanted:
            rate = self._of(request, method).rate(self._now)
            gain = 1.0
            for place in range(1, most + 1):
                gain *= rate
                gains.append((-gain, place, request.handle, method))
        gains.sort()
        best, tokens, time = 0, float(number), plain
        said, done = tokens, 0
        passes: dict[str, int] = {}
        for size in _sizes(len(gains)):
            for gain, place, _, method in gains[done:size]:
                said -= gain
                if place > passes.get(method, 0):
                    passes[method] = place
            done = size
            took = self._cost.step(number, size) + self._drafting(passes)
            if said * time > tokens * took * (1.0 if best else WORTH):
                best, tokens, time = size, said, took
        counts = dict.fromkeys((request.handle for request, _, _ in wanted), 0)
        for _, place, handle, _ in gains[:best]:
            counts[handle] = max(counts[handle], place)
        return counts, tokens, time

    def _choose_trial(
        self, wanted: Sequence[Wanted], number: int, counts: Mapping[int, int], looking: float
    ) -> tuple[dict[int, int], float, bool]:
        """What to propose besides ``counts``; how much longer that takes; whether a request is new.

        Time for ``looking`` is lost anyway. For the requests of which least is known, one proposal each before a second
        for any, and as many as teach most for the time they take.
        """
        made: dict[str, int] = {}
        for request, method, _ in wanted:
            made[method] = max(made.get(method, 0), counts[request.handle])
        others = [each for each in wanted if not counts[each[0].handle]]
        least = nsmallest(TRIED, others, key=lambda each: self._of(each[0], each[1]).known(self._now))
        places = [(place, each) for place in range(1, TRIED_DEPTH + 1) for each in least if place <= each[2]]
        already = sum(counts.values())
        before = self._cost.step(number, already) + self._drafting(made)
        passes = dict(made)
        best, best_worth, price = 0, 0.0, 0.0
        taught, done = 0.0, 0
        for size in _sizes(min(len(places), TRIED)):
            for place, (_, method, _) in places[done:size]:
                taught += 0.5 ** (place - 1)  # for all that is known it will not be reached
                passes[method] = max(passes.get(method, 0), place)
            done = size
            more = max(self._cost.step(number, already + size) + self._drafting(passes) - before, 0.0) + looking
            worth = taught / (4 + taught) / (0.02 * before + more)
            if worth > best_worth:
                best, best_worth, price = size, worth, more
        trial = {request.handle: place for place, (request, _, _) in places[:best]}
        return trial, price, not self._of(least[0][0], least[0][1]).known(self._now)

    def _drafting(self, passes: Mapping[str, int]) -> float:
        return sum(count * self._passes[method].value for method, count in passes.items() if method in self._passes)

    def _of(self, request: Request, method: str) -> Acceptance:
        known = self._requests.get(request.handle)
        if known is None or known[0] is not request or known[1] != method:
            for handle in [handle for handle, (each, _, _) in self._requests.items() if each.finish_reason is not None]:
                del self._requests[handle]
            acceptance = Acceptance(self._pools.setdefault(method, Pool()), self._now)
            known = self._requests[request.handle] = (request, method, acceptance)
        return known[2]


def _sizes(most: int) -> list[int]:
    """Numbers of proposals to consider, up to ``most``."""
    return [*SIZES[: bisect_left(SIZES, most)], most] if most else []
