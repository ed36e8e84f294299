"""OpenTelemetry traces, as a collector receives them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from running_front import RunningFront

Start = Callable[..., RunningFront]


@pytest.fixture
def collector() -> Iterator[tuple[str, list]]:
    """An OTLP collector: its address and the spans that it was sent."""
    spans: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            spans.extend(span for each in request.resource_spans for scope in each.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_request_becomes_a_trace_whose_stages_add_up_and_whose_parent_is_the_clients(
    scripted: Start, collector: tuple[str, list]
) -> None:
    address, spans = collector
    front = scripted("good", step_s=0.01, otlp_endpoint=address)
    front.wait_for_engine("ready")
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    body = {"prompt": [70, 71, 72], "max_tokens": 5, "request_id": "traced", "temperature": 0.5}
    front.http.post("/v1/completions", json=body, headers={"traceparent": f"00-{trace}-{parent}-01"}).raise_for_status()
    front.wait_for(lambda: len(spans) >= 5, "spans", 15)
    by_name = {span.name: span for span in spans}
    whole = by_name["llm_request"]
    assert whole.trace_id.hex() == trace
    assert whole.parent_span_id.hex() == parent
    attributes = {item.key: item.value for item in whole.attributes}
    assert attributes["gen_ai.request.id"].string_value == "traced"
    assert attributes["gen_ai.usage.completion_tokens"].int_value == 5
    assert attributes["gen_ai.request.temperature"].double_value == 0.5
    stages = [by_name[name] for name in ("tokenize", "queue", "prefill", "decode")]
    assert {span.parent_span_id for span in stages} == {whole.span_id}
    assert stages[0].start_time_unix_nano == whole.start_time_unix_nano
    assert stages[-1].end_time_unix_nano == whole.end_time_unix_nano
    for before, after in itertools.pairwise(stages):
        assert before.end_time_unix_nano == after.start_time_unix_nano


def test_spans_that_wait_are_sent_when_the_server_stops(scripted: Start, collector: tuple[str, list]) -> None:
    address, spans = collector
    front = scripted("good", step_s=0.001, otlp_endpoint=address)
    front.wait_for_engine("ready")
    front.http.post("/v1/completions", json={"prompt": [70], "max_tokens": 2}).raise_for_status()
    front.close()
    assert {span.name for span in spans} >= {"llm_request", "decode"}
