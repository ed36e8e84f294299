/** What the plots over engine steps share: which steps are in the window, the x axis, pointing at a step. */

import { minMaxIndices } from '../telemetry/statistics';
import type { StepRecord } from '../telemetry/store';
import { stepsWithin } from '../telemetry/window';
import type { Bokeh, Figure, Range1d } from './bokeh';
import { duration } from './format';
import { Plot } from './plot';

/** More columns than this could not be told apart. */
const COLUMNS = 180;
const TABLE_ROWS = 100;

export abstract class StepPlot extends Plot {
  protected shown: StepRecord[] = [];
  protected readonly columns: number = COLUMNS;
  protected xRange: Range1d | null = null;
  protected yRange: Range1d | null = null;

  /** A step in words; a plot that says more of the selection overrides {@link describe}. */
  protected sentence(step: StepRecord): string {
    return this.context.trans.__('step %1: %2', step.event.step, this.stepTime(step));
  }

  protected describe(): string | null {
    const step = this.selected();
    return step ? this.sentence(step) : null;
  }

  /** A figure over engine steps, its ranges at hand. */
  protected stepFigure(bokeh: Bokeh, shared: { tools: string; height: number }, yLabel: string): Figure {
    this.xRange = new bokeh.Range1d({ start: 0, end: 60 });
    this.yRange = new bokeh.Range1d({ start: 0, end: 1 });
    return bokeh.figure({
      ...shared,
      x_range: this.xRange,
      y_range: this.yRange,
      toolbar_location: null,
      sizing_mode: 'stretch_width',
      x_axis_label: this.context.trans.__('engine step'),
      y_axis_label: yLabel
    });
  }

  /** Rows of a table of the newest steps, the newest first. */
  protected newest(row: (step: StepRecord) => (string | number)[]): (string | number)[][] {
    return this.context.store.steps.last(TABLE_ROWS).reverse().map(row);
  }

  /**
   * The steps of the window from step number `from` on, thinned so that the extremes of `value` stay; sets
   * {@link shown} and the x axis.
   */
  protected collect(value: (step: StepRecord) => number, from = -Infinity): void {
    const all = stepsWithin(this.context.store, this.context.windowNs, from);
    this.shown = minMaxIndices(all.map(value), this.columns).map(index => all[index]);
    if (this.xRange && all.length > 0) {
      const first = all[0].event.step;
      const last = all[all.length - 1].event.step;
      this.xRange.start = Math.min(first, Math.max(0, last - 40)) - 1;
      this.xRange.end = last + 1;
    }
  }

  /** Half the width of one column, in steps. */
  protected columnHalf(): number {
    if (this.shown.length < 2) {
      return 0.42;
    }
    const span = this.shown[this.shown.length - 1].event.step - this.shown[0].event.step + 1;
    return Math.max(0.42, (0.5 * span) / this.shown.length);
  }

  protected pick(x: number): void {
    const step = this.nearest(x);
    if (step) {
      this.context.selection.follow({ step: step.event.step, request: null, index: null });
    }
  }

  protected crosshairAt(): number | null {
    return this.context.selection.value?.step ?? null;
  }

  protected walk(direction: -1 | 1): void {
    const { selection, store, windowNs } = this.context;
    // A figure that has just come into view may not be drawn yet.
    const steps = this.shown.length > 0 ? this.shown : stepsWithin(store, windowNs);
    const at = steps.findIndex(each => each.event.step === selection.value?.step);
    const next = at < 0 ? steps.length - 1 : Math.min(steps.length - 1, Math.max(0, at + direction));
    const step = steps[next];
    if (step) {
      selection.set({ step: step.event.step, request: null, index: null });
    }
  }

  protected selected(): StepRecord | null {
    const { value } = this.context.selection;
    return value ? (this.context.store.step(value.step) ?? null) : null;
  }

  protected stepTime(step: StepRecord): string {
    return duration(step.event.end_ns - step.event.begin_ns);
  }

  private nearest(x: number): StepRecord | null {
    let best: StepRecord | null = null;
    for (const step of this.shown) {
      if (best === null || Math.abs(step.event.step - x) < Math.abs(best.event.step - x)) {
        best = step;
      }
    }
    return best;
  }
}
