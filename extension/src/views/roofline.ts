/**
 * The roofline: what each step achieved, against what this machine was measured to be capable of. Left of the ridge a step
 * waits for memory, right of it for arithmetic.
 */

import { Kind } from '../telemetry/protocol';
import { minMaxIndices, percentile } from '../telemetry/statistics';
import type { StepRecord } from '../telemetry/store';
import { stepsWithin } from '../telemetry/window';
import type { Bokeh, ColumnDataSource, Figure, Range1d } from './bokeh';
import type { LegendEntry, Table } from './card';
import { kindColour, PHASE, PHASE_ON_DARK } from './colours';
import { bytes, duration, percent, significant } from './format';
import { Plot } from './plot';
import type { ViewContext } from './view';

const MOST_POINTS = 300;
const TABLE_ROWS = 100;
/** Of others, while the ceilings were measured: from here on they may be too low (`docs/metrics.md`). */
const BUSY_CORES = 0.2;

/** A step as a point: what it had to do, and how quickly it did. */
export interface RooflinePoint {
  step: StepRecord;
  /** FLOP per byte that has to be moved. */
  intensity: number;
  /** FLOP per second. */
  achieved: number;
  bytesPerS: number;
}

/** Null where the engine cannot say what a step has to read and compute. */
export function rooflinePoint(step: StepRecord): RooflinePoint | null {
  const { flops, read_bytes: read, begin_ns: begin, end_ns: end } = step.event;
  if (!flops || !read || end <= begin) {
    return null;
  }
  const seconds = (end - begin) / 1e9;
  return { step, intensity: flops / read, achieved: flops / seconds, bytesPerS: read / seconds };
}

export class Roofline extends Plot {
  protected override readonly intervalMs = 500;
  private points: RooflinePoint[] = [];
  private dots: ColumnDataSource | null = null;
  private newest: ColumnDataSource | null = null;
  private roof: ColumnDataSource | null = null;
  private xRange: Range1d | null = null;
  private yRange: Range1d | null = null;
  private paintGlyphs: () => void = () => undefined;

  constructor(context: ViewContext) {
    const { trans } = context;
    super(
      context,
      'roofline',
      trans.__('Roofline'),
      trans.__(
        'Each step at what it computed per byte that it had to move (weights once, keys and values once per request) and at the operations per second that it reached: flops / (end − begin). The roof is measured on this machine: streaming reads, and a large matrix product in the model’s number format. MBU and MFU are the distances to its two sides.'
      )
    );
  }

  protected build(bokeh: Bokeh, shared: { tools: string; height: number }): Figure {
    const { trans } = this.context;
    this.xRange = new bokeh.Range1d({ start: 0.1, end: 1000 });
    this.yRange = new bokeh.Range1d({ start: 0.1, end: 1000 });
    const figure = bokeh.figure({
      ...shared,
      x_range: this.xRange,
      y_range: this.yRange,
      x_axis_type: 'log',
      y_axis_type: 'log',
      toolbar_location: null,
      sizing_mode: 'stretch_width',
      x_axis_label: trans.__('FLOP per byte'),
      y_axis_label: trans.__('GFLOP/s')
    });
    this.roof = new bokeh.ColumnDataSource({ data: { x: [], y: [] } });
    this.dots = new bokeh.ColumnDataSource({ data: { x: [], y: [], colour: [], marker: [] } });
    this.newest = new bokeh.ColumnDataSource({ data: { x: [], y: [] } });
    const roof = figure.line({ field: 'x' }, { field: 'y' }, { source: this.roof, line_width: 2.5 });
    figure.scatter(
      { field: 'x' },
      { field: 'y' },
      {
        source: this.dots,
        marker: { field: 'marker' },
        size: 5,
        fill_color: { field: 'colour' },
        fill_alpha: 0.55,
        line_color: null
      }
    );
    const newest = figure.scatter(
      { field: 'x' },
      { field: 'y' },
      { source: this.newest, marker: 'circle', size: 13, fill_color: null, line_width: 2.5 }
    );
    this.paintGlyphs = () => {
      const { theme } = this.context;
      roof.glyph.setv({ line_color: theme.ink });
      newest.glyph.setv({ line_color: theme.ink });
    };
    return figure;
  }

  protected recolour(): void {
    this.paintGlyphs();
  }

  protected fill(): string {
    const { store, trans, theme, windowNs } = this.context;
    const { ceilings } = store;
    const all = stepsWithin(store, windowNs)
      .map(rooflinePoint)
      .filter(each => each !== null);
    this.points = minMaxIndices(
      all.map(each => each.achieved),
      MOST_POINTS / 2
    ).map(at => all[at]);
    this.dots!.data = {
      x: this.points.map(each => each.intensity),
      y: this.points.map(each => each.achieved / 1e9),
      colour: this.points.map(each => kindColour(mainKind(each.step), theme.dark)),
      marker: this.points.map(each => (mainKind(each.step) === Kind.Decode ? 'circle' : 'square'))
    };
    const last = all.at(-1);
    this.newest!.data = last ? { x: [last.intensity], y: [last.achieved / 1e9] } : { x: [], y: [] };
    const xs = this.points.map(each => each.intensity);
    const ys = this.points.map(each => each.achieved / 1e9);
    const ridge = ceilings ? ceilings.flops_per_s / ceilings.read_bytes_per_s : null;
    const left = Math.min(...xs, ridge ?? 1) / 4;
    const right = Math.max(...xs, ridge ?? 1) * 6;
    this.xRange!.start = left;
    this.xRange!.end = right;
    if (ceilings && ridge) {
      const at = (x: number) => Math.min(ceilings.flops_per_s, x * ceilings.read_bytes_per_s) / 1e9;
      this.roof!.data = { x: [left, ridge, right], y: [at(left), at(ridge), at(right)] };
      ys.push(at(left), at(right));
    } else {
      this.roof!.data = { x: [], y: [] };
    }
    if (ys.length > 0) {
      this.yRange!.start = Math.min(...ys) / 3;
      this.yRange!.end = Math.max(...ys) * 3;
    }
    if (!last) {
      return store.steps.length === 0
        ? trans.__('No step yet.')
        : trans.__('For this model it is not known what a step has to read and compute.');
    }
    if (!ceilings) {
      return trans.__('The machine’s ceilings are measured when the engine has been idle for some seconds.');
    }
    const decode = all.filter(each => mainKind(each.step) === Kind.Decode);
    const of = decode.length > 0 ? decode : all;
    const mbu =
      percentile(
        of.map(each => each.bytesPerS),
        0.5
      )! / ceilings.read_bytes_per_s;
    const mfu =
      percentile(
        of.map(each => each.achieved),
        0.5
      )! / ceilings.flops_per_s;
    return [
      trans.__(
        '%1 steps, median: MBU %2, MFU %3',
        decode.length > 0 ? trans.__('%1 decode', decode.length) : all.length,
        percent(mbu),
        percent(mfu)
      ),
      trans.__(
        'ceilings %1/s and %2 GFLOP/s (%3)',
        bytes(ceilings.read_bytes_per_s),
        significant(ceilings.flops_per_s / 1e9),
        ceilings.dtype
      ),
      (ceilings.others_cores ?? 0) > BUSY_CORES
        ? trans.__(
            'perhaps too low: others kept %1 cores busy when they were measured',
            significant(ceilings.others_cores!)
          )
        : ''
    ]
      .filter(Boolean)
      .join(' · ');
  }

  protected legend(): LegendEntry[] {
    const { theme, trans } = this.context;
    const phase = theme.dark ? PHASE_ON_DARK : PHASE;
    return [
      { colour: phase.decode, text: trans.__('decode'), look: 'dot' },
      { colour: phase.prefill, text: trans.__('prefill (■)'), look: 'fill' },
      { colour: theme.ink, text: trans.__('newest (○)'), look: 'outline' },
      { colour: theme.ink, text: trans.__('measured ceilings'), look: 'line' }
    ];
  }

  protected table(): Table {
    const { trans, store } = this.context;
    const { ceilings } = store;
    return {
      columns: [
        trans.__('step'),
        trans.__('step time'),
        trans.__('to read'),
        trans.__('GFLOP'),
        trans.__('FLOP/byte'),
        trans.__('GFLOP/s'),
        trans.__('MBU'),
        trans.__('MFU')
      ],
      rows: store.steps
        .last(TABLE_ROWS)
        .map(rooflinePoint)
        .filter(each => each !== null)
        .reverse()
        .map(({ step: { event }, intensity, achieved, bytesPerS }) => [
          event.step,
          duration(event.end_ns - event.begin_ns),
          bytes(event.read_bytes!),
          significant(event.flops! / 1e9),
          significant(intensity),
          significant(achieved / 1e9),
          ceilings ? percent(bytesPerS / ceilings.read_bytes_per_s) : '–',
          ceilings ? percent(achieved / ceilings.flops_per_s) : '–'
        ])
    };
  }

  protected pick(x: number, y: number): void {
    let best: RooflinePoint | null = null;
    let distance = Infinity;
    for (const point of this.points) {
      const away = Math.hypot(Math.log(point.intensity / x), 0.5 * Math.log(point.achieved / 1e9 / y));
      if (away < distance) {
        [best, distance] = [point, away];
      }
    }
    this.select(best, 'follow');
  }

  protected walk(direction: -1 | 1): void {
    const step = this.context.selection.value?.step;
    const at = this.points.findIndex(each => each.step.event.step === step);
    this.select(at < 0 ? (this.points.at(-1) ?? null) : (this.points[at + direction] ?? null));
  }

  protected crosshairAt(): number | null {
    return this.selected()?.intensity ?? null;
  }

  protected describe(): string | null {
    const { trans, store } = this.context;
    const point = this.selected();
    if (!point) {
      return null;
    }
    const { ceilings } = store;
    const shares = ceilings
      ? trans.__(
          ', MBU %1, MFU %2',
          percent(point.bytesPerS / ceilings.read_bytes_per_s),
          percent(point.achieved / ceilings.flops_per_s)
        )
      : '';
    return (
      trans.__(
        'step %1: %2 FLOP per byte, %3 GFLOP/s',
        point.step.event.step,
        significant(point.intensity),
        significant(point.achieved / 1e9)
      ) + shares
    );
  }

  private select(point: RooflinePoint | null, how: 'set' | 'follow' = 'set'): void {
    if (point) {
      this.context.selection[how]({ step: point.step.event.step, request: null, index: null });
    }
  }

  private selected(): RooflinePoint | null {
    const { selection, store } = this.context;
    const step = selection.value ? store.step(selection.value.step) : undefined;
    return step ? rooflinePoint(step) : null;
  }
}

/** What most of a step's positions were for; decoding where nothing else is in it. */
function mainKind(step: StepRecord): Kind {
  const other = step.byKind[Kind.Prefill] + step.byKind[Kind.Recompute];
  return other === 0
    ? Kind.Decode
    : step.byKind[Kind.Recompute] > step.byKind[Kind.Prefill]
      ? Kind.Recompute
      : Kind.Prefill;
}
