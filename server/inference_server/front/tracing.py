"""OpenTelemetry: one trace per request, made when the request has ended. Imports the SDK only where it is asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import structlog

from inference_server.front.settings import SettingsError

if TYPE_CHECKING:
    from inference_server.front.requests import Sample

_log = structlog.get_logger(__name__)
_STAGES = ("tokenize", "queue", "prefill", "decode")


class Tracer:
    """Exports ended requests as spans.

    Parameters
    ----------
    endpoint
        Of an OTLP collector over HTTP, such as ``http://127.0.0.1:4318``.
    version
        Of this server.

    Raises
    ------
    SettingsError
        If OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, version: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
            from opentelemetry.trace import set_span_in_context  # noqa: PLC0415
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise SettingsError(
                f"The setting 'otlp_endpoint' needs the package {error.name!r}. "
                'Install it with: pip install "inference-workbench[otel]"'
            ) from error
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "inference-workbench", "service.version": version}),
            shutdown_on_exit=False,
        )
        url = f"{endpoint.rstrip('/')}/v1/traces"
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("inference_server", version)
        self._within = set_span_in_context
        self._propagator = TraceContextTextMapPropagator()
        self._wall_offset_ns = time.time_ns() - time.monotonic_ns()

    def request(self, sample: Sample, model: str) -> None:
        """Export a request whose last token was sent, or that ended otherwise. Queues only; a thread sends."""
        generation = sample.generation
        begin, end = generation.arrival_ns, sample.last_sent_ns or time.monotonic_ns()
        context = self._propagator.extract(generation.headers)
        span = self._tracer.start_span(
            "llm_request", context=context, start_time=self._wall(begin), attributes=_attributes(sample, model)
        )
        moments = (begin, sample.submitted_ns, sample.started_ns, sample.first_token_ns, end)
        for stage, low, high in zip(_STAGES, moments, moments[1:], strict=False):
            if low is None or high is None:
                break
            child = self._tracer.start_span(stage, context=self._within(span), start_time=self._wall(low))
            child.end(self._wall(high))
        if sample.error is not None:
            from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415

            span.set_status(Status(StatusCode.ERROR, sample.error))
        span.end(self._wall(end))

    def close(self) -> None:
        """Send what is queued; takes as long as the collector does, so call it from a thread."""
        self._provider.shutdown()

    def _wall(self, monotonic_ns: int) -> int:
        return monotonic_ns + self._wall_offset_ns


def _attributes(sample: Sample, model: str) -> Mapping[str, Any]:
    generation = sample.generation
    found: dict[str, Any] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.id": sample.id,
        "gen_ai.response.model": model,
        "gen_ai.usage.input_tokens": sample.prompt_tokens,
        "gen_ai.usage.prompt_tokens": sample.prompt_tokens,
        "gen_ai.usage.output_tokens": sample.output_tokens,
        "gen_ai.usage.completion_tokens": sample.output_tokens,
        "gen_ai.usage.cached_tokens": sample.cached_tokens,
        "gen_ai.request.max_tokens": sample.max_tokens,
        "gen_ai.request.n": generation.samples_per_prompt,
    }
    if sample.detail is not None:
        found["gen_ai.request.temperature"] = sample.detail.sampling.temperature
        found["gen_ai.request.top_p"] = sample.detail.sampling.top_p
    if sample.finish_reason is not None:
        found["gen_ai.response.finish_reasons"] = [sample.finish_reason]
    arrival, first, last = generation.arrival_ns, sample.first_token_ns, sample.last_sent_ns
    if sample.started_ns is not None and sample.submitted_ns is not None:
        found["gen_ai.latency.time_in_queue"] = (sample.started_ns - sample.submitted_ns) / 1e9
    if first is not None:
        found["gen_ai.latency.time_to_first_token"] = (first - arrival) / 1e9
    if last is not None:
        found["gen_ai.latency.e2e"] = (last - arrival) / 1e9
    return found
