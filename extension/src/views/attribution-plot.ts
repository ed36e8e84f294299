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

export class AttributionPlot extends StepPlot {
  private readonly sources = new Map<Part, ColumnDataSource>();
  private glyphs: { part: Part; paint: () => void }[] = [];
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
      const source = new bokeh.ColumnDataSource({ data: { left: [], right: [], bottom: [], top: [] } });
      const renderer = figure.quad(
        { field: 'left' },
        { field: 'right' },
        { field: 'bottom' },
        { field: 'top' },
        { source, line_width: 0.5, hatch_scale: 7, hatch_weight: 1 }
      );
      this.sources.set(part, source);
      this.glyphs.push({
        part,
        paint: () => {
          const look = partLook(part, this.context.theme);
          renderer.glyph.setv({
            fill_color: look.fill,
            line_color: part === 'unexplained' ? look.line : this.context.theme.ground,
            hatch_color: look.line,
            hatch_pattern: PATTERNS[look.hatch]
          });
        }
      });
    }
    return figure;
  }

  protected recolour(): void {
    this.glyphs.forEach(each => each.paint());
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
    PARTS.forEach((part, at) => {
      const data: Record<'left' | 'right' | 'bottom' | 'top', number[]> = { left: [], right: [], bottom: [], top: [] };
      found.forEach((each, column) => {
        const value = (each?.parts[at] ?? 0) / 1e6;
        if (value > 0) {
          const step = this.shown[column].event.step;
          data.left.push(step - half);
          data.right.push(step + half);
          data.bottom.push(bottoms[column]);
          bottoms[column] += value;
          data.top.push(bottoms[column]);
        }
      });
      this.sources.get(part)!.data = data;
      if (data.left.length > 0 || ALWAYS.includes(part)) {
        this.present.push(part);
      }
    });
    if (this.present.length !== before) {
      this.drawLegend();
    }
    const usual = percentile(bottoms, 0.95) ?? 10;
    const highest = Math.max(1, ...bottoms);
    const top = highest <= usual * 2 ? highest * 1.12 : Math.max(1, usual * 1.7);
    this.yRange!.end = top;
    if (this.parts.size === 0) {
      return store.tokens.length === 0
        ? trans.__('No token yet.')
        : trans.__('These tokens were recorded without the parts of their latency: see the switch Instrumentation.');
    }
    const above = bottoms.filter(each => each > top).length;
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
