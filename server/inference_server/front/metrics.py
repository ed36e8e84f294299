"""``/metrics``: Prometheus text under vLLM's names and types, so that its dashboards and gateways read this server too.

Counting is a few list operations per token; the text is made when somebody asks. ``docs/metrics.md`` says what each
name means here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from inference_server.features import MAX_DRAFTS
from inference_server.front.latency_summary import LatencyStatistics
from inference_server.protocol import Capacity, FinishReason, KvUsage, Ready, RequestState, StepReport

if TYPE_CHECKING:
    from inference_server.front.requests import Sample, SentToken

# vLLM's bounds, with finer ones below: a small model's tokens take a millisecond.
_TTFT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
         80.0, 160.0, 640.0, 2560.0)  # fmt: skip
_ITL = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
        10.0, 20.0, 40.0, 80.0)  # fmt: skip
_REQUEST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0,
            50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
_CHOICES = (1, 2, 5, 10, 20)
_REASONS: dict[FinishReason, str] = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}

_HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("Arrival at the front to the first token sent.", _TTFT),
    "inter_token_latency_seconds": ("Gap between two consecutive tokens of a request, as sent.", _ITL),
    "request_time_per_output_token_seconds": ("(E2E - TTFT) / (tokens - 1), per request.", _ITL),
    "e2e_request_latency_seconds": ("Arrival to the last token sent.", _REQUEST),
    "request_queue_time_seconds": ("Handed to the engine to the first step that computes the request.", _REQUEST),
    "request_inference_time_seconds": ("First step to the last token sent.", _REQUEST),
    "request_prefill_time_seconds": ("First step to the first token sent.", _REQUEST),
    "request_decode_time_seconds": ("First token sent to the last.", _REQUEST),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": ("Output tokens of a request.", _TOKENS),
    "request_max_num_generation_tokens": ("Most output tokens that a request's samples asked for.", _TOKENS),
    "request_params_max_tokens": ("The parameter max_tokens.", _TOKENS),
    "request_params_n": ("The parameter n.", _CHOICES),
    "iteration_tokens_total": ("Positions computed in a step.", _ITERATION),
}
_COUNTERS = {
    "num_preemptions": "Preemptions.",
    "prompt_tokens": "Prompt tokens of requests that have answered.",
    "generation_tokens": "Output tokens sent.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache, once per request.",
    "prefix_cache_hits": "Prompt tokens that the prefix cache supplied.",
    "spec_decode_num_drafts": "Verified proposals, of one or more tokens for a request in a step.",
    "spec_decode_num_draft_tokens": "Tokens proposed.",
    "spec_decode_num_accepted_tokens": "Tokens proposed and accepted.",
}


class _Histogram:
    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound."""
        rows, so_far = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            so_far += count
            rows.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(so_far)))
        return rows


class Metrics:
    """Counts everything that ``/metrics`` and the summary say.

    Parameters
    ----------
    statistics
        Gets every latency too.
    """

    def __init__(self, statistics: LatencyStatistics) -> None:
        self.statistics = statistics
        self.states: Callable[[], list[RequestState]] = list
        """Returns the states of the active requests."""
        self._histograms = {name: _Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
        self._counters = dict.fromkeys(_COUNTERS, 0)
        self._accepted_per_position = [0] * MAX_DRAFTS
        self._ended: dict[FinishReason, int] = dict.fromkeys(_REASONS, 0)
        self._kv: KvUsage | None = None
        self.model_name = ""
        """What is served now."""
        self._capacity: Capacity | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Collector(self._collect))

    def ready(self, ready: Ready) -> None:
        """Name the model that is served from now on."""
        self.model_name = ready.model.name
        self._capacity = ready.capacity
        self._kv = None

    def text(self) -> bytes:
        """Return the Prometheus exposition."""
        return generate_latest(self._registry)

    # -- counting ----------------------------------------------------------------------------------------------------

    def step(self, report: StepReport) -> None:
        """A step ended."""
        self._counters["num_preemptions"] += len(report.preempted)
        self._counters["spec_decode_num_drafts"] += len(report.verified)
        self._counters["spec_decode_num_draft_tokens"] += sum(report.drafted)
        self._counters["spec_decode_num_accepted_tokens"] += sum(report.accepted)
        for accepted in report.accepted:
            for position in range(accepted):
                self._accepted_per_position[position] += 1
        step = report.step
        if step is None:
            self._kv = None  # nothing is known about it while nothing is recorded
        else:
            self._kv = step.kv
            if step.scheduled:
                self._histograms["iteration_tokens_total"].observe(sum(step.scheduled))

    def started(self, sample: Sample) -> None:
        """A request left the queue for the first time."""
        self._counters["prefix_cache_queries"] += sample.prompt_tokens
        self._counters["prefix_cache_hits"] += sample.cached_tokens
        if sample.started_ns is not None and sample.submitted_ns is not None:
            queued = max(sample.started_ns - sample.submitted_ns, 0)
            self._histograms["request_queue_time_seconds"].observe(queued / 1e9)

    def tokens(self, tokens: list[SentToken], latencies_ns: list[int]) -> None:
        """Tokens were sent."""
        self._counters["generation_tokens"] += len(tokens)
        first, gaps = self._histograms["time_to_first_token_seconds"], self._histograms["inter_token_latency_seconds"]
        for (output, _, _), latency in zip(tokens, latencies_ns, strict=True):
            sample = output.sample
            if output.index == 0:
                first.observe(latency / 1e9)
                self._counters["prompt_tokens"] += sample.prompt_tokens
            else:
                gaps.observe(latency / 1e9)
                sample.longest_itl_ns = max(sample.longest_itl_ns, latency)
            self.statistics.token(latency, first=output.index == 0)

    def finished(self, sample: Sample) -> None:
        """The last token of a request was sent."""
        first, last, started = sample.first_token_ns, sample.last_sent_ns, sample.started_ns
        if first is None or last is None:
            return
        observe = {name: histogram.observe for name, histogram in self._histograms.items()}
        arrival, count = sample.generation.arrival_ns, sample.output_tokens
        tpot = (last - first) / (count - 1) if count > 1 else None
        observe["e2e_request_latency_seconds"]((last - arrival) / 1e9)
        observe["request_decode_time_seconds"]((last - first) / 1e9)
        if started is not None:
            observe["request_prefill_time_seconds"]((first - started) / 1e9)
            observe["request_inference_time_seconds"]((last - started) / 1e9)
        if tpot is not None:
            observe["request_time_per_output_token_seconds"](tpot / 1e9)
        observe["request_prompt_tokens"](sample.prompt_tokens)
        observe["request_generation_tokens"](count)
        observe["request_params_max_tokens"](sample.max_tokens)
        observe["request_max_num_generation_tokens"](sample.max_tokens)
        observe["request_params_n"](sample.generation.samples_per_prompt)
        self.statistics.request(
            ttft_ns=first - arrival, tpot_ns=tpot, longest_itl_ns=sample.longest_itl_ns, e2e_ns=last - arrival
        )

    def ended(self, sample: Sample, reason: FinishReason) -> None:
        """A request ended, however."""
        del sample
        self._ended[reason] += 1
        if reason == "error":
            self.statistics.failed_request()

    # -- telling -----------------------------------------------------------------------------------------------------

    def _collect(self) -> Iterator[Metric]:
        labels, values = ["model_name", "engine"], [self.model_name, "0"]

        def gauge(name: str, text: str, value: float) -> Metric:
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=labels)
            family.add_metric(values, value)
            return family

        states = self.states()
        running = sum(state == "running" for state in states)
        yield gauge("num_requests_running", "Requests in the running batch.", running)
        yield gauge("num_requests_waiting", "Requests that wait, preempted ones included.", len(states) - running)
        if self._kv is not None or not states:  # while nothing is recorded nobody knows, but for "nothing"
            kv = self._kv if states else None
            share = kv.used_blocks / max(kv.total_blocks, 1) if kv is not None else 0.0
            yield gauge("kv_cache_usage_perc", "Referenced KV blocks, 1 is all.", share)
        if self._capacity is not None:
            config = GaugeMetricFamily(
                "vllm:cache_config_info",
                "KV cache, as labels.",
                labels=[*labels, "block_size", "num_gpu_blocks", "enable_prefix_caching"],
            )
            size, blocks = self._capacity.block_size, self._capacity.num_blocks
            config.add_metric([*values, str(size), str(blocks), "True"], 1.0)
            yield config
        for name, text in _COUNTERS.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=labels)
            counter.add_metric(values, self._counters[name])
            yield counter
        per_position = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted tokens by their place in the proposal, from 0.",
            labels=[*labels, "position"],
        )
        for position, accepted in enumerate(self._accepted_per_position):
            per_position.add_metric([*values, str(position)], accepted)
        yield per_position
        success = CounterMetricFamily(
            "vllm:request_success", "Requests by how they ended.", labels=[*labels, "finished_reason"]
        )
        for reason, name in _REASONS.items():
            success.add_metric([*values, name], self._ended[reason])
        yield success
        for name, (text, _) in _HISTOGRAMS.items():
            histogram = self._histograms[name]
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=labels)
            family.add_metric(values, histogram.buckets(), histogram.total)
            yield family


class _Collector(Collector):
    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        return self._collect()
