"""A recording as a trace in Chrome's trace-event format, which Perfetto opens (https://ui.perfetto.dev).

One track for the engine's steps with their phases, one per request with queue, prefill, decode and each token, counters
for the batch, the KV cache and the output rate, and marks where switches were thrown. Times are microseconds since the
recording began.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pandas as pd

from inference_server.protocol import PARTS, Kind
from inference_workbench.tables import rows as each_row

if TYPE_CHECKING:
    from inference_workbench.recording import Recording

Event = dict[str, Any]

ENGINE = 1
REQUESTS = 2
_STEPS_TRACK = 1
_SWITCHES_TRACK = 2
_PHASES = ("schedule", "prepare", "forward", "sample", "update")


def write_trace(recording: Recording, path: Path) -> Path:
    """Write the trace as JSON and return its path."""
    encoder = msgspec.json.Encoder()
    manifest = recording.manifest
    about = {
        "recording": manifest.name,
        "created": manifest.created,
        "model": manifest.models[-1].model.name if manifest.models else "",
        **{f"version of {name}": version for name, version in manifest.versions.items()},
    }
    with path.open("wb") as file:
        file.write(b'{"displayTimeUnit":"ms","otherData":' + encoder.encode(about) + b',"traceEvents":[\n')
        separator = b""
        for event in trace_events(recording):
            file.write(separator + encoder.encode(event))
            separator = b",\n"
        file.write(b"\n]}\n")
    return path


def trace_events(recording: Recording) -> Iterator[Event]:
    """Yield the events of the trace."""
    clock = _Clock(recording.manifest.started_ns)
    yield _name(ENGINE, None, "engine")
    yield _name(ENGINE, _STEPS_TRACK, "steps")
    yield _name(ENGINE, _SWITCHES_TRACK, "switches")
    yield _name(REQUESTS, None, "requests")
    yield from _steps(recording, clock)
    yield from _switches(recording, clock)
    yield from _requests(recording, clock)


class _Clock:
    def __init__(self, begin_ns: int) -> None:
        self._begin = begin_ns

    def __call__(self, at_ns: float) -> float:
        """Microseconds since the recording began."""
        return (int(at_ns) - self._begin) / 1e3


def _name(process: int, thread: int | None, name: str) -> Event:
    kind = "process_name" if thread is None else "thread_name"
    return {"ph": "M", "name": kind, "pid": process, "tid": thread or 0, "ts": 0, "args": {"name": name}}


def _slice(
    clock: _Clock, process: int, thread: int, name: str, category: str, begin: float, end: float, **args: Any
) -> Event:
    start = clock(begin)
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": process,
        "tid": thread,
        "ts": start,
        "dur": max(0.0, clock(end) - start),
        "args": {key: value for key, value in args.items() if value is not None},
    }


def _counter(clock: _Clock, name: str, at_ns: float, **values: float) -> Event:
    return {"ph": "C", "name": name, "pid": ENGINE, "tid": 0, "ts": clock(at_ns), "args": values}


def _steps(recording: Recording, clock: _Clock) -> Iterator[Event]:
    kinds = recording.sql("select step, kind, sum(scheduled)::BIGINT as positions from step_requests group by all")
    positions = {
        step: {Kind(kind).name.lower(): int(count) for kind, count in zip(rows["kind"], rows["positions"], strict=True)}
        for step, rows in kinds.groupby("step")
    }
    for row in each_row(recording.tables["steps"]):
        yield _slice(
            clock, ENGINE, _STEPS_TRACK, f"step {row.step}", "step", row.begin_ns, row.end_ns,
            epoch=row.epoch, path=row.path, **positions.get(row.step, {}),
        )  # fmt: skip
        at = row.begin_ns
        for phase in _PHASES:
            length = getattr(row, f"{phase}_ns")
            # Where a GPU's work overlaps the next step, phases together may outlast the step: slices have to nest.
            end = min(at + length, row.end_ns)
            if length > 0 and end > at:
                yield _slice(clock, ENGINE, _STEPS_TRACK, phase, "phase", at, end)
            at = end
        yield _counter(clock, "batch", row.end_ns, running=row.running, waiting=row.waiting)
        yield _counter(clock, "KV blocks", row.end_ns, used=row.used_blocks, cached=row.cached_blocks)
    tokens = recording.tables["tokens"]
    if len(tokens):
        second = ((tokens["sent_ns"] - recording.manifest.started_ns) // 1_000_000_000).astype("int64")
        counts = second.value_counts()
        for at in range(int(second.min()), int(second.max()) + 2):
            begin = recording.manifest.started_ns + at * 1_000_000_000
            yield _counter(clock, "output tokens/s", begin, tokens=int(counts.get(at, 0)))


def _switches(recording: Recording, clock: _Clock) -> Iterator[Event]:
    told = set()
    for row in each_row(recording.tables["features"]):
        if len(row.changed) == 0 or row.epoch in told:
            continue
        told.add(row.epoch)
        values = msgspec.json.decode(row.values)
        yield {
            "ph": "i",
            "s": "p",
            "name": ", ".join(f"{name} = {_spell(values[name])}" for name in row.changed),
            "cat": "switch",
            "pid": ENGINE,
            "tid": _SWITCHES_TRACK,
            "ts": clock(row.applied_ns),
            "args": {"epoch": row.epoch, "cost": row.cost, "apply_ms": row.apply_ns / 1e6, "preempted": row.preempted},
        }


def _requests(recording: Recording, clock: _Clock) -> Iterator[Event]:
    tokens = dict(tuple(recording.tables["tokens"].groupby("request", sort=False)))
    none = recording.tables["tokens"].iloc[:0]
    for row in each_row(recording.tables["requests"]):
        yield _name(REQUESTS, row.request, f"#{row.request} {row.preview}".strip())
        own = tokens.get(row.request, none)
        ended = max([row.at_ns, *([int(own["sent_ns"].iloc[-1])] if len(own) else [])])
        yield _slice(
            clock, REQUESTS, row.request, f"request {row.id}", "request", row.arrival_ns, ended,
            state=row.state, prompt_tokens=row.prompt_tokens, cached_tokens=row.cached_tokens,
            output_tokens=row.output_tokens, finish_reason=row.finish_reason, error=row.error,
            preemptions=row.preemptions,
        )  # fmt: skip
        started = _or_none(row.started_ns)
        first = _or_none(row.first_token_ns)
        yield _slice(clock, REQUESTS, row.request, "queue", "phase", row.arrival_ns, started or ended)
        if started is None:
            continue
        yield _slice(clock, REQUESTS, row.request, "prefill", "phase", started, min(first or ended, ended))
        if first is None:
            continue
        yield _slice(clock, REQUESTS, row.request, "decode", "phase", first, ended)
        yield from _tokens(own, clock, row.request)


def _tokens(own: pd.DataFrame, clock: _Clock, request: int) -> Iterator[Event]:
    """A slice per token but the first, from the token before to its own sending."""
    for row in each_row(own):
        if row.index == 0:
            continue
        parts = {f"{part}_ms": value / 1e6 for part in PARTS if (value := _or_none(getattr(row, f"{part}_ns")))}
        yield _slice(
            clock, REQUESTS, request, row.text or "·", "token", row.sent_ns - row.latency_ns, row.sent_ns,
            index=row.index, step=row.step, token_id=row.token_id, **parts,
        )  # fmt: skip


def _or_none(value: float) -> int | None:
    return None if pd.isna(value) else int(value)


def _spell(value: object) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
