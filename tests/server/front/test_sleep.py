"""Sleep gives memory back between two steps and loses no request; what the engine has to say reaches everyone."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import openai
import pytest
from running_front import TOKEN, RunningFront
from websockets.sync.client import connect

from inference_server.protocol import PROTOCOL_VERSION, NoticeEvent, ServerMessage, Snapshot, Subscribe


def test_a_stream_waits_while_the_engine_sleeps_and_then_goes_on(front: RunningFront) -> None:
    whole = (
        front.client.completions.create(model="tiny-llama", prompt=[5, 6, 7], max_tokens=120, temperature=0)
        .choices[0]
        .text
    )
    stream = front.client.completions.create(
        model="tiny-llama", prompt=[5, 6, 7], max_tokens=120, temperature=0, stream=True
    )
    chunks = iter(stream)
    text = next(chunks).choices[0].text
    answer = front.http.post("/engine/sleep", json={}).raise_for_status().json()
    assert answer["requests"] in {0, 1}, "the stream may have been over"
    assert answer["duration_ns"] > 0
    assert front.engine()["state"] == "asleep"
    with pytest.raises(openai.APIError, match=r"asleep.*Wake it") as refused:
        front.client.completions.create(model="tiny-llama", prompt=[5, 6], max_tokens=4)
    assert refused.value.status_code == 503
    again = front.http.post("/engine/sleep", json={})
    assert again.status_code == 422
    assert "asleep already" in again.json()["error"]["message"]
    waiting = len(front.active())
    time.sleep(0.3)
    assert len(front.active()) == waiting, "nothing goes on"
    front.http.post("/engine/wake", json={}).raise_for_status()
    assert front.engine()["state"] == "ready"
    text += "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == whole
    assert front.http.post("/engine/wake", json={}).status_code == 422


def test_starting_a_sleeping_engine_wakes_it(front: RunningFront) -> None:
    front.http.post("/engine/sleep", json={}).raise_for_status()
    assert front.http.post("/engine/start", json={}).json()["state"] == "ready"
    assert front.client.completions.create(model="tiny-llama", prompt=[5, 6], max_tokens=2).usage.completion_tokens == 2


def test_what_the_engine_has_to_say_reaches_those_who_watch_and_those_who_come_later(
    scripted: Callable[..., RunningFront],
) -> None:
    front = scripted("has-something-to-say", after=2)
    front.wait_for_engine("ready")
    with connect(f"{front.url.replace('http', 'ws')}/telemetry?token={TOKEN}") as socket:
        socket.send(msgspec.msgpack.encode(Subscribe(protocol=PROTOCOL_VERSION, credits=100)))
        front.client.completions.create(model="scripted", prompt=[5, 6], max_tokens=4)
        heard: list[object] = []
        while not any(isinstance(event, NoticeEvent) for event in heard):
            message = msgspec.msgpack.decode(socket.recv(10), type=ServerMessage)
            heard += getattr(message, "events", [])
        notice = next(event for event in heard if isinstance(event, NoticeEvent))
        assert (notice.severity, notice.text) == ("error", "a block leaked")
    with connect(f"{front.url.replace('http', 'ws')}/telemetry?token={TOKEN}") as socket:
        socket.send(msgspec.msgpack.encode(Subscribe(protocol=PROTOCOL_VERSION, credits=100)))
        snapshot = msgspec.msgpack.decode(socket.recv(10), type=ServerMessage)
        assert isinstance(snapshot, Snapshot)
        assert notice in snapshot.history
