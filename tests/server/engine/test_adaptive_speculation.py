"""Adaptive speculation against a simulated machine whose step times and acceptance are known."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from inference_server.engine.request import Request
from inference_server.engine.scheduler import Scheduled
from inference_server.engine.speculation.adaptive import Adaptive, StepCost
from inference_server.protocol import Kind, SamplingParams

Cost = Callable[[int], float]


def request(handle: int) -> Request:
    return Request(handle, 4, [1, 2, 3, 4, 5], SamplingParams(max_tokens=10_000), 0, handle)


def simulate(
    rates: list[float], step_ns: Cost, pass_ns: float, k: int, steps: int, adaptive: Adaptive | None, seed: int = 0
) -> float:
    """Tokens per second of requests with the given acceptance; without ``adaptive`` always ``k`` tokens proposed."""
    random = Random(seed)
    requests = [request(handle) for handle in range(len(rates))]
    tokens, time_ns = 0, 0.0
    for _ in range(steps):
        counts = dict.fromkeys(range(len(rates)), k)
        if adaptive is not None and k:
            counts = adaptive.decide([(each, "m", k) for each in requests], 0)
        items, verified, accepted = [], [], 0
        for each, rate in zip(requests, rates, strict=True):
            item = Scheduled(each, 4, 1 + counts[each.handle], Kind.DECODE, sample=True)
            item.propose([0] * counts[each.handle])
            right = 0
            while right < counts[each.handle] and random.random() < rate:
                right += 1
            items.append(item)
            accepted += right
            if item.drafts:
                verified.append((item, "m", right))
        depth = max(counts.values())
        noise = 1 + 0.1 * random.random()
        own, drafting = step_ns(sum(item.count for item in items)) * noise, pass_ns * depth * noise
        time_ns += own + drafting
        tokens += len(items) + accepted
        if adaptive is not None:
            adaptive.observe(items, verified, int(own), int(drafting))
    return tokens / time_ns


def memory_bound(rows: int) -> float:
    return 10e6 + 0.5e6 * rows


def compute_bound(rows: int) -> float:
    return 1e6 + 4e6 * rows


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("cost", [memory_bound, compute_bound])
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("pass_ns", [0.0, 5e6])
def test_it_is_never_much_slower_than_the_better_of_on_and_off(
    rate: float, cost: Cost, batch: int, pass_ns: float
) -> None:
    rates = [rate] * batch
    best = max(simulate(rates, cost, pass_ns, k, 2000, None) for k in (0, 4))
    assert simulate(rates, cost, pass_ns, 4, 2000, Adaptive()) >= 0.97 * best


def test_it_proposes_for_those_requests_for_which_it_pays() -> None:
    adaptive = Adaptive()
    simulate([0.95, 0.05], lambda rows: 10e6 + 2e6 * rows, 0, 4, 400, adaptive)
    requests = [request(handle) for handle in range(2)]
    simulate([0.95, 0.05], lambda rows: 10e6 + 2e6 * rows, 0, 4, 1, adaptive)
    rates = [0.9, 0.05]
    items = []
    for each, rate in zip(requests, rates, strict=True):
        for _ in range(20):
            item = Scheduled(each, 4, 5, Kind.VERIFY, sample=True)
            item.propose([0] * 4)
            items.append(item)
            adaptive.observe([item], [(item, "m", 4 if rate > 0.5 else 0)], 20_000_000, 0)
    counts = adaptive.decide([(each, "m", 4) for each in requests], 0)
    assert counts[0] >= 3
    assert counts[1] == 0


def test_it_turns_round_when_acceptance_does() -> None:
    adaptive = Adaptive()
    before = simulate([0.9], memory_bound, 1e6, 4, 1000, adaptive)
    assert before > 1.5 * simulate([0.9], memory_bound, 1e6, 0, 1000, None)
    simulate([0.02], memory_bound, 1e6, 4, 100, adaptive)
    assert simulate([0.02], memory_bound, 1e6, 4, 1000, adaptive) >= 0.97 * simulate(
        [0.02], memory_bound, 1e6, 0, 1000, None
    )
    simulate([0.9], memory_bound, 1e6, 4, 1000, adaptive)
    assert simulate([0.9], memory_bound, 1e6, 4, 500, adaptive) > 0.9 * before


def test_step_costs_lie_between_those_that_are_known() -> None:
    cost = StepCost()
    assert cost.estimate(3) is None
    for time in (90, 100, 1000):
        cost.learn(2, time)
    cost.learn(6, 300)
    assert [cost.estimate(rows) for rows in (1, 2, 4, 6, 9)] == [100, 100, 200, 300, 300]


def test_while_it_rests_nobody_has_to_be_asked_until_it_tries_again() -> None:
    adaptive = Adaptive()
    assert not adaptive.resting
    simulate([0.02], compute_bound, 1e6, 4, 200, adaptive)
    steps = 0
    while adaptive.resting:
        adaptive.rest()
        steps += 1
    assert 0 < steps <= 384
    asked = request(0)
    assert max(adaptive.decide([(asked, "m", 4)], 0).values()) > 0, "then it tries"
    assert adaptive.resting
