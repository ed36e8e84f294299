"""Adaptive speculation on simulated machines whose step times and acceptance are known."""

from __future__ import annotations

import pytest
from simulated_clock import DAY, MACHINES, Machine, Simulation, Text, alike, best_fixed, day

from inference_server.engine.request import Request
from inference_server.engine.scheduler import Scheduled
from inference_server.engine.speculation.acceptance import Acceptance, Pool
from inference_server.engine.speculation.adaptive import Adaptive
from inference_server.engine.speculation.step_cost import StepCost, Time, rising
from inference_server.protocol import Kind, SamplingParams


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_from_a_cold_start_it_is_hardly_slower_than_the_better_of_on_and_off(name: str, rows: int) -> None:
    machine = MACHINES[name]
    for rate in (0.0, 0.1, 0.3, 0.6, 0.8):
        for seed in (1, 2) if rows < 64 else (3,):
            speed = Simulation(machine, Adaptive(), seed).speed(alike(rate, rows), 2000)
            assert speed >= 0.97 * best_fixed(machine, rate, rows), (rate, seed)


@pytest.mark.parametrize("rate", [0.1, 0.8])
def test_noise_does_not_fool_it(rate: float) -> None:
    for name in ("gpu 8b", "cpu"):
        for seed in range(3):
            noisy = Simulation(MACHINES[name], Adaptive(), seed, noise=0.1, outliers=0.03)
            assert noisy.speed(alike(rate, 4), 2000) >= 0.97 * best_fixed(MACHINES[name], rate, 4)


@pytest.mark.parametrize(
    ("name", "always"),
    [(name, always) for name in MACHINES for always in (True, False) if always or "draft" not in name],
)
def test_over_a_day_it_beats_both_and_in_no_part_of_it_is_it_much_slower_than_the_better(
    name: str, always: bool
) -> None:
    low = 0
    seeds = (1, 2) if name in {"gpu 8b", "cpu"} else (3,)
    for seed in seeds:
        modes = ("on", "off", Adaptive())
        on, off, adaptive = (day(MACHINES[name], mode, seed, 1000, always=always) for mode in modes)

        def seconds(phases: list[tuple[float, float]], work: list[tuple[float, float]] = off) -> float:
            return sum(tokens * time / said for (tokens, _), (said, time) in zip(work, phases, strict=True))

        assert seconds(adaptive) < min(seconds(on), seconds(off))
        for one, other, own in zip(on, off, adaptive, strict=True):
            ratio = own[0] / own[1] / max(one[0] / one[1], other[0] / other[1])
            assert ratio >= 0.94
            low += ratio < 0.97
    assert low <= len(seeds) * len(DAY) // 10


@pytest.mark.parametrize(
    ("name", "rows", "before", "after", "kept"),
    [
        ("gpu 8b", 1, 0.1, 0.8, 0.95),
        ("gpu 8b", 64, 0.1, 0.8, 0.95),
        ("gpu 0.6b", 4, 0.1, 0.8, 0.9),
        ("gpu 8b draft", 4, 0.1, 0.8, 0.9),
        ("cpu", 1, 0.1, 0.8, 0.92),
        ("gpu 8b", 1, 0.8, 0.1, 0.95),
        ("gpu 8b", 64, 0.8, 0.1, 0.94),
        ("gpu 0.6b", 4, 0.8, 0.1, 0.93),
        ("gpu 8b draft", 4, 0.8, 0.1, 0.93),
        ("cpu", 1, 0.8, 0.1, 0.95),
    ],
)
def test_it_turns_round_soon_after_acceptance_did(
    name: str, rows: int, before: float, after: float, kept: float
) -> None:
    machine = MACHINES[name]
    for seed in range(3):
        simulation, texts = Simulation(machine, Adaptive(), seed), alike(before, rows)
        simulation.run(texts, 1000)
        for text in texts:
            text.rate = after
        assert simulation.speed(texts, 360) >= kept * best_fixed(machine, after, rows), seed


def test_trying_costs_a_hundredth_of_the_time() -> None:
    for name in ("gpu 8b", "gpu 8b draft", "gpu 0.6b", "cpu"):
        simulation, texts = Simulation(MACHINES[name], Adaptive()), alike(0.0, 16)
        simulation.run(texts, 500)
        assert 0.985 <= simulation.speed(texts, 2000) / best_fixed(MACHINES[name], 0.0, 16) <= 0.995


def test_it_saves_up_for_a_trial_that_takes_longer_than_all_it_would_lend() -> None:
    slow = Machine(lambda rows: 5.0, lambda rows: 6.0, draft=lambda rows: 12.0)
    simulation, texts = Simulation(slow, Adaptive()), alike(0.0, 2)
    simulation.run(texts, 500)
    before = simulation.proposed
    simulation.run(texts, 1000)
    assert 1 <= simulation.proposed - before <= 10


def test_it_proposes_for_those_requests_for_which_it_pays() -> None:
    adaptive, texts = Adaptive(), [Text(0.95), Text(0.05)]
    Simulation(MACHINES["cpu"], adaptive).run(texts, 400)
    counts = adaptive.decide([(text.request, "m", 4) for text in texts], 0)
    assert counts[texts[0].request.handle] >= 3
    assert counts[texts[1].request.handle] <= 1


def test_while_it_rests_nobody_is_asked_until_it_tries_again_or_somebody_comes() -> None:
    adaptive, texts = Adaptive(), alike(0.02, 2)
    simulation = Simulation(MACHINES["gpu 8b"], adaptive)
    simulation.run(texts, 400)
    while not adaptive.resting:
        simulation.run(texts, 1)
    items = [Scheduled(text.request, 4, 1, Kind.DECODE, sample=True) for text in texts]
    steps = 0
    while adaptive.resting:
        adaptive.observe(items, [], 5_600_000, 0, ahead=True)
        steps += 1
    assert 10 < steps < 60
    assert max(adaptive.decide([(text.request, "m", 4) for text in texts], 0).values()) > 0, "then it tries"
    adaptive.observe(items, [], 5_600_000, 0, ahead=False)
    assert adaptive.resting
    new = Request(9, 4, [1, 2, 3, 4, 5], SamplingParams(max_tokens=9), 0, 9)
    adaptive.observe([Scheduled(new, 0, 4, Kind.PREFILL, sample=True)], [], 9_000_000, 0, ahead=True)
    assert not adaptive.resting


def test_a_step_cost_lies_between_those_that_are_known() -> None:
    cost = StepCost()
    for requests, proposed, time in [(2, 0, 100), (2, 0, 100), (2, 4, 140), (2, 12, 180)]:
        for _ in range(30):
            cost.learn(requests, proposed, time, ahead=False)
    times = [cost.step(2, proposed) for proposed in (0, 2, 4, 8, 12, 50)]
    assert times == pytest.approx([100, 120, 140, 160, 180, 180])
    assert cost.measured(2)
    assert not cost.measured(4)
    assert cost.known(4)
    assert not cost.known(16)


def test_plain_steps_are_known_from_those_that_were_launched_ahead() -> None:
    cost = StepCost()
    for _ in range(20):
        cost.learn(2, 0, 120, ahead=False)
    for _ in range(20):
        cost.learn(2, 0, 100, ahead=True)
        cost.learn(2, 0, 120, ahead=False)
    assert (cost.step(2, 0), cost.alone) == pytest.approx((100, 20), abs=2)


def test_a_time_forgives_accidents_and_a_first_one_has_to_come_twice() -> None:
    time = Time()
    time.learn(300, 100, 110)
    assert time.count == 0
    time.learn(300, 100, 110)
    assert time.value == 300
    time.learn(120, 300)
    assert time.value == 120, "it cannot be faster by accident"
    for _ in range(30):
        time.learn(120, 120)
    time.learn(360, 120)
    assert time.value < 123


def test_times_rise_with_size() -> None:
    assert rising([(1, 3.0, 1), (2, 2.0, 3), (4, 5.0, 1)]) == [(1, 2.25), (2, 2.25), (4, 5.0)]


def test_an_estimate_that_rests_on_much_turns_after_little() -> None:
    acceptance = Acceptance(Pool(), 0)
    for now in range(1, 200):
        acceptance.observe(4, 0, now)
    assert acceptance.rate(200) < 0.05
    acceptance.observe(4, 4, 230)
    assert acceptance.rate(230) > 0.5
    for now in range(231, 300):
        acceptance.observe(4, 4, now)
    assert acceptance.rate(300) > 0.95
    for now in range(300, 306):
        acceptance.observe(4, 0, now)
    assert acceptance.rate(306) < 0.3


def test_a_new_request_is_like_the_others_and_what_surprises_in_one_moves_them() -> None:
    pool = Pool()
    others = [Acceptance(pool, 0) for _ in range(20)]
    for now in range(1, 20):
        for other in others:
            other.observe(4, 0, now)
    new = Acceptance(pool, 20)
    before = new.rate(20)
    assert before < 0.2
    others[0].observe(4, 4, 20)
    assert new.rate(20) > before + 0.05
    assert others[1].rate(20) < 0.1, "of which much is known moves little"
