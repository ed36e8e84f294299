"""``/metrics`` as Prometheus and vLLM's dashboards read it, and the summary with its percentiles and objectives."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from running_front import TOKEN, RunningFront
from watcher import Watcher

from inference_server.front import latency_summary
from inference_server.front.latency_summary import LatencyStatistics, Slo
from inference_server.protocol import CeilingsEvent, DeviceEvent, TokensEvent

Start = Callable[..., RunningFront]
DASHBOARDS = json.loads((Path(__file__).parent / "vllm_dashboards.json").read_text())


def generate(front: RunningFront, tokens: int, **extra: object) -> None:
    body = {"prompt": [70, 71, 72], "max_tokens": tokens, "ignore_eos": True, "stream": True} | extra
    with front.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        for _ in answer.iter_lines():
            pass


def samples(front: RunningFront) -> list[Sample]:
    answer = front.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]


def value(found: list[Sample], name: str, **labels: str) -> float:
    [sample] = [s for s in found if s.name == f"vllm:{name}" and labels.items() <= s.labels.items()]
    return sample.value


def difference(before: list[Sample], after: list[Sample], name: str, **labels: str) -> float:
    return value(after, name, **labels) - value(before, name, **labels)


def test_every_series_that_vllms_dashboards_ask_for_is_there_with_its_labels(front: RunningFront) -> None:
    generate(front, 5)
    found = samples(front)
    by_name: dict[str, set[str]] = {}
    for sample in found:
        by_name.setdefault(sample.name, set()).update(sample.labels)
    missing = []
    for dashboard, queries in DASHBOARDS.items():
        for query in queries:
            matched = re.fullmatch(r"([\w:]+)\{([\w,]*)\}", query)
            assert matched is not None
            name, labels = matched[1], {label for label in matched[2].split(",") if label}
            if not labels <= by_name.get(name, {""}):
                missing.append((dashboard, query))
    assert not missing
    [name] = {sample.labels["model_name"] for sample in found}
    assert name == front.client.models.list().data[0].id


def test_types_are_those_of_vllm(front: RunningFront) -> None:
    families = {family.name: family.type for family in text_string_to_metric_families(front.http.get("/metrics").text)}
    assert families["vllm:num_requests_running"] == "gauge"
    assert families["vllm:generation_tokens"] == "counter"
    assert families["vllm:inter_token_latency_seconds"] == "histogram"
    assert families["vllm:iteration_tokens_total"] == "histogram"


def test_what_is_counted_is_what_happened(front: RunningFront) -> None:
    before = samples(front)
    with Watcher(front.url, TOKEN) as watcher:
        for tokens in (1, 4, 7):
            generate(front, tokens)
        front.wait_for(lambda: len(watcher.tokens()) == 12, "tokens")
    after = samples(front)
    latencies = [
        (index, latency / 1e9)
        for event in watcher.events(TokensEvent)
        for index, latency in zip(event.index, event.latency_ns, strict=True)
    ]
    assert difference(before, after, "generation_tokens_total") == 12
    assert difference(before, after, "prompt_tokens_total") == 9
    assert difference(before, after, "request_success_total", finished_reason="length") == 3
    assert difference(before, after, "time_to_first_token_seconds_count") == 3
    assert difference(before, after, "inter_token_latency_seconds_count") == 9
    assert difference(before, after, "request_time_per_output_token_seconds_count") == 2, "none of one token"
    assert difference(before, after, "e2e_request_latency_seconds_count") == 3
    firsts = sum(latency for index, latency in latencies if index == 0)
    assert difference(before, after, "time_to_first_token_seconds_sum") == pytest.approx(firsts, rel=1e-6)
    gaps = sum(latency for index, latency in latencies if index)
    assert difference(before, after, "inter_token_latency_seconds_sum") == pytest.approx(gaps, rel=1e-6)
    assert difference(before, after, "e2e_request_latency_seconds_sum") == pytest.approx(firsts + gaps, rel=1e-6)
    parts = ("queue", "prefill", "decode")
    whole = sum(difference(before, after, f"request_{part}_time_seconds_sum") for part in parts)
    assert 0.5 * (firsts + gaps) < whole <= firsts + gaps
    assert value(after, "num_requests_running") == 0
    assert value(after, "kv_cache_usage_perc") == 0


def test_a_prompt_is_looked_up_in_the_prefix_cache_once_and_its_hits_are_counted(front: RunningFront) -> None:
    prompt = [(7 * n) % 90 + 10 for n in range(64)]
    generate(front, 2, prompt=prompt)
    before = samples(front)
    generate(front, 2, prompt=prompt)
    after = samples(front)
    assert difference(before, after, "prefix_cache_queries_total") == 64
    assert 32 <= difference(before, after, "prefix_cache_hits_total") < 64


def test_metrics_need_the_token_like_everything_else(front: RunningFront) -> None:
    for path in ("/metrics", "/metrics/summary", "/recordings", "/ceilings"):
        assert httpx.get(front.url + path).status_code == 401
    assert httpx.get(f"{front.url}/metrics?token={TOKEN}").status_code == 200


def test_cancelled_requests_are_counted_as_aborted(scripted: Start) -> None:
    front = scripted("good", step_s=0.02)
    front.wait_for_engine("ready")
    with front.http.stream(
        "POST", "/v1/completions", json={"prompt": [70], "max_tokens": 1000, "stream": True}
    ) as answer:
        lines = answer.iter_lines()  # to be kept: with it the stream would be closed
        next(lines)
        assert value(samples(front), "num_requests_running") == 1
    front.wait_for(lambda: value(samples(front), "request_success_total", finished_reason="abort") == 1, "abort")
    assert front.http.get("/metrics/summary").json()["requests"] == 0, "nobody's objective was missed"


def test_goodput_counts_the_requests_that_met_every_objective(scripted: Start) -> None:
    front = scripted("good", step_s=0.03)
    front.wait_for_engine("ready")
    assert front.http.put("/slo", json={"tpot_ms": 20}).json()["tpot_ms"] == 20
    generate(front, 5)
    missed = front.http.get("/metrics/summary").json()
    assert (missed["requests"], missed["good_requests"]) == (1, 0)
    front.http.put("/slo", json={"tpot_ms": 500, "ttft_ms": 5000})
    generate(front, 5)
    met = front.http.get("/metrics/summary").json()
    assert (met["requests"], met["good_requests"]) == (1, 1)
    assert met["goodput_per_s"] == pytest.approx(1 / met["window_s"])
    assert met["tpot"]["p50_ms"] > 25
    assert met["itl"]["count"] == 4


@pytest.mark.parametrize("body", [{"ttft_ms": 0}, {"tpot_ms": -1}, {"speed": 3}, {"e2e_ms": "fast"}])
def test_objectives_that_make_no_sense_are_refused(front: RunningFront, body: dict) -> None:
    answer = front.http.put("/slo", json=body)
    assert answer.status_code == 422
    assert next(iter(body)) in answer.text


def test_the_hardware_is_sampled_and_the_machines_ceilings_become_known(front: RunningFront) -> None:
    with Watcher(front.url, TOKEN) as watcher:
        front.wait_for(lambda: generate(front, 60) or watcher.events(DeviceEvent), "device sample", 20)
        measured = front.http.post("/ceilings/measure", json={}).json()
        front.wait_for(lambda: watcher.events(CeilingsEvent), "ceilings", 5)
    sample = watcher.events(DeviceEvent)[-1]
    assert sample.process == ["front", "engine"]
    assert all(rss > 10 << 20 for rss in sample.rss)
    assert 0 < sample.system_memory_used < sample.system_memory_total
    assert measured == front.http.get("/ceilings").json()
    assert measured["read_bytes_per_s"] > 1e9
    assert measured["copy_bytes_per_s"] > 1e9
    assert measured["flops_per_s"] > 1e9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]

    class Time:
        monotonic = staticmethod(lambda: now[0])

    monkeypatch.setattr(latency_summary, "time", Time)

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 1e5), min_size=1, max_size=300))
def test_percentiles_are_within_one_percent_of_the_true_ones(values: list[float]) -> None:
    statistics = LatencyStatistics(Slo())
    for each in values:
        statistics.token(int(each * 1e6), first=False)
    found = statistics.summary().itl
    for name, quantile in latency_summary.QUANTILES.items():
        low, high = (np.quantile(values, quantile, method=method) for method in ("lower", "higher"))
        measured = getattr(found, f"{name}_ms")
        assert low * 0.989 - 1e-6 <= measured <= high * 1.011 + 1e-6


def test_a_window_covers_its_intervals_and_all_covers_everything(clock: Callable[[float], None]) -> None:
    statistics = LatencyStatistics(Slo())
    for minute in range(15):
        for _ in range(6):
            statistics.token((minute + 1) * 1_000_000, first=False)
            clock(10)
    recent, everything = statistics.summary(60), statistics.summary()
    assert recent.itl.count == 6
    assert recent.itl.p50_ms == pytest.approx(15, rel=0.011)
    assert everything.itl.count == everything.output_tokens == 90
    assert everything.itl.p50_ms == pytest.approx(8, rel=0.011)
    assert everything.window_s == pytest.approx(900)
