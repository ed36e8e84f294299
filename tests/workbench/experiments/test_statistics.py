"""Intervals cover, tests keep their level, and both find what is there: checked by simulation and by known values."""

import math

import numpy as np
import pytest

from inference_workbench.experiments.statistics import (
    expanded_quantiles,
    joint_p,
    paired_effect,
    pairs_for,
    pairs_needed,
    two_sample_p,
)


@pytest.mark.parametrize("pairs", [6, 10, 16])
def test_an_interval_at_95_percent_covers_the_truth_about_as_often(pairs):
    random = np.random.default_rng(pairs)
    truth = 0.05
    intervals = [paired_effect(random.normal(truth, 0.03, size=pairs)) for _ in range(400)]
    covered = np.mean([each.low <= truth <= each.high for each in intervals])
    assert 0.915 <= covered <= 0.985


def test_the_interval_is_as_wide_as_students_t_says():
    values = np.random.default_rng(1).normal(size=10)
    effect = paired_effect(values)
    half = 2.262 * values.std(ddof=1) / math.sqrt(10)  # Student's t, 9 degrees of freedom
    assert effect.high - effect.low == pytest.approx(2 * half, rel=0.12)
    assert effect.estimate == pytest.approx(values.mean())
    assert paired_effect(values) == effect, "the same values give the same interval"


def test_more_confidence_and_fewer_pairs_cut_further_out():
    assert expanded_quantiles(10, 0.99)[0] < expanded_quantiles(10, 0.95)[0] < expanded_quantiles(100, 0.95)[0] < 0.025


def test_asking_about_five_metrics_raises_a_false_alarm_in_one_of_twenty_cases_and_no_more():
    random = np.random.default_rng(5)
    alarms = 0
    for _ in range(400):
        common = random.normal(size=8)
        effects = {str(metric): common * 0.7 + random.normal(size=8) for metric in range(5)}
        alarms += min(joint_p(effects).values()) <= 0.05
    assert alarms / 400 <= 0.075


def test_a_difference_in_one_of_five_metrics_is_found_in_that_one():
    random = np.random.default_rng(6)
    effects = {str(metric): random.normal(0, 0.02, size=10) for metric in range(4)}
    effects["slower"] = random.normal(0.05, 0.02, size=10)
    p = joint_p(effects)
    assert p["slower"] <= 0.01
    assert min(value for name, value in p.items() if name != "slower") > 0.05


def test_the_sign_flip_test_is_exact_for_few_pairs():
    # All eight of the same sign: 2 of 2^8 assignments of signs are as extreme.
    assert joint_p({"x": [1.0, 2, 3, 1, 2, 3, 1, 2]})["x"] == pytest.approx(2 / 2**8)
    assert paired_effect([0.1, -0.1, 0.2, -0.2, 0.3, -0.3]).p == 1.0


def test_with_too_few_pairs_nothing_can_be_found_and_the_least_number_says_so():
    least = pairs_for(0.95)
    assert joint_p({"x": [1.0] * (least - 1)})["x"] > 0.05 >= joint_p({"x": [1.0] * least})["x"]


def test_missing_values_are_left_out_of_an_estimate_and_not_tested():
    assert paired_effect([0.1, math.nan, 0.2, 0.3]).pairs == 3
    assert joint_p({"x": [1.0, math.nan, 2, 3, 4, 5]})["x"] == 1.0
    empty = paired_effect([])
    assert (empty.low, empty.high, empty.p) == (-math.inf, math.inf, 1.0)


def test_the_number_of_pairs_it_says_is_needed_gives_the_power():
    random = np.random.default_rng(7)
    pilot = random.normal(0, 0.04, size=400)
    size = math.log(1.03)
    needed = pairs_needed(pilot, size)
    found = [joint_p({"x": random.normal(size, 0.04, size=needed)})["x"] <= 0.05 for _ in range(200)]
    assert np.mean(found) == pytest.approx(0.9, abs=0.07)


def test_two_samplers_are_told_apart_and_one_is_not_told_apart_from_itself():
    random = np.random.default_rng(8)

    def draw(p):
        return [random.choice(20, size=40, p=p).tolist() for _ in range(60)]

    even = np.full(20, 1 / 20)
    tilted = np.linspace(1, 2, 20) / np.linspace(1, 2, 20).sum()
    assert two_sample_p(draw(even), draw(tilted)) < 0.01
    assert np.mean([two_sample_p(draw(even), draw(even), seed) <= 0.05 for seed in range(40)]) <= 0.15
