"""What the front tells of speculative decoding: counters, tokens' origins, and each request's proposals by place."""

from __future__ import annotations

import json

from running_front import TOKEN, RunningFront
from test_metrics import difference, samples
from watcher import Watcher

from inference_server.protocol import Origin, RequestEvent, StepEvent, TokensEvent

REPEATS = {"const": "ab" * 12}
"""A model that must say this says what was to be expected."""


def test_what_became_of_proposals_is_counted_and_told(front: RunningFront) -> None:
    front.http.patch("/features", json={"adaptive_speculation": False}).raise_for_status()
    before = samples(front)
    with Watcher(front.url, TOKEN) as watcher:
        body = {
            "prompt": "a few words",
            "max_tokens": 60,
            "temperature": 0,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": REPEATS}},
            "features": {"speculation": "ngram", "num_speculative_tokens": 3},
        }
        answer = front.http.post("/v1/completions", json=body).raise_for_status().json()
        assert json.loads(answer["choices"][0]["text"]) == REPEATS["const"]
        count = answer["usage"]["completion_tokens"]
        front.wait_for(lambda: len(watcher.tokens()) >= count, "tokens")
        front.wait_for(lambda: any(e.state == "finished" for e in watcher.events(RequestEvent)), "end")
    after = samples(front)
    steps, told = watcher.events(StepEvent), watcher.events(TokensEvent)
    drafted = [number for step in steps for number in step.drafted if number]
    accepted = [
        number for step in steps for proposed, number in zip(step.drafted, step.accepted, strict=True) if proposed
    ]
    assert sum(accepted) > 3
    assert {step.speculation for step in steps if step.drafted} == {"ngram"}
    assert difference(before, after, "spec_decode_num_drafts_total") == len(drafted)
    assert difference(before, after, "spec_decode_num_draft_tokens_total") == sum(drafted)
    assert difference(before, after, "spec_decode_num_accepted_tokens_total") == sum(accepted)
    for position in range(4):
        reached = sum(number > position for number in accepted)
        name = "spec_decode_num_accepted_tokens_per_pos_total"
        assert difference(before, after, name, position=str(position)) == reached
    origins = [origin for event in told for origin in event.origin or [0] * len(event.request)]
    assert origins.count(Origin.ACCEPTED) == sum(accepted)
    last = watcher.events(RequestEvent)[-1]
    assert last.drafted == [sum(number > place for number in drafted) for place in range(max(drafted))]
    assert last.accepted == [sum(number > place for number in accepted) for place in range(max(accepted))]


def test_a_choice_that_cannot_be_made_here_is_refused_with_the_reason(front: RunningFront) -> None:
    answer = front.http.patch("/features", json={"speculation": "draft"})
    assert answer.status_code == 422
    assert "'speculation' cannot be 'draft' here: " in answer.json()["error"]["message"]
