"""The verdict on outputs: identical, diverged at a near-tie, or another distribution."""

import numpy as np
import pytest

from inference_workbench.experiments.journal import Probe
from inference_workbench.experiments.outputs import divergences, judge
from inference_workbench.experiments.sender import Request


def requests(count, temperature=0.0):
    return [Request(index=index, ids=[1], max_tokens=4, temperature=temperature) for index in range(count)]


def probe(request, gap):
    return Probe(request=request, position=2, first=3, second=9, gap=gap)


SAME = {0: [1, 2, 3, 4], 1: [5, 6, 7, 8]}
PARTED = {0: [1, 2, 9, 9], 1: [5, 6, 7, 8]}


def test_the_first_difference_of_each_request_is_found_also_where_one_output_is_longer():
    (parted,) = divergences(SAME, PARTED)
    assert (parted.request, parted.position, parted.first, parted.second) == (0, 2, 3, 9)
    (longer,) = divergences({0: [1, 2]}, {0: [1, 2, 3]})
    assert (longer.position, longer.first, longer.second) == (2, None, 3)
    assert not divergences(SAME, SAME)


def test_the_same_tokens_are_identical():
    outputs = judge(requests(2), [SAME, SAME], [SAME], {}, "float32")
    assert outputs.verdict == "identical"
    assert (outputs.identical, outputs.unstable) == (2, 0)


@pytest.mark.parametrize(
    ("gap", "dtype", "verdict"),
    [
        (1e-4, "float32", "near-ties"),
        (-1e-4, "float32", "near-ties"),
        (0.2, "float32", "distribution changed"),
        (0.2, "bfloat16", "near-ties"),
        (3.0, "bfloat16", "distribution changed"),
        (None, "bfloat16", "distribution changed"),
    ],
)
def test_the_gap_where_outputs_part_decides_between_rounding_and_another_distribution(gap, dtype, verdict):
    outputs = judge(requests(2), [SAME], [PARTED], {0: probe(0, gap)}, dtype)
    assert outputs.verdict == verdict
    assert "token 2" in outputs.words
    frame = outputs.to_frame()
    assert frame[["request", "position", "first", "second"]].to_numpy().tolist() == [[0, 2, 3, 9]]


def test_a_baseline_that_differs_from_itself_is_said_to():
    outputs = judge(requests(2), [SAME, PARTED], [SAME], {}, "float32")
    assert outputs.verdict == "identical"
    assert outputs.unstable == 1
    assert "not repeatable" in outputs.words


def test_without_token_ids_or_without_gaps_nothing_is_claimed():
    assert judge(requests(1), [{0: []}], [{0: []}], {}, "float32").verdict == "unknown"
    assert judge(requests(2), [SAME], [PARTED], {}, "float32").verdict == "unknown"


def test_sampled_outputs_are_compared_by_their_frequencies():
    random = np.random.default_rng(1)
    sent = requests(60, temperature=1.0)

    def run(low):
        return {each.index: random.integers(low, 20, size=30).tolist() for each in sent}

    assert judge(sent, [run(0)], [run(0)], {}, "float32").verdict == "not told apart"
    assert judge(sent, [run(0)], [run(4)], {}, "float32").verdict == "distribution changed"
    same = run(0)
    assert judge(sent, [same], [same], {}, "float32").verdict == "identical"
