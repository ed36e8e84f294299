"""The server's own load: starts, changes while it runs, stops, counts what became of it, and says what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from running_front import TOKEN, RunningFront

from inference_server.workloads.workload import WorkloadError
from inference_workbench.client import connect
from inference_workbench.traffic import Traffic

SHORT = {"low": 4, "high": 8}


@pytest.fixture
def traffic(front: RunningFront) -> Iterator[Traffic]:
    with connect(front.url, token=TOKEN) as workbench:
        yield workbench.traffic
        workbench.traffic.stop()


def test_a_workload_of_so_many_requests_ends_by_itself_and_the_counts_add_up(
    front: RunningFront, traffic: Traffic
) -> None:
    traffic.start("chat", requests=12, concurrency=3, output_tokens=(4, 8), ignore_eos=True)
    front.wait_for(lambda: traffic.status.state == "stopped", "end of the traffic")
    status = traffic.status
    assert (status.sent, status.finished, status.failed, status.in_flight) == (12, 12, 0, 0)
    mine = [r for r in front.http.get("/requests").json()["requests"] if r["id"].startswith("traffic-")][-12:]
    assert status.output_tokens == sum(request["output_tokens"] for request in mine)
    assert status.message == "All 12 requests are done."
    assert "12 finished" in repr(traffic)


def test_a_closed_loop_keeps_as_many_under_way_as_asked_and_can_be_changed(
    front: RunningFront, traffic: Traffic
) -> None:
    traffic.start("chat", concurrency=2, output_tokens=200, ignore_eos=True)
    front.wait_for(lambda: len(front.active()) == 2, "two requests")
    traffic.set(concurrency=7)
    front.wait_for(lambda: len(front.active()) == 7, "seven requests")
    traffic.set(concurrency=1)
    front.wait_for(lambda: len(front.active()) == 1, "one request")
    last = traffic.stop()
    assert last.state == "stopped"
    assert last.in_flight == 0
    front.wait_until_idle()
    with pytest.raises(Exception, match="no traffic to change"):
        traffic.set(concurrency=2)


def test_requests_that_arrive_by_themselves_can_be_made_faster_at_once(front: RunningFront, traffic: Traffic) -> None:
    traffic.start("chat", rate=0.01, output_tokens=3)
    time.sleep(0.3)
    assert traffic.status.sent <= 1
    traffic.set(rate=200.0)
    front.wait_for(lambda: traffic.status.finished >= 30, "thirty answers")
    assert traffic.status.workload["arrivals"] == {"kind": "poisson", "rate": 200.0, "burstiness": 1.0}


def test_a_wrong_workload_is_refused_and_the_one_that_runs_goes_on(front: RunningFront, traffic: Traffic) -> None:
    traffic.start("code", concurrency=1)
    answer = front.http.post("/traffic", json={"preset": "poems"})
    assert answer.status_code == 422
    assert "There are: chat, summarize" in answer.json()["error"]["message"]
    assert front.http.patch("/traffic", json={"temperature": 9}).status_code == 422
    with pytest.raises(WorkloadError, match="not both"):
        traffic.start("chat", rate=1, concurrency=2)
    assert traffic.status.state == "running"
    assert traffic.status.workload["source"] == "code"


def test_prompts_too_long_for_the_model_stop_the_traffic_with_the_reason(scripted: Callable[..., RunningFront]) -> None:
    front = scripted()
    front.wait_for_engine("ready")
    front.http.post(
        "/traffic",
        json={
            "source": "random",
            "prompt_tokens": {"low": 100_001, "high": 100_001},
            "arrivals": {"kind": "poisson", "rate": 100},
        },
    ).raise_for_status()
    traffic = lambda: front.http.get("/traffic").json()["traffic"]  # noqa: E731
    front.wait_for(lambda: traffic()["state"] == "stopped", "end of the traffic")
    assert "failures in a row" in traffic()["message"]
    assert "leaves no room for an answer" in traffic()["message"]


def test_traffic_survives_a_dying_engine(scripted: Callable[..., RunningFront], tmp_path) -> None:
    front = scripted("dies", after=5, once=tmp_path / "died")
    front.wait_for_engine("ready")
    body = {"preset": "chat", "arrivals": {"kind": "closed", "concurrency": 2}, "output_tokens": SHORT}
    front.http.post("/traffic", json=body).raise_for_status()
    front.wait_for(lambda: front.http.get("/traffic").json()["traffic"]["finished"] > 6, "answers after the restart")
    status = front.http.get("/traffic").json()["traffic"]
    assert status["failed"] >= 1
    assert status["state"] == "running"
    front.http.post("/traffic/stop", json={})
