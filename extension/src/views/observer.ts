/** The observer effect: what watching costs, as measured, and the switch of how much is measured. */

import type { TelemetryCostEvent } from '../telemetry/protocol';
import { currentValue } from '../telemetry/store';
import { measuredBadge } from './badge';
import { h, setText } from './dom';
import { bytes, duration, percent } from './format';
import type { View, ViewContext } from './view';

const SWITCH = 'instrumentation';

export class Observer implements View {
  readonly element: HTMLElement;
  private readonly number = h('span', { class: 'iw-tile-number', text: '–', attrs: { 'data-figure': 'observer' } });
  private readonly unit = h('span', { class: 'iw-tile-unit' });
  private readonly note = h('div', { class: 'iw-tile-note' });
  private readonly level: HTMLSelectElement;
  private levels = '';
  private pending = false;

  constructor(private readonly context: ViewContext) {
    const { trans } = context;
    const label = trans.__('Cost of watching');
    this.level = h('select', {
      class: 'iw-select iw-observer-level',
      title: trans.__('How much is measured'),
      attrs: { 'aria-label': trans.__('Instrumentation'), 'data-feature-quick': SWITCH },
      on: { change: () => this.switch(this.level.value) }
    });
    this.element = h(
      'div',
      { class: 'iw-tile iw-tile-observer', attrs: { role: 'group', 'aria-label': label } },
      h(
        'div',
        { class: 'iw-tile-label' },
        h('span', { text: label }),
        measuredBadge(
          trans,
          label,
          trans.__(
            'Time that the engine’s own thread spent on telemetry, divided by the time it spent on steps, over the last second with steps: the part that delays tokens. Encoding, the server’s share and the recording’s writer run beside it. CPU time of each thread.'
          )
        )
      ),
      h('div', { class: 'iw-tile-value' }, this.number, this.unit, h('span', { class: 'iw-spring' }), this.level),
      this.note
    );
  }

  update(): void {
    const { store, connection, trans } = this.context;
    const spec = store.specs.find(each => each.name === SWITCH);
    this.element.hidden = !spec && store.telemetryCost === null;
    this.level.hidden = !spec;
    if (spec) {
      const levels = spec.choices.join();
      if (levels !== this.levels) {
        this.levels = levels;
        this.level.replaceChildren(...spec.choices.map(text => h('option', { text, attrs: { value: text } })));
      }
      if (!this.pending) {
        this.level.value = String(currentValue(store, spec));
      }
      const usable = connection.status.state === 'connected' && store.engine?.state === 'ready';
      this.level.disabled = connection.readOnly || !usable || this.pending;
    }
    const cost = store.telemetryCost;
    const share = cost && cost.step_ns > 0 ? cost.engine_ns / cost.step_ns : null;
    setText(this.number, share === null ? '–' : percent(share).replace(' %', ''));
    setText(this.unit, share === null ? '' : '%');
    setText(this.note, cost === null || share === null ? trans.__('no step measured yet') : this.sentence(cost));
  }

  private sentence(cost: TelemetryCostEvent): string {
    const { trans } = this.context;
    const beside = cost.encode_ns + cost.front_ns + cost.journal_ns;
    return trans.__(
      'of step time · %1 a step; beside it %2 a step, %3/s',
      duration(cost.engine_ns / Math.max(1, cost.steps)),
      duration(beside / Math.max(1, cost.steps)),
      bytes(Math.round(cost.bytes / (cost.window_ns / 1e9)))
    );
  }

  private switch(value: string): void {
    this.pending = true;
    this.update();
    this.context.connection
      .setFeatures({ [SWITCH]: value })
      .catch((error: unknown) => {
        this.context.store.note('error', error instanceof Error ? error.message : String(error));
      })
      .finally(() => {
        this.pending = false;
        this.update();
      });
  }
}
