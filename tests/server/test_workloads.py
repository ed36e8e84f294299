"""A workload is its name, seed and settings: the same always brings the same requests, of the lengths asked for."""

from __future__ import annotations

import math
import statistics

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_server.workloads.workload import (
    PRESETS,
    ClosedLoop,
    Length,
    Poisson,
    Workload,
    WorkloadError,
    changed,
    convert,
)


def encode(text: str) -> list[int]:
    """One token for each word, the same for the same word."""
    return [sum(map(ord, word)) % 1000 for word in text.replace("\n", " \n ").split(" ") if word]


def compose(text: str) -> list[int]:
    return encode(f"<user> {text} <assistant>")


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_brings_the_same_requests_every_time_and_survives_json(name: str) -> None:
    workload = PRESETS[name][1]
    again = msgspec.json.decode(msgspec.json.encode(workload), type=Workload)
    assert again == workload
    first = [workload.request(index, encode, compose, 1000) for index in range(5)]
    assert first == [again.request(index, encode, compose, 1000) for index in range(5)]
    assert len({tuple(each.prompt) for each in first}) > 1
    assert [workload.gap_s(index) for index in range(5)] == [again.gap_s(index) for index in range(5)]


@given(
    st.sampled_from(["chat", "summarize", "code", "story", "random"]),
    st.integers(40, 900),
    st.integers(0, 300),
    st.integers(0, 99),
)
def test_prompts_are_as_long_as_asked_and_begin_alike(source: str, length: int, shared: int, seed: int) -> None:
    wanted = length + shared
    workload = convert(
        {
            "source": source,
            "seed": seed,
            "prompt_tokens": {"low": wanted, "high": wanted},
            "shared_prefix_tokens": shared,
        }
    )
    one, two = (workload.request(index, encode, compose, 1000) for index in (0, 1))
    for each in (one, two):
        fits = len(compose("x")) + 60 <= wanted or source == "random"
        if fits and source != "chat":
            assert wanted - 4 <= len(each.prompt) <= wanted, "whole words, so a token or two may be missing"
        assert 16 <= each.output_tokens <= 128
    common = next((i for i, (a, b) in enumerate(zip(one.prompt, two.prompt, strict=False)) if a != b), shared)
    assert common >= shared - 4


def test_arrivals_have_the_rate_and_the_burstiness_asked_for() -> None:
    for burstiness in (0.25, 1.0, 4.0):
        workload = Workload(arrivals=Poisson(rate=5.0, burstiness=burstiness), seed=3)
        gaps = [workload.gap_s(index) for index in range(20_000)]
        assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
        variation = statistics.stdev(gaps) / statistics.mean(gaps)
        assert variation == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)
    assert Workload(arrivals=ClosedLoop(concurrency=3)).gap_s(7) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "chatter"}, "no preset 'chatter'. There are: chat, summarize"),
        ({"arrivals": {"kind": "closed", "concurrency": 0}}, r"Expected `int` >= 1 - at `\$.arrivals.concurrency`"),
        ({"arrivals": {"kind": "poisson", "rate": -1}}, r"\$.arrivals.rate"),
        ({"lenght": 5}, "unknown field `lenght`"),
        ({"source": "poems"}, "poems"),
        ({"temperature": "hot"}, "temperature"),
    ],
)
def test_a_wrong_value_is_named(values: dict, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        convert(values)
    with pytest.raises(WorkloadError):
        changed(Workload(), {"output_tokens": {"low": 0, "high": 2}})


def test_a_length_with_its_bounds_the_wrong_way_round_is_its_lower_bound() -> None:
    from random import Random

    assert Length(low=9, high=3).draw(Random(0)) == 9
