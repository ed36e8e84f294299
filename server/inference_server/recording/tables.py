"""Events to rows: one columnar builder per table, written to Parquet piece by piece so that memory stays flat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from inference_server.protocol import (
    PARTS,
    DeviceEvent,
    EngineEvent,
    Event,
    FeaturesEvent,
    KvEvents,
    RequestEvent,
    StepEvent,
    TelemetryCostEvent,
    TokensEvent,
)
from inference_server.recording.format import NESTED, PART_COLUMNS, TABLES
from inference_server.recording.journal import RequestDetail

ROWS_PER_GROUP = 65_536

_TYPES: dict[str, pa.DataType] = {
    "int8": pa.int8(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint64": pa.uint64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "string": pa.string(),
    "list<int32>": pa.list_(pa.int32()),
    "list<string>": pa.list_(pa.string()),
}
_STEP_FIELDS = [name for name in TABLES["steps"] if name not in NESTED]


def schema(table: str) -> pa.Schema:
    """Return the schema that a table has in a recording."""
    return pa.schema(
        [
            pa.field(name, _TYPES[kind.removesuffix("?")], nullable=kind.endswith("?"))
            for name, kind in TABLES[table].items()
        ]
    )


class TableWriter:
    """Collects the rows of one table and writes them in groups.

    Parameters
    ----------
    name
        One of :data:`~inference_server.recording.format.TABLES`.
    path
        Of the Parquet file.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._schema = schema(name)
        self.columns: dict[str, list[Any]] = {column: [] for column in TABLES[name]}
        self._length = self.columns[next(iter(self.columns))]
        self._writer = pq.ParquetWriter(path, self._schema, compression="snappy")

    def written(self) -> None:
        """Rows were added; write them if there are enough."""
        if len(self._length) >= ROWS_PER_GROUP:
            self._write()

    def close(self) -> None:
        """Write what is left. The file is a valid table even with no row."""
        self._write()
        self._writer.close()

    def _write(self) -> None:
        if not self._length:
            return
        self.rows += len(self._length)
        self._writer.write_table(pa.table(self.columns, schema=self._schema))
        for column in self.columns.values():
            column.clear()


class _Story:
    """A request so far: its newest event, what it asked for, and the sums of its tokens' parts."""

    __slots__ = ("detail", "event", "sums", "tokens")

    def __init__(self) -> None:
        self.event: RequestEvent | None = None
        self.detail: RequestDetail | None = None
        self.sums = [0] * len(PARTS)
        self.tokens = 0


class TablesWriter:
    """Writes every table of a recording into a folder.

    Parameters
    ----------
    folder
        Gets one ``NAME.parquet`` per table.
    """

    def __init__(self, folder: Path) -> None:
        self.tables = {name: TableWriter(name, folder / f"{name}.parquet") for name in TABLES}
        self._stories: dict[int, _Story] = {}
        self._json = msgspec.json.Encoder()

    def add(self, record: Event | RequestDetail) -> None:
        """Add one event."""
        match record:
            case StepEvent():
                self._add_step(record)
            case TokensEvent():
                self._add_tokens(record)
            case KvEvents():
                self._add_columns(
                    "kv_events",
                    step=[record.step] * len(record.op),
                    op=record.op,
                    block=record.block,
                    request=record.request,
                )
            case RequestEvent():
                self._add_row("request_events", msgspec.structs.asdict(record))
                self._story(record.request).event = record
            case RequestDetail():
                self._story(record.request).detail = record
            case FeaturesEvent():
                self._add_row("features", {**msgspec.structs.asdict(record), "values": self._text(record.values)})
            case EngineEvent():
                self._add_row("engine_events", msgspec.structs.asdict(record))
            case DeviceEvent():
                self._add_row("device", msgspec.structs.asdict(record))
                count = len(record.process)
                self._add_columns(
                    "device_processes",
                    at_ns=[record.at_ns] * count,
                    process=record.process,
                    pid=record.pid,
                    cpu=record.cpu,
                    rss=record.rss,
                )
            case TelemetryCostEvent():
                self._add_row("telemetry_cost", msgspec.structs.asdict(record))
            case _:
                pass  # the recording's own state, and the ceilings, are in the manifest

    def close(self) -> None:
        """Write the requests and finish every file."""
        for story in self._stories.values():
            if story.event is None:
                continue
            row = msgspec.structs.asdict(story.event)
            detail = story.detail
            row["prompt"] = None if detail is None else list(detail.prompt)
            row["sampling"] = None if detail is None else self._text(detail.sampling)
            row["overrides"] = None if detail is None else self._text(detail.overrides)
            row["stops"] = None if detail is None else list(detail.stops)
            row["streaming"] = None if detail is None else detail.streaming
            row["tokens_recorded"] = story.tokens
            row.update(zip(PART_COLUMNS, story.sums, strict=True))
            self._add_row("requests", row)
        for table in self.tables.values():
            table.close()

    def _story(self, request: int) -> _Story:
        story = self._stories.get(request)
        if story is None:
            story = self._stories[request] = _Story()
        return story

    def _text(self, value: object) -> str:
        return self._json.encode(value).decode()

    def _add_row(self, name: str, row: dict[str, Any]) -> None:
        table = self.tables[name]
        for column, values in table.columns.items():
            values.append(row[column])
        table.written()

    def _add_columns(self, name: str, **columns: list[Any]) -> None:
        table = self.tables[name]
        for column, values in table.columns.items():
            values.extend(columns[column])
        table.written()

    def _add_step(self, event: StepEvent) -> None:
        steps = self.tables["steps"]
        for name in _STEP_FIELDS:
            steps.columns[name].append(getattr(event, name))
        for name in NESTED:
            steps.columns[name].append(getattr(event.kv, name))
        steps.written()
        self._add_columns(
            "step_requests",
            step=[event.step] * len(event.request),
            request=event.request,
            start=event.start,
            scheduled=event.scheduled,
            kind=event.kind,
            drafted=event.drafted or [0] * len(event.request),
            accepted=event.accepted or [0] * len(event.request),
        )

    def _add_tokens(self, event: TokensEvent) -> None:
        count = len(event.request)
        parts: list[list[Any]] = list(event.parts) or [[None] * count for _ in PARTS]
        self._add_columns(
            "tokens",
            step=[event.step] * count,
            request=event.request,
            index=event.index,
            token_id=event.token_id,
            text=event.text,
            logprob=event.logprob,
            sent_ns=event.sent_ns,
            latency_ns=event.latency_ns,
            **dict(zip(PART_COLUMNS, parts, strict=True)),
            origin=event.origin or [0] * count,
        )
        for place, request in enumerate(event.request):
            story = self._story(request)
            story.tokens += 1
            if event.parts:
                for part, values in enumerate(event.parts):
                    story.sums[part] += values[place]
