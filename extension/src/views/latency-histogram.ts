/** TTFT, ITL, TPOT and E2E: the percentiles of all four, and the distribution of the one that is chosen. */

import type { Bin, LatencyName, LatencySummary } from '../telemetry/latencies';
import { LATENCIES, latencies, logBins, QUANTILES, summarizeLatencies } from '../telemetry/latencies';
import { measuredBadge } from './badge';
import type { Bokeh, ColumnDataSource, Figure, Range1d } from './bokeh';
import type { LegendEntry, Table } from './card';
import { PHASE, PHASE_ON_DARK } from './colours';
import { h, press, setText } from './dom';
import { count, percent, significant } from './format';
import { Plot } from './plot';
import type { Translation } from './translation';
import type { ViewContext } from './view';

const BINS_PER_DECADE = 16;
/** Drawn into the histogram; of {@link QUANTILES}. */
const MARKED: readonly number[] = [0.5, 0.95, 0.99];

export class LatencyHistogram extends Plot {
  /** Sorting tens of thousands of latencies is not for every quarter of a second. */
  protected override readonly intervalMs = 500;
  private chosen: LatencyName = 'itl';
  private bins: Bin[] = [];
  private summary: LatencySummary[] = [];
  private pointed: number | null = null;
  private bars: ColumnDataSource | null = null;
  private marks: ColumnDataSource | null = null;
  private xRange: Range1d | null = null;
  private yRange: Range1d | null = null;
  private paintGlyphs: () => void = () => undefined;
  private readonly buttons: Record<LatencyName, HTMLButtonElement>;
  private readonly cells: Record<LatencyName, HTMLElement[]>;

  constructor(context: ViewContext) {
    const { trans } = context;
    super(
      context,
      'histogram',
      trans.__('Latency distribution'),
      trans.__(
        'How often each latency occurred in the window, on a logarithmic axis, with percentiles (linear interpolation). Each latency’s own definition stands beside its name.'
      )
    );
    const perName = <T>(make: (name: LatencyName) => T) =>
      Object.fromEntries(LATENCIES.map(name => [name, make(name)])) as Record<LatencyName, T>;
    this.buttons = perName(name =>
      h('button', {
        class: 'iw-window',
        text: latencyLabel(name),
        title: latencyTitle(name, trans),
        attrs: { type: 'button', 'aria-pressed': String(name === this.chosen), 'data-latency': name },
        on: { click: () => this.choose(name) }
      })
    );
    this.cells = perName(() => Array.from({ length: QUANTILES.length + 1 }, () => h('td', { text: '–' })));
    const names = ['n', ...QUANTILES.map(q => (q === 1 ? trans.__('max') : `p${q * 100}`))];
    const table = h(
      'table',
      {
        class: 'iw-table iw-quantiles',
        attrs: { 'data-table': 'quantiles', 'aria-label': trans.__('Percentiles, ms') }
      },
      h(
        'thead',
        {},
        h(
          'tr',
          {},
          h('th', { text: trans.__('ms'), attrs: { scope: 'col' } }),
          ...names.map(text => h('th', { text, attrs: { scope: 'col' } }))
        )
      ),
      h(
        'tbody',
        {},
        ...LATENCIES.map(name =>
          h(
            'tr',
            { attrs: { 'data-latency-row': name } },
            h(
              'th',
              { attrs: { scope: 'row' } },
              this.buttons[name],
              measuredBadge(trans, latencyTitle(name, trans), latencyDefinition(name, trans))
            ),
            ...this.cells[name]
          )
        )
      )
    );
    this.frame.after(table);
  }

  protected build(bokeh: Bokeh, shared: { tools: string; height: number }): Figure {
    const { trans } = this.context;
    this.xRange = new bokeh.Range1d({ start: 1, end: 1000 });
    this.yRange = new bokeh.Range1d({ start: 0, end: 1 });
    const figure = bokeh.figure({
      ...shared,
      height: 170,
      x_range: this.xRange,
      y_range: this.yRange,
      x_axis_type: 'log',
      toolbar_location: null,
      sizing_mode: 'stretch_width',
      x_axis_label: trans.__('ms'),
      y_axis_label: trans.__('how many')
    });
    for (const axis of figure.axes) {
      // On the logarithmic one every digit would be written out, one over the other.
      (axis.ticker as unknown as { mantissas?: number[] }).mantissas = [1, 2, 5];
    }
    this.bars = new bokeh.ColumnDataSource({ data: { left: [], right: [], top: [] } });
    this.marks = new bokeh.ColumnDataSource({ data: { x: [], y: [], text: [] } });
    const bars = figure.quad(
      { field: 'left' },
      { field: 'right' },
      { value: 0 },
      { field: 'top' },
      { source: this.bars, line_width: 1 }
    );
    const stems = figure.segment(
      { field: 'x' },
      { value: 0 },
      { field: 'x' },
      { field: 'y' },
      { source: this.marks, line_dash: 'dashed', line_width: 1.5 }
    );
    const labels = figure.text(
      { field: 'x' },
      { field: 'y' },
      { field: 'text' },
      { source: this.marks, text_font_size: '11px', text_align: 'left', text_baseline: 'top', x_offset: 3 }
    );
    this.paintGlyphs = () => {
      const { theme } = this.context;
      bars.glyph.setv({ fill_color: this.colour(), line_color: theme.ground });
      stems.glyph.setv({ line_color: theme.ink });
      labels.glyph.setv({ text_color: theme.ink, text_font: theme.font });
    };
    return figure;
  }

  protected recolour(): void {
    this.paintGlyphs();
  }

  protected override repaint(): void {
    // The percentiles do not wait for the plot.
    const { store, windowNs } = this.context;
    const values = latencies(store, windowNs);
    this.summary = summarizeLatencies(values);
    this.bins = logBins(values[this.chosen], BINS_PER_DECADE);
    for (const { name, count: n, quantiles } of this.summary) {
      const texts = [count(n), ...quantiles.map(each => (each === null ? '–' : significant(each)))];
      texts.forEach((text, at) => setText(this.cells[name][at], text));
    }
    const { quantiles } = this.summary.find(each => each.name === this.chosen)!;
    this.marked = MARKED.map(q => quantiles[QUANTILES.indexOf(q)]);
    super.repaint();
  }

  private marked: (number | null)[] = [];

  protected fill(): string {
    const { trans } = this.context;
    this.bars!.data = {
      left: this.bins.map(bin => bin.from),
      right: this.bins.map(bin => bin.to),
      top: this.bins.map(bin => bin.count)
    };
    const highest = Math.max(1, ...this.bins.map(bin => bin.count));
    this.yRange!.end = highest * 1.15;
    if (this.bins.length > 0) {
      this.xRange!.start = this.bins[0].from / 1.3;
      this.xRange!.end = this.bins[this.bins.length - 1].to * 1.3;
    }
    const shown = MARKED.flatMap((q, at) => {
      const value = this.marked[at];
      return value === null || value === undefined || value <= 0 ? [] : [{ q, value }];
    });
    this.marks!.data = {
      x: shown.map(each => each.value),
      y: shown.map((_, at) => highest * (1.13 - 0.14 * at)),
      text: shown.map(each => `p${each.q * 100}`)
    };
    const total = this.bins.reduce((sum, bin) => sum + bin.count, 0);
    return total === 0
      ? trans.__('%1: none in this window yet.', latencyTitle(this.chosen, trans))
      : trans.__('%1: %2 in this window', latencyTitle(this.chosen, trans), count(total));
  }

  protected legend(): LegendEntry[] {
    const { trans, theme } = this.context;
    return [
      { colour: this.colour(), text: latencyTitle(this.chosen, trans) },
      { colour: theme.ink, text: trans.__('percentiles'), look: 'dashed' }
    ];
  }

  protected table(): Table {
    const { trans } = this.context;
    const total = this.bins.reduce((sum, bin) => sum + bin.count, 0);
    let below = 0;
    return {
      columns: [trans.__('from, ms'), trans.__('to, ms'), trans.__('how many'), trans.__('up to here')],
      rows: this.bins.map(bin => {
        below += bin.count;
        return [significant(bin.from), significant(bin.to), bin.count, percent(below / total)];
      })
    };
  }

  protected pick(x: number): void {
    const at = this.bins.findIndex(bin => bin.from <= x && x < bin.to);
    this.point(at < 0 ? null : at);
  }

  protected walk(direction: -1 | 1): void {
    if (this.bins.length > 0) {
      const at = this.pointed === null ? 0 : this.pointed + direction;
      this.point(Math.min(this.bins.length - 1, Math.max(0, at)));
    }
  }

  /** The latency of the token that is pointed at, where it is of the chosen kind. */
  protected crosshairAt(): number | null {
    const { selection, store } = this.context;
    const { value } = selection;
    if (!value || value.request === null || value.index === null) {
      return null;
    }
    const token = store.requests.get(value.request)?.tokens.find(each => each.index === value.index);
    const name: LatencyName = value.index === 0 ? 'ttft' : 'itl';
    return token && name === this.chosen ? Math.max(1e-3, token.latencyNs / 1e6) : null;
  }

  protected describe(): string | null {
    const bin = this.pointed === null ? undefined : this.bins[this.pointed];
    if (!bin) {
      return null;
    }
    const total = this.bins.reduce((sum, each) => sum + each.count, 0);
    return this.context.trans.__(
      '%1 to %2 ms: %3, %4 of all',
      significant(bin.from),
      significant(bin.to),
      count(bin.count),
      percent(bin.count / Math.max(1, total))
    );
  }

  private point(at: number | null): void {
    this.pointed = at;
    this.showCaption();
  }

  private choose(name: LatencyName): void {
    this.chosen = name;
    this.pointed = null;
    press(this.buttons, name);
    this.paintGlyphs();
    this.drawLegend();
    this.repaint();
  }

  private colour(): string {
    const phase = this.context.theme.dark ? PHASE_ON_DARK : PHASE;
    const colours: Record<LatencyName, string> = {
      ttft: phase.prefill,
      itl: phase.decode,
      tpot: phase.recompute,
      e2e: phase.accepted
    };
    return colours[this.chosen];
  }
}

export function latencyLabel(name: LatencyName): string {
  return name.toUpperCase();
}

export function latencyTitle(name: LatencyName, trans: Translation): string {
  const titles: Record<LatencyName, string> = {
    ttft: trans.__('Time to first token'),
    itl: trans.__('Inter-token latency'),
    tpot: trans.__('Time per output token'),
    e2e: trans.__('End-to-end latency')
  };
  return titles[name];
}

function latencyDefinition(name: LatencyName, trans: Translation): string {
  const definitions: Record<LatencyName, string> = {
    ttft: trans.__(
      'TTFT: from the arrival of a request at the front until its first token is sent; waiting and prefill are included. (vLLM’s per-request metric starts when the request is scheduled, benchmarks when the client sends.) Server clock.'
    ),
    itl: trans.__(
      'ITL: gap between two consecutive tokens of one request, as sent by the front. First tokens are not counted. (Some benchmarks take a mean per request, or the gap between streamed chunks.) Server clock.'
    ),
    tpot: trans.__(
      'TPOT: (E2E − TTFT) / (N − 1) of each finished request with N > 1 output tokens: one value a request, so that long ones do not outweigh short ones. (GuideLLM divides E2E by N.) Server clock.'
    ),
    e2e: trans.__(
      'E2E: from the arrival of a request at the front until its last token is sent, of the requests that finished in the window. Server clock.'
    )
  };
  return definitions[name];
}
