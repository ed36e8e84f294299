"""Static Bokeh figures of experiments' results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from bokeh.layouts import column
from bokeh.models import ColumnDataSource, FactorRange, HoverTool, LinearColorMapper
from bokeh.models.annotations import Span, Whisker
from bokeh.models.layouts import Column
from bokeh.plotting import figure

from inference_workbench.experiments.figures import METRICS, Floats, token_gaps_ms

if TYPE_CHECKING:
    from inference_workbench.experiments.ablation import Ablation
    from inference_workbench.experiments.capacity import Capacity
    from inference_workbench.experiments.compare import Comparison
    from inference_workbench.experiments.crossover import Crossover

# Okabe and Ito's palette; each series also has its own marker or dash.
_BLUE, _ORANGE, _GREEN, _VERMILION, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#595959"
_DIVERGING = ("#2166AC", "#67A9CF", "#D1E5F0", "#F7F7F7", "#FDDBC7", "#F4A582", "#E66101")
_TOOLS = "pan,wheel_zoom,box_zoom,reset,save"


def comparison_plot(comparison: Comparison) -> Column:
    """Draw each metric's ratio with its interval and its pairs, and how long gaps are under both settings."""
    return column(_ratios(comparison), _latencies(comparison), sizing_mode="stretch_width")


def ablation_plot(ablation: Ablation, metric: str) -> figure:
    """Draw a heat map of ratios: main effects on the diagonal, interactions of two switches beside it."""
    names = list(ablation.factors)
    cells: dict[str, Any] = {name: [] for name in ("x", "y", "log", "text", "range", "effect")}
    for effect, estimate in ablation.estimates_of(metric).items():
        for first, second in {(effect[0], effect[-1]), (effect[-1], effect[0])}:
            cells["x"].append(first)
            cells["y"].append(second)
            cells["log"].append(estimate.estimate)
            sure = not estimate.low <= 0 <= estimate.high
            cells["text"].append(f"×{estimate.ratio:.3g}" + ("" if sure else " ?"))
            cells["range"].append(f"{estimate.ratio_low:.3g} … {estimate.ratio_high:.3g}, p = {estimate.p:.2g}")
            cells["effect"].append(" × ".join(effect))
    reach = max((abs(value) for value in cells["log"] if np.isfinite(value)), default=0.0) or 1.0
    title = METRICS[metric].title
    plot = figure(
        x_range=FactorRange(factors=names),
        y_range=FactorRange(factors=names[::-1]),
        height=140 + 60 * len(names),
        width=260 + 110 * len(names),
        title=f"{title}: factor by which a switch, or two together, change it ('?': not told from 1)",
        tools="save",
    )
    # From blue to orange: told apart under the common colour blindnesses; every cell says its number, too.
    mapper = LinearColorMapper(palette=_DIVERGING, low=-reach, high=reach)
    source = ColumnDataSource(cells)
    squares = plot.rect(
        "x", "y", 0.96, 0.96, source=source, fill_color={"field": "log", "transform": mapper}, line_color=_GREY
    )
    plot.text("x", "y", text="text", source=source, text_align="center", text_baseline="middle", text_color="black")
    plot.add_tools(HoverTool(renderers=[squares], tooltips=[("", "@effect"), (title, "@text (@range)")]))
    return plot


def crossover_plot(crossover: Crossover, metric: str) -> figure:
    """Draw the ratio of a metric over what was varied, with intervals, and where it crosses 1."""
    table = crossover.effects(metric).reset_index()
    over = crossover.arguments["over"]
    x = [float(value) for value in table[over]]
    title = METRICS[metric].title
    plot = figure(
        height=320,
        sizing_mode="stretch_width",
        x_axis_type="log" if min(x) > 0 else "linear",
        y_axis_type="log",
        x_axis_label=over,
        y_axis_label=f"{title}: candidate / baseline, measured",
        title=f"{title} over {over}",
        tools=_TOOLS,
    )
    plot.add_layout(Span(location=1.0, dimension="width", line_color=_GREY, line_dash="dashed"))
    source = ColumnDataSource({"x": x, **{name: table[name].tolist() for name in ("ratio", "low", "high", "verdict")}})
    plot.line("x", "ratio", source=source, color=_BLUE, line_width=2)
    points = plot.scatter("x", "ratio", source=source, size=9, color=_BLUE, marker="diamond")
    plot.add_layout(Whisker(base="x", lower="low", upper="high", source=source))
    tooltips = [(over, "@x"), ("ratio", "@ratio{0.000} (@low{0.000} … @high{0.000})"), ("", "@verdict")]
    plot.add_tools(HoverTool(renderers=[points], tooltips=tooltips))
    crossing = crossover.crossing(metric)
    if crossing is not None:
        plot.add_layout(Span(location=crossing.value, dimension="height", line_color=_VERMILION, line_width=2))
    return plot


def capacity_plot(capacity: Capacity) -> Column:
    """Draw goodput over the rate of arrivals with the capacity, and latencies over the throughput."""
    curve = capacity.curve()
    source = ColumnDataSource({str(name): curve[name].tolist() for name in curve.columns})
    goodput = figure(
        height=280,
        sizing_mode="stretch_width",
        x_axis_label="requests per second that arrive",
        y_axis_label="per second, measured",
        title="Goodput: requests per second that meet every objective",
        tools=_TOOLS,
    )
    goodput.line("rate", "rate", source=source, color=_GREY, line_dash="dotted", legend_label="all that arrive")
    goodput.line("rate", "goodput", source=source, color=_BLUE, line_width=2, legend_label="goodput")
    points = goodput.scatter("rate", "goodput", source=source, color=_BLUE, size=8, marker="diamond")
    shown = "@attainment{0%} (@attainment_low{0%} … @attainment_high{0%})"
    goodput.add_tools(HoverTool(renderers=[points], tooltips=[("rate", "@rate{0.00}/s"), ("meet it", shown)]))
    if capacity.rate is not None:
        goodput.add_layout(Span(location=capacity.rate, dimension="height", line_color=_VERMILION, line_width=2))
    goodput.legend.location = "top_left"
    latency = figure(
        height=280,
        sizing_mode="stretch_width",
        y_axis_type="log",
        x_axis_label="output tokens per second",
        y_axis_label="ms, measured by the client",
        title="Latency over throughput",
        tools=_TOOLS,
    )
    for name, colour, dash in (
        ("ttft_ms_p50", _BLUE, "solid"),
        ("ttft_ms_p90", _BLUE, "dashed"),
        ("tpot_ms_p50", _ORANGE, "solid"),
        ("tpot_ms_p90", _ORANGE, "dashed"),
    ):
        label = name.replace("_ms_", " ").replace("ttft", "TTFT").replace("tpot", "TPOT")
        latency.line("output_tokens_per_s", name, source=source, color=colour, line_dash=dash, legend_label=label)
        latency.scatter("output_tokens_per_s", name, source=source, color=colour, size=6)
    latency.legend.location = "top_left"
    return column(goodput, latency, sizing_mode="stretch_width")


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
