/**
 * The text as it is generated, each token on the colour (and with a bar of the height) of its latency, or coloured by how
 * it came about where tokens are proposed ahead. One row a request. A token pointed at, or reached by the arrow keys, is described in the line below.
 */

import { Origin } from '../telemetry/protocol';
import { gapsOf, proposalBehind } from '../telemetry/speculation';
import type { RequestRecord, TokenRecord } from '../telemetry/store';
import { isActive } from '../telemetry/store';
import { percentile } from '../telemetry/statistics';
import {
  HEAT_DARK,
  HEAT_LIGHT,
  LATENCY_EDGES_MS,
  latencyClass,
  ORIGIN_DARK,
  ORIGIN_LIGHT,
  ORIGIN_LOOKS
} from './colours';
import type { Colourings } from './colourings';
import { colourings } from './colourings';
import { h, setText, uniqueId } from './dom';
import { duration } from './format';
import { keep, kept } from './kept';
import type { View, ViewContext } from './view';
import { changes, firstSentence, kindName, nothingProposed, provenance } from './words';

const MAX_ROWS = 8;
/** Older tokens of a row are folded away: thousands of elements would slow the page. */
const MAX_TOKENS = 800;
/** As many as a row shows without scrolling: enough for whoever hurries past. */
const HURRIED_TOKENS = 40;

/** The latency that a row gives is of so many. */
const RECENT_TOKENS = 64;

type Colouring = 'latency' | 'speculation';
/** The colouring that was chosen last. */
const KEPT = 'token-colours';

interface Row {
  handle: number;
  element: HTMLElement;
  title: HTMLElement;
  facts: HTMLElement;
  text: HTMLElement;
  folded: HTMLElement;
  spans: HTMLElement[];
  tokens: TokenRecord[];
  /** Index of the next token to draw. */
  next: number;
  lastEpoch: number | null;
  follow: boolean;
  /** Got tokens in this update. */
  grown: boolean;
  /** The store's generation that it was drawn from. */
  generation: number;
  /** Drawn in a hurry: it lacks tokens that belong to it. */
  partial: boolean;
  /** Some token of it was proposed, or stands where one was. */
  speculated: boolean;
  /** Corrections whose step is not known yet, and with it how much was rejected. */
  uncounted: { span: HTMLElement; token: TokenRecord }[];
}

export class TokenStrip implements View {
  readonly element: HTMLElement;
  private readonly rowsElement: HTMLElement;
  private readonly rows = new Map<number, Row>();
  private readonly legend = h('div', { class: 'iw-legend' });
  private readonly details: HTMLElement;
  private readonly empty: HTMLElement;
  /** Why nothing is coloured by speculation. */
  private readonly unproposed = h('p', { class: 'iw-hint', attrs: { role: 'status', hidden: true } });
  private readonly buttons: Colourings<Colouring>;
  private colouring: Colouring = kept(KEPT) === 'speculation' ? 'speculation' : 'latency';
  private readonly more = h('p', { class: 'iw-hint', attrs: { hidden: true } });
  private pointed: HTMLElement | null = null;
  private pinned: HTMLElement | null = null;
  private readonly stopSelection: () => void;

  constructor(private readonly context: ViewContext) {
    const { trans } = context;
    this.empty = h('p', {
      class: 'iw-empty',
      text: trans.__(
        'Nothing generated yet. Press Generate above, or send a request from a notebook or any OpenAI client.'
      )
    });
    this.rowsElement = h('div', { class: 'iw-strip-rows' });
    this.details = h('p', { class: 'iw-details', attrs: { 'aria-live': 'polite' } });
    this.setDetails(null);
    this.buttons = colourings<Colouring>(
      trans.__('Colours of the tokens'),
      { latency: trans.__('by latency'), speculation: trans.__('by speculation') },
      colouring => {
        keep(KEPT, colouring);
        this.colourBy(colouring);
      }
    );
    this.element = h(
      'section',
      { class: 'iw-card iw-strip', attrs: { 'aria-label': trans.__('Generated tokens') } },
      h('div', { class: 'iw-card-head' }, h('h3', { text: trans.__('Tokens') }), this.buttons.element, this.legend),
      this.empty,
      this.unproposed,
      this.rowsElement,
      this.more,
      this.details
    );
    this.colourBy(this.colouring);
    this.restyle();
    this.stopSelection = context.selection.onChange(() => this.showSelection());
  }

  restyle(): void {
    const { theme } = this.context;
    const heat = theme.dark ? HEAT_DARK : HEAT_LIGHT;
    heat.forEach((shade, index) => {
      this.element.style.setProperty(`--iw-heat-${index}`, shade.fill);
      this.element.style.setProperty(`--iw-heat-ink-${index}`, shade.ink);
    });
    for (const [look, shade] of Object.entries(theme.dark ? ORIGIN_DARK : ORIGIN_LIGHT)) {
      this.element.style.setProperty(`--iw-origin-${look}`, shade.fill);
      this.element.style.setProperty(`--iw-origin-ink-${look}`, shade.ink);
    }
  }

  /** What a token's colour says from now on. */
  private colourBy(colouring: Colouring): void {
    this.colouring = colouring;
    this.element.dataset.colouredBy = colouring;
    this.buttons.show(colouring);
    this.drawLegend();
    this.sayUnproposed();
    this.showSelection();
  }

  private drawLegend(): void {
    const { trans } = this.context;
    if (this.colouring === 'speculation') {
      const entry = (look: string, text: string, title: string) =>
        h('span', { class: `iw-token iw-origin-${look}`, text, title });
      this.legend.replaceChildren(
        entry('plain', trans.__('plain'), trans.__('The model’s choice where nothing was proposed')),
        entry('accepted', trans.__('accepted'), trans.__('Proposed, and what the model chose too')),
        entry('bonus', trans.__('bonus'), trans.__('The model’s choice after everything proposed was accepted')),
        entry('corrected', trans.__('corrected'), trans.__('The model’s choice in place of a proposed token')),
        h('span', {
          class: 'iw-rejected',
          text: '2',
          attrs: { 'aria-hidden': 'true' }
        }),
        h('span', { text: trans.__('so many proposed were rejected') })
      );
      return;
    }
    this.legend.replaceChildren(
      ...HEAT_LIGHT.map((_, index) => {
        const text =
          index < LATENCY_EDGES_MS.length
            ? trans.__('≤ %1', LATENCY_EDGES_MS[index])
            : trans.__('> %1 ms', LATENCY_EDGES_MS[LATENCY_EDGES_MS.length - 1]);
        return h('span', { class: `iw-token iw-heat-${index}`, text });
      }),
      h('span', { class: 'iw-token iw-first', text: trans.__('first (TTFT)') })
    );
  }

  update(): void {
    const { store, trans } = this.context;
    const shown = this.choose();
    this.empty.hidden = shown.length > 0;
    const keep = new Set(shown.map(each => each.handle));
    for (const [handle, row] of this.rows) {
      if (!keep.has(handle)) {
        row.element.remove();
        this.rows.delete(handle);
      }
    }
    shown.forEach((request, at) => {
      let row = this.rows.get(request.handle);
      const first = request.tokens[0]?.index ?? 0;
      const newest = request.tokens.at(-1)?.index ?? -1;
      if (row && store.generation !== row.generation) {
        row.generation = store.generation;
        cutBack(row, first, newest);
      }
      if (row && ((row.partial && !this.context.hurried) || newest + 1 < row.next)) {
        // Drawn in a hurry, or another server gave the handle to another request: begin anew.
        row.element.remove();
        row = undefined;
      }
      if (!row) {
        row = this.makeRow(request.handle);
        row.next = first;
        this.rows.set(request.handle, row);
      }
      if (this.rowsElement.children[at] !== row.element) {
        this.rowsElement.insertBefore(row.element, this.rowsElement.children[at] ?? null);
      }
      this.fillRow(row, request);
    });
    // All rows are written before the first is measured: measuring makes the browser lay out the page.
    for (const row of this.rows.values()) {
      if (row.grown && row.follow && !this.context.hurried) {
        row.text.scrollTop = 1e6;
      }
      row.grown = false;
    }
    this.sayUnproposed();
    this.rowsElement.classList.toggle('iw-many', shown.length > 2);
    const hidden = [...store.requests.values()].filter(isActive).length - shown.filter(isActive).length;
    this.more.hidden = hidden <= 0;
    setText(this.more, hidden > 0 ? trans.__('%1 more requests are running and not shown here.', hidden) : '');
  }

  dispose(): void {
    this.stopSelection();
  }

  private sayUnproposed(): void {
    const rows = [...this.rows.values()];
    const nothing =
      this.colouring === 'speculation' && rows.some(row => row.spans.length > 0) && !rows.some(row => row.speculated);
    setText(this.unproposed, nothing ? nothingProposed(this.context) : '');
    this.unproposed.hidden = !nothing;
  }

  /** What runs, and those that came together with the newest; then the most recent ended ones, up to three in all. */
  private choose(): RequestRecord[] {
    const all = [...this.context.store.requests.values()].filter(each => each.tokens.length > 0 || isActive(each));
    all.sort((a, b) => b.handle - a.handle);
    const burst = all[0]?.event?.arrival_ns;
    const wanted = (each: RequestRecord) => isActive(each) || (burst !== undefined && each.event?.arrival_ns === burst);
    const shown = [...all.filter(wanted), ...all.filter(each => !wanted(each)).slice(0, 3)];
    const count = Math.max(3, all.filter(wanted).length);
    return shown.slice(0, Math.min(MAX_ROWS, count)).sort((a, b) => b.handle - a.handle);
  }

  private makeRow(handle: number): Row {
    const { trans } = this.context;
    const titleId = uniqueId('row');
    const title = h('span', { class: 'iw-row-title', attrs: { id: titleId } });
    const facts = h('span', { class: 'iw-row-facts' });
    const folded = h('span', { class: 'iw-folded', attrs: { hidden: true } });
    const text = h('div', {
      class: 'iw-row-text',
      attrs: {
        tabindex: 0,
        role: 'group',
        'aria-labelledby': titleId,
        'aria-description': trans.__(
          'Left and right arrow keys go from token to token, Enter asks why it took so long.'
        )
      }
    });
    text.append(folded);
    const row: Row = {
      handle,
      element: h(
        'div',
        { class: 'iw-row', attrs: { 'data-request': handle } },
        h('div', { class: 'iw-row-head' }, title, facts),
        text
      ),
      title,
      facts,
      text,
      folded,
      spans: [],
      tokens: [],
      next: 0,
      lastEpoch: null,
      follow: true,
      grown: false,
      generation: this.context.store.generation,
      partial: false,
      speculated: false,
      uncounted: []
    };
    text.addEventListener('mouseover', event => {
      const span = (event.target as HTMLElement).closest<HTMLElement>('.iw-token');
      if (span) {
        this.pointAt(row, row.spans.indexOf(span));
      }
    });
    text.addEventListener('click', event => {
      const span = (event.target as HTMLElement).closest<HTMLElement>('.iw-token');
      if (span) {
        this.pinAt(row, row.spans.indexOf(span));
      }
    });
    text.addEventListener('mouseleave', () => {
      if (document.activeElement !== text) {
        this.context.selection.set(null);
      }
    });
    text.addEventListener('scroll', () => {
      row.follow = text.scrollTop + text.clientHeight >= text.scrollHeight - 8;
    });
    text.addEventListener('keydown', event => this.onKey(row, event));
    text.addEventListener('blur', () => this.context.selection.set(null));
    return row;
  }

  private onKey(row: Row, event: KeyboardEvent): void {
    const { value } = this.context.selection;
    const at = value?.request === row.handle ? row.tokens.findIndex(token => token.index === value.index) : -1;
    const last = row.spans.length - 1;
    const moves: Record<string, number> = {
      ArrowLeft: at < 0 ? last : Math.max(0, at - 1),
      ArrowRight: at < 0 ? 0 : Math.min(last, at + 1),
      Home: 0,
      End: last
    };
    if (event.key in moves && last >= 0) {
      event.preventDefault();
      this.pointAt(row, moves[event.key]);
      row.spans[moves[event.key]]?.scrollIntoView({ block: 'nearest' });
    } else if ((event.key === 'Enter' || event.key === ' ') && at >= 0) {
      event.preventDefault();
      event.stopPropagation();
      this.pinAt(row, at);
    } else if (event.key === 'Escape') {
      this.context.selection.set(null);
      this.context.selection.pin(null);
    }
  }

  private fillRow(row: Row, request: RequestRecord): void {
    const { trans } = this.context;
    const { event } = request;
    setText(row.title, event?.preview ? `#${request.handle} ${event.preview}` : `#${request.handle}`);
    setText(row.facts, this.facts(request));
    row.element.dataset.state = event?.state ?? 'running';
    const fragment = document.createDocumentFragment();
    const firstIndex = request.tokens[0]?.index ?? 0;
    // After a jump only what stays is drawn.
    const most = this.context.hurried ? HURRIED_TOKENS : MAX_TOKENS;
    const from = Math.max(0, row.next - firstIndex, request.tokens.length - most);
    row.partial ||= this.context.hurried && from > Math.max(0, row.next - firstIndex);
    for (let at = from; at < request.tokens.length; at++) {
      const token = request.tokens[at];
      if (row.lastEpoch !== null && token.epoch !== null && token.epoch !== row.lastEpoch) {
        fragment.append(this.switchMark(token.epoch));
      }
      row.lastEpoch = token.epoch ?? row.lastEpoch;
      const span = tokenSpan(token);
      row.spans.push(span);
      row.tokens.push(token);
      row.speculated ||= token.origin !== Origin.Plain;
      if (token.origin === Origin.Corrected) {
        row.uncounted.push({ span, token });
      }
      fragment.append(span);
      row.next = token.index + 1;
    }
    row.uncounted = row.uncounted.filter(({ span, token }) => !this.countRejected(span, token));
    if (fragment.childNodes.length > 0) {
      row.text.append(fragment);
      const excess = row.spans.length - (row.partial ? HURRIED_TOKENS : MAX_TOKENS);
      if (excess > 0) {
        row.spans.splice(0, excess).forEach(span => span.remove());
        row.tokens.splice(0, excess);
        row.folded.hidden = false;
        setText(row.folded, trans.__('… %1 earlier tokens ', row.tokens[0].index));
      }
      row.grown = true;
    }
  }

  /** Say at a correction how many proposed tokens were thrown away for it; false while that is not known. */
  private countRejected(span: HTMLElement, token: TokenRecord): boolean {
    const proposal = proposalBehind(this.context.store, token);
    if (proposal === null) {
      return false;
    }
    span.dataset.rejected = String(proposal.drafted - proposal.accepted);
    return true;
  }

  private facts(request: RequestRecord): string {
    const { trans } = this.context;
    const { event, tokens } = request;
    const parts: string[] = [];
    if (event) {
      const states = {
        queued: trans.__('queued'),
        running: trans.__('running'),
        preempted: trans.__('preempted, catching up'),
        finished: event.finish_reason === 'length' ? trans.__('reached its limit') : trans.__('finished'),
        cancelled: trans.__('cancelled'),
        failed: trans.__('failed: %1', firstSentence(event.error ?? ''))
      };
      parts.push(states[event.state]);
      parts.push(
        event.cached_tokens > 0
          ? trans.__('prompt %1, %2 from the prefix cache', event.prompt_tokens, event.cached_tokens)
          : trans.__('prompt %1', event.prompt_tokens)
      );
    }
    const produced = tokens.length > 0 ? tokens[tokens.length - 1].index + 1 : 0;
    parts.push(event ? trans.__('%1/%2 tokens', produced, event.max_tokens) : trans.__('%1 tokens', produced));
    const first = tokens[0];
    if (first?.index === 0) {
      parts.push(`TTFT ${duration(first.latencyNs)}`);
    }
    parts.push(...this.gaps(tokens.slice(-RECENT_TOKENS)));
    return parts.join(' · ');
  }

  /** How long the newest tokens took; where steps said several, a step and a token apart: most of the latter came at once. */
  private gaps(recent: readonly TokenRecord[]): string[] {
    const { trans } = this.context;
    const later = recent.filter(each => each.index > 0);
    if (!later.some(each => each.origin === Origin.Accepted)) {
      const median = percentile(
        later.map(each => each.latencyNs),
        0.5
      );
      return median === null ? [] : [`ITL ${duration(median)}`];
    }
    const gaps = gapsOf(later);
    return gaps === null
      ? []
      : [trans.__('%1 a step, %2 a token (means)', duration(gaps.stepNs), duration(gaps.tokenNs))];
  }

  private switchMark(epoch: number): HTMLElement {
    const { trans, store } = this.context;
    const event = store.epochs.get(epoch);
    const what = event ? changes(event, trans) : '';
    return h('span', { class: 'iw-switch-mark', text: what || trans.__('epoch %1', epoch) });
  }

  private pointAt(row: Row, at: number): void {
    const token = row.tokens[at];
    if (token) {
      this.context.selection.set({ step: token.step, request: token.request, index: token.index });
    }
  }

  private pinAt(row: Row, at: number): void {
    const token = row.tokens[at];
    if (token) {
      this.context.selection.pin({ step: token.step, request: token.request, index: token.index });
    }
  }

  private showSelection(): void {
    const { value } = this.context.selection;
    this.pointed?.classList.remove('iw-pointed');
    this.pointed = null;
    this.showPinned();
    const row = value && value.request !== null ? this.rows.get(value.request) : undefined;
    const at = row ? row.tokens.findIndex(token => token.index === value!.index) : -1;
    if (row && at >= 0) {
      this.pointed = row.spans[at];
      this.pointed.classList.add('iw-pointed');
      this.setDetails(row.tokens[at]);
    } else {
      this.setDetails(null);
    }
  }

  private showPinned(): void {
    const { pinned } = this.context.selection;
    const row = pinned && pinned.request !== null ? this.rows.get(pinned.request) : undefined;
    const at = row ? row.tokens.findIndex(token => token.index === pinned!.index) : -1;
    const span = row && at >= 0 ? row.spans[at] : null;
    if (span !== this.pinned) {
      this.pinned?.classList.remove('iw-pinned');
      span?.classList.add('iw-pinned');
      this.pinned = span;
    }
  }

  private setDetails(token: TokenRecord | null): void {
    const { trans, store } = this.context;
    this.details.classList.toggle('iw-quiet', token === null);
    if (token === null) {
      setText(
        this.details,
        trans.__(
          'Point at a token, or walk with the arrow keys, to see where and when it was made; click it, or press Enter, to see why it took so long.'
        )
      );
      return;
    }
    const prompt = store.requests.get(token.request)?.event?.prompt_tokens;
    const parts = [
      `“${visible(token.text)}”`,
      trans.__('request #%1', token.request),
      `${token.index === 0 ? 'TTFT' : 'ITL'} ${duration(token.latencyNs)}`,
      prompt === undefined
        ? trans.__('output token %1', token.index)
        : trans.__('position %1 (output token %2)', prompt + token.index, token.index),
      trans.__('step %1', token.step)
    ];
    if (token.epoch !== null) {
      parts.push(trans.__('epoch %1', token.epoch));
    }
    if (token.batch !== null) {
      parts.push(trans.__('batch of %1', token.batch));
    }
    if (token.kind !== null) {
      parts.push(kindName(token.kind, trans));
    }
    if (token.origin !== Origin.Plain || this.colouring === 'speculation') {
      parts.push(provenance(store, token, trans));
    }
    if (token.logprob !== null) {
      parts.push(trans.__('probability %1 %', (Math.exp(token.logprob) * 100).toFixed(1)));
    }
    setText(this.details, parts.join(' · '));
  }
}

/** Another moment of the same recording: keep what is the same, take away what is not there yet. */
function cutBack(row: Row, first: number, newest: number): void {
  while (row.tokens.length > 0 && row.tokens[row.tokens.length - 1].index > newest) {
    row.tokens.pop();
    const span = row.spans.pop()!;
    while (span.previousSibling instanceof HTMLElement && span.previousSibling.matches('.iw-switch-mark')) {
      span.previousSibling.remove();
    }
    span.remove();
  }
  const last = row.tokens.at(-1);
  row.next = last ? last.index + 1 : row.folded.hidden ? first : Infinity;
  row.lastEpoch = last?.epoch ?? null;
  row.speculated = row.tokens.some(token => token.origin !== Origin.Plain);
}

function tokenSpan(token: TokenRecord): HTMLElement {
  const look = token.index === 0 ? 'iw-first' : `iw-heat-${latencyClass(token.latencyNs / 1e6)}`;
  return h('span', {
    class: `iw-token ${look} iw-origin-${ORIGIN_LOOKS[token.origin]}`,
    text: token.text === '' ? '·' : token.text
  });
}

function visible(text: string): string {
  return text.replaceAll('\n', '↵').replaceAll('\t', '⇥') || '·';
}
