"""A recording, opened in Python: its tables as data frames, Arrow and SQL, its summary, and its exports."""

from __future__ import annotations

import html
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec
import numpy as np
import pandas as pd

from inference_server.protocol import PARTS
from inference_server.recording.file import RecordingFile
from inference_server.recording.format import MANIFEST, SUFFIX, TABLES, Manifest
from inference_workbench.tables import Tables

if TYPE_CHECKING:
    import pyarrow as pa

_NS_PER_MS = 1e6
_PART_COLUMNS = [f"{part}_ns" for part in PARTS]


@dataclass(frozen=True, slots=True, repr=False)
class RecordingSummary:
    """The figures of a recording. Times in milliseconds; ``None`` where a figure does not exist."""

    seconds: float
    requests: int
    finished: int
    tokens: int
    steps: int
    output_tokens_per_s: float | None
    """Output tokens / time between the first and the last of them."""
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    itl_p50_ms: float | None
    itl_p95_ms: float | None
    switches: int
    parts: dict[str, float]
    """Share of all latency that went into each part; the parts add up to 1."""
    lost_events: int

    def to_series(self) -> pd.Series[Any]:
        """Return the figures as a pandas Series; parts as ``share_NAME``."""
        values = {name: getattr(self, name) for name in self.__slots__ if name != "parts"}
        return pd.Series(values | {f"share_{name}": share for name, share in self.parts.items()})

    def _labelled(self) -> list[tuple[str, str]]:
        def ms(value: float | None) -> str:
            return "–" if value is None else f"{value:,.2f} ms"

        rate = self.output_tokens_per_s
        rows = [
            ("Duration", f"{self.seconds:,.1f} s"),
            ("Requests (finished)", f"{self.requests:,} ({self.finished:,})"),
            ("Output tokens", f"{self.tokens:,}"),
            ("Steps", f"{self.steps:,}"),
            ("Switches", f"{self.switches:,}"),
            ("Output tokens per second", "–" if rate is None else f"{rate:,.1f}"),
            ("TTFT p50, p95", f"{ms(self.ttft_p50_ms)}, {ms(self.ttft_p95_ms)}"),
            ("ITL p50, p95", f"{ms(self.itl_p50_ms)}, {ms(self.itl_p95_ms)}"),
        ]
        if self.parts:
            largest = sorted(self.parts.items(), key=lambda part: (part[0] == "unexplained", -part[1]))
            shown = [each for each in largest if each[1] >= 0.005 or each[0] == "unexplained"]
            rows.append(("Where the time went", ", ".join(f"{name} {share:.1%}" for name, share in shown)))
        if self.lost_events:
            rows.append(("Lost events", f"{self.lost_events:,}"))
        return rows

    def __repr__(self) -> str:
        return "\n".join(f"{label:<26} {value}" for label, value in self._labelled())

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left'>{label}</td><td style='text-align:right'>{html.escape(value)}</td></tr>"
            for label, value in self._labelled()
        )
        return f"<table>{rows}</table>"


class Recording:
    """Everything that happened on a server between the start and the stop of a recording.

    Get one from :func:`open_recording`; use it as a context manager, or close it, to let go of the file.

    Attributes
    ----------
    path
        Of the file.
    tables
        ``steps``, ``step_requests``, ``tokens``, ``requests``, ``request_events``, ``features``, ``kv_events``,
        ``engine_events``, ``device``, ``device_processes``, ``telemetry_cost``: each also an attribute of the
        recording. Columns are described in ``docs/recording-format.md``; times are nanoseconds of the server's
        monotonic clock.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = RecordingFile(self.path)
        self.tables = Tables(tuple(TABLES), self._file.table)

    @property
    def manifest(self) -> Manifest:
        """What was recorded, on what, how it ended."""
        return self._file.manifest

    def __getattr__(self, name: str) -> pd.DataFrame:
        if name.startswith("_") or name not in TABLES:
            raise AttributeError(f"A recording has no attribute {name!r}. Its tables are {', '.join(TABLES)}.")
        return self.tables[name]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *TABLES]

    def arrow(self, name: str) -> pa.Table:
        """Return a table as Arrow has it."""
        return self.tables.arrow(name)

    def sql(self, query: str) -> pd.DataFrame:
        """Run a query of DuckDB's SQL over the tables; each table has its name."""
        return self.tables.sql(query)

    def summary(self) -> RecordingSummary:
        """Return the figures of the whole recording; see :class:`RecordingSummary` for their definitions."""
        tokens, requests, manifest = self.tables["tokens"], self.tables["requests"], self.manifest
        latency = tokens["latency_ns"].to_numpy(dtype=float) / _NS_PER_MS
        first = tokens["index"].to_numpy() == 0
        sent = tokens["sent_ns"].to_numpy()
        span = (sent.max() - sent.min()) / 1e9 if len(sent) > 1 else 0.0
        thrown = self.sql("select count(distinct epoch) as n from features where len(changed) > 0")
        known = tokens[_PART_COLUMNS].dropna()
        sums = known.sum()
        total = float(sums.sum())
        return RecordingSummary(
            seconds=((manifest.ended_ns or manifest.started_ns) - manifest.started_ns) / 1e9,
            requests=len(requests),
            finished=int((requests["state"] == "finished").sum()),
            tokens=len(tokens),
            steps=len(self.tables["steps"]),
            output_tokens_per_s=(len(sent) - 1) / span if span > 0 else None,
            ttft_p50_ms=_percentile(latency[first], 50),
            ttft_p95_ms=_percentile(latency[first], 95),
            itl_p50_ms=_percentile(latency[~first], 50),
            itl_p95_ms=_percentile(latency[~first], 95),
            switches=int(thrown["n"].iloc[0]),
            parts={} if total == 0 else {part: float(sums[f"{part}_ns"]) / total for part in PARTS},
            lost_events=manifest.lost_events,
        )

    def to_chrome_trace(self, path: str | Path) -> Path:
        """Write a trace that Perfetto (ui.perfetto.dev) and ``chrome://tracing`` open, and return its path."""
        from inference_workbench.chrome_trace import write_trace  # noqa: PLC0415 -- only for who exports

        return write_trace(self, Path(path))

    def to_csv(self, folder: str | Path) -> Path:
        """Write each table as ``NAME.csv`` into a folder, which is made if need be, and return it."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, table in self.tables.items():
            table.to_csv(target / f"{name}.csv", index=False)
        return target

    def to_html(self, path: str | Path) -> Path:
        """Write one HTML file that replays the recording in any browser, without a server or a network; see docs."""
        from inference_workbench.html_replay import write_html  # noqa: PLC0415 -- only for who exports

        return write_html(self, Path(path))

    def bytes(self) -> bytes:
        """Return the recording as the content of an ``.iwrec`` file, also where it was opened from a journal."""
        if self.path.suffix == SUFFIX:
            return self.path.read_bytes()
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(MANIFEST, msgspec.json.encode(self.manifest))
            for name, info in self.manifest.tables.items():
                archive.writestr(info.file, self._file.table_bytes(name))
        return buffer.getvalue()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        manifest = self.manifest
        counts = ", ".join(f"{manifest.tables[name].rows:,} {name}" for name in ("requests", "tokens", "steps"))
        return f"<Recording {manifest.name!r}: {counts}>"

    def _repr_html_(self) -> str:
        manifest = self.manifest
        title = f"<b>{html.escape(manifest.name)}</b>, {html.escape(manifest.created)}"
        note = f"<p>{html.escape(manifest.note)}</p>" if manifest.note else ""
        return f"<div>{title}{note}{self.summary()._repr_html_()}</div>"


def open_recording(path: str | Path) -> Recording:
    """Open a recording (``.iwrec``), or the journal of one that is still running or was never finished.

    Parameters
    ----------
    path
        Of the file.

    Raises
    ------
    RecordingError
        If it is missing, damaged, truncated, something else, or of a newer version; the message says which.
    """
    return Recording(path)


def _percentile(values: np.ndarray[Any, Any], q: float) -> float | None:
    return float(np.percentile(values, q)) if values.size else None
