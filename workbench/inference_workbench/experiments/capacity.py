"""How much a server can take: the highest rate of arrivals at which it still meets an objective, found by bisection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from threading import Event
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pandas as pd

from inference_server.features import FeatureValue
from inference_server.workloads.workload import ClosedLoop, Poisson, Trace, Workload
from inference_workbench.errors import WorkbenchError
from inference_workbench.experiments.conductor import Conductor, Slot
from inference_workbench.experiments.experiment import Options, ProgressWish, Result, make
from inference_workbench.experiments.figures import request_figures, run_figures, span_s, token_gaps_ms
from inference_workbench.experiments.journal import Features, Loaded, RunRecord
from inference_workbench.experiments.sender import Answer
from inference_workbench.experiments.workloads import AnyWorkload, Load, RequestSet, from_plain
from inference_workbench.experiments.workloads import workload as make_workload

if TYPE_CHECKING:
    from bokeh.models.layouts import Column

    from inference_workbench.client import Workbench
    from inference_workbench.experiments.target import Target

OBJECTIVES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
"""What an objective may bound, for each request: its TTFT, TPOT, largest gap, and E2E."""
_SATURATION = "saturation"
_SATURATING_CONCURRENCY = 64
_MAX_PROBES = 24


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured at one rate."""

    rate: float
    """Requests per second that arrived on average."""
    requests: int
    good: int
    """That met every objective; a failed one met none."""
    seconds: float

    @property
    def attainment(self) -> float:
        """Share of requests that met every objective."""
        return self.good / self.requests if self.requests else 0.0

    @property
    def goodput(self) -> float:
        """Requests per second that met every objective."""
        return self.good / self.seconds if self.seconds > 0 else 0.0

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return Wilson's interval of the attainment."""
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        n, p = self.requests, self.attainment
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


def next_rate(points: Sequence[Point], saturation: float, attainment: float, precision: float) -> float | None:
    """Return the rate to try next, or ``None`` when the highest that meets the objective is known well enough.

    First a rate that passes and one that fails are looked for around what the server finished under full load; then the
    gap between them is halved, on a logarithmic scale.

    Parameters
    ----------
    points
        What was measured so far.
    saturation
        Requests per second that the server finished under full load: it cannot keep up with more for long.
    attainment
        Share of requests that has to meet the objectives.
    precision
        How far above the highest rate that passed the lowest that failed may be, as a fraction.
    """
    passed = [point.rate for point in points if point.attainment >= attainment]
    failed = [point.rate for point in points if point.attainment < attainment]
    if len(points) >= _MAX_PROBES:
        return None
    if not passed and not failed:
        return 0.6 * saturation
    if not failed:
        # Far above what it can finish the queue alone breaks any objective, given requests enough.
        return max(passed) * 1.5 if max(passed) < 8 * saturation else None
    low = max((rate for rate in passed if rate < min(failed)), default=None)
    if low is None:
        return min(failed) / 2 if min(failed) > saturation / 32 else None
    return math.sqrt(low * min(failed)) if min(failed) / low > 1 + precision else None


class Capacity(Result):
    """The result of :func:`capacity`."""

    kind = "capacity"
    function = "capacity"
    tolerant = True

    @classmethod
    def settings(cls, arguments: Mapping[str, Any]) -> dict[str, Features]:
        """There is one, which all rates share."""
        del arguments
        return {"server": {}}

    @classmethod
    def loads(cls, arguments: Mapping[str, Any]) -> dict[str, AnyWorkload]:
        """Return the requests under full load; those of each rate are the same ones, spread in time."""
        what = from_plain(arguments["workload"])
        if isinstance(what, RequestSet):
            return {_SATURATION: msgspec.structs.replace(what, limit=_SATURATING_CONCURRENCY)}
        return {_SATURATION: msgspec.structs.replace(what, arrivals=ClosedLoop(concurrency=_SATURATING_CONCURRENCY))}

    @classmethod
    def slots(cls, arguments: Mapping[str, Any]) -> list[Slot]:
        """Return the runs that are known beforehand."""
        del arguments
        return [
            Slot(key=name, setting="server", load=_SATURATION, block=-1, warm_up=True)
            for name in ("warm-up", _SATURATION)
        ]

    def work(self, conductor: Conductor) -> None:
        """Run at full load, then at one rate after the other, as the ones before say."""
        slots = self.slots(self.arguments)
        conductor.run(slots)
        while not conductor.cancelled and (rate := self._next_rate()) is not None:
            name = f"{rate:.4g} requests/s"
            if name not in self.journal.loads:
                self.journal.append(Loaded(name=name, load=self._load_at(rate)))
            slots.append(Slot(key=name, setting="server", load=name, block=len(slots)))
            conductor.run(slots)

    @property
    def complete(self) -> bool:
        """Whether the search has ended."""
        return _SATURATION in self.journal.runs and self._next_rate() is None

    @property
    def enough(self) -> bool:
        """Whether there is a point at least."""
        return bool(self.points)

    @property
    def saturation(self) -> float:
        """Requests per second that the server finished under full load."""
        answers = self.journal.runs[_SATURATION].answers
        finished = sum(answer.finished for answer in answers)
        seconds = span_s(answers)
        if not finished or seconds <= 0:
            errors = {answer.error for answer in answers if answer.error}
            raise WorkbenchError(f"No request was answered under full load: {'; '.join(sorted(errors)[:3])}")
        return finished / seconds

    @property
    def slo(self) -> dict[str, float]:
        """The objectives, in milliseconds."""
        return dict(self.arguments["slo"])

    @property
    def points(self) -> list[Point]:
        """What was measured, by rising rate."""
        return sorted((self._point(run) for run in self.journal.measured()), key=lambda point: point.rate)

    @cached_property
    def bracket(self) -> tuple[float | None, float | None]:
        """The highest rate that met the objective, and the lowest that did not; ``None`` where there was none."""
        wanted = self.arguments["attainment"]
        failed = min((point.rate for point in self.points if point.attainment < wanted), default=None)
        passed = [
            point.rate
            for point in self.points
            if point.attainment >= wanted and (failed is None or point.rate < failed)
        ]
        return max(passed, default=None), failed

    @property
    def rate(self) -> float | None:
        """The highest rate, in requests per second, that met the objective."""
        return self.bracket[0]

    @property
    def knee(self) -> Point | None:
        """The rate with the highest goodput: beyond it, more arrivals mean fewer that are served well."""
        return max(self.points, key=lambda point: point.goodput, default=None)

    def curve(self) -> pd.DataFrame:
        """Return a row a rate: what share met the objectives (with its interval), goodput, and latencies."""
        rows = []
        for run in self.journal.measured():
            point = self._point(run)
            low, high = point.interval()
            finished = [request_figures(answer) for answer in run.answers if answer.finished]
            row: dict[str, Any] = {
                "rate": point.rate,
                "requests": point.requests,
                "attainment": point.attainment,
                "attainment_low": low,
                "attainment_high": high,
                "goodput": point.goodput,
                "failed": sum(not answer.finished for answer in run.answers),
                "output_tokens_per_s": run_figures(run.answers)["output_tokens_per_s"],
            }
            for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
                values = [each[name] for each in finished if each[name] is not None]
                for q in (50, 90):
                    row[f"{name}_p{q}"] = float(np.percentile(values, q)) if values else math.nan
            rows.append(row)
        return pd.DataFrame(rows).sort_values("rate", ignore_index=True) if rows else pd.DataFrame()

    def summary(self) -> str:
        """Return the finding in words, and the curve."""
        objectives = ", ".join(f"{name} ≤ {value:g}" for name, value in self.slo.items())
        share = f"{self.arguments['attainment']:.0%} of requests"
        passed, failed = self.bracket
        if passed is None:
            said = f"No rate that was tried meets the objective; the lowest was {self.points[0].rate:.3g} requests/s."
        elif failed is None:
            said = f"Every rate that was tried meets the objective, up to {passed:.3g} requests/s."
        else:
            said = f"It meets the objective up to {passed:.3g} requests/s, and no more at {failed:.3g}."
        knee = self.knee
        lines = [
            f"objective  {objectives} for {share}",
            f"workload   {self.workload.name}",
            f"where      {self.manifest.environment.model} on {self.manifest.environment.device or 'the server'}",
            "",
            said,
            f"Under full load it finishes {self.saturation:.3g} requests/s.",
        ]
        if knee is not None:
            lines.append(f"Goodput is highest at {knee.rate:.3g} requests/s: {knee.goodput:.3g} good requests/s.")
        shown = ["rate", "attainment", "goodput", "ttft_ms_p50", "ttft_ms_p90", "tpot_ms_p50", "tpot_ms_p90"]
        lines += ["", self.curve()[shown].to_string(index=False, float_format=lambda value: f"{value:,.3g}")]
        caveats = self.caveats()
        return "\n".join([*lines, *([""] if caveats else []), *caveats])

    def plot(self) -> Column:
        """Return a static Bokeh figure: goodput over the rate, and latencies over the throughput."""
        from inference_workbench.experiments.plots import capacity_plot  # noqa: PLC0415 -- Bokeh takes a while

        return capacity_plot(self)

    def estimates(self) -> dict[str, tuple[float, float]]:
        """Return the logarithm of the capacity, known as well as its bracket, and of the throughput at full load."""
        passed, failed = self.bracket
        found: dict[str, tuple[float, float]] = {"log full-load requests/s": (math.log(self.saturation), 0.1)}
        if passed is not None and failed is not None:
            # A share of so few requests may fall on either side of the objective at a neighbouring rate.
            width = math.log(failed / passed)
            found["log capacity"] = (math.log(passed * failed) / 2, max(width, 1 / math.sqrt(self.points[0].requests)))
        return found

    # -- private -----------------------------------------------------------------------------------------------------

    def _next_rate(self) -> float | None:
        return next_rate(self.points, self.saturation, self.arguments["attainment"], self.arguments["precision"])

    def _load_at(self, rate: float) -> Load:
        """Return the requests of the full load, arriving at a rate."""
        what = self.workload
        requests = self.journal.loads[_SATURATION].requests
        arrivals = what.arrivals if isinstance(what, Workload) else None
        burstiness = arrivals.burstiness if isinstance(arrivals, Poisson) else 1.0
        spread = Workload(arrivals=Poisson(rate=1.0, burstiness=burstiness), seed=self.arguments["seed"])
        at_s, timed = 0.0, []
        for place, request in enumerate(requests):
            # Gaps of rate 1 are scaled, so that the pattern of arrivals is the same at every rate.
            at_s += spread.gap_s(place) / rate if place else 0.0
            timed.append(msgspec.structs.replace(request, at_s=at_s))
        return Load(requests=timed, estimated_lengths=self.journal.loads[_SATURATION].estimated_lengths)

    def _point(self, run: RunRecord) -> Point:
        requests = self.journal.loads[run.load].requests
        last = requests[-1].at_s
        good = sum(meets(answer, self.slo) for answer in run.answers)
        seconds = max(span_s(run.answers), last)
        return Point(rate=float(run.load.split()[0]), requests=len(requests), good=good, seconds=seconds)


def meets(answer: Answer, slo: Mapping[str, float]) -> bool:
    """Whether a request ended well and met every objective; one that does not apply (TPOT of one token) is met."""
    if not answer.finished:
        return False
    figures = request_figures(answer)
    gaps = token_gaps_ms(answer)
    figures["itl_ms"] = float(gaps.max()) if gaps.size else None
    return all(figures[name] is None or figures[name] <= value for name, value in slo.items())


def checked_slo(slo: Mapping[str, float]) -> dict[str, float]:
    """Return the objectives.

    Raises
    ------
    WorkbenchError
        If there is none, or one that is not known.
    """
    unknown = sorted(set(slo) - set(OBJECTIVES))
    if unknown or not slo:
        what = f"There is no objective {unknown[0]!r}" if unknown else "There is no objective"
        raise WorkbenchError(f"{what}. Bound one or more of {', '.join(OBJECTIVES)}, in milliseconds.")
    wrong = {name: value for name, value in slo.items() if not value > 0}
    if wrong:
        raise WorkbenchError(f"An objective is a time above 0 ms; wrong: {wrong}.")
    return {name: float(value) for name, value in slo.items()}


def capacity(
    slo: Mapping[str, float],
    workload: str | Path | AnyWorkload = "chat",
    *,
    attainment: float = 0.9,
    requests: int | None = None,
    precision: float = 0.1,
    features: Mapping[str, FeatureValue] | None = None,
    seed: int = 0,
    wb: Workbench | Target | None = None,
    path: str | Path | None = None,
    progress: ProgressWish = True,
    cancel: Event | None = None,
) -> Capacity:
    """Find the highest rate of arrivals at which a server meets an objective.

    A run under full load says what the server can finish; then the same requests arrive by themselves, at one rate
    after the other, until the highest that passes and the lowest that fails are close. On our own server every run
    starts with empty caches; other servers keep theirs, and a prompt that comes again may be answered from them.

    Parameters
    ----------
    slo
        Bounds in milliseconds on one or more of ``ttft_ms``, ``tpot_ms``, ``itl_ms`` (a request's largest gap) and
        ``e2e_ms``, for each request.
    workload
        What is sent; its arrivals are replaced, but for their burstiness.
    attainment
        Share of the requests that has to meet all of them.
    requests
        How many requests each rate is tried with. The more, the surer: the share has an interval.
    precision
        How close the two rates have to be, as a fraction.
    features, path, progress, cancel
        As in :func:`compare`.
    seed
        Of the arrivals.
    wb
        The server: a workbench, or a :class:`~inference_workbench.experiments.target.Target` for any other.

    Raises
    ------
    WorkbenchError
        If an objective is not known, or no request is answered.
    """
    if not 0 < attainment <= 1:
        raise WorkbenchError(f"The attainment is a share above 0 and up to 1, such as 0.9; not {attainment}.")
    if not 0.01 <= precision <= 1:
        raise WorkbenchError(f"The precision is a fraction between 0.01 and 1, such as 0.1; not {precision}.")
    what = make_workload(workload)
    if isinstance(what, Workload) and isinstance(what.arrivals, Trace):
        raise WorkbenchError("A trace has its own arrivals; a search for a rate needs a workload that has none.")
    arguments = {
        "slo": checked_slo(slo),
        "workload": msgspec.to_builtins(what),
        "attainment": attainment,
        "requests": requests,
        "precision": precision,
        "features": None if features is None else dict(features),
        "seed": seed,
    }
    return make(Capacity, arguments, Options(site=wb, path=path, progress=progress, cancel=cancel))
