"""One finished request: its text, every token with the time it took and why, every step it took part in, its summary.

Definitions are those of docs/notebook-api.md. All numbers are measured; times are the server's monotonic clock.
"""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from inference_server.protocol import PARTS, FeaturesEvent, Kind, Origin, RequestEvent
from inference_workbench.store import EventStore

if TYPE_CHECKING:
    from bokeh.plotting import figure as Figure  # noqa: N812 -- it is a class

    from inference_workbench.run_tables import RunRows
    from inference_workbench.tables import Tables

_NS_PER_MS = 1e6
_TEXT_SHOWN = 2000


@dataclass(frozen=True, slots=True, repr=False)
class Summary:
    """The figures of one request. Times in milliseconds; ``None`` where a figure does not exist."""

    prompt_tokens: int
    output_tokens: int
    finish_reason: str | None
    ttft_ms: float | None
    """Arrival at the server → first token sent."""
    queue_ms: float | None
    """Arrival → begin of the first step that worked on it; part of TTFT."""
    itl_p50_ms: float | None
    itl_p95_ms: float | None
    """Gap between two consecutive tokens, percentiles over the request."""
    tpot_ms: float | None
    """(E2E − TTFT) / (output tokens − 1)."""
    e2e_ms: float | None
    """Arrival → last token sent."""
    output_tokens_per_s: float | None
    """Output tokens / E2E."""
    steps: int
    epochs: tuple[int, ...]
    """The settings it ran under: more than one when a switch was thrown meanwhile."""
    acceptance_rate: float | None = None
    """Accepted / proposed tokens, without the bonus; ``None`` where nothing was proposed."""
    mean_acceptance_length: float | None = None
    """Tokens per step that verified proposals: 1 + accepted / such steps."""

    def to_series(self) -> pd.Series[Any]:
        """Return the figures as a pandas Series, for tables that compare runs."""
        return pd.Series(asdict(self))

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left'>{label}</td><td style='text-align:right'>{value}</td></tr>"
            for label, value in self._labelled()
        )
        return f"<table>{rows}</table>"

    def __repr__(self) -> str:
        return "\n".join(f"{label:<28} {value}" for label, value in self._labelled())

    def _labelled(self) -> list[tuple[str, str]]:
        def ms(value: float | None) -> str:
            return "–" if value is None else f"{value:,.2f} ms"

        rate, length = self.output_tokens_per_s, self.mean_acceptance_length
        speculation = []
        if length is not None:
            speculation.append(("Tokens per verifying step", f"{length:.2f} ({self.acceptance_rate:.0%} accepted)"))
        return [
            ("Prompt / output tokens", f"{self.prompt_tokens} / {self.output_tokens}"),
            ("Finish reason", self.finish_reason or "–"),
            ("TTFT (of which queue)", f"{ms(self.ttft_ms)} ({ms(self.queue_ms)})"),
            ("ITL p50", ms(self.itl_p50_ms)),
            ("ITL p95", ms(self.itl_p95_ms)),
            ("TPOT", ms(self.tpot_ms)),
            ("E2E latency", ms(self.e2e_ms)),
            ("Output tokens per second", "–" if rate is None else f"{rate:,.1f}"),
            ("Steps", str(self.steps)),
            ("Settings (epochs)", ", ".join(map(str, self.epochs)) or "–"),
            *speculation,
        ]


class Run:
    """A finished request and all that was measured of it.

    Attributes
    ----------
    id
        The request's id on the server.
    text
        What was generated.
    request
        The server's last word on it: state, arrival, token counts, finish reason, error.
    tokens
        A row a token: ``request, index, token_id, text, sent_ns, latency_ms, step, epoch, batch_size, path, kind,
        origin, scheduled, logprob, step_ms, forward_ms``. ``latency_ms`` is the time to first token for index 0 and the
        gap to the token before for the others; ``scheduled`` is how many positions the step computed for this request;
        ``batch_size`` how many requests shared the step; ``origin`` is ``plain``, or where tokens were proposed
        ``accepted``, ``corrected`` or ``bonus``.
    steps
        A row a step that worked on this request, with its phases in milliseconds, the whole batch's figures and the KV
        cache's occupancy; ``own_start``, ``own_scheduled``, ``kind``, ``drafted`` and ``accepted`` are this
        request's share.
    switches
        The switches thrown between its arrival and its end.
    attribution
        Where each token's latency went: a row a token, in milliseconds, ``latency_ms`` and one column per part. The
        parts add up to the latency. Missing values where the server did not measure them.
    complete
        Whether every token's record is here. False when the telemetry connection was lost or too slow meanwhile.
    """

    def __init__(
        self,
        *,
        request_id: str,
        text: str,
        request: RequestEvent | None,
        tokens: pd.DataFrame,
        steps: pd.DataFrame,
        switches: list[FeaturesEvent],
        complete: bool,
        rows: RunRows,
    ) -> None:
        self.id = request_id
        self.text = text
        self.request = request
        self.tokens = tokens
        self.steps = steps
        self.switches = switches
        self.complete = complete
        self.rows = rows
        self._tables: Tables | None = None

    @classmethod
    def collect(cls, store: EventStore, request_id: str, text: str, timeout_s: float = 3.0) -> Run:
        """Copy a request's rows out of the store, after waiting for the last of them."""
        handle = store.wait_for_request(request_id, timeout_s)
        complete = handle is not None
        if handle is None:
            handle = store.handle(request_id)
        known = -1 if handle is None else handle
        shares = store.shares(known)
        from inference_workbench.run_tables import RunRows  # noqa: PLC0415 -- pyarrow takes a while to load

        step_rows = store.steps(shares["begin_ns"].to_numpy(dtype=np.int64))
        token_rows = store.tokens(known)
        steps = _steps_table(step_rows, shares)
        tokens = _tokens_table(token_rows, steps)
        request = store.request(known)
        switches: list[FeaturesEvent] = []
        if request is not None:
            switches = [each for each in store.switches() if request.arrival_ns <= each.applied_ns <= request.at_ns]
        return cls(
            request_id=request_id,
            text=text,
            request=request,
            tokens=tokens,
            steps=steps,
            switches=switches,
            complete=complete,
            rows=RunRows(step_rows, shares, token_rows, request, switches),
        )

    @property
    def tables(self) -> Tables:
        """The run's rows in the shape of a recording's tables: steps, step_requests, tokens, requests, features."""
        if self._tables is None:
            from inference_workbench.run_tables import run_tables  # noqa: PLC0415 -- pyarrow takes a while to load

            self._tables = run_tables([self.rows])
        return self._tables

    def sql(self, query: str) -> pd.DataFrame:
        """Run a query of DuckDB's SQL over :attr:`tables`."""
        return self.tables.sql(query)

    @property
    def attribution(self) -> pd.DataFrame:
        """Where each token's latency went, in milliseconds; see the attributes above."""
        rows = self.rows.tokens.sort_values("index", kind="stable")
        parts = {part: rows[f"{part}_ns"] / _NS_PER_MS for part in PARTS}
        table = pd.DataFrame({"latency_ms": rows["latency_ns"] / _NS_PER_MS, **parts})
        return table.set_axis(rows["index"], axis="index")

    def summary(self) -> Summary:
        """Return the request's figures; see :class:`Summary` for their definitions."""
        request = self.request
        count = len(self.tokens)
        latency = self.tokens["latency_ms"].to_numpy(dtype=float)
        ttft = e2e = queue = None
        gaps = latency[self.tokens["index"].to_numpy() > 0]
        if request is not None and count:
            first = self.tokens.loc[self.tokens["index"] == 0, "sent_ns"]
            ttft = None if first.empty else float(first.iloc[0] - request.arrival_ns) / _NS_PER_MS
            e2e = float(self.tokens["sent_ns"].iloc[-1] - request.arrival_ns) / _NS_PER_MS
        if request is not None and len(self.steps):
            queue = float(self.steps["begin_ns"].iloc[0] - request.arrival_ns) / _NS_PER_MS
        drafted = self.steps["drafted"].to_numpy() if len(self.steps) else np.zeros(0)
        accepted = self.steps["accepted"].to_numpy()[drafted > 0].sum() if drafted.any() else 0
        return Summary(
            prompt_tokens=0 if request is None else request.prompt_tokens,
            output_tokens=count if request is None else request.output_tokens,
            finish_reason=None if request is None else request.finish_reason,
            ttft_ms=ttft,
            queue_ms=queue,
            itl_p50_ms=float(np.percentile(gaps, 50)) if gaps.size else None,
            itl_p95_ms=float(np.percentile(gaps, 95)) if gaps.size else None,
            tpot_ms=(e2e - ttft) / (count - 1) if e2e is not None and ttft is not None and count > 1 else None,
            e2e_ms=e2e,
            output_tokens_per_s=count / e2e * 1e3 if e2e else None,
            steps=len(self.steps),
            epochs=tuple(int(epoch) for epoch in self.steps["epoch"].unique()),
            acceptance_rate=float(accepted / drafted.sum()) if drafted.any() else None,
            mean_acceptance_length=float(1 + accepted / (drafted > 0).sum()) if drafted.any() else None,
        )

    def plot(self) -> Figure:
        """Return a Bokeh figure of each token's latency over its position, coloured by the settings of its step."""
        from inference_workbench.figures import latency_over_position  # noqa: PLC0415 -- Bokeh takes a while to load

        return latency_over_position(self)

    def __repr__(self) -> str:
        state = "unknown" if self.request is None else self.request.state
        return f"<Run {self.id}: {state}, {len(self.tokens)} tokens, {self.text[:60]!r}>"

    def _repr_html_(self) -> str:
        shown = self.text[:_TEXT_SHOWN] + ("…" if len(self.text) > _TEXT_SHOWN else "")
        note = "" if self.complete else "<p><b>Some of this request's telemetry is missing.</b></p>"
        error = self.request.error if self.request is not None else None
        problem = f"<p><b>{html.escape(error)}</b></p>" if error else ""
        text = f"<pre style='white-space:pre-wrap'>{html.escape(shown)}</pre>"
        return f"<div>{text}{problem}{note}{self.summary()._repr_html_()}</div>"


def _steps_table(steps: pd.DataFrame, shares: pd.DataFrame) -> pd.DataFrame:
    own = shares.rename(columns={"start": "own_start", "scheduled": "own_scheduled"})
    table = steps.merge(own.drop(columns=["request", "step"]), on="begin_ns", how="inner").sort_values("begin_ns")
    for phase in ("schedule", "prepare", "forward", "sample", "update"):
        table[f"{phase}_ms"] = table.pop(f"{phase}_ns") / _NS_PER_MS
    table["step_ms"] = (table["end_ns"] - table["begin_ns"]) / _NS_PER_MS
    table["kind"] = [Kind(kind).name.lower() for kind in table["kind"]]
    first = ["step", "epoch", "kind", "own_start", "own_scheduled", "batch_size", "scheduled", "step_ms", "forward_ms"]
    return table[[*first, *(name for name in table.columns if name not in first)]].reset_index(drop=True)


def _tokens_table(tokens: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    why = steps[["step", "epoch", "batch_size", "path", "kind", "own_scheduled", "step_ms", "forward_ms"]]
    table = tokens.merge(why, on="step", how="left")
    table["latency_ms"] = table.pop("latency_ns") / _NS_PER_MS
    table = table.rename(columns={"own_scheduled": "scheduled"})
    for name in ("epoch", "batch_size", "scheduled"):
        table[name] = table[name].astype("Int64")
    table["origin"] = [Origin(origin).name.lower() for origin in table["origin"]]
    order = ["request", "index", "token_id", "text", "latency_ms", "step", "epoch", "batch_size", "kind", "scheduled"]
    return table[[*order, "origin", "path", "step_ms", "forward_ms", "logprob", "sent_ns"]].sort_values(
        "index", kind="stable"
    )
