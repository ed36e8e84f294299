"""What answers amount to, as a client saw them: each request's latencies, and each run's figures.

Definitions are those of docs/experiments.md. A client's TTFT begins when it sends, a server's when the request arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd

from inference_workbench.experiments.sender import Answer

Floats = npt.NDArray[np.float64]


class Metric(msgspec.Struct, frozen=True):
    """What a figure is called, and which direction is good."""

    name: str
    title: str
    unit: str
    better: Literal["lower", "higher"]
    definition: str


METRICS = {
    each.name: each
    for each in (
        Metric("ttft_ms", "TTFT", "ms", "lower", "request sent → first token received"),
        Metric("tpot_ms", "TPOT", "ms", "lower", "(E2E − TTFT) / (output tokens − 1), of each request"),
        Metric("itl_p99_ms", "ITL p99", "ms", "lower", "gap between two tokens of a request, 99th percentile of a run"),
        Metric("e2e_ms", "E2E", "ms", "lower", "request sent → last token received"),
        Metric(
            "output_tokens_per_s",
            "output tokens/s",
            "1/s",
            "higher",
            "output tokens of all requests / time from the first request sent to the last token received",
        ),
    )
}
"""What is compared between two settings, in this order."""

PER_REQUEST = ("ttft_ms", "tpot_ms", "e2e_ms")


def token_gaps_ms(answer: Answer) -> Floats:
    """Gaps between consecutive tokens; tokens that came in one piece have gaps of zero."""
    times = np.repeat(np.asarray(answer.times_s), np.asarray(answer.counts, dtype=np.int64))
    return np.diff(times) * 1e3


def request_figures(answer: Answer) -> dict[str, Any]:
    """Return one request's figures, ``None`` where one does not exist."""
    row: dict[str, Any] = {
        "request": answer.index,
        "due_s": answer.due_s,
        "sent_s": answer.sent_s,
        "late_ms": None if answer.sent_s is None else (answer.sent_s - answer.due_s) * 1e3,
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": answer.output_tokens,
        "cached_tokens": answer.cached_tokens,
        "ttft_ms": None,
        "tpot_ms": None,
        "e2e_ms": None,
        "finish": answer.finish,
        "error": answer.error,
    }
    if answer.finished and answer.sent_s is not None:
        first, last = answer.times_s[0], answer.times_s[-1]
        row["ttft_ms"] = (first - answer.sent_s) * 1e3
        row["e2e_ms"] = (last - answer.sent_s) * 1e3
        if (answer.output_tokens or 0) > 1:
            row["tpot_ms"] = (last - first) * 1e3 / ((answer.output_tokens or 0) - 1)
    return row


def requests_table(answers: Sequence[Answer]) -> pd.DataFrame:
    """Return a row a request."""
    table = pd.DataFrame([request_figures(answer) for answer in answers])
    for name in (*PER_REQUEST, "sent_s", "late_ms"):
        table[name] = table[name].astype(float)
    return table


def span_s(answers: Sequence[Answer]) -> float:
    """Seconds from the first request sent to the last token received."""
    finished = [answer for answer in answers if answer.finished]
    if not finished:
        return 0.0
    begin = min(answer.sent_s for answer in answers if answer.sent_s is not None)
    return max(answer.times_s[-1] for answer in finished) - begin


def run_figures(answers: Sequence[Answer]) -> dict[str, float]:
    """Return a run's figures: means over its requests, percentiles of all gaps, rates over its span."""
    finished = [answer for answer in answers if answer.finished]
    rows = [request_figures(answer) for answer in finished]
    figures: dict[str, float] = {}
    for name in PER_REQUEST:
        values = [row[name] for row in rows if row[name] is not None]
        figures[name] = float(np.mean(values)) if values else np.nan
    gaps = np.concatenate([token_gaps_ms(answer) for answer in finished]) if finished else np.zeros(0)
    figures["itl_p99_ms"] = float(np.percentile(gaps, 99)) if gaps.size else np.nan
    span = span_s(answers)
    tokens = sum(answer.output_tokens or 0 for answer in finished)
    figures["output_tokens_per_s"] = tokens / span if span > 0 else np.nan
    return figures


def paired_effects(baseline: Sequence[Answer], candidate: Sequence[Answer]) -> dict[str, float]:
    """Return how two runs of the same requests differ: the logarithm of candidate / baseline for each metric.

    A metric that every request has is compared request by request, so that long and short ones weigh the same.
    """
    first = {answer.index: request_figures(answer) for answer in baseline if answer.finished}
    second = {answer.index: request_figures(answer) for answer in candidate if answer.finished}
    both = sorted(set(first) & set(second))
    effects: dict[str, float] = {}
    for name in PER_REQUEST:
        ratios = [
            np.log(second[index][name] / first[index][name])
            for index in both
            if first[index][name] and second[index][name]
        ]
        effects[name] = float(np.mean(ratios)) if ratios else np.nan
    ones, others = run_figures(baseline), run_figures(candidate)
    for name in METRICS:
        if name not in effects:
            before, after = ones[name], others[name]
            effects[name] = float(np.log(after / before)) if before > 0 and after > 0 else np.nan
    return effects
