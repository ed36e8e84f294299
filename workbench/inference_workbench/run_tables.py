"""The tables of one run, or of several, in the shape they have in a recording (``docs/recording-format.md``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pandas as pd
import pyarrow as pa

from inference_server.protocol import FeaturesEvent, RequestEvent
from inference_server.recording.format import NESTED, PART_COLUMNS, TABLES
from inference_server.recording.tables import schema
from inference_workbench.tables import Tables

NAMES = ("steps", "step_requests", "tokens", "requests", "features")


@dataclass(frozen=True, slots=True)
class RunRows:
    """What the client's store held of a run when it ended: the rows its tables are made of."""

    steps: pd.DataFrame
    shares: pd.DataFrame
    tokens: pd.DataFrame
    request: RequestEvent | None
    switches: list[FeaturesEvent]


def run_tables(runs: Sequence[RunRows]) -> Tables:
    """Return the tables ``steps``, ``step_requests``, ``tokens``, ``requests`` and ``features`` of some runs.

    ``step_requests`` has the runs' own shares of each step; what a step computed for others is in ``steps`` as sums.
    """
    makers = {
        "steps": lambda: _steps(runs),
        "step_requests": lambda: _concat([rows.shares for rows in runs]).sort_values(["step", "request"]),
        "tokens": lambda: _concat([rows.tokens for rows in runs]).sort_values("sent_ns", kind="stable"),
        "requests": lambda: _requests(runs),
        "features": lambda: _features(runs),
    }

    def load(name: str) -> pa.Table:
        frame = makers[name]()
        return pa.Table.from_pandas(frame[list(TABLES[name])], schema(name), preserve_index=False, safe=False)

    return Tables(NAMES, load)


def _steps(runs: Sequence[RunRows]) -> pd.DataFrame:
    steps = _concat([rows.steps for rows in runs]).drop_duplicates("begin_ns").sort_values("begin_ns")
    return steps.rename(columns={f"kv_{name}": name for name in NESTED})


def _requests(runs: Sequence[RunRows]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for run in runs:
        if run.request is not None:
            # The server does not tell a client what others asked for, nor itself again: prompts are in recordings only.
            row = {**dict.fromkeys(TABLES["requests"]), **msgspec.structs.asdict(run.request)}
            sums = run.tokens[list(PART_COLUMNS)].sum()
            rows.append(row | {"tokens_recorded": len(run.tokens)} | {name: int(sums[name]) for name in PART_COLUMNS})
    return pd.DataFrame(rows, columns=list(TABLES["requests"]))


def _features(runs: Sequence[RunRows]) -> pd.DataFrame:
    events = {event.epoch: event for run in runs for event in run.switches}
    rows = [
        {**msgspec.structs.asdict(event), "values": msgspec.json.encode(event.values).decode()}
        for _, event in sorted(events.items())
    ]
    return pd.DataFrame(rows, columns=list(TABLES["features"]))


def _concat(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)
