/** What each step computed: its token positions, by what they were for, against the token budget. */

import { Kind } from '../telemetry/protocol';
import type { StepRecord } from '../telemetry/store';
import type { Bokeh, ColumnDataSource, Figure, Span } from './bokeh';
import { kindColour } from './colours';
import { count, duration } from './format';
import type { LegendEntry, Table } from './card';
import { StepPlot } from './step-plot';
import type { ViewContext } from './view';
import { kindName } from './words';

const STACK: readonly Kind[] = [Kind.Decode, Kind.Verify, Kind.Draft, Kind.Recompute, Kind.Prefill];
/** Without speculation there is nothing to explain about these. */
const RARE: readonly Kind[] = [Kind.Draft, Kind.Verify];

export class BatchPlot extends StepPlot {
  private readonly sources = new Map<Kind, ColumnDataSource>();
  private glyphs: { kind: Kind; paint: (colour: string, line: string) => void }[] = [];
  private budget: Span | null = null;
  /** Of {@link RARE}, those that are in view. */
  private rare: readonly Kind[] = [];

  constructor(context: ViewContext) {
    const { trans } = context;
    super(
      context,
      'batch',
      trans.__('Batch composition per step'),
      trans.__(
        'Token positions that each engine step computed, summed over its requests. Prefill: prompt positions, many at once. Decode: one new position per request. Verify: that one and those of the tokens proposed for it. Recompute: positions computed before and thrown away. The dashed line is the token budget of a step.'
      )
    );
  }

  protected build(bokeh: Bokeh, shared: { tools: string; height: number }): Figure {
    const { trans } = this.context;
    const figure = this.stepFigure(bokeh, shared, trans.__('tokens computed'));
    for (const kind of STACK) {
      const source = new bokeh.ColumnDataSource({ data: { left: [], right: [], bottom: [], top: [] } });
      const hatch =
        kind === Kind.Recompute
          ? { hatch_pattern: 'right_diagonal_line' as const, hatch_scale: 7, hatch_weight: 1 }
          : {};
      const renderer = figure.quad(
        { field: 'left' },
        { field: 'right' },
        { field: 'bottom' },
        { field: 'top' },
        { source, line_width: 0.5, ...hatch }
      );
      this.sources.set(kind, source);
      this.glyphs.push({
        kind,
        paint: (colour, line) => {
          renderer.glyph.setv({ fill_color: colour, line_color: line, hatch_color: line });
        }
      });
    }
    this.budget = new bokeh.Span({ dimension: 'width', location: null, line_dash: 'dashed', line_width: 1.5 });
    figure.add_layout(this.budget);
    return figure;
  }

  protected recolour(): void {
    const { theme } = this.context;
    for (const { kind, paint } of this.glyphs) {
      paint(kindColour(kind, theme.dark), theme.ground);
    }
    if (this.budget) {
      this.budget.line_color = theme.ink;
    }
  }

  protected fill(): string {
    const { store, trans } = this.context;
    this.collect(step => step.total);
    const half = this.columnHalf();
    const bottoms = this.shown.map(() => 0);
    for (const kind of STACK) {
      const data: Record<'left' | 'right' | 'bottom' | 'top', number[]> = { left: [], right: [], bottom: [], top: [] };
      this.shown.forEach((step, at) => {
        const tokens = step.byKind[kind];
        if (tokens > 0) {
          data.left.push(step.event.step - half);
          data.right.push(step.event.step + half);
          data.bottom.push(bottoms[at]);
          bottoms[at] += tokens;
          data.top.push(bottoms[at]);
        }
      });
      this.sources.get(kind)!.data = data;
    }
    const rare = RARE.filter(kind => this.shown.some(step => step.byKind[kind] > 0));
    if (rare.join() !== this.rare.join()) {
      this.rare = rare;
      this.drawLegend();
    }
    const highest = Math.max(1, ...bottoms);
    const limit = store.features?.values['max_num_batched_tokens'];
    const inView = typeof limit === 'number' && limit <= highest * 3;
    this.yRange!.end = Math.max(4, inView ? Math.max(highest, limit) * 1.08 : highest * 1.15);
    this.budget!.location = inView ? limit : null;
    const newest = store.steps.at(-1);
    if (!newest) {
      return trans.__('No step yet.');
    }
    const budget =
      typeof limit === 'number'
        ? inView
          ? trans.__('budget %1 tokens a step (dashed)', count(limit))
          : trans.__('budget %1 tokens a step, above this view', count(limit))
        : '';
    return [trans.__('Newest: %1', this.sentence(newest)), budget].filter(Boolean).join(' · ');
  }

  protected legend(): LegendEntry[] {
    const { theme, trans } = this.context;
    return [Kind.Prefill, Kind.Decode, ...this.rare, Kind.Recompute]
      .map((kind): LegendEntry => ({
        colour: kindColour(kind, theme.dark),
        text: kindName(kind, trans),
        look: kind === Kind.Recompute ? 'hatch' : 'fill'
      }))
      .concat([{ colour: theme.ink, text: trans.__('token budget'), look: 'dashed' }]);
  }

  protected table(): Table {
    const { trans } = this.context;
    return {
      columns: [
        trans.__('step'),
        trans.__('epoch'),
        trans.__('requests'),
        trans.__('prefill'),
        trans.__('decode'),
        trans.__('verify'),
        trans.__('recompute'),
        trans.__('step time'),
        trans.__('forward')
      ],
      rows: this.newest(step => [
        step.event.step,
        step.event.epoch,
        step.event.request.length,
        step.byKind[Kind.Prefill],
        step.byKind[Kind.Decode],
        step.byKind[Kind.Verify],
        step.byKind[Kind.Recompute],
        this.stepTime(step),
        duration(step.event.forward_ns)
      ])
    };
  }

  protected override sentence(step: StepRecord): string {
    const { trans } = this.context;
    const kinds = STACK.filter(kind => step.byKind[kind] > 0 || (!RARE.includes(kind) && kind === Kind.Decode))
      .map(kind => `${count(step.byKind[kind])} ${kindName(kind, trans)}`)
      .join(' + ');
    return trans.__(
      'step %1: batch of %2, %3 tokens, %4 (forward %5)',
      step.event.step,
      step.event.request.length,
      kinds,
      this.stepTime(step),
      duration(step.event.forward_ns)
    );
  }
}
