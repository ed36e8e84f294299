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

RECORDED = Path(__file__).parent / "data" / "calibration.json.gz"


def answers(run, stretch=1.0):
    return [
        Answer(
            index=each["index"],
            sent_s=each["sent_s"],
            times_s=[each["sent_s"] + (time - each["sent_s"]) * stretch for time in each["times_s"]],
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


def comparisons(blocks, candidate, stretch=1.0):
    """Twenty comparisons of the default number of pairs: each takes blocks that follow one another."""
    effects = [paired_effects(answers(block["one"]), answers(block[candidate], stretch)) for block in blocks]
    starts = np.linspace(0, len(effects) - DEFAULT_PAIRS, 20).round().astype(int)
    for start in starts:
        chosen = effects[start : start + DEFAULT_PAIRS]
        yield {name: np.array([effect[name] for effect in chosen]) for name in METRICS}
