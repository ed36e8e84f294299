"""Replays a recording as a workload: the same requests, at the times they came, against a live server."""

from __future__ import annotations

import html
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import pandas as pd

from inference_server.protocol import SamplingParams
from inference_workbench.errors import WorkbenchError
from inference_workbench.progress import ProgressLine
from inference_workbench.recording import Recording, open_recording
from inference_workbench.run import Run
from inference_workbench.store import ENDED
from inference_workbench.tables import Tables
from inference_workbench.tables import rows as each_row

if TYPE_CHECKING:
    from inference_workbench.client import Workbench

Verdict = Literal["identical", "different", "random", "shorter", "incomplete", "failed", "not sent"]
"""``random``: sampled from a seed that was not recorded. ``shorter``: identical as far as the recording has it.
``incomplete``: not all of its tokens' records reached this client."""

_MAX_PARALLEL = 512
_PATIENCE_S = 10.0
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Planned:
    """One request of a workload, ready to be sent.

    Attributes
    ----------
    recorded
        The recorded request's handle.
    due_s
        When to send it, seconds after the start.
    body
        Of ``POST /v1/completions``.
    tokens
        What the recording says was generated, by output position; positions before a recording began are missing.
    whole
        Whether that is all of it: neither its beginning nor its end lies outside the recording.
    reproducible
        Whether the same tokens are to be expected: greedy, or the seed is known.
    """

    recorded: int
    due_s: float
    body: dict[str, Any]
    tokens: dict[int, int]
    whole: bool
    reproducible: bool


def plan(recording: Recording, speed: float = 1.0) -> list[Planned]:
    """Return a recording's requests in the order of their arrival.

    A request that was cancelled is asked for as many tokens as it had got. Requests whose prompt the recording does not
    know are left out.

    Parameters
    ----------
    speed
        2 sends them twice as fast as they came.
    """
    rows = recording.tables["requests"]
    rows = rows[rows["prompt"].notna()].sort_values("arrival_ns", kind="stable")
    by_request = dict(iter(recording.tables["tokens"].groupby("request")))
    begin = recording.manifest.started_ns
    planned = []
    for row in each_row(rows):
        sampling = msgspec.json.decode(row.sampling, type=SamplingParams)
        own = by_request.get(row.request)
        tokens = {} if own is None else dict(zip(own["index"].tolist(), own["token_id"].tolist(), strict=True))
        seed = None if pd.isna(row.seed) else int(row.seed)
        planned.append(
            Planned(
                recorded=int(row.request),
                due_s=max(0.0, (row.arrival_ns - begin) / 1e9 / speed),
                body=_body(row, sampling, seed),
                tokens=tokens,
                whole=row.state in ENDED and len(tokens) == row.output_tokens,
                reproducible=sampling.temperature == 0 or seed is not None,
            )
        )
    return planned


def replay(
    recording: Recording | str | Path,
    client: Workbench,
    *,
    speed: float = 1.0,
    cancel: threading.Event | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> WorkloadRun:
    """Send a recording's requests to a live server: same arrivals, prompts (as token ids), sampling and seeds.

    Parameters
    ----------
    recording
        A recording, or the path of one.
    client
        Of the server. Its switches are left as they are: set them first to compare settings under the same load.
    speed
        2 sends the requests twice as fast as they came.
    cancel
        When set, nothing more is sent, what runs is ended, and what there is by then is returned. So does an interrupt.
    on_progress
        Called with how many requests have ended and how many there are.

    Returns
    -------
    WorkloadRun
        Every request's run, and how its tokens compare with the recorded ones.

    Raises
    ------
    WorkbenchError
        If the recording has no request that can be sent.
    """
    if isinstance(recording, str | Path):
        with open_recording(recording) as opened:
            return replay(opened, client, speed=speed, cancel=cancel, on_progress=on_progress)
    if speed <= 0:
        raise WorkbenchError(f"The speed has to be above 0, not {speed}.")
    planned = plan(recording, speed)
    if not planned:
        raise WorkbenchError(
            "This recording has no request that could be sent again: none of them has its prompt. "
            "Were they sent before the recording began?"
        )
    sender = _Sender(client, planned, cancel or threading.Event(), on_progress)
    outcomes = sender.run()
    return WorkloadRun(recording, planned, outcomes, speed)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one planned request: when it was sent (s after the start), its run or its error."""

    sent_s: float | None
    run: Run | None
    error: str | None


class _Sender:
    def __init__(
        self,
        client: Workbench,
        planned: list[Planned],
        cancel: threading.Event,
        on_progress: Callable[[int, int], object] | None,
    ) -> None:
        self._client = client
        self._planned = planned
        self._cancel = cancel
        self._on_progress = on_progress
        self._label = f"replay-{time.time_ns() % 10**10:010}"

    def run(self) -> list[Outcome]:
        """Send everything when it is due, and wait for the last answer."""
        line = ProgressLine("Replaying")
        ended = 0
        total = len(self._planned)
        futures: list[Future[Outcome]] = []

        def told(_: Future[Outcome]) -> None:
            nonlocal ended
            ended += 1
            if self._on_progress is not None:
                self._on_progress(ended, total)

        # A thread per request in flight; a load that keeps more in flight than this is sent late, which the run says.
        with ThreadPoolExecutor(min(total, _MAX_PARALLEL), thread_name_prefix="replay") as pool:
            begin = time.monotonic()
            try:
                for number, each in enumerate(self._planned):
                    while (left := begin + each.due_s - time.monotonic()) > 0 and not self._cancel.wait(
                        min(left, 0.25)
                    ):
                        line.update(f"{ended} of {total} requests", ended / total)
                    if self._cancel.is_set():
                        break
                    future = pool.submit(self._send, number, each, begin)
                    future.add_done_callback(told)
                    futures.append(future)
                while not all(future.done() for future in futures):
                    if self._cancel.wait(0.1):
                        self._end(futures)
                    line.update(f"{ended} of {total} requests", ended / total)
            except KeyboardInterrupt:
                self._cancel.set()
                self._end(futures)
        line.done(f"Replayed {ended} of {total} requests")
        done = [self._completed(future.result()) for future in futures]
        return done + [Outcome(None, None, "cancelled before it was due")] * (total - len(done))

    def _send(self, number: int, planned: Planned, begin: float) -> Outcome:
        if self._cancel.is_set():
            return Outcome(None, None, "cancelled before it was due")
        sent = time.monotonic() - begin
        try:
            run = self._client._generate(None, planned.body, None, request_id=self._id(number))  # noqa: SLF001 -- our own
        except WorkbenchError as error:
            return Outcome(sent, None, str(error))
        return Outcome(sent, run, None)

    def _completed(self, outcome: Outcome) -> Outcome:
        """Look again where telemetry lagged behind the answers, as it may under load."""
        run = outcome.run
        if run is None or run.complete:
            return outcome
        return replace(outcome, run=Run.collect(self._client.store, run.id, run.text, _PATIENCE_S))

    def _end(self, futures: list[Future[Outcome]]) -> None:
        for number, future in enumerate(futures):
            if not future.done():
                self._client._cancel_quietly(self._id(number))  # noqa: SLF001 -- our own

    def _id(self, number: int) -> str:
        return f"{self._label}-{number}"


class WorkloadRun:
    """A workload that was replayed: the runs, how they compare with the recording, and their tables.

    Attributes
    ----------
    requests
        A row a request, in the order of arrival: ``recorded`` (its handle in the recording), ``due_s``, ``sent_s``,
        ``late_ms``, ``verdict``, ``first_difference`` (output position), ``recorded_token`` and ``token`` there,
        ``tokens``, ``ttft_ms``, ``recorded_ttft_ms``, ``e2e_ms``, ``recorded_e2e_ms``, ``error``.
    runs
        The runs by the recorded request's handle; without those that failed or were not sent.
    tables
        ``steps``, ``step_requests``, ``tokens``, ``requests`` and ``features`` of all runs, as in a recording.
    """

    def __init__(self, recording: Recording, planned: list[Planned], outcomes: list[Outcome], speed: float) -> None:
        self.recording = recording.manifest.name
        self.speed = speed
        self.runs = {
            each.recorded: outcome.run
            for each, outcome in zip(planned, outcomes, strict=True)
            if outcome.run is not None
        }
        then = recording.tables["requests"].set_index("request")
        self.requests = pd.DataFrame(
            [_row(each, outcome, then.loc[each.recorded]) for each, outcome in zip(planned, outcomes, strict=True)]
        )
        for name in ("first_difference", "recorded_token", "token"):
            self.requests[name] = self.requests[name].astype("Int64")

    @property
    def tables(self) -> Tables:
        """The tables of all runs, in the shape they have in a recording."""
        from inference_workbench.run_tables import run_tables  # noqa: PLC0415 -- pyarrow takes a while to load

        return run_tables([run.rows for run in self.runs.values()])

    def sql(self, query: str) -> pd.DataFrame:
        """Run a query of DuckDB's SQL over :attr:`tables`."""
        return self.tables.sql(query)

    @property
    def identical(self) -> bool:
        """Whether every request whose tokens can be expected to be the same has the same."""
        return not len(self.differences)

    @property
    def differences(self) -> pd.DataFrame:
        """The requests that were sent and came out differently, or failed, or whose tokens are not all known."""
        return self.requests[self.requests["verdict"].isin(["different", "incomplete", "failed"])]

    def summary(self) -> pd.Series[Any]:
        """Return the figures: verdicts, how late requests were sent, and latencies beside the recorded ones."""
        rows = self.requests
        verdicts = rows["verdict"].value_counts()
        late = rows["late_ms"].dropna()
        figures: dict[str, Any] = {"requests": len(rows), "speed": self.speed}
        figures |= {str(verdict): int(count) for verdict, count in verdicts.items()}
        figures |= {"late_ms_p50": _percentile(late, 50), "late_ms_max": _percentile(late, 100)}
        for name, q in itertools.product(("ttft_ms", "e2e_ms"), (50, 95)):
            figures[f"{name}_p{q}"] = _percentile(rows[name].dropna(), q)
            figures[f"recorded_{name}_p{q}"] = _percentile(rows[f"recorded_{name}"].dropna(), q)
        return pd.Series(figures, dtype=object)

    def __repr__(self) -> str:
        verdicts = self.requests["verdict"].value_counts()
        said = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
        return f"<WorkloadRun of {self.recording!r} at {self.speed:g}×: {said}>"

    def _repr_html_(self) -> str:
        figures = self.summary().to_frame("value").to_html(header=False)
        differences = self.differences
        listed = differences.to_html(index=False, max_rows=20) if len(differences) else "<p>No difference.</p>"
        return f"<div><p>{html.escape(repr(self))}</p>{figures}{listed}</div>"


def _body(row: Any, sampling: SamplingParams, seed: int | None) -> dict[str, Any]:
    body: dict[str, Any] = {name: getattr(sampling, name) for name in _SAMPLING}
    cancelled = row.state == "cancelled" and row.output_tokens > 0
    body |= {
        "prompt": [int(token) for token in row.prompt],
        "max_tokens": int(row.output_tokens) if cancelled else sampling.max_tokens,
        "ignore_eos": sampling.ignore_eos,
        "stop_token_ids": list(sampling.stop_token_ids),
        "priority": int(row.priority),
    }
    if sampling.temperature > 0 and seed is not None:
        body["seed"] = seed if seed < 2**63 else seed - 2**64
    if sampling.logprobs is not None:
        body["logprobs"] = sampling.logprobs
    if sampling.json_schema is not None:
        schema = {"name": "recorded", "schema": msgspec.json.decode(sampling.json_schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if row.stops is not None and len(row.stops):
        body["stop"] = list(row.stops)
    overrides = msgspec.json.decode(row.overrides) if row.overrides else {}
    if overrides:
        body["features"] = overrides
    return body


def _row(planned: Planned, outcome: Outcome, then: Any) -> dict[str, Any]:
    run = outcome.run
    summary = None if run is None else run.summary()
    made = {} if run is None else dict(zip(run.tokens["index"].tolist(), run.tokens["token_id"].tolist(), strict=True))
    verdict, first = _compare(planned, outcome, made)
    ended = then["last_token_ns"]
    return {
        "recorded": planned.recorded,
        "due_s": planned.due_s,
        "sent_s": outcome.sent_s,
        "late_ms": None if outcome.sent_s is None else (outcome.sent_s - planned.due_s) * 1e3,
        "verdict": verdict,
        "first_difference": first,
        "recorded_token": None if first is None else planned.tokens.get(first),
        "token": None if first is None else made.get(first),
        "tokens": len(made),
        "ttft_ms": None if summary is None else summary.ttft_ms,
        "recorded_ttft_ms": _ms_between(then["arrival_ns"], then["first_token_ns"]),
        "e2e_ms": None if summary is None else summary.e2e_ms,
        "recorded_e2e_ms": _ms_between(then["arrival_ns"], ended),
        "error": outcome.error,
    }


def _compare(planned: Planned, outcome: Outcome, made: dict[int, int]) -> tuple[Verdict, int | None]:
    if outcome.sent_s is None:
        return "not sent", None
    if outcome.run is None:
        return "failed", None
    if not planned.reproducible:
        return "random", None
    if not outcome.run.complete:
        return "incomplete", None
    # What lies outside the recording cannot be compared; what lies in it has to be there.
    compared = set(planned.tokens) | set(made) if planned.whole else set(planned.tokens)
    first = min((index for index in compared if planned.tokens.get(index) != made.get(index)), default=None)
    if first is not None:
        return "different", first
    return ("identical" if planned.whole else "shorter"), None


def _ms_between(begin: float, end: float) -> float | None:
    return None if pd.isna(begin) or pd.isna(end) else float(end - begin) / 1e6


def _percentile(values: pd.Series[Any], q: float) -> float | None:
    return float(np.percentile(values.to_numpy(dtype=float), q)) if len(values) else None
