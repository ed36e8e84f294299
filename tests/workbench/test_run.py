"""What a run says about itself, checked against the raw events that the server sent."""

import contextlib
import math
import threading
import time

import msgspec
import numpy as np
import pytest

import inference_workbench as iw
from inference_server.protocol import (
    PROTOCOL_VERSION,
    Credit,
    Frame,
    RequestEvent,
    ServerMessage,
    StepEvent,
    Subscribe,
    TokensEvent,
)
from inference_workbench.store import EventStore


@pytest.fixture
def raw_events(wb):
    """Everything the server says from now on, as it says it: an independent witness."""
    events = []
    stop = threading.Event()
    closing = contextlib.ExitStack()
    socket = closing.enter_context(wb._server.endpoint.websocket("/telemetry"))
    socket.send(msgspec.msgpack.encode(Subscribe(protocol=PROTOCOL_VERSION, credits=64, history=0)))
    decoder = msgspec.msgpack.Decoder(ServerMessage)
    decoder.decode(socket.recv())

    def listen():
        while not stop.is_set():
            try:
                message = decoder.decode(socket.recv(timeout=0.05))
            except TimeoutError:
                continue
            if isinstance(message, Frame):
                events.extend(message.events)
                socket.send(msgspec.msgpack.encode(Credit(1)))

    thread = threading.Thread(target=listen)
    thread.start()
    yield events
    stop.set()
    thread.join()
    closing.close()


def tokens_of(events, handle):
    rows = []
    for event in events:
        if isinstance(event, TokensEvent):
            for place, request in enumerate(event.request):
                if request == handle:
                    rows.append((event.index[place], event.token_id[place], event.text[place], event.sent_ns[place]))
    return rows


def test_a_runs_tokens_and_figures_are_those_of_the_raw_events(wb, raw_events):
    runs = wb.generate_many(["one two three", "four", "five six"], max_tokens=24, ignore_eos=True)
    time.sleep(0.3)
    for run in runs:
        handle = run.request.request
        rows = tokens_of(raw_events, handle)
        assert list(zip(*(run.tokens[name] for name in ("index", "token_id", "text", "sent_ns")), strict=True)) == rows
        assert len(rows) == 24
        request = next(e for e in reversed(raw_events) if isinstance(e, RequestEvent) and e.request == handle)
        sent = [row[3] for row in rows]
        gaps = np.diff(sent) / 1e6
        summary = run.summary()
        assert summary.ttft_ms == pytest.approx((sent[0] - request.arrival_ns) / 1e6)
        assert summary.e2e_ms == pytest.approx((sent[-1] - request.arrival_ns) / 1e6)
        assert summary.tpot_ms == pytest.approx((sent[-1] - sent[0]) / 1e6 / 23)
        assert summary.itl_p50_ms == pytest.approx(np.percentile(gaps, 50))
        assert summary.itl_p95_ms == pytest.approx(np.percentile(gaps, 95))
        assert run.tokens["latency_ms"].sum() == pytest.approx(summary.e2e_ms)
        assert summary.output_tokens == 24
        assert summary.finish_reason == "length"


def test_a_runs_steps_are_the_raw_steps_that_worked_on_it(wb, raw_events):
    run, _other = wb.generate_many(["one two three", "four"], max_tokens=12, ignore_eos=True)
    time.sleep(0.3)
    handle = run.request.request
    steps = [event for event in raw_events if isinstance(event, StepEvent) and handle in event.request]
    assert run.steps["step"].tolist() == [event.step for event in steps]
    assert run.steps["batch_size"].tolist() == [len(event.request) for event in steps]
    own = [event.scheduled[event.request.index(handle)] for event in steps]
    assert run.steps["own_scheduled"].tolist() == own
    assert sum(own) == run.request.prompt_tokens + 12 - 1
    assert run.steps["forward_ms"].sum() == pytest.approx(sum(event.forward_ns for event in steps) / 1e6)
    by_step = {event.step: event for event in steps}
    for token in run.tokens.itertuples():
        event = by_step[token.step]
        assert (token.epoch, token.batch_size, token.path) == (event.epoch, len(event.request), event.path)


def test_the_printed_text_is_the_text_of_the_run_and_of_its_tokens(wb, capsys):
    run = wb.generate("hello", max_tokens=16, ignore_eos=True)
    assert capsys.readouterr().out == run.text + "\n"
    assert "".join(run.tokens["text"]) == run.text
    wb.generate("hello", max_tokens=16, stream=False)
    assert capsys.readouterr().out == ""


def test_messages_are_a_chat_and_a_seed_makes_it_repeatable(wb):
    messages = [{"role": "user", "content": "Say something"}]
    options = {"max_tokens": 12, "temperature": 0.9, "seed": 7, "ignore_eos": True, "stream": False}
    first, second = wb.generate(messages, **options), wb.generate(messages, **options)
    assert first.text == second.text
    assert first.summary().prompt_tokens > 0


def test_a_switch_thrown_in_mid_generation_shows_as_a_second_epoch(wb):
    def switch(index, _text):
        if index == 10:
            wb.features.kv_cache = False

    run = wb.generate("hello", max_tokens=600, ignore_eos=True, stream=False, on_token=switch)
    off = run.tokens[run.tokens["epoch"] == run.tokens["epoch"].max()]
    assert len(run.summary().epochs) == 2
    assert [event.changed for event in run.switches] == [["kv_cache"]]
    # Without a cache, each token computes every position before it again.
    late = off[off["index"] > off["index"].min() + 1]
    assert len(late) > 5
    assert (late["scheduled"] == late["index"] + run.request.prompt_tokens).all()
    on = run.tokens[(run.tokens["epoch"] == run.tokens["epoch"].min()) & (run.tokens["index"] > 0)]
    assert (on["scheduled"] == 1).all()


def test_the_plot_draws_every_token_under_the_settings_it_was_made_with(wb):
    def switch(index, _text):
        if index == 5:
            wb.features.kv_cache = False

    run = wb.generate("hello", max_tokens=600, ignore_eos=True, stream=False, on_token=switch)
    renderers = run.plot().renderers
    assert len(renderers) == 2
    drawn = np.concatenate([renderer.data_source.data["latency_ms"] for renderer in renderers])
    assert sorted(drawn) == pytest.approx(sorted(run.tokens["latency_ms"]))


def test_a_run_shows_itself_as_escaped_html(wb):
    run = wb.generate("hello", max_tokens=4, stream=False)
    run.text = "<script>"
    shown = run._repr_html_()
    assert "&lt;script&gt;" in shown
    assert "TTFT" in shown


def test_one_token_has_no_gaps(wb):
    summary = wb.generate("hello", max_tokens=1, ignore_eos=True, stream=False).summary()
    assert summary.itl_p50_ms is None
    assert summary.tpot_ms is None
    assert summary.ttft_ms == pytest.approx(summary.e2e_ms)
    assert not math.isnan(summary.ttft_ms)


def test_a_refused_request_says_what_was_wrong(wb):
    with pytest.raises(iw.RequestError, match="max_tokens") as caught:
        wb.generate("hello", max_tokens=-1, stream=False)
    assert caught.value.status in {400, 422}


def test_interrupting_a_cell_ends_the_request_on_the_server_and_keeps_what_there_is(wb):
    def interrupt(index, _text):
        if index >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wb.generate("hello", max_tokens=1500, ignore_eos=True, stream=False, on_token=interrupt)
    assert wb.last_run.request.state == "cancelled"
    assert wb.last_run.complete
    assert 0 < len(wb.last_run.tokens) < 1500
    assert wb.status().active_requests == 0


def test_many_prompts_share_steps(wb):
    runs = wb.generate_many([f"prompt {number}" for number in range(8)], max_tokens=32, ignore_eos=True)
    assert [len(run.tokens) for run in runs] == [32] * 8
    assert max(run.tokens["batch_size"].max() for run in runs) > 1
    assert wb.generate_many([]) == []


def test_one_bad_prompt_of_many_ends_the_others(wb):
    with pytest.raises(iw.RequestError):
        wb.generate_many(["fine", "x" * 100_000], max_tokens=1500, ignore_eos=True)
    assert wb.status().active_requests == 0


@pytest.mark.parametrize("level", ["off", "steps"])
def test_with_less_instrumentation_a_run_has_its_text_at_once_and_no_tokens(wb, level):
    wb.features.instrumentation = level
    try:
        begin = time.monotonic()
        run = wb.generate("hello", max_tokens=10, ignore_eos=True, stream=False)
        assert time.monotonic() - begin < 2.5
    finally:
        wb.features.instrumentation = "full"
    assert run.text
    assert run.complete
    assert run.request.output_tokens == 10
    assert len(run.tokens) == 0
    assert len(wb.generate("hello", max_tokens=10, ignore_eos=True, stream=False).tokens) == 10


def test_tokens_that_are_told_again_or_out_of_order_are_each_kept_once():
    store = EventStore()

    def told(step, requests, indices):
        count = len(requests)
        return Frame(
            seq=1,
            now_ns=0,
            dropped=0,
            events=[
                TokensEvent(
                    step=step, request=requests, index=indices, token_id=[7] * count, text=["a"] * count,
                    logprob=[None] * count, sent_ns=[step] * count, latency_ns=[1] * count,
                )
            ],
        )  # fmt: skip

    store.ingest_frame(told(2, [1], [1]))
    store.ingest_frame(told(1, [1, 2], [0, 0]))  # a slow connection had held up their step
    store.ingest_frame(told(2, [1, 2], [1, 1]))  # half of it is known
    found = store.tokens()
    assert sorted(zip(found["request"], found["index"], strict=True)) == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_a_run_tells_what_became_of_proposals(wb):
    # A model that must say this says what was to be expected.
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "ab" * 12}}}
    with wb.features.temporarily(speculation="ngram", adaptive_speculation=False):
        run = wb.generate("a few words", max_tokens=60, response_format=schema)
    steps, tokens = run.steps, run.tokens
    verifying, summary = steps[steps["drafted"] > 0], run.summary()
    assert set(verifying["kind"]) == {"verify"}
    assert verifying["accepted"].sum() > 3
    assert summary.acceptance_rate == verifying["accepted"].sum() / verifying["drafted"].sum()
    assert summary.mean_acceptance_length == 1 + verifying["accepted"].sum() / len(verifying)
    assert "Tokens per verifying step" in repr(summary)
    assert (tokens["origin"] == "accepted").sum() == verifying["accepted"].sum()
    names = ["plain", "accepted", "corrected", "bonus"]
    assert list(run.tables.tokens["origin"]) == [names.index(origin) for origin in tokens["origin"]]
