"""Comparisons are believed rightly: on runs of the default model that were recorded, none of which is random here.

``data/calibration.json.gz`` holds blocks of three runs, by ``benchmarks/experiments.py record``: one setting twice, and
the same with an engine that was 5 % slower.
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


def answers(run):
    return [
        Answer(
            index=each["index"],
            sent_s=each["sent_s"],
            times_s=each["times_s"],
            counts=[1] * len(each["times_s"]),
            output_tokens=len(each["times_s"]),
        )
        for each in run
    ]


@pytest.fixture(scope="module")
def blocks():
    found = {}
    for run in json.loads(gzip.decompress(RECORDED.read_bytes())):
        found.setdefault(run["block"], {})[run["setting"]] = run["answers"]
    return [block for _, block in sorted(found.items()) if len(block) == 3]


def comparisons(blocks, candidate):
    """Twenty comparisons of the default number of pairs: each takes blocks that follow one another."""
    effects = [paired_effects(answers(block["one"]), answers(block[candidate])) for block in blocks]
    starts = np.linspace(0, len(effects) - DEFAULT_PAIRS, 20).round().astype(int)
    for start in starts:
        chosen = effects[start : start + DEFAULT_PAIRS]
        yield {name: np.array([effect[name] for effect in chosen]) for name in METRICS}


def test_of_twenty_comparisons_of_identical_settings_one_at_most_is_called_different(blocks):
    alarms = [min(joint_p(effects).values()) <= 0.05 for effects in comparisons(blocks, "same")]
    assert sum(alarms) <= 1


def test_an_engine_that_is_five_percent_slower_is_found_at_the_default_length(blocks):
    found = [
        joint_p(effects)["tpot_ms"] <= 0.05 and effects["tpot_ms"].mean() > 0
        for effects in comparisons(blocks, "slower")
    ]
    assert np.mean(found) >= 0.9


def test_what_was_planted_is_what_is_found(blocks):
    effects = [paired_effects(answers(block["one"]), answers(block["slower"])) for block in blocks]
    assert np.exp(np.median([effect["tpot_ms"] for effect in effects])) == pytest.approx(1.05, abs=0.02)
