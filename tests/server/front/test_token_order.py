"""Tokens are booked in the order of their request, however slow somebody else's connection is."""

import asyncio

import pytest

from inference_server.front import requests
from inference_server.front.requests import Generation, Output, Sample, StepTokens


@pytest.fixture
def booked():
    return []


def sample(handle):
    generation = Generation(f"g{handle}", "", samples_per_prompt=1, streaming=True)
    return Sample(handle=handle, choice=0, id=f"r{handle}", generation=generation)


def step(number, booked, *outputs):
    def book(step, sent):
        booked.append((step.step, [(output.sample.handle, output.index) for output, _, _ in sent]))

    tokens = StepTokens(number, 0, book)
    for output in outputs:
        tokens.add(output)
    tokens.begin()
    return tokens


async def test_a_later_step_waits_for_nobody_but_books_what_its_requests_had_before(booked):
    quick, slow = sample(1), sample(2)
    outputs = [Output(quick, "a", 7, 0), Output(slow, "b", 7, 0), Output(quick, "c", 7, 1), Output(quick, "d", 7, 2)]
    steps = [step(1, booked, *outputs[:2]), step(2, booked, outputs[2]), step(3, booked, outputs[3])]
    outputs[0].sent(10)
    outputs[2].sent(20)
    assert booked == [(1, [(1, 0)]), (2, [(1, 1)])]
    outputs[3].sent(30)
    outputs[1].sent(40)
    assert booked[2:] == [(3, [(1, 2)]), (1, [(2, 0)])]
    assert len(steps) == 3


async def test_what_a_slow_connection_has_not_taken_is_booked_once_it_has(booked, monkeypatch):
    monkeypatch.setattr(requests, "_SENT_WITHIN_S", 0.01)
    quick, slow = sample(1), sample(2)
    first, late = Output(quick, "a", 7, 0), Output(slow, "b", 7, 0)
    tokens = step(1, booked, first, late)
    first.sent(10)
    await asyncio.sleep(0.05)
    assert booked == [(1, [(1, 0)])]
    late.sent(20)
    assert booked == [(1, [(1, 0)]), (1, [(2, 0)])]
    assert tokens.step == 1
