/** The big numbers: output rate, ITL, TTFT, KV occupancy, and what watching costs. */

import { measuredBadge } from './badge';
import { h, setText } from './dom';
import { percent, significant } from './format';
import { Observer } from './observer';
import type { View, ViewContext } from './view';

interface Tile {
  element: HTMLElement;
  number: HTMLElement;
  unit: HTMLElement;
  note: HTMLElement;
}

export class Tiles implements View {
  readonly element: HTMLElement;
  private readonly rate: Tile;
  private readonly itl: Tile;
  private readonly ttft: Tile;
  private readonly kv: Tile;
  private readonly observer: Observer;
  private readonly meter: HTMLElement;
  private readonly meterFilled: HTMLElement;

  constructor(private readonly context: ViewContext) {
    const { trans } = context;
    this.rate = this.tile(
      'rate',
      trans.__('Output rate'),
      trans.__(
        'Output tokens of all requests divided by the time in which they were made, over the chosen window up to the newest token. Server clock, when the front sent each token.'
      )
    );
    this.itl = this.tile(
      'itl',
      trans.__('Inter-token latency'),
      trans.__(
        'ITL: gap between two consecutive tokens of one request, as sent by the front. Median and 95th percentile of all gaps in the window. First tokens are not counted: they are TTFT. Of several tokens of one speculating step the first counts; the mean time of a token stands beside.'
      )
    );
    this.ttft = this.tile(
      'ttft',
      trans.__('Time to first token'),
      trans.__(
        'TTFT: arrival of a request at the front until its first token is sent; queueing and prefill are included. Median of the requests whose first token lies in the window.'
      )
    );
    this.kv = this.tile(
      'kv',
      trans.__('KV cache'),
      trans.__(
        'Used blocks divided by all blocks, and filled token slots divided by all slots. Blocks that are only kept for reuse count as free. Taken at the end of the newest step.'
      )
    );
    this.observer = new Observer(context);
    this.meterFilled = h('div', { class: 'iw-meter-filled' });
    this.meter = h(
      'div',
      { class: 'iw-meter', attrs: { 'aria-hidden': 'true' } },
      h('div', { class: 'iw-meter-used' }),
      this.meterFilled
    );
    this.kv.element.append(this.meter);
    this.element = h(
      'section',
      { class: 'iw-tiles', attrs: { 'aria-label': trans.__('Key figures') } },
      this.rate.element,
      this.itl.element,
      this.ttft.element,
      this.kv.element,
      this.observer.element
    );
  }

  update(): void {
    const { store, trans, windowNs } = this.context;
    const metrics = store.metrics(windowNs);
    fill(this.rate, metrics.outputRate, trans.__('tok/s'));
    setText(
      this.rate.note,
      metrics.idle
        ? metrics.outputRate === null
          ? trans.__('nothing generated yet')
          : trans.__('idle · figures of the last run')
        : metrics.waiting > 0
          ? trans.__('%1 running · %2 waiting', metrics.running, metrics.waiting)
          : trans.__('%1 running', metrics.running)
    );
    fill(this.itl, metrics.itlP50Ms, 'ms');
    setText(
      this.itl.note,
      metrics.itlP95Ms === null
        ? trans.__('p50 · no gap yet')
        : metrics.perTokenMs === null
          ? trans.__('p50 · p95 %1 ms · %2 gaps', significant(metrics.itlP95Ms), metrics.itlCount)
          : trans.__(
              'p50 · p95 %1 ms · %2 gaps; %3 ms a token (mean)',
              significant(metrics.itlP95Ms),
              metrics.itlCount,
              significant(metrics.perTokenMs)
            )
    );
    fill(this.ttft, metrics.ttftP50Ms, 'ms');
    setText(
      this.ttft.note,
      metrics.ttftCount > 0
        ? trans.__('p50 of %1', metrics.ttftCount)
        : metrics.ttftP50Ms === null
          ? trans.__('no request yet')
          : trans.__('newest request')
    );
    const used = metrics.kvBlocks ?? 0;
    const filled = metrics.kvSlots ?? 0;
    setText(this.kv.number, metrics.kvBlocks === null ? '–' : percent(used).replace(' %', ''));
    setText(this.kv.unit, metrics.kvBlocks === null ? '' : '%');
    setText(
      this.kv.note,
      metrics.kvBlocks === null
        ? trans.__('no step yet')
        : trans.__('blocks used · %1 of slots filled', percent(filled))
    );
    this.meter.style.setProperty('--iw-used', String(used));
    this.meter.style.setProperty('--iw-filled', String(filled));
    this.element.classList.toggle('iw-idle', metrics.idle);
    this.observer.update();
  }

  private tile(name: string, label: string, definition: string): Tile {
    const number = h('span', { class: 'iw-tile-number', text: '–', attrs: { 'data-figure': name } });
    const unit = h('span', { class: 'iw-tile-unit' });
    const note = h('div', { class: 'iw-tile-note' });
    const element = h(
      'div',
      { class: `iw-tile iw-tile-${name}`, attrs: { role: 'group', 'aria-label': label } },
      h(
        'div',
        { class: 'iw-tile-label' },
        h('span', { text: label }),
        measuredBadge(this.context.trans, label, definition)
      ),
      h('div', { class: 'iw-tile-value' }, number, unit),
      note
    );
    return { element, number, unit, note };
  }
}

function fill(tile: Tile, value: number | null, unit: string): void {
  setText(tile.number, value === null ? '–' : significant(value));
  setText(tile.unit, value === null ? '' : unit);
}
