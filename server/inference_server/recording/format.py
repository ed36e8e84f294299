"""What a recording looks like: names, columns, the manifest, and the errors of reading one. Imports no pyarrow.

``docs/recording-format.md`` is this module in words.
"""

from __future__ import annotations

import msgspec

from inference_server.protocol import PARTS, Capacity, Ceilings, FeaturesEvent, FeatureSpec, ModelInfo

FORMAT = "inference-workbench-recording"
FORMAT_VERSION = 1
SUFFIX = ".iwrec"
JOURNAL_SUFFIX = ".iwjournal"
MANIFEST = "manifest.json"

PART_COLUMNS = tuple(f"{part}_ns" for part in PARTS)
"""Columns of ``tokens`` (per token) and of ``requests`` (sums), in the order of :data:`PARTS`."""


class RecordingError(ValueError):
    """A recording or a journal cannot be read. The message says what is wrong with it and what can be done."""


class Clock(msgspec.Struct, frozen=True, kw_only=True):
    """Ties the monotonic clock of every ``*_ns`` column to the calendar."""

    monotonic_ns: int
    """A moment of the monotonic clock …"""
    wall_ns: int
    """… and the same moment in nanoseconds since 1970, UTC."""


class WeightsFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the model's weights, identified by its content."""

    name: str
    bytes: int
    sha256: str | None
    """``None`` where the file was gone when the recording was finished."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """A model that was served during the recording, from ``since_ns`` on."""

    since_ns: int
    model: ModelInfo
    capacity: Capacity
    specs: tuple[FeatureSpec, ...]
    weights: tuple[WeightsFile, ...] = ()
    versions: dict[str, str] = {}
    """Of the engine's libraries."""


class TableInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One table of the file."""

    file: str
    rows: int
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """``manifest.json``: what was recorded, on what, how it ended, and what the tables have to be."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    id: str
    name: str
    note: str
    created: str
    """ISO 8601."""
    clock: Clock
    started_ns: int
    ended_ns: int | None = None
    """The last moment that is known: of the stop, or of the last event of a recovered journal."""
    end_reason: str = ""
    """Why it ended, for a person."""
    recovered: bool = False
    """The journal had no end: whoever wrote it was gone. All that had been flushed is here."""
    torn_bytes: int = 0
    """Bytes at the journal's end that were no whole record and were cut off."""
    lost_events: int = 0
    """Events that could not be written because the disk was too slow."""
    flush_interval_s: float
    instance: str
    """Of the server."""
    versions: dict[str, str]
    """Of the server and Python."""
    hardware: dict[str, str | int]
    features: FeaturesEvent | None = None
    """The switches at the start."""
    parts: tuple[str, ...] = PARTS
    models: tuple[Served, ...] = ()
    """In the order they were served. Empty if no engine was ready at any time."""
    ceilings: tuple[Ceilings, ...] = ()
    tables: dict[str, TableInfo] = {}


Columns = dict[str, str]
"""Name of each column and its type, as pyarrow spells it; ``?`` marks a column that may be null."""

TABLES: dict[str, Columns] = {
    "steps": {
        "step": "int64",
        "epoch": "int32",
        "begin_ns": "int64",
        "schedule_ns": "int64",
        "prepare_ns": "int64",
        "forward_ns": "int64",
        "sample_ns": "int64",
        "update_ns": "int64",
        "end_ns": "int64",
        "path": "string",
        "running": "int32",
        "waiting": "int32",
        "total_blocks": "int32",
        "used_blocks": "int32",
        "cached_blocks": "int32",
        "filled_slots": "int64",
        "block_size": "int32",
        "idle_slots": "int32",
        "device_ns": "int64?",
        "before_ns": "int64",
        "draft_ns": "int64",
        "attention_ns": "int64?",
        "read_bytes": "int64?",
        "flops": "int64?",
        "speculation": "string",
    },
    "step_requests": {
        "step": "int64",
        "request": "int64",
        "start": "int32",
        "scheduled": "int32",
        "kind": "int8",
        "drafted": "int16",
        "accepted": "int16",
    },
    "tokens": {
        "step": "int64",
        "request": "int64",
        "index": "int32",
        "token_id": "int32",
        "text": "string",
        "logprob": "float64?",
        "sent_ns": "int64",
        "latency_ns": "int64",
        **dict.fromkeys(PART_COLUMNS, "int64?"),
        "origin": "int8",
    },
    "request_events": {
        "request": "int64",
        "id": "string",
        "state": "string",
        "at_ns": "int64",
        "arrival_ns": "int64",
        "prompt_tokens": "int32",
        "output_tokens": "int32",
        "max_tokens": "int32",
        "preview": "string",
        "cached_tokens": "int32",
        "first_token_ns": "int64?",
        "finish_reason": "string?",
        "error": "string?",
        "group": "int64?",
        "submitted_ns": "int64?",
        "started_ns": "int64?",
        "last_token_ns": "int64?",
        "preemptions": "int32",
        "seed": "uint64?",
        "priority": "int32",
        "drafted": "list<int32>",
        "accepted": "list<int32>",
    },
    "features": {
        "epoch": "int32",
        "values": "string",
        "changed": "list<string>",
        "cost": "string",
        "requested_ns": "int64",
        "applied_ns": "int64",
        "apply_ns": "int64",
        "preempted": "int32",
        "recompute_tokens": "int64",
        "settled_ns": "int64?",
    },
    "kv_events": {
        "step": "int64",
        "op": "int8",
        "block": "int32",
        "request": "int64",
    },
    "engine_events": {
        "state": "string",
        "at_ns": "int64",
        "stage": "string",
        "fraction": "float64?",
        "message": "string",
        "pid": "int64?",
        "restarts": "int32",
        "failed_requests": "int32",
    },
    "device": {
        "at_ns": "int64",
        "cores": "int32",
        "system_cpu": "float64",
        "system_memory_used": "int64",
        "system_memory_total": "int64",
        "gpu_name": "string?",
        "gpu_memory_used": "int64?",
        "gpu_memory_total": "int64?",
        "gpu_power_w": "float64?",
        "gpu_clock_mhz": "int32?",
        "gpu_memory_clock_mhz": "int32?",
        "gpu_utilization": "float64?",
        "gpu_memory_utilization": "float64?",
        "gpu_temperature_c": "int32?",
    },
    "device_processes": {
        "at_ns": "int64",
        "process": "string",
        "pid": "int64",
        "cpu": "float64",
        "rss": "int64",
    },
    "telemetry_cost": {
        "at_ns": "int64",
        "window_ns": "int64",
        "level": "string",
        "steps": "int32",
        "step_ns": "int64",
        "engine_ns": "int64",
        "encode_ns": "int64",
        "front_ns": "int64",
        "journal_ns": "int64",
        "events": "int32",
        "bytes": "int64",
    },
}
TABLES["requests"] = {
    **TABLES["request_events"],
    "prompt": "list<int32>?",
    "sampling": "string?",
    "overrides": "string?",
    "stops": "list<string>?",
    "streaming": "bool?",
    "tokens_recorded": "int32",
    **dict.fromkeys(PART_COLUMNS, "int64"),
}

NESTED = {"total_blocks", "used_blocks", "cached_blocks", "filled_slots", "block_size"}
"""Columns of ``steps`` that are fields of ``StepEvent.kv``."""
