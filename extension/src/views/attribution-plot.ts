/** Where the time of each step's tokens went: one stacked bar a step, the unexplained rest always on top. */

import type { StepParts } from '../telemetry/attribution';
import { partsByStep } from '../telemetry/attribution';
import type { Part } from '../telemetry/protocol';
import { PARTS } from '../telemetry/protocol';
import { percentile } from '../telemetry/statistics';
import type { Bokeh, ColumnDataSource, Figure } from './bokeh';
import { duration, percent, significant } from './format';
import type { Hatch } from './parts';
import { partLook, partName } from './parts';
import type { LegendEntry, Table } from './plot';
import { StepPlot } from './step-plot';
import type { ViewContext } from './view';

const PATTERNS: Record<Hatch, 'blank' | 'right_diagonal_line' | 'dot' | 'vertical_line' | 'horizontal_line' | 'cross'> =
  {
    none: 'blank',
    diagonal: 'right_diagonal_line',
    dots: 'dot',
    vertical: 'vertical_line',
    horizontal: 'horizontal_line',
    cross: 'cross'
  };
/** Parts that are said even when they are nothing. */
const ALWAYS: readonly Part[] = ['forward', 'unexplained'];

/** One part of all columns: the outline of its pieces is one path, which is drawn at once. */
interface Layer {
  part: Part;
  source: ColumnDataSource;
  show(shown: boolean): void;
  paint(): void;
}

export class AttributionPlot extends StepPlot {
  /** A column has many pieces. */
  protected override readonly columns = 90;
  /** It costs more than the other plots, and is therefore drawn less often. */
  protected override readonly intervalMs = 500;
  private readonly filled = new Set<Part>();
  private layers: Layer[] = [];
  private parts = new Map<number, StepParts>();
  private present: Part[] = [...ALWAYS];

  constructor(context: ViewContext) {
    const { trans } = context;
    super(
      context,
      'attribution',
      trans.__('Where the tokens’ time went'),
      trans.__(
        'Latency of the tokens that each step produced, split into its parts and averaged over them, in ms. For a first token the latency counts from the arrival of the request. The parts add up to the latency; what was not measured is shown as unexplained. Engine and server clocks, put on one by exchanges of messages.'
      )
    );
  }

  protected build(bokeh: Bokeh, { tools, height }: { tools: string; height: number }): Figure {
    const { trans } = this.context;
    const figure = bokeh.figure({
      ...this.makeRanges(bokeh),
      tools,
      height,
      toolbar_location: null,
      sizing_mode: 'stretch_width',
      x_axis_label: trans.__('engine step'),
      y_axis_label: trans.__('ms per token')
    });
    for (const part of PARTS) {
      const source = new bokeh.ColumnDataSource({ data: { x: [], y1: [], y2: [] } });
      const renderer = figure.varea_step({ field: 'x' }, { field: 'y1' }, { field: 'y2' }, 'after', {
        source,
        hatch_scale: 7,
        hatch_weight: 1
      });
      const edge =
        part === 'unexplained'
          ? figure.step({ field: 'x' }, { field: 'y2' }, 'after', { source, line_width: 0.5 })
          : null;
      // What is not there is not drawn: a renderer costs time even when its source is empty.
      const show = (shown: boolean): void => {
        renderer.visible = shown;
        if (edge) {
          edge.visible = shown;
        }
      };
      show(false);
      this.layers.push({
        part,
        source,
        show,
        paint: () => {
          const look = partLook(part, this.context.theme);
          renderer.glyph.setv({ fill_color: look.fill, hatch_color: look.line, hatch_pattern: PATTERNS[look.hatch] });
          edge?.glyph.setv({ line_color: look.line });
        }
      });
    }
    return figure;
  }

  protected recolour(): void {
    this.layers.forEach(each => each.paint());
  }

  protected draw(): string {
    const { store, trans, windowNs } = this.context;
    this.parts = partsByStep(store, windowNs);
    // Tokens are forgotten before steps are: no bar is missing, it is only no longer known.
    const oldest = Math.min(...this.parts.keys());
    this.collect(step => this.parts.get(step.event.step)?.latencyNs ?? 0, oldest);
    const half = this.columnHalf();
    const found = this.shown.map(step => this.parts.get(step.event.step));
    const bottoms = found.map(() => 0);
    const before = this.present.length;
    this.present = [];
    const totals = found.map(each => (each?.latencyNs ?? 0) / 1e6);
    const usual = percentile(totals, 0.95) ?? 10;
    const highest = Math.max(1, ...totals);
    const top = highest <= usual * 2 ? highest * 1.12 : Math.max(1, usual * 1.7);
    this.yRange!.end = top;
    // What is thinner than half a pixel has its place in the stack and is not drawn.
    const thinnest = top / 400;
    this.layers.forEach(({ part, source, show }, at) => {
      const data: Record<'x' | 'y1' | 'y2', number[]> = { x: [], y1: [], y2: [] };
      let drawn = false;
      found.forEach((each, column) => {
        const value = (each?.parts[at] ?? 0) / 1e6;
        const bottom = bottoms[column];
        bottoms[column] += Math.max(0, value);
        const step = this.shown[column].event.step;
        drawn ||= value >= thinnest;
        // The right edge goes down to the axis: between two columns there is nothing.
        data.x.push(step - half, step + half);
        data.y1.push(bottom, 0);
        data.y2.push(value >= thinnest ? bottoms[column] : bottom, 0);
      });
      if (drawn) {
        source.data = data;
      }
      if (drawn !== this.filled.has(part)) {
        this.filled[drawn ? 'add' : 'delete'](part);
        show(drawn);
      }
      if (ALWAYS.includes(part) || found.some(each => (each?.parts[at] ?? 0) > 0)) {
        this.present.push(part);
      }
    });
    if (this.present.length !== before) {
      this.drawLegend();
    }
    if (this.parts.size === 0) {
      return store.tokens.length === 0
        ? trans.__('No token yet.')
        : trans.__('These tokens were recorded without the parts of their latency: see the switch Instrumentation.');
    }
    const above = totals.filter(each => each > top).length;
    return [
      this.average(),
      above > 0 ? trans.__('%1 bars above this view, up to %2 ms', above, significant(highest)) : ''
    ]
      .filter(Boolean)
      .join(' · ');
  }

  protected legend(): LegendEntry[] {
    const { theme, trans } = this.context;
    return this.present.map(part => {
      const look = partLook(part, theme);
      return { colour: look.fill, line: look.line, hatch: look.hatch, text: partName(part, trans) };
    });
  }

  protected describe(): string | null {
    const { value } = this.context.selection;
    const each = value ? this.parts.get(value.step) : undefined;
    if (!each) {
      return null;
    }
    const { trans } = this.context;
    return trans.__(
      'step %1: %2 per token, most of it %3',
      each.step,
      duration(each.latencyNs),
      this.shares(each.parts, each.latencyNs)
    );
  }

  protected table(): Table {
    const { store, trans, windowNs } = this.context;
    const parts = partsByStep(store, windowNs);
    const columns = PARTS.filter(
      (part, at) => ALWAYS.includes(part) || [...parts.values()].some(each => each.parts[at] > 0)
    );
    return {
      columns: [
        trans.__('step'),
        trans.__('tokens'),
        trans.__('latency'),
        ...columns.map(part => partName(part, trans))
      ],
      rows: [...parts.values()]
        .sort((a, b) => b.step - a.step)
        .slice(0, 100)
        .map(each => [
          each.step,
          each.tokens,
          duration(each.latencyNs),
          ...columns.map(part => duration(each.parts[PARTS.indexOf(part)]))
        ])
    };
  }

  /** Of everything in the window. */
  private average(): string {
    const { trans } = this.context;
    let latency = 0;
    let tokens = 0;
    const sums = PARTS.map(() => 0);
    for (const each of this.parts.values()) {
      tokens += each.tokens;
      latency += each.latencyNs * each.tokens;
      each.parts.forEach((value, at) => (sums[at] += value * each.tokens));
    }
    return trans.__('%1 tokens: %2', tokens.toLocaleString('en'), this.shares(sums, latency));
  }

  /** "forward 82 %, host 6 %, unexplained 1.2 %": the three largest, and the rest that nobody can explain. */
  private shares(parts: readonly number[], latency: number): string {
    const { trans } = this.context;
    const order = PARTS.map((part, at) => ({ part, value: parts[at] }))
      .filter(each => each.part !== 'unexplained' && each.value > 0)
      .sort((a, b) => b.value - a.value)
      .slice(0, 3);
    order.push({ part: 'unexplained', value: parts[PARTS.indexOf('unexplained')] });
    return order
      .map(each => `${partName(each.part, trans)} ${percent(latency > 0 ? each.value / latency : 0)}`)
      .join(', ');
  }
}
