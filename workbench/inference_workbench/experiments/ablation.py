"""What each of several switches is worth, alone and together: a factorial experiment with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from random import Random
from threading import Event
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd

from inference_server.features import FeatureValue
from inference_workbench.errors import WorkbenchError
from inference_workbench.experiments.conductor import Slot
from inference_workbench.experiments.experiment import BlockedResult, Options, ProgressWish, blocks_needed, make
from inference_workbench.experiments.factorial import Design, aliases, contrasts, design_points
from inference_workbench.experiments.figures import METRICS, PER_REQUEST, request_figures, run_figures
from inference_workbench.experiments.journal import Features, RunRecord
from inference_workbench.experiments.statistics import Effect, joint_effects
from inference_workbench.experiments.workloads import AnyWorkload
from inference_workbench.experiments.workloads import workload as make_workload

if TYPE_CHECKING:
    from bokeh.plotting import figure as Figure  # noqa: N812 -- it is a class

    from inference_workbench.client import Workbench
    from inference_workbench.recording import Recording

DEFAULT_BLOCKS = 6
DEFAULT_METRIC = "e2e_ms"

Levels = Mapping[str, tuple[FeatureValue, FeatureValue]]


class Ablation(BlockedResult):
    """The result of :func:`ablate`."""

    kind = "ablation"
    function = "ablate"
    renamed: ClassVar = {"features_varied": "features", "features": "common"}

    @classmethod
    def settings(cls, arguments: Mapping[str, Any]) -> dict[str, Features]:
        """Return a setting for each combination, named by its signs."""
        factors: dict[str, list[FeatureValue]] = arguments["features_varied"]
        return {
            _signs(point): {
                name: levels[int(sign > 0)] for (name, levels), sign in zip(factors.items(), point, strict=True)
            }
            for point in cls._points(arguments)
        }

    @classmethod
    def slots(cls, arguments: Mapping[str, Any]) -> list[Slot]:
        """Return a run of each combination that does not count, then blocks of all in random order and its reverse."""
        names = [_signs(point) for point in cls._points(arguments)]
        slots = [Slot(key=f"warm-up {name}", setting=name, load="workload", block=-1, warm_up=True) for name in names]
        random = Random(arguments["seed"])  # noqa: S311 -- reproducible, no secret
        order = list(names)
        for block in range(arguments["blocks"]):
            if block % 2 == 0:
                random.shuffle(order)
            else:
                order.reverse()
            slots += [
                Slot(key=f"block {block + 1} {name}", setting=name, load="workload", block=block) for name in order
            ]
        return slots

    @property
    def factors(self) -> dict[str, tuple[FeatureValue, FeatureValue]]:
        """The switches, each with its lower and its upper level."""
        return {name: (low, high) for name, (low, high) in self.arguments["features_varied"].items()}

    @property
    def blocks(self) -> list[int]:
        """Numbers of the blocks of which all runs were made."""
        wanted = {_signs(point) for point in self._points(self.arguments)}
        made: dict[int, set[str]] = {}
        for run in self.journal.measured():
            made.setdefault(run.block, set()).add(run.setting)
        return sorted(block for block, names in made.items() if names == wanted)

    @cached_property
    def aliases(self) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
        """For each effect, the others that this design cannot tell from it."""
        return aliases(contrasts(self._points(self.arguments), list(self.factors)))

    def estimates_of(self, metric: str = DEFAULT_METRIC) -> dict[tuple[str, ...], Effect]:
        """Return the effect of each switch and each pair of switches on a metric, as logarithms of ratios.

        A main effect is what the upper level does, averaged over all settings of the others. An interaction is by how
        much it does more (above 0) or less where the other switch is at its upper level, too: half the difference of
        both effects, as is usual.

        Raises
        ------
        WorkbenchError
            If there is no such metric.
        """
        return joint_effects(self._contrast_values(metric), self.confidence)

    def effects(self, metric: str = DEFAULT_METRIC) -> pd.DataFrame:
        """Return a row an effect: ratio with interval, p (for all of them together), what it is mixed up with."""
        rows = []
        for effect, estimate in self.estimates_of(metric).items():
            found = estimate.found(self.confidence)
            rows.append(
                {
                    "effect": " × ".join(effect),
                    "ratio": estimate.ratio,
                    "low": estimate.ratio_low,
                    "high": estimate.ratio_high,
                    "p": estimate.p,
                    "found": found,
                    "mixed up with": ", ".join(" × ".join(other) for other in self.aliases[effect]),
                }
            )
        return pd.DataFrame(rows).set_index("effect")

    def summary(self) -> str:
        """Return the effects on E2E in words, and the table."""
        table = self.effects()
        metric = METRICS[DEFAULT_METRIC]
        lines = [f"{name}: {low} → {high}" for name, (low, high) in self.factors.items()]
        points, blocks = len(self._points(self.arguments)), len(self.blocks)
        lines += [
            f"workload   {self.workload.name}, {len(self.journal.loads['workload'].requests)} requests a run",
            f"where      {self.manifest.environment.model} on {self.manifest.environment.device}",
            f"design     {self.arguments['design']}: {points} combinations, {blocks} blocks",
            "",
        ]
        found = table[table["found"]]
        if found.empty:
            lines.append(f"No effect on {metric.title} was found.")
        for name, row in found.iterrows():
            lines.append(
                f"{name}: {metric.title} × {row['ratio']:.3g} ({row['low']:.3g} to {row['high']:.3g})"
                + (f", mixed up with {row['mixed up with']}" if row["mixed up with"] else "")
            )
        lines += ["", table.to_string(float_format=lambda value: f"{value:,.4g}")]
        caveats = self.caveats()
        return "\n".join([*lines, *([""] if caveats else []), *caveats])

    def plot(self, metric: str = DEFAULT_METRIC) -> Figure:
        """Return a heat map: main effects on the diagonal, interactions beside it, as ratios of a metric."""
        from inference_workbench.experiments.plots import ablation_plot  # noqa: PLC0415 -- Bokeh takes a while

        return ablation_plot(self, metric)

    def estimates(self) -> dict[str, tuple[float, float]]:
        """Return each effect on E2E and half the width of its interval."""
        return {
            " × ".join(effect): (estimate.estimate, (estimate.high - estimate.low) / 2)
            for effect, estimate in self.estimates_of().items()
        }

    # -- private -----------------------------------------------------------------------------------------------------

    @classmethod
    def _points(cls, arguments: Mapping[str, Any]) -> npt.NDArray[np.int64]:
        return design_points(len(arguments["features_varied"]), arguments["design"])

    def _contrast_values(self, metric: str) -> dict[tuple[str, ...], npt.NDArray[np.float64]]:
        """Return each effect in each block."""
        if metric not in METRICS:
            raise WorkbenchError(f"There is no metric {metric!r}. There are: {', '.join(METRICS)}.")
        points = self._points(self.arguments)
        columns = contrasts(points, list(self.factors))
        runs = {(run.block, run.setting): run for run in self.journal.measured()}
        values = np.array(
            [[_log_level(runs[block, _signs(point)], metric) for point in points] for block in self.blocks]
        ).reshape(len(self.blocks), len(points))
        return {effect: values @ column / (len(points) / 2) for effect, column in columns.items()}


def ablate(
    features: Sequence[str] | Levels,
    workload: str | Path | AnyWorkload | Recording = "chat",
    *,
    design: Design = "full",
    blocks: int = DEFAULT_BLOCKS,
    requests: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    common: Mapping[str, FeatureValue] | None = None,
    wb: Workbench | None = None,
    path: str | Path | None = None,
    progress: ProgressWish = True,
    cancel: Event | None = None,
) -> Ablation:
    """Measure what each of several switches does, and how they work together, with every combination or a fraction.

    Parameters
    ----------
    features
        Names of switches that are on or off; or for each switch its lower and upper level, such as
        ``{"max_num_seqs": (4, 32), "kv_cache": (False, True)}``.
    workload
        What is sent; see :func:`~inference_workbench.workload`.
    design
        ``full``, ``half``, ``quarter`` or ``smallest``; see
        :func:`~inference_workbench.experiments.factorial.design_points`. A fraction cannot tell all effects apart; the
        result says which.
    blocks
        How often every combination is run, 6 at least at 95 %.
    requests
        How many requests a run has.
    confidence
        Of the intervals, and of what is called found, for all effects together.
    seed
        Of the order of runs.
    common
        Switches that all have in common. Without it, as they stand on the server.
    wb, path, progress, cancel
        As in :func:`compare`.

    Raises
    ------
    FeatureRefusedError
        If a switch does not exist, or a combination is not possible. Nothing was run then.

    Examples
    --------
    >>> result = iw.ablate(["kv_cache", "prefix_cache_read", "chunked_prefill"], "shared prefix")
    >>> result.effects("ttft_ms"), result.plot("ttft_ms")
    """
    if isinstance(features, str):
        raise WorkbenchError(f"Give several switches, as a list: [{features!r}, …].")
    levels = dict(features) if isinstance(features, Mapping) else dict.fromkeys(features, (False, True))
    wrong = [name for name, pair in levels.items() if len(pair) != 2 or pair[0] == pair[1]]
    if wrong:
        raise WorkbenchError(f"A switch takes two different levels, such as (False, True); wrong: {', '.join(wrong)}.")
    design_points(len(levels), design)
    if blocks < (least := blocks_needed(confidence)):
        raise WorkbenchError(
            f"At {confidence:.0%} it takes {least} blocks at least to find any effect, however large; not {blocks}."
        )
    arguments = {
        "features_varied": {name: list(pair) for name, pair in levels.items()},
        "workload": msgspec.to_builtins(make_workload(workload)),
        "design": design,
        "blocks": blocks,
        "requests": requests,
        "confidence": confidence,
        "seed": seed,
        "features": None if common is None else dict(common),
    }
    return make(Ablation, arguments, Options(site=wb, path=path, progress=progress, cancel=cancel))


def _signs(point: npt.NDArray[np.int64]) -> str:
    return "".join("+" if sign > 0 else "-" for sign in point)


def _log_level(run: RunRecord, metric: str) -> float:
    """Return the logarithm of a run's figure; of those that every request has, the mean of the logarithms."""
    if metric not in PER_REQUEST:
        value = run_figures(run.answers)[metric]
        return float(np.log(value)) if value > 0 else np.nan
    values = [request_figures(answer)[metric] for answer in run.answers if answer.finished]
    logs = [np.log(value) for value in values if value]
    return float(np.mean(logs)) if logs else np.nan
