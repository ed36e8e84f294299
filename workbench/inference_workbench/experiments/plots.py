"""Static Bokeh figures of experiments' results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from bokeh.layouts import column
from bokeh.models import ColumnDataSource, FactorRange, HoverTool
from bokeh.models.annotations import Span, Whisker
from bokeh.models.layouts import Column
from bokeh.plotting import figure

from inference_workbench.experiments.figures import Floats, token_gaps_ms

if TYPE_CHECKING:
    from inference_workbench.experiments.compare import Comparison

# Okabe and Ito's palette; each series also has its own marker or dash.
_BLUE, _ORANGE, _GREEN, _VERMILION, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#595959"
_TOOLS = "pan,wheel_zoom,box_zoom,reset,save"


def comparison_plot(comparison: Comparison) -> Column:
    """Draw each metric's ratio with its interval and its pairs, and how long gaps are under both settings."""
    return column(_ratios(comparison), _latencies(comparison), sizing_mode="stretch_width")


def _ratios(comparison: Comparison) -> Any:
    findings = list(comparison.findings.values())[::-1]
    names = [finding.title for finding in findings]
    plot = figure(
        y_range=FactorRange(factors=names),
        height=60 + 36 * len(names),
        sizing_mode="stretch_width",
        x_axis_type="log",
        x_axis_label=f"candidate / baseline, measured, with {comparison.confidence:.0%} intervals and single pairs",
        title=comparison.verdict if len(comparison.verdict) < 110 else "Candidate against baseline",
        tools=_TOOLS,
    )
    plot.add_layout(Span(location=1.0, dimension="height", line_color=_GREY, line_dash="dashed"))
    pairs = ColumnDataSource(
        {
            "ratio": np.exp(np.concatenate([comparison.effects[finding.metric].to_numpy() for finding in findings])),
            "name": np.repeat(names, len(comparison.effects)),
        }
    )
    plot.scatter("ratio", "name", source=pairs, size=5, color=_GREY, alpha=0.4)
    source = ColumnDataSource(
        {
            "name": names,
            "ratio": [finding.effect.ratio for finding in findings],
            "low": [finding.effect.ratio_low for finding in findings],
            "high": [finding.effect.ratio_high for finding in findings],
            "verdict": [finding.verdict for finding in findings],
            "colour": [_GREY if f.verdict == "no difference found" else _BLUE for f in findings],
        }
    )
    plot.add_layout(Whisker(base="name", lower="low", upper="high", dimension="width", source=source))
    points = plot.scatter("ratio", "name", source=source, size=10, color="colour", marker="diamond")
    tooltips = [("", "@name: @verdict"), ("ratio", "@ratio{0.000} (@low{0.000} … @high{0.000})")]
    plot.add_tools(HoverTool(renderers=[points], tooltips=tooltips))
    return plot


def _latencies(comparison: Comparison) -> Any:
    plot = figure(
        height=260,
        sizing_mode="stretch_width",
        x_axis_type="log",
        x_axis_label="gap between two tokens (ms), measured by the client",
        y_axis_label="share of tokens",
        title="Gaps between tokens: share that is at most so long",
        tools=_TOOLS,
    )
    for setting, colour, dash in (("baseline", _BLUE, "solid"), ("candidate", _ORANGE, "dashed")):
        runs = [run for run in comparison.journal.measured() if run.setting == setting]
        gaps = [token_gaps_ms(answer) for run in runs for answer in run.answers if answer.finished]
        x, y = _distribution(np.concatenate(gaps) if gaps else np.zeros(0))
        plot.line(x, y, color=colour, line_dash=dash, line_width=2, legend_label=setting)
    plot.legend.location = "bottom_right"
    return plot


def _distribution(values: Floats, points: int = 400) -> tuple[Floats, Floats]:
    """Return the cumulative distribution at so many quantiles; tokens that came together have no gap to show."""
    values = values[values > 0]
    if not len(values):
        return np.zeros(0), np.zeros(0)
    shares = np.linspace(0, 1, points)
    return np.quantile(values, shares), shares
