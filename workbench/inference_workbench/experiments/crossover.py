"""Where an optimization turns from gain to loss: one comparison at each value of a load's or a switch's parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd

from inference_server.features import FeatureValue
from inference_server.workloads.workload import Workload
from inference_workbench.errors import WorkbenchError
from inference_workbench.experiments.compare import BASELINE, CANDIDATE
from inference_workbench.experiments.conductor import Slot
from inference_workbench.experiments.experiment import BlockedResult, Options, ProgressWish, blocks_needed, make
from inference_workbench.experiments.figures import METRICS, paired_effects
from inference_workbench.experiments.journal import Features
from inference_workbench.experiments.statistics import Effect, expanded_quantiles, joint_effects
from inference_workbench.experiments.workloads import AnyWorkload, from_plain
from inference_workbench.experiments.workloads import workload as make_workload

if TYPE_CHECKING:
    from bokeh.plotting import figure as Figure  # noqa: N812 -- it is a class

    from inference_workbench.client import Workbench

DEFAULT_METRIC = "e2e_ms"
OVER_LOAD = ("concurrency", "rate", "prompt_tokens", "output_tokens", "shared_prefix_tokens", "temperature")
"""Parameters of the workload that may be varied; any other name is a switch's."""
_RESAMPLES = 4000

Floats = npt.NDArray[np.float64]


class Crossing(msgspec.Struct, frozen=True, kw_only=True):
    """Where the effect changes its sign."""

    value: float
    low: float
    high: float
    """Interval of the value; infinite where a resample had no crossing on that side."""
    share: float
    """Of the resamples in which there was a crossing of this direction at all."""
    turns: str
    """``gain to loss`` or ``loss to gain``, with rising values."""


class Crossover(BlockedResult):
    """The result of :func:`crossover`."""

    kind = "crossover"
    function = "crossover"

    @classmethod
    def settings(cls, arguments: Mapping[str, Any]) -> dict[str, Features]:
        """Return both settings; where a switch is varied, both at each of its values."""
        both = {BASELINE: dict(arguments["baseline"]), CANDIDATE: dict(arguments["candidate"])}
        over = arguments["over"]
        if over in OVER_LOAD:
            return both
        return {
            f"{name} {over}={value}": {**settings, over: value}
            for name, settings in both.items()
            for value in arguments["values"]
        }

    @classmethod
    def loads(cls, arguments: Mapping[str, Any]) -> dict[str, AnyWorkload]:
        """Return the workload at each value; where a switch is varied, there is one."""
        what, over = from_plain(arguments["workload"]), arguments["over"]
        if over not in OVER_LOAD:
            return {"workload": what}
        return {f"{over}={value}": make_workload(what, **{over: value}) for value in arguments["values"]}

    @classmethod
    def slots(cls, arguments: Mapping[str, Any]) -> list[Slot]:
        """Return a run of each that does not count, then blocks: up and down the values, A B and B A by turns."""
        over, values = arguments["over"], arguments["values"]

        def slot(key: str, side: str, value: Any, block: int) -> Slot:
            setting = side if over in OVER_LOAD else f"{side} {over}={value}"
            load = f"{over}={value}" if over in OVER_LOAD else "workload"
            return Slot(key=key, setting=setting, load=load, block=block, warm_up=block < 0)

        sides = (BASELINE, CANDIDATE)
        slots = [slot(f"warm-up {over}={value} {side}", side, value, -1) for value in values for side in sides]
        for block in range(arguments["pairs"]):
            for place, value in enumerate(values if block % 2 == 0 else values[::-1]):
                order = sides if (block + place) % 2 == 0 else sides[::-1]
                slots += [slot(f"block {block + 1} {over}={value} {side}", side, value, block) for side in order]
        return slots

    @property
    def values(self) -> list[Any]:
        """What was varied takes these values."""
        return list(self.arguments["values"])

    @property
    def blocks(self) -> list[int]:
        """Numbers of the blocks of which all runs were made."""
        counts: dict[int, int] = {}
        for run in self.journal.measured():
            counts[run.block] = counts.get(run.block, 0) + 1
        return sorted(block for block, count in counts.items() if count == 2 * len(self.values))

    def effects(self, metric: str = DEFAULT_METRIC) -> pd.DataFrame:
        """Return a row a value: ratio of a metric with its interval, p (for all values together), and the verdict."""
        rows = []
        for value, effect in self._effects(metric).items():
            found = effect.found(self.confidence)
            good = (effect.estimate < 0) == (METRICS[metric].better == "lower")
            verdict = ("gain" if good else "loss") if found else "no difference found"
            rows.append(
                {
                    self.arguments["over"]: value,
                    "ratio": effect.ratio,
                    "low": effect.ratio_low,
                    "high": effect.ratio_high,
                    "p": effect.p,
                    "verdict": verdict,
                }
            )
        return pd.DataFrame(rows).set_index(self.arguments["over"])

    def crossing(self, metric: str = DEFAULT_METRIC) -> Crossing | None:
        """Return where the effect on a metric changes its sign first, with an interval; ``None`` if it does not.

        Between two values the effect is interpolated over the logarithm of the value (over the value itself where it
        may be 0). The interval comes from resampling blocks.
        """
        table = self._table(metric)
        x = np.array([float(value) for value in self.values])
        scale = np.log(x) if (x > 0).all() else x
        crossed = first_crossing(scale, table.mean(axis=0))
        if crossed is None:
            return None
        place, rising = crossed
        random = np.random.default_rng(0)
        chosen = random.integers(0, len(table), size=(_RESAMPLES, len(table)))
        found = [first_crossing(scale, table[rows].mean(axis=0), rising=rising) for rows in chosen]
        places = np.array([np.nan if each is None else each[0] for each in found])
        share = float(np.isfinite(places).mean())
        tail, upper = expanded_quantiles(len(table), self.confidence)
        # A resample without a crossing says that it may lie beyond either end.
        low = np.quantile(np.where(np.isfinite(places), places, -np.inf), tail, method="lower")
        high = np.quantile(np.where(np.isfinite(places), places, np.inf), upper, method="higher")
        back = np.exp if (x > 0).all() else (lambda value: value)
        better_up = METRICS[metric].better == "higher"
        return Crossing(
            value=float(back(place)),
            low=float(back(low)),
            high=float(back(high)),
            share=share,
            turns="loss to gain" if rising == better_up else "gain to loss",
        )

    @cached_property
    def verdict(self) -> str:
        """The finding about E2E in a sentence."""
        over = self.arguments["over"]
        crossing = self.crossing()
        if crossing is not None and crossing.share >= self.confidence:
            return (
                f"The candidate turns from {crossing.turns} in E2E at {over} = {crossing.value:.3g} "
                f"({crossing.low:.3g} to {crossing.high:.3g})."
            )
        verdicts = self.effects()["verdict"]
        found = sorted(set(verdicts) - {"no difference found"})
        if not found:
            return f"No difference in E2E was found at any {over}."
        if len(found) == 1 and (verdicts == found[0]).all():
            return f"The candidate is a {found[0]} in E2E at every {over} from {self.values[0]} to {self.values[-1]}."
        places = "; ".join(
            f"a {word} at {', '.join(str(value) for value, each in verdicts.items() if each == word)}" for word in found
        )
        return f"In E2E the candidate is {places}; no crossing is certain at {self.arguments['confidence']:.0%}."

    def summary(self) -> str:
        """Return the finding in words, and the effect at each value."""
        lines = [
            f"baseline   {_settings(self.arguments['baseline'])}",
            f"candidate  {_settings(self.arguments['candidate'])}",
            f"over       {self.arguments['over']} = {', '.join(map(str, self.values))}",
            f"workload   {self.workload.name}, {len(next(iter(self.journal.loads.values())).requests)} requests a run",
            f"where      {self.manifest.environment.model} on {self.manifest.environment.device}",
            "",
            self.verdict,
            "",
            self.effects().to_string(float_format=lambda value: f"{value:,.4g}"),
        ]
        caveats = self.caveats()
        return "\n".join([*lines, *([""] if caveats else []), *caveats])

    def plot(self, metric: str = DEFAULT_METRIC) -> Figure:
        """Return a static Bokeh figure: the ratio of a metric over the value, with intervals and the crossing."""
        from inference_workbench.experiments.plots import crossover_plot  # noqa: PLC0415 -- Bokeh takes a while

        return crossover_plot(self, metric)

    def estimates(self) -> dict[str, tuple[float, float]]:
        """Return the effect on E2E at each value and half the width of its interval."""
        return {
            f"log ratio of E2E at {value}": (effect.estimate, (effect.high - effect.low) / 2)
            for value, effect in self._effects(DEFAULT_METRIC).items()
        }

    # -- private -----------------------------------------------------------------------------------------------------

    def _effects(self, metric: str) -> dict[Any, Effect]:
        table = self._table(metric)
        columns = {value: table[:, place] for place, value in enumerate(self.values)}
        return joint_effects(columns, self.confidence)

    def _table(self, metric: str) -> Floats:
        """Return the effect in each block (row) at each value (column), as the logarithm of a ratio."""
        if metric not in METRICS:
            raise WorkbenchError(f"There is no metric {metric!r}. There are: {', '.join(METRICS)}.")
        return self._all_effects[:, :, list(METRICS).index(metric)]

    @cached_property
    def _all_effects(self) -> Floats:
        over, runs = self.arguments["over"], self.journal.runs
        effects = []
        for block in self.blocks:
            for value in self.values:
                ones, others = (
                    runs[f"block {block + 1} {over}={value} {side}"].answers for side in (BASELINE, CANDIDATE)
                )
                found = paired_effects(ones, others)
                effects.append([found[name] for name in METRICS])
        return np.array(effects, dtype=np.float64).reshape(len(self.blocks), len(self.values), len(METRICS))


def first_crossing(x: Floats, y: Floats, *, rising: bool | None = None) -> tuple[float, bool] | None:
    """Return where a piecewise linear curve changes its sign first and whether it rises there; ``None`` if nowhere.

    Parameters
    ----------
    rising
        Only from below zero to above it, or only from above to below.
    """
    for left in range(len(x) - 1):
        before, after = y[left], y[left + 1]
        if before * after < 0 and (rising is None or (after > before) == rising):
            return float(x[left] + (x[left + 1] - x[left]) * before / (before - after)), bool(after > before)
    return None


def crossover(
    feature: str | None = None,
    *,
    over: str,
    values: Sequence[Any],
    workload: str | Path | AnyWorkload = "chat",
    baseline: Mapping[str, FeatureValue] | None = None,
    candidate: Mapping[str, FeatureValue] | None = None,
    features: Mapping[str, FeatureValue] | None = None,
    pairs: int = 6,
    requests: int | None = None,
    confidence: float = 0.95,
    wb: Workbench | None = None,
    path: str | Path | None = None,
    progress: ProgressWish = True,
    cancel: Event | None = None,
) -> Crossover:
    """Find where an optimization turns from gain to loss.

    Parameters
    ----------
    feature
        A switch that is off or on: off is the baseline, on the candidate. Or give ``baseline`` and ``candidate``.
    over
        What is varied: ``concurrency``, ``rate``, ``prompt_tokens``, ``output_tokens``, ``shared_prefix_tokens`` or
        ``temperature`` of the workload, or the name of a switch.
    values
        Its values, rising, two at least.
    workload
        What is sent: a preset's name or a workload. Where answers should have the lengths that were drawn, let it have
        ``ignore_eos=True``.
    baseline, candidate
        Switches of both settings.
    features
        Switches that both have in common. Without it, as they stand on the server.
    pairs
        Pairs of runs at each value, 6 at least at 95 %.
    requests, confidence, wb, path, progress, cancel
        As in :func:`compare`.

    Raises
    ------
    FeatureRefusedError
        If a switch does not exist, or cannot be set so. Nothing was run then.
    WorkloadError
        If the workload has no such parameter, or a value of it is wrong.

    Examples
    --------
    >>> iw.crossover("prefix_cache_read", over="shared_prefix_tokens", values=[0, 64, 256, 1024])
    >>> iw.crossover(baseline={}, candidate={"fast_path": False}, over="concurrency", values=[1, 4, 16])
    """
    if (feature is None) == (baseline is None and candidate is None):
        raise WorkbenchError("Give either a switch that is off or on, or baseline={…} and candidate={…}.")
    if feature is not None:
        baseline, candidate = {feature: False}, {feature: True}
    listed = list(values)
    if len(listed) < 2 or listed != sorted(set(listed)):
        raise WorkbenchError(f"The values of {over!r} have to rise, and be two at least; not {listed}.")
    if pairs < (least := blocks_needed(confidence)):
        raise WorkbenchError(f"At {confidence:.0%} it takes {least} pairs at least at each value; not {pairs}.")
    what = make_workload(workload)
    if not isinstance(what, Workload) and over in OVER_LOAD:
        raise WorkbenchError(f"The requests of {what.name!r} are fixed: only a switch can be varied with them.")
    arguments = {
        "over": over,
        "values": listed,
        "workload": msgspec.to_builtins(what),
        "baseline": dict(baseline or {}),
        "candidate": dict(candidate or {}),
        "features": None if features is None else dict(features),
        "pairs": pairs,
        "requests": requests,
        "confidence": confidence,
    }
    return make(Crossover, arguments, Options(site=wb, path=path, progress=progress, cancel=cancel))


def _settings(values: Mapping[str, FeatureValue]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items()) or "the server's own"
