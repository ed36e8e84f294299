"""Two settings under the same requests: run in turns on one server, compared pair by pair, with a verdict in words."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pandas as pd

from inference_server.features import FeatureValue
from inference_workbench.errors import WorkbenchError
from inference_workbench.experiments.conductor import Conductor, Slot, output_ids
from inference_workbench.experiments.experiment import BlockedResult, Options, ProgressWish, blocks_needed, make
from inference_workbench.experiments.figures import METRICS, paired_effects, run_figures
from inference_workbench.experiments.journal import Features
from inference_workbench.experiments.outputs import Outputs, ask_gaps, divergences, judge
from inference_workbench.experiments.sites import OwnServer
from inference_workbench.experiments.statistics import Effect, joint_p, paired_effect, pairs_needed
from inference_workbench.experiments.workloads import AnyWorkload
from inference_workbench.experiments.workloads import workload as make_workload

if TYPE_CHECKING:
    from bokeh.models.layouts import Column

    from inference_workbench.client import Workbench
    from inference_workbench.recording import Recording

BASELINE, CANDIDATE = "baseline", "candidate"
DEFAULT_PAIRS = 10
_SERVER_SIDE = {
    "ttft_ms": "server TTFT",
    "queue_ms": "queue",
    "tpot_ms": "server TPOT",
    "step_ms": "step",
    "batch_size": "requests in a step",
    "kv_peak": "peak of KV blocks in use",
    "cached_tokens": "prompt tokens from the prefix cache",
}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What was found about one metric."""

    metric: str
    title: str
    unit: str
    baseline: float
    candidate: float
    """Means over the runs."""
    effect: Effect
    """Of the logarithm of candidate / baseline."""
    p: float
    """Adjusted for the number of metrics (:func:`joint_p`)."""
    verdict: str
    """``better``, ``worse`` or ``no difference found``."""


class Comparison(BlockedResult):
    """The result of :func:`compare`."""

    kind = "compare"
    function = "compare"

    @classmethod
    def settings(cls, arguments: Mapping[str, Any]) -> dict[str, Features]:
        """Return both."""
        return {BASELINE: dict(arguments["baseline"]), CANDIDATE: dict(arguments["candidate"])}

    @classmethod
    def slots(cls, arguments: Mapping[str, Any]) -> list[Slot]:
        """Return a run of each setting that does not count, then pairs in the order A B, B A, A B and so on."""
        slots = [
            Slot(key=f"warm-up {setting}", setting=setting, load="workload", block=-1, warm_up=True)
            for setting in (BASELINE, CANDIDATE)
        ]
        for pair in range(arguments["pairs"]):
            order = (BASELINE, CANDIDATE) if pair % 2 == 0 else (CANDIDATE, BASELINE)
            slots += [
                Slot(key=f"pair {pair + 1} {setting}", setting=setting, load="workload", block=pair)
                for setting in order
            ]
        return slots

    def work(self, conductor: Conductor) -> None:
        """Make the runs; then ask, under the baseline's settings, how close the call was where outputs part."""
        conductor.run(self.slots(self.arguments))
        ones, others = self._outputs(BASELINE), self._outputs(CANDIDATE)
        load = self.journal.loads["workload"]
        if conductor.cancelled or not ones or not others or any(each.temperature > 0 for each in load.requests):
            return
        found = divergences(ones[0], others[0])
        if found:
            conductor.switch(BASELINE)
            assert isinstance(conductor.site, OwnServer)  # only that has settings that could be compared
            ask_gaps(conductor.site.workbench, load.requests, ones[0], found, self.journal.probes, self.journal.append)

    @property
    def blocks(self) -> list[int]:
        """The pairs."""
        return self.pairs

    @property
    def pairs(self) -> list[int]:
        """Numbers of the pairs of which both runs were made."""
        return sorted(set(self._runs(BASELINE)) & set(self._runs(CANDIDATE)))

    @cached_property
    def effects(self) -> pd.DataFrame:
        """A row a pair of runs: the logarithm of candidate / baseline for each metric."""
        ones, others = self._runs(BASELINE), self._runs(CANDIDATE)
        rows = {pair: paired_effects(ones[pair].answers, others[pair].answers) for pair in self.pairs}
        return pd.DataFrame.from_dict(rows, orient="index", columns=list(METRICS))

    @cached_property
    def findings(self) -> dict[str, Finding]:
        """What was found, by metric, as the client saw it."""
        ones, others = self._runs(BASELINE), self._runs(CANDIDATE)
        effects = {name: paired_effect(self.effects[name].to_numpy(), self.confidence) for name in METRICS}
        adjusted = joint_p({name: self.effects[name].to_numpy() for name in METRICS})
        before = pd.DataFrame([run_figures(ones[pair].answers) for pair in self.pairs], columns=list(METRICS)).mean()
        after = pd.DataFrame([run_figures(others[pair].answers) for pair in self.pairs], columns=list(METRICS)).mean()
        findings = {}
        for name, metric in METRICS.items():
            effect = effects[name]
            found = effect.found(self.confidence, adjusted[name])
            good = (effect.estimate < 0) == (metric.better == "lower")
            findings[name] = Finding(
                metric=name,
                title=metric.title,
                unit=metric.unit,
                baseline=float(before[name]),
                candidate=float(after[name]),
                effect=effect,
                p=adjusted[name],
                verdict=("better" if good else "worse") if found else "no difference found",
            )
        return findings

    @property
    def significant(self) -> bool:
        """Whether a difference was found in any metric; the confidence holds for all of them together."""
        return any(finding.verdict != "no difference found" for finding in self.findings.values())

    @cached_property
    def outputs(self) -> Outputs:
        """What the candidate does to the outputs."""
        load = self.journal.loads["workload"]
        dtype = self.manifest.environment.dtype
        return judge(load.requests, self._outputs(BASELINE), self._outputs(CANDIDATE), self.journal.probes, dtype)

    @property
    def verdict(self) -> str:
        """The finding in a sentence."""
        found = [finding for finding in self.findings.values() if finding.verdict != "no difference found"]
        level = f"{self.confidence:.0%}"
        if not found:
            tpot = self.findings["tpot_ms"].effect
            low, high = _changes(tpot.low, tpot.high)
            return (
                f"No difference found with {len(self.pairs)} pairs at {level}. If there is one in TPOT, it is between "
                f"{low} and {high}."
            )
        told = []
        for finding in found:
            effect, low, high = _changes(finding.effect.estimate, finding.effect.low, finding.effect.high)
            told.append(f"{finding.title} is {effect} ({low} to {high}), {finding.verdict}")
        return f"With the candidate, {'; '.join(told)} ({level} intervals, {len(self.pairs)} pairs)."

    def table(self) -> pd.DataFrame:
        """Return a row a metric: both means, the ratio with its interval, p, and the verdict."""
        rows = []
        for finding in self.findings.values():
            effect = finding.effect
            rows.append(
                {
                    "metric": f"{finding.title} ({finding.unit})",
                    "baseline": finding.baseline,
                    "candidate": finding.candidate,
                    "ratio": effect.ratio,
                    "low": effect.ratio_low,
                    "high": effect.ratio_high,
                    "p": finding.p,
                    "verdict": finding.verdict,
                }
            )
        return pd.DataFrame(rows).set_index("metric")

    def server_table(self) -> pd.DataFrame:
        """Return what the server told of the runs, both means and their ratio; described, not tested."""
        frame = self.to_frame()
        rows = []
        for name, title in _SERVER_SIDE.items():
            values = pd.to_numeric(frame[f"server_{name}"], errors="coerce")
            one, other = (float(values[frame["setting"] == setting].mean()) for setting in (BASELINE, CANDIDATE))
            if not np.isnan(one) or not np.isnan(other):
                ratio = other / one if one else np.nan
                rows.append({"figure": title, "baseline": one, "candidate": other, "ratio": ratio})
        return pd.DataFrame(rows, columns=["figure", "baseline", "candidate", "ratio"]).set_index("figure")

    def summary(self) -> str:
        """Return the settings, the verdict, the table, the outputs, and what to know about the runs."""
        base, other = (self.arguments[name] for name in (BASELINE, CANDIDATE))
        lines = [
            f"baseline   {_settings(base)}",
            f"candidate  {_settings(other)}",
            f"workload   {self.workload.name}, {len(self.journal.loads['workload'].requests)} requests a run",
            f"where      {self.manifest.environment.model} on {self.manifest.environment.device}",
            "",
            self.verdict,
            self.outputs.words,
            "",
            self.table().to_string(float_format=lambda value: f"{value:,.4g}"),
        ]
        server = self.server_table()
        if len(server):
            lines += ["", server.to_string(float_format=lambda value: f"{value:,.4g}")]
        if not self.significant and self.enough:
            needed = pairs_needed(self.effects["tpot_ms"].to_numpy(), 0.05, self.confidence)
            lines += ["", f"To find a difference of 5 % in TPOT with 90 % power it takes about {needed} such pairs."]
        caveats = self.caveats()
        return "\n".join([*lines, *([""] if caveats else []), *caveats])

    def plot(self) -> Column:
        """Return a static Bokeh figure: every metric's ratio with its interval and its pairs, and both latencies."""
        from inference_workbench.experiments.plots import comparison_plot  # noqa: PLC0415 -- Bokeh takes a while

        return comparison_plot(self)

    def estimates(self) -> dict[str, tuple[float, float]]:
        """Return the logarithm of each metric's ratio and half the width of its interval."""
        return {
            f"log ratio of {finding.title}": (
                finding.effect.estimate,
                (finding.effect.high - finding.effect.low) / 2,
            )
            for finding in self.findings.values()
        }

    def _outputs(self, setting: str) -> list[dict[int, list[int]]]:
        runs = self._runs(setting)
        return [output_ids(runs[pair].answers) for pair in self.pairs]


def compare(
    baseline: Mapping[str, FeatureValue],
    candidate: Mapping[str, FeatureValue],
    workload: str | Path | AnyWorkload | Recording = "chat",
    *,
    features: Mapping[str, FeatureValue] | None = None,
    pairs: int = DEFAULT_PAIRS,
    requests: int | None = None,
    confidence: float = 0.95,
    wb: Workbench | None = None,
    path: str | Path | None = None,
    progress: ProgressWish = True,
    cancel: Event | None = None,
) -> Comparison:
    """Compare two settings of the switches under the very same requests, on one server, in turns.

    Each pair is a run with either setting, in alternating order (A B, B A, …), so that a drift of the machine hits both
    alike. A run of each that does not count goes first. Before every run the prefix and the response cache are emptied.
    Afterwards, also after an error or an interrupt, the switches are put back.

    Parameters
    ----------
    baseline, candidate
        The switches of both settings; ``{}`` is the server's own.
    workload
        What is sent: a preset's name, a workload, a recording, or a file; see :func:`~inference_workbench.replaying`.
    features
        Switches that both have in common. Without it, as they stand on the server.
    pairs
        How many pairs of runs count; 6 at least at 95 % (with fewer, chance alone could explain any difference).
    requests
        How many requests a run has.
    confidence
        Of the intervals, and of the verdict on all metrics together.
    wb
        The connection; without it, one is made.
    path
        The file that keeps every run as soon as it is done. If it holds this very experiment, that is gone on with.
        Without it, a new file in the user's data folder.
    progress
        Whether to show it, or a function that is called with each :class:`Report`.
    cancel
        When set, from another thread, what there is by then is returned.

    Raises
    ------
    FeatureRefusedError
        If a switch does not exist, or cannot be set so. Nothing was run then.
    WorkbenchError
        If the server is busy or a request fails. What was done is kept, and the message says how to go on.

    Examples
    --------
    >>> result = iw.compare({"kv_cache": True}, {"kv_cache": False}, "chat")
    >>> result.verdict, result.plot(), result.outputs
    """
    if pairs < (least := blocks_needed(confidence)):
        raise WorkbenchError(
            f"At {confidence:.0%} it takes {least} pairs at least to find any difference, however large; not {pairs}."
        )
    arguments = {
        "baseline": dict(baseline),
        "candidate": dict(candidate),
        "workload": msgspec.to_builtins(make_workload(workload)),
        "features": None if features is None else dict(features),
        "pairs": pairs,
        "requests": requests,
        "confidence": confidence,
    }
    return make(Comparison, arguments, Options(site=wb, path=path, progress=progress, cancel=cancel))


def _settings(values: Mapping[str, FeatureValue]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items()) or "the server's own"


def _changes(*log_ratios: float) -> list[str]:
    """Say a change and its bounds alike: as factors where one of them is a half or twice and more, else in percent."""
    ratios = [float(np.exp(each)) for each in log_ratios]
    as_factors = any(np.isfinite(ratio) and not 0.5 < ratio < 2 and ratio > 0 for ratio in ratios)
    return [
        "anything" if not np.isfinite(log_ratio) else f"{ratio:.2f}×" if as_factors else f"{100 * (ratio - 1):+.1f} %"
        for log_ratio, ratio in zip(log_ratios, ratios, strict=True)
    ]
