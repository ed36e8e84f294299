/** "Why did this token take 43 ms?": the parts of the pinned token's latency as a bar and as a table. */

import type { Part } from '../telemetry/protocol';
import { Kind, Origin, PARTS } from '../telemetry/protocol';
import type { TokenRecord } from '../telemetry/store';
import { measuredBadge } from './badge';
import { h, setText } from './dom';
import { count, duration, percent } from './format';
import { largestPart, partLook, partMeaning, partName } from './parts';
import type { View, ViewContext } from './view';
import { kindName, provenance } from './words';

export class TokenWhy implements View {
  readonly element: HTMLElement;
  private readonly title = h('h3');
  private readonly subject = h('p', { class: 'iw-why-subject' });
  private readonly bar = h('div', { class: 'iw-why-bar', attrs: { 'aria-hidden': 'true' } });
  private readonly body = h('tbody');
  private readonly table: HTMLElement;
  private readonly note = h('p', { class: 'iw-empty' });
  private readonly close: HTMLButtonElement;
  private readonly stopSelection: () => void;
  private shown: TokenRecord | null = null;

  constructor(private readonly context: ViewContext) {
    const { trans, selection } = context;
    this.table = h(
      'table',
      { class: 'iw-table iw-why-table', attrs: { 'data-table': 'why' } },
      h(
        'thead',
        {},
        h(
          'tr',
          {},
          ...[trans.__('part'), trans.__('time'), trans.__('share'), trans.__('what it is')].map(text =>
            h('th', { text, attrs: { scope: 'col' } })
          )
        )
      ),
      this.body
    );
    this.close = h('button', {
      class: 'iw-button iw-button-quiet',
      text: trans.__('Close'),
      attrs: { type: 'button', 'data-action': 'close-why' },
      on: { click: () => selection.pin(null) }
    });
    this.element = h(
      'section',
      {
        class: 'iw-card iw-why',
        attrs: { 'aria-label': trans.__('Why a token took so long'), 'aria-live': 'polite', hidden: true },
        on: {
          keydown: event => {
            if (event.key === 'Escape') {
              selection.pin(null);
            }
          }
        }
      },
      h(
        'div',
        { class: 'iw-card-head' },
        this.title,
        measuredBadge(
          trans,
          trans.__('The parts of a latency'),
          trans.__(
            'Each part is measured by the engine or the server while the token is made; together they are the latency, exactly. What is left over is shown as unexplained. Shares are of this token’s latency.'
          )
        ),
        h('span', { class: 'iw-spring' }),
        this.close
      ),
      this.subject,
      this.bar,
      this.note,
      this.table
    );
    this.stopSelection = selection.onChange(() => this.update());
  }

  update(): void {
    const { selection, store } = this.context;
    const { pinned } = selection;
    const token =
      pinned === null || pinned.request === null
        ? null
        : (store.requests.get(pinned.request)?.tokens.find(each => each.index === pinned.index) ?? null);
    this.element.hidden = token === null;
    if (token !== null && token !== this.shown) {
      this.draw(token);
    }
    this.shown = token;
  }

  restyle(): void {
    if (this.shown) {
      this.draw(this.shown);
    }
  }

  dispose(): void {
    this.stopSelection();
  }

  private draw(token: TokenRecord): void {
    const { trans } = this.context;
    setText(this.title, trans.__('Why did “%1” take %2?', visible(token.text), duration(token.latencyNs)));
    setText(this.subject, this.circumstances(token));
    const { parts } = token;
    this.bar.hidden = parts === null;
    this.table.hidden = parts === null;
    setText(
      this.note,
      parts === null
        ? trans.__('Its parts were not measured: the switch Instrumentation was not at “full” when it was made.')
        : ''
    );
    this.note.hidden = parts !== null;
    if (parts === null) {
      return;
    }
    const shares = PARTS.map((part, at) => ({ part, ns: parts[at] })).filter(
      each => each.ns > 0 || each.part === 'unexplained'
    );
    this.bar.replaceChildren(
      ...shares.map(({ part, ns }) => {
        const segment = this.swatch(part, 'iw-why-segment');
        segment.style.flexGrow = String(Math.max(ns, 0));
        segment.title = `${partName(part, trans)} ${duration(ns)}`;
        return segment;
      })
    );
    this.body.replaceChildren(
      ...shares
        .sort((a, b) => Number(a.part === 'unexplained') - Number(b.part === 'unexplained') || b.ns - a.ns)
        .map(({ part, ns }) => this.row(part, ns, token.latencyNs)),
      h(
        'tr',
        { class: 'iw-why-total' },
        h('th', { text: trans.__('latency'), attrs: { scope: 'row' } }),
        h('td', { text: duration(token.latencyNs) }),
        h('td', { text: percent(1) }),
        h('td', {
          text: token.index === 0 ? trans.__('from the arrival of the request') : trans.__('since the token before')
        })
      )
    );
  }

  private row(part: Part, ns: number, latencyNs: number): HTMLElement {
    const { trans } = this.context;
    return h(
      'tr',
      { attrs: { 'data-part': part } },
      h('th', { attrs: { scope: 'row' } }, this.swatch(part, 'iw-key'), partName(part, trans)),
      h('td', { text: duration(ns) }),
      h('td', { text: percent(latencyNs > 0 ? ns / latencyNs : 0) }),
      h('td', { text: partMeaning(part, trans) })
    );
  }

  private swatch(part: Part, css: string): HTMLElement {
    const look = partLook(part, this.context.theme);
    const element = h('span', { class: `${css} iw-part iw-part-${look.hatch}`, attrs: { 'aria-hidden': 'true' } });
    element.style.setProperty('--iw-part-fill', look.fill);
    element.style.setProperty('--iw-part-line', look.line);
    return element;
  }

  /** What else its step had to do: the usual reason. */
  private circumstances(token: TokenRecord): string {
    const { trans, store } = this.context;
    const said = [
      trans.__('request #%1', token.request),
      token.index === 0 ? trans.__('first token (TTFT)') : trans.__('output token %1 (ITL)', token.index),
      trans.__('step %1', token.step)
    ];
    const step = store.step(token.step);
    if (step) {
      const work = [Kind.Prefill, Kind.Recompute, Kind.Decode, Kind.Draft, Kind.Verify]
        .filter(kind => step.byKind[kind] > 0)
        .map(kind => `${count(step.byKind[kind])} ${kindName(kind, trans)}`)
        .join(' + ');
      said.push(trans.__('its step computed %1 for %2 requests', work, step.event.request.length));
    }
    if (token.origin !== Origin.Plain) {
      said.push(provenance(store, token, trans));
    }
    if (token.parts !== null) {
      said.push(trans.__('most of the time: %1', partName(largestPart(token.parts), trans)));
    }
    return said.join(' · ');
  }
}

function visible(text: string): string {
  return text.replaceAll('\n', '↵').replaceAll('\t', '⇥').trim() || '␣';
}
