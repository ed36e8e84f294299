"""One load against any server of OpenAI's API, measured by the client: one ruler for our server and for its peers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from inference_server.version import distribution_version
from inference_workbench.errors import WorkbenchError
from inference_workbench.experiments.capacity import checked_slo, meets
from inference_workbench.experiments.experiment import DEFAULT_REQUESTS
from inference_workbench.experiments.figures import Floats, request_figures, requests_table, span_s, token_gaps_ms
from inference_workbench.experiments.journal import now
from inference_workbench.experiments.sender import Answer, Sending, send
from inference_workbench.experiments.sites import usable_cores
from inference_workbench.experiments.target import Target
from inference_workbench.experiments.workloads import AnyWorkload, Load, RequestSet, plan
from inference_workbench.experiments.workloads import workload as make_workload

_PERCENTILES = (50, 90, 95, 99)
_FORMAT = 1


class Benchmark(msgspec.Struct, frozen=True, kw_only=True):
    """What one load measured. Figures are named as in ``vllm bench serve``'s result files where they mean the same."""

    target: dict[str, Any]
    workload: dict[str, Any]
    date: str
    load: Load
    sending: Sending
    slo: dict[str, float] = {}

    @property
    def answers(self) -> list[Answer]:
        """Of every request."""
        return self.sending.answers

    @property
    def requests(self) -> pd.DataFrame:
        """A row a request."""
        return requests_table(self.answers)

    def figures(self) -> dict[str, float | int | None]:
        """Return the figures; times in milliseconds, ``None`` where one does not exist."""
        finished = [answer for answer in self.answers if answer.finished]
        rows = [request_figures(answer) for answer in finished]
        seconds = span_s(self.answers)
        prompt = sum(answer.prompt_tokens or 0 for answer in finished)
        output = sum(answer.output_tokens or 0 for answer in finished)
        gaps = np.concatenate([token_gaps_ms(answer) for answer in finished]) if finished else np.zeros(0)
        late = [row["late_ms"] for row in rows if row["late_ms"] is not None]

        def per_second(count: int) -> float | None:
            return count / seconds if seconds > 0 else None

        figures: dict[str, float | int | None] = {
            "completed": len(finished),
            "failed": len(self.answers) - len(finished),
            "duration": seconds,
            "total_input_tokens": prompt,
            "total_output_tokens": output,
            "request_throughput": per_second(len(finished)),
            "output_throughput": per_second(output),
            "total_token_throughput": per_second(prompt + output),
        }
        for name, values in (
            ("ttft_ms", [row["ttft_ms"] for row in rows]),
            ("tpot_ms", [row["tpot_ms"] for row in rows if row["tpot_ms"] is not None]),
            ("itl_ms", gaps),
            ("e2el_ms", [row["e2e_ms"] for row in rows]),
        ):
            figures |= _described(name, np.asarray(values, dtype=np.float64))
        if self.slo:
            good = sum(meets(answer, self.slo) for answer in self.answers)
            figures |= {"good": good, "request_goodput": per_second(good)}
        figures |= {"max_late_ms": max(late, default=0.0), "client_lag_ms": self.sending.lag_ms}
        return figures

    @property
    def notes(self) -> list[str]:
        """What a reader has to know about the figures."""
        finished = [answer for answer in self.answers if answer.finished]
        said = []
        errors = sorted({answer.error for answer in self.answers if answer.error})
        if errors:
            said.append(f"Failed requests said: {'; '.join(errors[:3])}")
        if self.load.estimated_lengths:
            said.append("Prompt lengths are estimates: the server does not tokenize.")
        counted, told = (sum(sum(a.counts) for a in finished), sum(a.output_tokens or 0 for a in finished))
        if finished and abs(counted - told) > 0.01 * told:
            said.append(
                f"The server sent {told} tokens in {counted} pieces and does not tell which: gaps are between pieces."
            )
        if self.sending.lag_ms > 20:
            said.append(f"The client was late by up to {self.sending.lag_ms:.0f} ms: it needs a processor of its own.")
        return said

    def to_dict(self, *, details: bool = False) -> dict[str, Any]:
        """Return all of it as plain data, with every request's times if ``details``."""
        plain = {
            "format": _FORMAT,
            "tool": f"inference-workbench bench {distribution_version()}",
            "date": self.date,
            "target": self.target,
            "workload": self.workload,
            "requests": len(self.answers),
            "slo": self.slo,
            "cores": usable_cores(),
            "figures": self.figures(),
            "notes": self.notes,
        }
        if details:
            plain["details"] = msgspec.to_builtins(self.answers)
        return plain

    def save(self, path: str | Path, *, details: bool = True) -> Path:
        """Write it as JSON and return the path."""
        target = Path(path)
        target.write_bytes(msgspec.json.format(msgspec.json.encode(self.to_dict(details=details)), indent=1) + b"\n")
        return target

    def summary(self) -> str:
        """Return the figures in words."""
        figures = self.figures()

        def shown(name: str) -> str:
            value = figures[name]
            return "–" if value is None else f"{value:,.2f}"

        tokens = f"{figures['total_input_tokens']:,} prompt tokens, {figures['total_output_tokens']:,} output tokens"
        lines = [
            f"{figures['completed']} of {len(self.answers)} requests answered in {figures['duration']:.1f} s; {tokens}",
            f"requests/s       {shown('request_throughput')}",
            f"output tokens/s  {shown('output_throughput')}",
            f"all tokens/s     {shown('total_token_throughput')}",
        ]
        if self.slo:
            lines.append(f"good requests/s  {shown('request_goodput')}")
        lines.append(f"{'ms':<8}{'mean':>12}{'p50':>12}{'p90':>12}{'p99':>12}")
        for title, name in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("E2E", "e2el_ms")):
            values = "".join(f"{shown(f'{part}_{name}'):>12}" for part in ("mean", "median", "p90", "p99"))
            lines.append(f"{title:<8}{values}")
        return "\n".join([*lines, *self.notes])

    def __repr__(self) -> str:
        return self.summary()


def bench(
    target: Target,
    workload: str | Path | AnyWorkload = "chat",
    *,
    requests: int | None = None,
    warm_up: int = 1,
    as_text: bool = True,
    slo: Mapping[str, float] | None = None,
    cancel: Event | None = None,
    on_end: Callable[[int, int], object] | None = None,
) -> Benchmark:
    """Send a workload to a server once and measure, as a client.

    Parameters
    ----------
    target
        The server; see :meth:`~inference_workbench.experiments.target.Target.probe`.
    workload
        What is sent; see :func:`~inference_workbench.workload`.
    requests
        How many.
    warm_up
        So many of them are sent before, one after the other, and not counted. Their prompts may then be in the server's
        prefix cache, as with any benchmark that does so; 0 sends none.
    as_text
        Send words rather than token ids, so that every server is asked the same.
    slo
        Bounds for goodput; see :func:`capacity`.
    cancel
        When set, what runs is ended and what there is is returned.
    on_end
        Called, in the sending thread, with how many requests have ended and how many there are.

    Raises
    ------
    WorkbenchError
        If the warm-up fails.
    """
    what = make_workload(workload)
    bounds = checked_slo(slo) if slo else {}
    ends = isinstance(what, RequestSet) or what.count is not None
    load = plan(what, target, requests=requests if requests is not None or ends else DEFAULT_REQUESTS, as_text=as_text)
    stop = cancel or Event()
    if warm_up:
        first = [msgspec.structs.replace(request, at_s=0.0) for request in load.requests[:warm_up]]
        failed = [answer for answer in send(target, first, limit=1, cancel=stop).answers if not answer.finished]
        if failed and not stop.is_set():
            raise WorkbenchError(f"{target.endpoint.place} does not answer as it should: {failed[0].error}")
    date = now()
    sending = send(target, load.requests, limit=load.limit, cancel=stop, on_end=on_end)
    return Benchmark(
        target={"url": target.endpoint.place, "model": target.model, "token_ids": target.token_ids},
        workload=msgspec.to_builtins(what) if not isinstance(what, RequestSet) else {"name": what.name},
        date=date,
        load=load,
        sending=sending,
        slo=bounds,
    )


def _described(name: str, values: Floats) -> dict[str, float | int | None]:
    """Return mean, median, standard deviation and percentiles under vLLM's names."""
    if not len(values):
        return dict.fromkeys([f"mean_{name}", f"median_{name}", f"std_{name}"] + [f"p{q}_{name}" for q in _PERCENTILES])
    described: dict[str, float | int | None] = {
        f"mean_{name}": float(values.mean()),
        f"median_{name}": float(np.median(values)),
        f"std_{name}": float(values.std()),
    }
    return described | {f"p{q}_{name}": float(np.percentile(values, q)) for q in _PERCENTILES}


def parse_slo(text: str) -> dict[str, float]:
    """Read objectives as ``ttft=500,tpot=50`` (milliseconds).

    Raises
    ------
    WorkbenchError
        If they cannot be read.
    """
    objectives: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            objectives[name if name.endswith("_ms") else f"{name}_ms"] = float(value)
        except ValueError:
            raise WorkbenchError(f"{part!r} is no objective. Write for example ttft=500,tpot=50 (ms).") from None
    return checked_slo(objectives)


def parse_length(text: str) -> int | tuple[int, int]:
    """Read a length as ``128`` or ``100:600``.

    Raises
    ------
    WorkbenchError
        If it is neither.
    """
    parts: Sequence[str] = text.split(":")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in {1, 2} or not all(math.isfinite(number) and number > 0 for number in numbers):
        raise WorkbenchError(f"{text!r} is no length. Write a number of tokens, such as 128, or a range: 100:600.")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
