"""Comparisons are believed rightly: on recorded runs of the default model, on a machine that others used, too.

``data/calibration.json.gz`` holds blocks of runs of about 64 tokens each, by ``benchmarks/experiments.py record``: one
setting twice, and (in the last recording) the same with an engine that was 5 % slower.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from inference_workbench.experiments.compare import DEFAULT_PAIRS
from inference_workbench.experiments.figures import METRICS, paired_effects
from inference_workbench.experiments.sender import Answer
from inference_workbench.experiments.statistics import joint_p

RECORDED = Path(__file__).parent / "data" / "calibration.json.gz"
RUNS_TOGETHER = 8
"""Recorded runs that make one of a comparison's: under a third of the default length."""


def answers(run):
    made = []
    for index, sent, *gaps in run:
        times = (sent + np.cumsum(gaps)) / 1e5
        made.append(
            Answer(
                index=index,
                sent_s=sent / 1e5,
                times_s=times.tolist(),
                counts=[1] * len(times),
                output_tokens=len(times),
            )
        )
    return made


@pytest.fixture(scope="module")
def recordings():
    """Blocks by setting, of each recording."""
    found = {}
    for run in json.loads(gzip.decompress(RECORDED.read_bytes())):
        found.setdefault(run["recording"], {}).setdefault(run["block"], {})[run["setting"]] = run["answers"]
    return [[block for _, block in sorted(blocks.items())] for _, blocks in sorted(found.items())]


def effects_of(blocks, candidate):
    """The effect of each block on each metric: an array of shape (blocks, metrics)."""
    whole = [block for block in blocks if {"one", candidate} <= set(block)]
    effects = [paired_effects(answers(block["one"]), answers(block[candidate])) for block in whole]
    return np.array([[effect[name] for name in METRICS] for effect in effects])


def test_of_all_comparisons_of_identical_settings_one_in_twenty_at_most_is_called_different(recordings):
    made = alarms = 0
    for blocks in recordings:
        effects = effects_of(blocks, "same")
        for begin in range(0, len(effects) - DEFAULT_PAIRS + 1, DEFAULT_PAIRS):
            pairs = effects[begin : begin + DEFAULT_PAIRS]
            alarms += min(joint_p(dict(zip(METRICS, pairs.T, strict=True))).values()) <= 0.05
            made += 1
    assert made >= 20
    assert alarms <= 1


def test_an_engine_that_is_five_percent_slower_is_found_in_nine_of_ten_comparisons(recordings):
    effects = effects_of(recordings[-1], "slower")
    steps = range(0, len(effects) - RUNS_TOGETHER + 1, RUNS_TOGETHER)
    pairs = np.array([effects[at : at + RUNS_TOGETHER].mean(axis=0) for at in steps])
    random = np.random.default_rng(1)
    found = 0
    for _ in range(40):
        chosen = pairs[random.choice(len(pairs), DEFAULT_PAIRS, replace=False)]
        p = joint_p(dict(zip(METRICS, chosen.T, strict=True)))
        found += p["tpot_ms"] <= 0.05 and chosen[:, list(METRICS).index("tpot_ms")].mean() > 0
    assert found >= 0.9 * 40


def test_what_was_planted_is_what_is_found(recordings):
    place = list(METRICS).index("tpot_ms")
    slower = effects_of(recordings[-1], "slower")[:, place]
    same = effects_of(recordings[-1], "same")[:, place]
    assert np.exp(slower.mean()) == pytest.approx(1.05, abs=0.025)
    assert np.exp(same.mean()) == pytest.approx(1.0, abs=0.025)
