"""Books what happens: logs steps and sent tokens, splits their latency, and feeds the metrics.

Nothing here is needed for an answer; what is done of it depends on the feature ``instrumentation``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from inference_server.front.event_log import EventLog
from inference_server.front.metrics import Metrics
from inference_server.protocol import (
    PARTS,
    EngineEvent,
    FinishReason,
    Instrumentation,
    StepReport,
    StepWork,
    TokensEvent,
)
from inference_server.recording.attribution import Attribution
from inference_server.recording.work import with_work

if TYPE_CHECKING:
    from inference_server.front.requests import Sample, SentToken, StepTokens


class TokenBook:
    """Turns what the engine and the connections report into events and metrics.

    Parameters
    ----------
    log
        Gets the events.
    metrics
        Counted at every level.
    """

    def __init__(self, log: EventLog, metrics: Metrics) -> None:
        self._log = log
        self._metrics = metrics
        self._attribution = Attribution()
        self.level: Instrumentation = "full"
        self.work: StepWork | None = None
        """Of the model that is served."""
        self.on_end: Callable[[Sample], None] | None = None
        """Gets every request that has ended, its last token sent."""
        self._asleep_since_ns: int | None = None
        self.spent_ns = 0
        """What booking has cost so far, without the log's own part."""

    def step(self, report: StepReport) -> None:
        """Log a step and what happened to the KV blocks."""
        begin, logged = time.monotonic_ns(), self._log.spent_ns
        step = report.step
        self._metrics.step(report)
        if step is not None:
            if self.work is not None:
                rejected = sum(report.drafted) - sum(report.accepted)
                step = with_work(step, self.work, len(report.tokens.request) + rejected)
            if self.level == "full":
                self._attribution.add_step(step)
            self._log.append(step)
        if report.kv_events is not None:
            self._log.append(report.kv_events)
        self.spent_ns += time.monotonic_ns() - begin - (self._log.spent_ns - logged)

    def engine_event(self, event: EngineEvent) -> None:
        """The engine changed state: while it sleeps, its requests stall."""
        if event.state == "asleep":
            self._asleep_since_ns = self._asleep_since_ns or event.at_ns
        elif self._asleep_since_ns is not None:
            self._attribution.add_pause(self._asleep_since_ns, event.at_ns)
            self._asleep_since_ns = None

    def turned_into_text(self, begin_ns: int, end_ns: int) -> None:
        """The front was busy with a step's tokens; called before any of them is booked."""
        if self.level == "full":
            self._attribution.add_front_turn(begin_ns, end_ns)

    def tokens(self, step: StepTokens, tokens: list[SentToken]) -> None:
        """Book tokens that the clients have taken; moves each sample's clock on."""
        begin, logged = time.monotonic_ns(), self._log.spent_ns
        latencies: list[int] = []
        splits: list[list[int]] = []
        full = self.level == "full" and step.step is not None
        split = self._attribution.split
        for output, _, sent_ns in tokens:
            sample = output.sample
            low = sample.last_sent_ns
            first = low is None
            if low is None:
                low = sample.generation.arrival_ns
            latencies.append(sent_ns - low)
            if full:
                assert step.step is not None
                leader = sample.leader or sample
                splits.append(
                    split(
                        step=step.step,
                        request=sample.handle,
                        leader=leader.handle,
                        low_ns=low,
                        sent_ns=sent_ns,
                        submitted_ns=sample.submitted_ns if first else None,
                        started_ns=(leader.started_ns or sample.started_ns) if first else None,
                        received_ns=step.received_ns,
                    )
                )
            sample.last_sent_ns = sent_ns
        if full:
            assert step.step is not None
            outputs = [output for output, _, _ in tokens]
            self._log.append(
                TokensEvent(
                    step=step.step,
                    request=[output.sample.handle for output in outputs],
                    index=[output.index for output in outputs],
                    token_id=[token_id for _, token_id, _ in tokens],
                    text=[output.token_text for output in outputs],
                    logprob=[output.logprob for output in outputs],
                    sent_ns=[sent_ns for _, _, sent_ns in tokens],
                    latency_ns=latencies,
                    parts=[list(column) for column in zip(*splits, strict=True)] if splits else [[] for _ in PARTS],
                    origin=[output.origin for output in outputs] if any(output.origin for output in outputs) else [],
                )
            )
        self._metrics.tokens(tokens, latencies)
        self.spent_ns += time.monotonic_ns() - begin - (self._log.spent_ns - logged)

    def started(self, sample: Sample) -> None:
        """A request left the queue for the first time."""
        self._metrics.started(sample)

    def finished(self, sample: Sample) -> None:
        """The last token of a request was sent."""
        self._metrics.finished(sample)
        if self.on_end is not None:
            self.on_end(sample)

    def ended(self, sample: Sample, reason: FinishReason) -> None:
        """A request ended, however."""
        self._metrics.ended(sample, reason)
        if self.on_end is not None and reason in {"cancelled", "error"}:
            self.on_end(sample)
