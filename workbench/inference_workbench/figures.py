"""Static Bokeh figures of finished runs. Live views are the TypeScript ones (:mod:`inference_workbench.panel`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bokeh.models import ColumnDataSource, HoverTool
from bokeh.plotting import figure

if TYPE_CHECKING:
    from inference_workbench.run import Run

# Okabe and Ito's palette, told apart under the common colour blindnesses; each epoch also has its own marker.
_COLOURS = ("#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9", "#882255")
_MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex")


def latency_over_position(run: Run) -> figure:
    """Draw each token's latency (ms) over its output position; one colour and marker an epoch, first token included."""
    plot = figure(
        height=320,
        sizing_mode="stretch_width",
        x_axis_label="output position (tokens)",
        y_axis_label="latency (ms), measured",
        title=f"Latency of each token · {run.id}",
        tools="pan,wheel_zoom,box_zoom,reset,save",
    )
    labels = {event.epoch: event for event in run.switches}
    for number, (epoch, rows) in enumerate(run.tokens.groupby("epoch", dropna=False)):
        source = ColumnDataSource(rows.assign(shown=[repr(text) for text in rows["text"]]).astype({"epoch": object}))
        switch = labels.get(epoch) if isinstance(epoch, int) else None
        told = "" if switch is None else " · " + ", ".join(f"{name} = {switch.values[name]}" for name in switch.changed)
        plot.scatter(
            "index",
            "latency_ms",
            source=source,
            size=6,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            legend_label=f"settings {epoch}{told}",
        )
    tooltips = [
        ("token", "@index @shown"),
        ("latency", "@latency_ms{0.00} ms"),
        ("step", "@step (@step_ms{0.00} ms, forward @forward_ms{0.00} ms)"),
        ("positions computed", "@scheduled"),
        ("requests in the step", "@batch_size"),
    ]
    plot.add_tools(HoverTool(tooltips=tooltips))
    plot.y_range.start = 0  # type: ignore[attr-defined]
    if plot.legend:
        plot.legend.location = "top_left"
    return plot
