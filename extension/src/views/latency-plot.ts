/** Latency of each token against its position: what a KV cache makes flat. Switches are marked where they took effect. */

import { Kind } from '../telemetry/protocol';
import { percentile, robustLine } from '../telemetry/statistics';
import type { RequestRecord, TokenRecord } from '../telemetry/store';
import { isActive } from '../telemetry/store';
import type { Bokeh, ColumnDataSource, Figure, Range1d } from './bokeh';
import { kindColour } from './colours';
import { count, duration, significant } from './format';
import { Plot } from './plot';
import type { LegendEntry, Table } from './card';
import type { ViewContext } from './view';
import { changes, kindName } from './words';

const MAX_REQUESTS = 8;
const MAX_POINTS = 1200;
/** A slope of fewer tokens says more about noise than about the switch. */
const MIN_FIT = 12;

interface Point {
  token: TokenRecord;
  position: number;
  ms: number;
}

/** Slope of latency over position while one set of features was in force. */
export interface EpochSlope {
  epoch: number;
  tokens: number;
  /** Milliseconds per token position. */
  slopeMs: number;
  medianMs: number;
}

export class LatencyPlot extends Plot {
  private points: Point[] = [];
  private dots: ColumnDataSource | null = null;
  private lines: ColumnDataSource | null = null;
  private marks: ColumnDataSource | null = null;
  private xRange: Range1d | null = null;
  private yRange: Range1d | null = null;
  private paintGlyphs: () => void = () => undefined;

  constructor(context: ViewContext) {
    const { trans } = context;
    super(
      context,
      'latency',
      trans.__('Latency against position'),
      trans.__(
        'Inter-token latency of each output token over its position in the text (prompt included). First tokens are left out: they are TTFT. The slope is the median of pairwise slopes (Theil–Sen) within one epoch of switches.'
      )
    );
  }

  protected build(bokeh: Bokeh, { tools, height }: { tools: string; height: number }): Figure {
    const { trans } = this.context;
    this.xRange = new bokeh.Range1d({ start: 0, end: 64 });
    this.yRange = new bokeh.Range1d({ start: 0, end: 50 });
    const figure = bokeh.figure({
      x_range: this.xRange,
      y_range: this.yRange,
      tools,
      height,
      toolbar_location: null,
      sizing_mode: 'stretch_width',
      x_axis_label: trans.__('token position'),
      y_axis_label: trans.__('latency, ms')
    });
    this.lines = new bokeh.ColumnDataSource({ data: { xs: [], ys: [] } });
    this.dots = new bokeh.ColumnDataSource({ data: { x: [], y: [], colour: [], marker: [] } });
    this.marks = new bokeh.ColumnDataSource({ data: { x: [], y: [], text: [], offset: [] } });
    const lines = figure.multi_line(
      { field: 'xs' },
      { field: 'ys' },
      { source: this.lines, line_width: 1, line_alpha: 0.5 }
    );
    figure.scatter(
      { field: 'x' },
      { field: 'y' },
      { source: this.dots, marker: { field: 'marker' }, size: 4, fill_color: { field: 'colour' }, line_color: null }
    );
    const stems = figure.segment(
      { field: 'x' },
      { value: 0 },
      { field: 'x' },
      { field: 'y' },
      { source: this.marks, line_dash: 'dotted', line_width: 1.5 }
    );
    const labels = figure.text(
      { field: 'x' },
      { field: 'y' },
      { field: 'text' },
      {
        source: this.marks,
        text_font_size: '11px',
        text_align: 'left',
        text_baseline: 'top',
        x_offset: 4,
        y_offset: { field: 'offset' }
      }
    );
    this.paintGlyphs = () => {
      const { theme } = this.context;
      lines.glyph.setv({ line_color: theme.softInk });
      stems.glyph.setv({ line_color: theme.ink });
      labels.glyph.setv({ text_color: theme.ink, text_font: theme.font });
    };
    return figure;
  }

  protected recolour(): void {
    this.paintGlyphs();
  }

  protected fill(): string {
    const { store, trans, theme } = this.context;
    const requests = this.choose();
    this.points = requests.flatMap(pointsOf);
    const xs: number[][] = [];
    const ys: number[][] = [];
    const stride = Math.max(1, Math.ceil(this.points.length / MAX_POINTS));
    const dots = { x: [] as number[], y: [] as number[], colour: [] as string[], marker: [] as string[] };
    const marks = { x: [] as number[], epoch: [] as number[] };
    for (const request of requests) {
      const points = pointsOf(request);
      xs.push(points.map(each => each.position));
      ys.push(points.map(each => each.ms));
      points.forEach((point, at) => {
        if (at % stride === 0) {
          dots.x.push(point.position);
          dots.y.push(point.ms);
          dots.colour.push(kindColour(point.token.kind, theme.dark));
          dots.marker.push(point.token.kind === Kind.Recompute ? 'diamond' : 'circle');
        }
        const epoch = point.token.epoch;
        const before = points[at - 1]?.token.epoch ?? epoch;
        if (epoch !== null && before !== null && epoch !== before) {
          marks.x.push(point.position);
          marks.epoch.push(epoch);
        }
      });
    }
    this.lines!.data = { xs, ys };
    this.dots!.data = dots;
    const values = this.points.map(each => each.ms);
    const usual = percentile(values, 0.97) ?? 40;
    const highest = Math.max(0, ...values);
    const top = highest <= usual * 2 ? Math.max(highest, 1) * 1.25 : usual * 1.6;
    this.yRange!.end = top;
    const positions = this.points.map(each => each.position);
    const first = Math.min(...positions);
    const last = Math.max(...positions);
    if (positions.length > 0) {
      this.xRange!.start = Math.max(0, first - 2);
      this.xRange!.end = Math.max(last, first + 48) + 4;
    }
    // One label per switch: the requests of a batch meet it at different positions.
    const labelled = new Set<number>();
    let row = 0;
    const texts = marks.epoch.map(epoch => {
      if (labelled.has(epoch)) {
        return '';
      }
      labelled.add(epoch);
      return this.switchLabel(epoch);
    });
    this.marks!.data = {
      x: marks.x,
      y: marks.x.map(() => top * 0.99),
      text: texts,
      offset: texts.map(text => (text === '' ? 0 : 13 * (row++ % 3)))
    };
    if (this.points.length === 0) {
      return trans.__('No token after a first one yet.');
    }
    const above = values.filter(each => each > top).length;
    const parts = epochSlopes(this.points).map(each =>
      trans.__(
        '%1: median %2 ms, slope %3 ms per 100 tokens',
        this.epochName(each.epoch),
        significant(each.medianMs),
        signed(each.slopeMs * 100)
      )
    );
    if (parts.length === 0) {
      parts.push(trans.__('median %1 ms', significant(percentile(values, 0.5) ?? 0)));
    }
    if (above > 0) {
      parts.push(trans.__('%1 points above this view, up to %2 ms', above, significant(highest)));
    }
    if (store.requests.size > requests.length && requests.length === MAX_REQUESTS) {
      parts.push(trans.__('the newest %1 requests', requests.length));
    }
    return parts.join(' · ');
  }

  protected legend(): LegendEntry[] {
    const { theme, trans } = this.context;
    return [
      { colour: kindColour(Kind.Decode, theme.dark), text: trans.__('decode'), look: 'dot' },
      { colour: kindColour(Kind.Recompute, theme.dark), text: trans.__('recompute (◆)'), look: 'dot' },
      { colour: theme.softInk, text: trans.__('one line per request'), look: 'line' },
      { colour: theme.ink, text: trans.__('switch'), look: 'dashed' }
    ];
  }

  protected pick(x: number, y: number): void {
    if (!this.xRange || !this.yRange || this.points.length === 0) {
      return;
    }
    const width = this.xRange.end - this.xRange.start;
    const height = this.yRange.end - this.yRange.start;
    let best: Point | null = null;
    let distance = Infinity;
    for (const point of this.points) {
      const away = ((point.position - x) / width) ** 2 + (0.3 * ((point.ms - y) / height)) ** 2;
      if (away < distance) {
        distance = away;
        best = point;
      }
    }
    this.select(best, 'follow');
  }

  protected crosshairAt(): number | null {
    return this.selectedPoint()?.position ?? null;
  }

  protected describe(): string | null {
    const point = this.selectedPoint();
    if (!point) {
      return null;
    }
    const { trans } = this.context;
    const { token } = point;
    return trans.__(
      'position %1, request #%2, step %3: ITL %4%5',
      point.position,
      token.request,
      token.step,
      duration(token.latencyNs),
      token.kind === null ? '' : `, ${kindName(token.kind, trans)}`
    );
  }

  protected walk(direction: -1 | 1): void {
    const current = this.selectedPoint();
    const at = current ? this.points.indexOf(current) : -1;
    this.select(at < 0 ? this.points[this.points.length - 1] : (this.points[at + direction] ?? current));
  }

  protected table(): Table {
    const { trans } = this.context;
    return {
      columns: [
        trans.__('request'),
        trans.__('position'),
        trans.__('token'),
        trans.__('ITL'),
        trans.__('step'),
        trans.__('epoch'),
        trans.__('batch'),
        trans.__('kind')
      ],
      rows: this.points
        .slice(-100)
        .reverse()
        .map(({ token, position }) => [
          `#${token.request}`,
          position,
          token.text,
          duration(token.latencyNs),
          token.step,
          token.epoch ?? '–',
          token.batch ?? '–',
          token.kind === null ? '–' : kindName(token.kind, trans)
        ])
    };
  }

  private select(point: Point | null | undefined, how: 'set' | 'follow' = 'set'): void {
    if (point) {
      this.context.selection[how]({ step: point.token.step, request: point.token.request, index: point.token.index });
    }
  }

  private selectedPoint(): Point | null {
    const { value } = this.context.selection;
    if (!value) {
      return null;
    }
    return (
      this.points.find(
        each =>
          each.token.step === value.step &&
          (value.request === null || (each.token.request === value.request && each.token.index === value.index))
      ) ?? null
    );
  }

  /** The newest running requests, or, when nothing runs, those of the newest burst. */
  private choose(): RequestRecord[] {
    const all = [...this.context.store.requests.values()].filter(each => each.tokens.length > 1);
    all.sort((a, b) => b.handle - a.handle);
    const active = all.filter(isActive);
    const newest = all[0]?.event?.arrival_ns;
    const chosen = active.length > 0 ? active : all.filter(each => each.event?.arrival_ns === newest);
    return chosen.slice(0, MAX_REQUESTS).reverse();
  }

  private switchLabel(epoch: number): string {
    const event = this.context.store.epochs.get(epoch);
    return event && event.changed.length > 0
      ? changes(event, this.context.trans, name => this.featureTitle(name))
      : this.context.trans.__('epoch %1', epoch);
  }

  private epochName(epoch: number): string {
    const event = this.context.store.epochs.get(epoch);
    const label = event && event.changed.length > 0 ? this.switchLabel(epoch) : '';
    return label
      ? this.context.trans.__('epoch %1 (%2)', count(epoch), label)
      : this.context.trans.__('epoch %1', epoch);
  }

  private featureTitle(name: string): string {
    return this.context.store.specs.find(spec => spec.name === name)?.title ?? name;
  }
}

/** Slopes of the newest epochs, oldest first, for those with enough tokens. */
export function epochSlopes(points: readonly Point[], newest = 3): EpochSlope[] {
  const byEpoch = new Map<number, Point[]>();
  for (const point of points) {
    if (point.token.epoch !== null) {
      const list = byEpoch.get(point.token.epoch) ?? [];
      list.push(point);
      byEpoch.set(point.token.epoch, list);
    }
  }
  const result: EpochSlope[] = [];
  for (const [epoch, list] of [...byEpoch].sort(([a], [b]) => a - b)) {
    const line =
      list.length >= MIN_FIT
        ? robustLine(
            list.map(each => each.position),
            list.map(each => each.ms)
          )
        : null;
    if (line) {
      result.push({
        epoch,
        tokens: list.length,
        slopeMs: line.slope,
        medianMs: percentile(
          list.map(each => each.ms),
          0.5
        )!
      });
    }
  }
  return result.slice(-newest);
}

export function pointsOf(request: RequestRecord): Point[] {
  const prompt = request.event?.prompt_tokens ?? 0;
  return request.tokens
    .filter(token => token.index > 0)
    .map(token => ({ token, position: prompt + token.index, ms: token.latencyNs / 1e6 }));
}

function signed(value: number): string {
  return `${value < 0 ? '−' : '+'}${significant(Math.abs(value))}`;
}
