/** What happened, newest first: switches, requests, the engine, gaps in the data. */

import type { FeedEntry, FeedKind } from '../telemetry/store';
import { h } from './dom';
import { count } from './format';
import type { View, ViewContext } from './view';
import { changes, describeEngine, describeRecording, describeRequest, describeSwitch } from './words';

const SHOWN = 60;

const SIGNS: Record<FeedKind, string> = {
  switch: '⇄',
  request: '·',
  eviction: '⊘',
  engine: '●',
  recording: '◉',
  error: '▲',
  gap: '…',
  connection: '⌁'
};

export class EventFeed implements View {
  readonly element: HTMLElement;
  private readonly list: HTMLElement;
  private readonly empty: HTMLElement;
  private newest = 0;
  private generation = 0;

  constructor(private readonly context: ViewContext) {
    const { trans } = context;
    this.list = h('ol', { class: 'iw-feed-lines' });
    this.empty = h('p', {
      class: 'iw-empty',
      text: trans.__('Switches, requests and what happens to the engine are listed here.')
    });
    this.element = h(
      'section',
      { class: 'iw-card iw-feed', attrs: { 'aria-label': trans.__('Events') } },
      h('div', { class: 'iw-card-head' }, h('h3', { text: trans.__('Events') })),
      this.empty,
      h(
        'div',
        { class: 'iw-feed-list', attrs: { role: 'log', tabindex: 0, 'aria-label': trans.__('Events') } },
        this.list
      )
    );
  }

  update(): void {
    const { feed, generation } = this.context.store;
    if (generation !== this.generation) {
      // Another moment of a recording: its own lines, and no later ones.
      this.generation = generation;
      const kept = feed.at(-1)?.serial ?? 0;
      if (kept < this.newest) {
        this.newest = 0;
        this.list.replaceChildren();
        this.empty.hidden = false;
      }
    }
    const fresh = feed.last(SHOWN).filter(entry => entry.serial > this.newest);
    if (fresh.length === 0) {
      return;
    }
    this.newest = fresh[fresh.length - 1].serial;
    this.empty.hidden = true;
    this.list.prepend(...fresh.reverse().map(entry => this.line(entry)));
    while (this.list.children.length > SHOWN) {
      this.list.lastChild!.remove();
    }
  }

  private line(entry: FeedEntry): HTMLElement {
    const { store } = this.context;
    const since = store.server && entry.atNs !== null ? (entry.atNs - store.server.started_ns) / 1e9 : null;
    return h(
      'li',
      { class: `iw-feed-line iw-feed-${entry.kind}` },
      h('span', { class: 'iw-feed-sign', text: SIGNS[entry.kind], attrs: { 'aria-hidden': 'true' } }),
      h('span', { class: 'iw-feed-time', text: since === null ? '' : `${since.toFixed(1)} s` }),
      h('span', { class: 'iw-feed-text', text: this.words(entry) })
    );
  }

  private words({ event, missing, evicted, text }: FeedEntry): string {
    const { trans } = this.context;
    switch (event?.t) {
      case 'features':
        return event.settled_ns !== null && event.preempted > 0
          ? trans.__('Epoch %1: %2', event.epoch, describeSwitch(event, trans))
          : trans.__('Epoch %1: %2, %3', event.epoch, changes(event, trans), describeSwitch(event, trans));
      case 'request':
        return describeRequest(event, trans);
      case 'engine':
        return describeEngine(event, trans);
      case 'recording':
        return describeRecording(event, trans);
      case undefined:
        if (evicted > 0) {
          return evicted === 1
            ? trans.__('1 cached KV block was evicted for a new one')
            : trans.__('%1 cached KV blocks were evicted for new ones', count(evicted));
        }
        return missing > 0
          ? trans.__('%1 events were left out: this page or its connection was too slow', missing)
          : text;
    }
  }
}
