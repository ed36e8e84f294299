"""What the client measures, against a server that knows when it sent what."""

import threading
import time

import numpy as np
import pytest
from streaming_server import DONE, StreamingServer, event, text

from inference_workbench.endpoint import Endpoint
from inference_workbench.errors import WorkbenchError
from inference_workbench.experiments.figures import paired_effects, request_figures, run_figures, token_gaps_ms
from inference_workbench.experiments.sender import Answer, Request, send
from inference_workbench.experiments.target import Target

# Scheduling on a busy machine may add this much to a time, but nothing can take away from it.
SLACK_S = 0.25


@pytest.fixture
def serve():
    servers = []

    def start(script, **options):
        servers.append(StreamingServer(script, **options))
        return servers[-1], Target.probe(Endpoint(token="", url=servers[-1].url))

    yield start
    for server in servers:
        server.close()


def usage(prompt, output):
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": output})


def plain(index=0, at_s=0.0, tokens=4):
    return Request(index=index, text="hello", max_tokens=tokens, at_s=at_s)


def test_times_are_when_the_pieces_were_sent_and_figures_follow_from_them(serve):
    def script(_number, _body):
        yield 0.15, text("a")
        yield 0.05, text("b")
        yield 0.10, text("c", finish_reason="length")
        yield 0.0, usage(7, 3) + DONE

    server, target = serve(script)
    begin = time.perf_counter()
    answer = send(target, [plain()]).answers[0]
    arrived = server.received[0][0]
    sent = arrived - begin  # the client's zero is a moment after `begin`
    assert answer.sent_s <= sent
    stamps = np.array(server.stamps[0][:3])
    seen = np.array(answer.times_s)
    assert answer.counts == [1, 1, 1]
    waits = np.diff(stamps, prepend=arrived)
    assert (seen - answer.sent_s >= np.cumsum(waits) - 0.002).all(), "nothing is seen before it was sent"
    assert (seen - answer.sent_s <= np.cumsum(waits) + SLACK_S).all()
    figures = request_figures(answer)
    assert figures["ttft_ms"] == pytest.approx((seen[0] - answer.sent_s) * 1e3)
    assert figures["e2e_ms"] == pytest.approx((seen[2] - answer.sent_s) * 1e3)
    assert figures["tpot_ms"] == pytest.approx((figures["e2e_ms"] - figures["ttft_ms"]) / 2)
    assert (figures["prompt_tokens"], figures["output_tokens"], figures["finish"]) == (7, 3, "length")
    assert run_figures([answer])["output_tokens_per_s"] == pytest.approx(3 / (seen[2] - answer.sent_s))


def test_tokens_are_counted_by_their_ids_and_those_of_one_piece_have_no_gap(serve):
    def script(_number, _body):
        yield 0.02, text("abc", token_ids=[4, 5, 6])
        yield 0.05, text("", token_ids=[7])
        yield 0.02, text("d", token_ids=[8, 9], finish_reason="stop")
        yield 0.0, usage(2, 6) + DONE

    _, target = serve(script)
    answer = send(target, [plain()]).answers[0]
    assert answer.token_ids == [4, 5, 6, 7, 8, 9]
    assert answer.counts == [3, 1, 2]
    gaps = token_gaps_ms(answer)
    assert gaps[[0, 1, 4]].tolist() == [0, 0, 0]
    assert gaps[2] >= 49
    assert gaps.sum() == pytest.approx((answer.times_s[-1] - answer.times_s[0]) * 1e3)


def test_a_chats_opening_piece_without_words_is_not_its_first_token(serve):
    def script(_number, _body):
        yield 0.0, event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
        yield 0.1, event(choices=[{"index": 0, "delta": {"content": "Hi"}, "finish_reason": "stop"}])
        yield 0.0, DONE

    server, target = serve(script)
    request = Request(index=0, messages=[{"role": "user", "content": "hello"}], max_tokens=4)
    answer = send(target, [request]).answers[0]
    assert server.received[0][1] == "/v1/chat/completions"
    assert answer.times_s[0] - answer.sent_s >= 0.099
    assert (answer.output_tokens, answer.text) == (1, "Hi")


def test_events_are_read_whole_however_they_are_cut_into_packets(serve):
    whole = text("a") + text("b", finish_reason="length") + usage(1, 2) + DONE

    def script(_number, _body):
        for at in range(0, len(whole), 7):
            yield 0.002, whole[at : at + 7]

    _, target = serve(script)
    answer = send(target, [plain()]).answers[0]
    assert (answer.text, answer.error, answer.output_tokens) == ("ab", None, 2)


def test_a_closed_loop_never_has_more_under_way_and_starts_the_next_when_one_ends(serve):
    def script(_number, _body):
        yield 0.05, text("a", finish_reason="length") + DONE

    server, target = serve(script)
    ended = []
    sending = send(target, [plain(index) for index in range(9)], limit=3, on_end=lambda *state: ended.append(state))
    assert server.most_at_once == 3
    assert all(answer.finished for answer in sending.answers)
    assert ended == [(number, 9) for number in range(1, 10)]


def test_an_open_loop_sends_when_due_whether_or_not_the_server_keeps_up(serve):
    def script(_number, _body):
        yield 0.5, text("a", finish_reason="length") + DONE

    server, target = serve(script)
    due = [0.0, 0.05, 0.1, 0.3]
    answers = send(target, [plain(index, at_s) for index, at_s in enumerate(due)]).answers
    assert server.most_at_once == 4
    for answer, at_s in zip(answers, due, strict=True):
        assert at_s - 0.002 <= answer.sent_s <= at_s + SLACK_S
        assert request_figures(answer)["late_ms"] == pytest.approx((answer.sent_s - at_s) * 1e3)


def test_a_failed_request_says_why_and_the_others_go_on(serve):
    def script(number, _body):
        if number == 0:
            yield 0.0, event(error={"message": "out of memory"})
        elif number == 1:
            yield 0.0, text("a")
            yield 0.0, None
        else:
            yield 0.0, text("a", finish_reason="length") + DONE

    _, target = serve(script)
    answers = send(target, [plain(index) for index in range(3)], limit=1).answers
    assert answers[0].error == "out of memory"
    assert "broke off" in answers[1].error
    assert answers[2].finished
    assert run_figures(answers)["e2e_ms"] == pytest.approx(request_figures(answers[2])["e2e_ms"])


def test_cancelling_ends_what_runs_and_sends_nothing_more(serve):
    def script(_number, _body):
        yield 0.01, text("a")
        yield 30.0, text("b", finish_reason="length") + DONE

    server, target = serve(script)
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    began = time.monotonic()
    sending = send(target, [plain(index) for index in range(5)], limit=2, cancel=cancel)
    assert time.monotonic() - began < 10
    assert sending.cancelled
    assert len(server.received) == 2
    assert not any(answer.finished for answer in sending.answers)
    assert sending.answers[4].sent_s is None


def test_a_server_is_asked_what_it_can_do_and_a_wrong_address_is_named(serve):
    _, plain_target = serve(lambda *_: iter(()))
    assert (plain_target.model, plain_target.tokenizes, plain_target.token_ids) == ("scripted", None, False)
    _, vllm = serve(lambda *_: iter(()), paths={"/tokenize": {"tokens": [1], "count": 1}})
    assert (vllm.tokenizes, vllm.token_ids) == ("vllm", True)
    _, llama = serve(lambda *_: iter(()), paths={"/tokenize": {"tokens": [1]}})
    assert (llama.tokenizes, llama.token_ids) == ("llama.cpp", False)
    with pytest.raises(WorkbenchError, match="serves no model"):
        serve(lambda *_: iter(()), models=())
    with pytest.raises(WorkbenchError, match=r"Nobody answers at http://127\.0\.0\.1:9"):
        Target.probe(Endpoint(token="", url="http://127.0.0.1:9"))


def test_two_runs_are_compared_request_by_request():
    def answer(index, scale):
        times = [0.1 * (index + 1) * scale, 0.3 * (index + 1) * scale]
        return Answer(index=index, sent_s=0.0, times_s=times, counts=[1, 1], output_tokens=2)

    before = [answer(0, 1.0), answer(1, 1.0), answer(2, 1.0)]
    after = [answer(0, 1.1), answer(1, 1.1), Answer(index=2, error="failed")]
    effects = paired_effects(before, after)
    assert effects["ttft_ms"] == pytest.approx(np.log(1.1))
    assert effects["e2e_ms"] == pytest.approx(np.log(1.1))
