/** How full the KV cache is, four ways: used, cached and free blocks, and the filled slots of the used ones. */

import type { StepRecord } from '../telemetry/store';
import type { Bokeh, ColumnDataSource, Figure } from './bokeh';
import { PHASE, PHASE_ON_DARK } from './colours';
import { bytes, count, percent } from './format';
import type { LegendEntry, Table } from './card';
import { StepPlot } from './step-plot';
import type { ViewContext } from './view';

export class KvPlot extends StepPlot {
  private source: ColumnDataSource | null = null;
  private paintGlyphs: () => void = () => undefined;

  constructor(context: ViewContext) {
    const { trans } = context;
    super(
      context,
      'kv',
      trans.__('KV cache occupancy'),
      trans.__(
        'Blocks at the end of each step. Used: referenced by a request. Cached: kept for reuse, evictable at once. Free: the rest up to the total. Filled slots: token positions of used blocks that hold a key and a value, divided by the block size; the gap to “used” is reserved and empty.'
      )
    );
  }

  protected build(bokeh: Bokeh, shared: { tools: string; height: number }): Figure {
    const { trans } = this.context;
    const figure = this.stepFigure(bokeh, shared, trans.__('blocks'));
    this.source = new bokeh.ColumnDataSource({ data: { step: [], zero: [], used: [], held: [], filled: [] } });
    const source = this.source;
    const x = { field: 'step' };
    const cached = figure.varea(x, { field: 'used' }, { field: 'held' }, { source, fill_alpha: 0.55 });
    const used = figure.varea(x, { field: 'zero' }, { field: 'used' }, { source, fill_alpha: 0.3 });
    const edge = figure.line(x, { field: 'used' }, { source, line_width: 2 });
    const filled = figure.line(x, { field: 'filled' }, { source, line_width: 2, line_dash: 'dashed' });
    this.paintGlyphs = () => {
      const { theme } = this.context;
      const phase = theme.dark ? PHASE_ON_DARK : PHASE;
      cached.glyph.setv({ fill_color: phase.cacheHit });
      used.glyph.setv({ fill_color: phase.prefill });
      edge.glyph.setv({ line_color: phase.prefill });
      filled.glyph.setv({ line_color: theme.ink });
    };
    return figure;
  }

  protected recolour(): void {
    this.paintGlyphs();
  }

  protected fill(): string {
    const { store, trans } = this.context;
    this.collect(step => step.event.kv.used_blocks);
    const used = this.shown.map(step => step.event.kv.used_blocks);
    const held = this.shown.map(step => step.event.kv.used_blocks + step.event.kv.cached_blocks);
    this.source!.data = {
      step: this.shown.map(step => step.event.step),
      zero: used.map(() => 0),
      used,
      held,
      filled: this.shown.map(filledBlocks)
    };
    this.yRange!.end = Math.max(4, ...held) * 1.15;
    const newest = store.steps.at(-1);
    if (!newest) {
      return trans.__('No step yet.');
    }
    const memory = store.capacity ? ` · ${trans.__('%1 in all', bytes(store.capacity.kv_bytes))}` : '';
    return this.sentence(newest) + memory;
  }

  protected legend(): LegendEntry[] {
    const { theme, trans } = this.context;
    const phase = theme.dark ? PHASE_ON_DARK : PHASE;
    return [
      { colour: phase.prefill, text: trans.__('used blocks') },
      { colour: phase.cacheHit, text: trans.__('cached, evictable') },
      { colour: theme.ink, text: trans.__('filled slots ÷ block size'), look: 'dashed' }
    ];
  }

  protected table(): Table {
    const { trans } = this.context;
    return {
      columns: [
        trans.__('step'),
        trans.__('used blocks'),
        trans.__('cached blocks'),
        trans.__('free blocks'),
        trans.__('filled slots'),
        trans.__('slots of used blocks')
      ],
      rows: this.newest(({ event: { step, kv } }) => [
        step,
        count(kv.used_blocks),
        count(kv.cached_blocks),
        count(kv.total_blocks - kv.used_blocks - kv.cached_blocks),
        count(kv.filled_slots),
        count(kv.used_blocks * kv.block_size)
      ])
    };
  }

  protected override sentence({ event: { step, kv } }: StepRecord): string {
    const { trans } = this.context;
    const slots = kv.used_blocks * kv.block_size;
    return trans.__(
      'step %1: %2 used · %3 cached · %4 free of %5 blocks; %6 of the used blocks’ slots filled',
      step,
      count(kv.used_blocks),
      count(kv.cached_blocks),
      count(kv.total_blocks - kv.used_blocks - kv.cached_blocks),
      count(kv.total_blocks),
      slots === 0 ? '–' : percent(kv.filled_slots / slots)
    );
  }
}

function filledBlocks({ event: { kv } }: StepRecord): number {
  return kv.filled_slots / kv.block_size;
}
