"""The search for the highest rate: on servers whose limit is known."""

import threading
import time

import pytest
from streaming_server import DONE, StreamingServer, event, text

import inference_workbench as iw
from inference_workbench.experiments.capacity import Point, meets, next_rate
from inference_workbench.experiments.sender import Answer


def search(limit, saturation, precision=0.1):
    points = []
    while (rate := next_rate(points, saturation, 0.9, precision)) is not None:
        good = 20 if rate <= limit else 10
        points.append(Point(rate=rate, requests=20, good=good, seconds=20 / rate))
    return points


@pytest.mark.parametrize("limit", [0.2, 1.0, 3.3, 9.0])
@pytest.mark.parametrize("precision", [0.05, 0.3])
def test_the_search_ends_around_the_limit_as_close_as_asked(limit, precision):
    points = search(limit, saturation=4.0, precision=precision)
    passed = max(point.rate for point in points if point.attainment >= 0.9)
    failed = min(point.rate for point in points if point.attainment < 0.9)
    assert passed <= limit < failed <= passed * (1 + precision) * 1.0001
    assert len(points) <= 14


def test_a_server_that_always_or_never_meets_the_objective_ends_the_search():
    assert len(search(1e9, saturation=4.0)) <= 10
    assert len(search(0.0, saturation=4.0)) <= 14


def test_wilsons_interval_is_the_known_one():
    low, high = Point(rate=1, requests=10, good=9, seconds=10).interval()
    assert (low, high) == (pytest.approx(0.596, abs=1e-3), pytest.approx(0.982, abs=1e-3))


def test_a_request_is_good_if_it_ended_well_and_meets_every_objective():
    answer = Answer(index=0, sent_s=0.0, times_s=[0.1, 0.15, 0.3], counts=[1, 1, 1], output_tokens=3)
    assert meets(answer, {"ttft_ms": 101, "tpot_ms": 101, "itl_ms": 151, "e2e_ms": 301})
    for name, bound in {"ttft_ms": 99, "tpot_ms": 99, "itl_ms": 149, "e2e_ms": 299}.items():
        assert not meets(answer, {name: bound})
    assert not meets(Answer(index=0, sent_s=0.0, error="failed"), {"e2e_ms": 1e9})
    one_token = Answer(index=0, sent_s=0.0, times_s=[0.1], counts=[1], output_tokens=1)
    assert meets(one_token, {"tpot_ms": 1, "itl_ms": 1})


@pytest.fixture
def one_at_a_time():
    """A server that takes 40 ms a request, one after the other: at most 25 a second, whatever the machine does."""
    lock = threading.Lock()
    free_at = [0.0]

    def script(_number, _body):
        with lock:
            begin = max(time.monotonic(), free_at[0])
            free_at[0] = begin + 0.04
        yield free_at[0] - time.monotonic(), text("a", finish_reason="length") + DONE

    server = StreamingServer(script)
    yield iw.target(server.url)
    server.close()


def test_the_limit_of_a_real_queue_is_found_over_http_and_a_file_goes_on(one_at_a_time, tmp_path):
    workload = iw.workload("chat", rate=1.0, burstiness=1000.0)
    options = {"requests": 25, "precision": 0.3, "wb": one_at_a_time, "progress": False}
    found = iw.capacity({"e2e_ms": 200}, workload, path=tmp_path / "c.iwexp", **options)
    assert found.complete
    # Evenly spaced arrivals: below 25/s nothing waits, far above it the queue grows beyond 200 ms.
    assert 8 <= found.rate <= 40
    assert 12 <= found.saturation <= 25.5
    curve = found.curve()
    assert curve["rate"].is_monotonic_increasing
    assert (curve["attainment_low"] <= curve["attainment"]).all()
    assert "meets the objective up to" in found.summary()
    assert [len(figure.renderers) > 0 for figure in found.plot().children] == [True, True]
    opened = iw.open_result(tmp_path / "c.iwexp")
    assert opened.bracket == found.bracket
    assert "wb = iw.target('http://127.0.0.1:" in found.cell()
    runs = len(found.journal.runs)
    again = iw.capacity({"e2e_ms": 200}, workload, path=tmp_path / "c.iwexp", **options)
    assert len(again.journal.runs) == runs


def test_failed_requests_are_no_error_but_not_good(tmp_path):
    def script(number, _body):
        yield 0.0, text("a", finish_reason="length") + DONE if number % 2 else event(error={"message": "full"})

    server = StreamingServer(script)
    target = iw.target(server.url)
    path = tmp_path / "f.iwexp"
    workload = iw.workload("chat", rate=1.0, burstiness=100.0)
    found = iw.capacity({"e2e_ms": 5000}, workload, requests=2, path=path, wb=target, progress=False)
    server.close()
    assert found.rate is None
    assert "No rate that was tried" in found.summary()
    assert (found.curve()["failed"] == 1).all()


@pytest.mark.parametrize(
    ("slo", "message"),
    [({}, "no objective. Bound"), ({"ttft": 5}, "no objective 'ttft'"), ({"ttft_ms": -1}, "above 0 ms")],
)
def test_objectives_that_make_no_sense_are_named(slo, message, one_at_a_time):
    with pytest.raises(iw.WorkbenchError, match=message):
        iw.capacity(slo, wb=one_at_a_time)
