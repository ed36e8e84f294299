"""The telemetry WebSocket: snapshot, credits, dropping the oldest, pace, and coming back."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from running_front import TOKEN, RunningFront
from websockets.sync.client import ClientConnection, connect

from inference_server.front.kv_state import KvState
from inference_server.protocol import (
    PROTOCOL_VERSION,
    ClientMessage,
    ClockReply,
    ClockRequest,
    Credit,
    DeviceEvent,
    EngineEvent,
    FeaturesEvent,
    Frame,
    KvEvents,
    KvOp,
    RequestEvent,
    ServerError,
    ServerMessage,
    Snapshot,
    StepEvent,
    Subscribe,
    TokensEvent,
)

Start = Callable[..., RunningFront]


class Client:
    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    def say(self, message: ClientMessage) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def hear(self, within_s: float = 10) -> ServerMessage:
        return msgspec.msgpack.decode(self.socket.recv(within_s), type=ServerMessage)

    def subscribe(self, credit: int = 100, **options: int) -> Snapshot:
        self.say(Subscribe(protocol=PROTOCOL_VERSION, credits=credit, **options))
        snapshot = self.hear()
        assert isinstance(snapshot, Snapshot)
        return snapshot

    def frames_until(self, done: Callable[[list], bool]) -> list[Frame]:
        """Collect frames, giving each credit back, until their events satisfy ``done``."""
        frames: list[Frame] = []
        deadline = time.monotonic() + 20
        while not done([event for frame in frames for event in frame.events]):
            assert time.monotonic() < deadline
            frame = self.hear()
            assert isinstance(frame, Frame)
            frames.append(frame)
            self.say(Credit(1))
        return frames


@contextlib.contextmanager
def telemetry(front: RunningFront) -> Iterator[Client]:
    with connect(
        f"{front.url.replace('http', 'ws')}/telemetry?token={TOKEN}", max_size=10 << 20, close_timeout=0.2
    ) as socket:
        yield Client(socket)


def finished(identifier: str) -> Callable[[list], bool]:
    return lambda events: (
        any(
            isinstance(e, RequestEvent) and e.id == identifier and e.state == "finished" and e.first_token_ns
            for e in events
        )
        and sum(isinstance(e, TokensEvent) for e in events) > 0
    )


def generate(front: RunningFront, identifier: str, tokens: int, **extra: object) -> object:
    return front.client.completions.create(
        model=front.client.models.list().data[0].id,
        prompt=[70, 71, 72],
        max_tokens=tokens,
        extra_body={"ignore_eos": True, "request_id": identifier} | extra,
        stream=True,
    )


def test_every_token_of_a_request_is_told_with_its_step_and_its_time(front: RunningFront) -> None:
    with telemetry(front) as client:
        snapshot = client.subscribe()
        assert snapshot.model is not None
        assert snapshot.engine.state == "ready"
        assert snapshot.capacity is not None
        assert {spec.name for spec in snapshot.specs} >= {"kv_cache"}
        before = time.monotonic_ns()
        text = "".join(chunk.choices[0].text for chunk in generate(front, "watched", 30))
        after = time.monotonic_ns()
        frames = client.frames_until(finished("watched"))
    assert [frame.seq for frame in frames] == list(range(1, len(frames) + 1))
    assert all(frame.dropped == 0 for frame in frames)
    events = [event for frame in frames for event in frame.events]
    states = [event for event in events if isinstance(event, RequestEvent)]
    handle = states[0].request
    assert states[0].state == "queued"
    last = states[-1]
    assert (last.state, last.output_tokens, last.prompt_tokens, last.finish_reason) == ("finished", 30, 3, "length")
    tokens = [
        (event.step, index, piece, sent, latency)
        for event in events
        if isinstance(event, TokensEvent)
        for r, index, piece, sent, latency in zip(
            event.request, event.index, event.text, event.sent_ns, event.latency_ns, strict=True
        )
        if r == handle
    ]
    assert [index for _, index, *_ in tokens] == list(range(30))
    assert "".join(piece for _, _, piece, *_ in tokens) == text
    sent = [time_ns for *_, time_ns, _ in tokens]
    assert sent == sorted(sent)
    assert before < last.arrival_ns < sent[0] <= sent[-1] < after + 50_000_000
    assert last.first_token_ns == sent[0]
    latencies = [latency for *_, latency in tokens]
    assert latencies[0] == sent[0] - last.arrival_ns
    assert latencies[1:] == [b - a for a, b in itertools.pairwise(sent)]
    steps = {event.step: event for event in events if isinstance(event, StepEvent)}
    for step, _, _, sent_ns, _ in tokens:
        assert handle in steps[step].request
        assert steps[step].begin_ns < steps[step].end_ns < sent_ns  # one clock for engine and front


def test_a_switch_is_told(front: RunningFront) -> None:
    with telemetry(front) as client:
        client.subscribe()
        answer = front.http.patch("/features", json={"max_num_seqs": 9}).json()
        frames = client.frames_until(lambda events: any(isinstance(e, FeaturesEvent) for e in events))
        event = next(e for frame in frames for e in frame.events if isinstance(e, FeaturesEvent))
        assert event.epoch == answer["epoch"]
        assert event.values["max_num_seqs"] == 9
        assert event.requested_ns <= event.applied_ns
        assert event.settled_ns is not None
    front.http.patch("/features", json={"max_num_seqs": 32})


def test_no_more_frames_come_than_there_are_credits(scripted: Start) -> None:
    front = scripted(step_s=0.002)
    front.wait_for_engine("ready")
    with telemetry(front) as client:
        client.subscribe(credit=2)
        list(generate(front, "credits", 50))
        assert [client.hear().seq, client.hear().seq] == [1, 2]
        with pytest.raises(TimeoutError):
            client.hear(0.3)
        client.say(Credit(1))
        third = client.hear()
        assert isinstance(third, Frame)
        assert third.seq == 3
        assert third.dropped == 0
        assert len(third.events) > 50  # all that was kept meanwhile, in one frame


def test_a_client_that_lags_far_behind_gets_the_newest_and_is_told_what_it_missed(scripted: Start) -> None:
    front = scripted(step_s=0.0, log_events=1000)
    front.wait_for_engine("ready")
    with telemetry(front) as client:
        client.subscribe(credit=0)
        list(generate(front, "early", 1500))
        list(generate(front, "late", 300))
        client.say(Credit(100))
        frames = client.frames_until(finished("late"))
    assert frames[0].dropped > 300
    events = [event for frame in frames for event in frame.events]
    # The early request's end was overwritten in the log long ago, yet its state is known again.
    assert {e.id for e in events if isinstance(e, RequestEvent) and e.state == "finished"} == {"early", "late"}
    steps = [event.step for event in events if isinstance(event, StepEvent)]
    assert steps == sorted(steps)
    assert steps[-1] == 1799
    # Of the KV blocks it hears nothing until it has caught up, and then all at once.
    kv = [event for event in events if isinstance(event, KvEvents)]
    assert kv[0].op[0] == KvOp.RESET
    known = KvState()
    for each in kv:
        known.apply(each)
    with telemetry(front) as client:
        assert client.subscribe(credit=0).kv == known.describe()


def test_a_client_that_does_not_read_delays_no_token_and_costs_no_memory(scripted: Start) -> None:
    import psutil

    front = scripted(step_s=0.001)
    front.wait_for_engine("ready")
    list(generate(front, "warm", 300))
    begin = time.monotonic()
    list(generate(front, "alone", 500))
    alone = time.monotonic() - begin
    before = psutil.Process(front.process.pid).memory_info().rss
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            client = stack.enter_context(telemetry(front))
            client.subscribe(credit=10**9)
        begin = time.monotonic()
        list(generate(front, "watched", 500))
        watched = time.monotonic() - begin
    assert watched < 2 * alone + 1
    assert psutil.Process(front.process.pid).memory_info().rss - before < 32 << 20


def test_frames_keep_the_pace_that_a_client_asks_for(scripted: Start) -> None:
    front = scripted(step_s=0.002)
    front.wait_for_engine("ready")
    with telemetry(front) as client:
        client.subscribe(min_interval_ms=200)
        thread = threading.Thread(target=lambda: list(generate(front, "paced", 300)))
        begin = time.monotonic()
        thread.start()
        frames = client.frames_until(finished("paced"))
        took = time.monotonic() - begin
        thread.join()
    assert len(frames) <= took / 0.2 + 2
    assert sum(isinstance(e, StepEvent) for frame in frames for e in frame.events) == 300


def test_a_quiet_server_tells_how_much_memory_its_loaded_engine_takes(scripted: Start) -> None:
    front = scripted()
    front.wait_for_engine("ready")
    with telemetry(front) as client:
        client.subscribe()
        # Nobody asks for anything: that the engine has loaded is reason enough to look.
        frames = client.frames_until(lambda events: any(isinstance(e, DeviceEvent) for e in events))
    sampled = [event for frame in frames for event in frame.events if isinstance(event, DeviceEvent)]
    with telemetry(front) as client:
        told = client.subscribe().device
    assert told is not None
    assert "engine" in told.process
    assert told.at_ns >= sampled[-1].at_ns


def test_a_client_that_comes_back_knows_everything_from_the_snapshot(scripted: Start) -> None:
    front = scripted(step_s=0.01)
    front.wait_for_engine("ready")
    with telemetry(front) as client:
        first = client.subscribe()
    stream = iter(generate(front, "meanwhile", 2000))
    for _ in range(20):
        next(stream)
    with telemetry(front) as client:
        again = client.subscribe(history=10)
        assert again.server.instance == first.server.instance
        assert [r.id for r in again.requests if r.state == "running"] == ["meanwhile"]
        assert len(again.history) == 10
        assert all(isinstance(event, StepEvent | TokensEvent) for event in again.history)
        seen = max(event.step for event in again.history)
        frames = client.frames_until(lambda events: sum(isinstance(e, StepEvent) for e in events) >= 3)
        steps = [e.step for frame in frames for e in frame.events if isinstance(e, StepEvent)]
        assert steps[0] in {seen, seen + 1}  # nothing between snapshot and frames is lost or told twice
    stream.close() if hasattr(stream, "close") else None


def test_loading_and_death_of_the_engine_are_told(scripted: Start, tmp_path) -> None:
    front = scripted("dies", after=2, once=tmp_path / "once", load_s=0.5)
    with telemetry(front) as client:
        client.subscribe()
        with contextlib.suppress(Exception):
            list(generate(front, "doomed", 10))
        front.wait_for_engine("ready")
        with contextlib.suppress(Exception):
            front.client.completions.create(model="scripted", prompt=[70], max_tokens=10)
        frames = client.frames_until(
            lambda events: (
                [e.state for e in events if isinstance(e, EngineEvent)][-1:] == ["ready"]
                and any(isinstance(e, EngineEvent) and e.state == "restarting" for e in events)
            )
        )
    events = [e for frame in frames for e in frame.events]
    restarting = next(e for e in events if isinstance(e, EngineEvent) and e.state == "restarting")
    assert restarting.failed_requests == 1
    assert "SIGKILL" in restarting.message
    assert any(isinstance(e, EngineEvent) and e.stage == "pretending" and e.fraction == 0.5 for e in events)


def test_a_message_that_makes_no_sense_is_answered_and_the_connection_lives(front: RunningFront) -> None:
    with telemetry(front) as client:
        client.socket.send(b"\xc1 nonsense")
        assert isinstance(client.hear(), ServerError)
        client.socket.send("text")
        assert "binary" in client.hear().message
        client.say(Credit(1))
        assert "subscribe" in client.hear().message
        client.say(Subscribe(protocol=PROTOCOL_VERSION + 1, credits=1))
        assert str(PROTOCOL_VERSION) in client.hear().message
        client.say(ClockRequest(12.5))
        clock = client.hear()
        assert isinstance(clock, ClockReply)
        assert clock.client_time == 12.5
        assert abs(clock.now_ns - time.monotonic_ns()) < 5e9
        assert client.subscribe().engine.state == "ready"


def test_an_engine_whose_clock_is_ahead_is_put_on_the_fronts_clock(scripted: Start) -> None:
    front = scripted(clock_ahead_s=1000)
    front.wait_for_engine("ready")
    time.sleep(1.0)  # the first pings
    with telemetry(front) as client:
        client.subscribe()
        list(generate(front, "skewed", 3))
        frames = client.frames_until(finished("skewed"))
    steps = [e for frame in frames for e in frame.events if isinstance(e, StepEvent)]
    for step in steps:
        assert abs(step.end_ns - time.monotonic_ns()) < 10e9
