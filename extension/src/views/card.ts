/**
 * What all figures share, whatever draws them: a card with title, definition, legend, caption and a table behind it, and
 * when it is due to be painted.
 */

import { pageNow } from '../telemetry/clock';
import { measuredBadge } from './badge';
import type { Child } from './dom';
import { h, setText, uniqueId } from './dom';
import type { View, ViewContext } from './view';

export interface LegendEntry {
  colour: string;
  text: string;
  look?: 'fill' | 'hatch' | 'line' | 'dashed' | 'dot' | 'triangle' | 'outline';
  /** Of the hatch, where it is not the ground's. */
  line?: string;
  /** Which hatch; see `parts.ts`. */
  hatch?: string;
}

export interface Table {
  columns: string[];
  rows: (string | number)[][];
}

export interface CardOptions {
  /** Of the CSS class and the table. */
  name: string;
  title: string;
  definition: string;
  /** What the keys do while the figure has the focus. */
  keys: string;
  /** Between the title and the table button. */
  controls?: Child[];
  /** Made of text and controls that speak for themselves, instead of a picture. */
  readable?: boolean;
}

/** Figures repaint less often than text: a canvas costs more. */
const INTERVAL_MS = 250;
const HURRIED_INTERVAL_MS = 600;
/** What is scrolled out of sight only has to be roughly right when it comes back. */
const UNSEEN_INTERVAL_MS = 3000;

export abstract class Card implements View {
  readonly element: HTMLElement;
  readonly name: string;
  readonly title: string;
  /** How long to wait at least between two paintings while data arrives. */
  protected readonly intervalMs: number = INTERVAL_MS;
  protected readonly frame: HTMLElement;
  private readonly legendElement = h('div', { class: 'iw-legend' });
  private readonly captionElement = h('p', { class: 'iw-caption' });
  private readonly tableElement = h('div', {
    class: 'iw-table-holder',
    attrs: { hidden: true, tabindex: 0, role: 'region' }
  });
  private readonly tableButton: HTMLButtonElement;
  private readonly readable: boolean;
  private started = false;
  private paintedVersion = -1;
  private caption = '';
  private shownCaption: string | null = null;
  private readonly stopSelection: () => void;
  protected disposed = false;
  private seen = true;
  /** When it was last painted, on the page's clock. */
  paintedAt = -Infinity;
  /** It has come into view since then: the reader waits for it. */
  awaited = false;

  constructor(
    protected readonly context: ViewContext,
    options: CardOptions
  ) {
    const { trans } = context;
    this.name = options.name;
    this.title = options.title;
    const tableId = uniqueId('table');
    this.tableElement.id = tableId;
    this.tableElement.setAttribute('aria-label', trans.__('%1, as a table', options.title));
    this.tableButton = h('button', {
      class: 'iw-button iw-button-quiet iw-table-button',
      text: trans.__('Table'),
      attrs: { type: 'button', 'aria-pressed': 'false', 'aria-controls': tableId },
      on: { click: () => this.toggleTable() }
    });
    this.readable = options.readable ?? false;
    this.frame = h('div', {
      class: this.readable ? 'iw-readable' : 'iw-plot',
      attrs: this.readable
        ? {}
        : { tabindex: 0, role: 'img', 'aria-label': options.title, 'aria-description': options.keys },
      on: {
        keydown: event => this.onKey(event),
        blur: () => context.selection.set(null)
      }
    });
    this.element = h(
      'section',
      { class: `iw-card iw-plot-card iw-plot-${options.name}`, attrs: { 'aria-label': options.title } },
      h(
        'div',
        { class: options.controls ? 'iw-card-head iw-wraps' : 'iw-card-head' },
        h('h3', { text: options.title }),
        measuredBadge(trans, options.title, options.definition),
        h('span', { class: 'iw-spring' }),
        ...(options.controls ?? []),
        this.tableButton
      ),
      this.legendElement,
      this.frame,
      this.tableElement,
      this.captionElement
    );
    this.stopSelection = context.selection.onChange(() => {
      if (this.seen) {
        this.onSelection();
      } else {
        this.showCaption();
      }
    });
  }

  update(): void {
    this.repaint();
  }

  /** Is there something newer than what was painted? */
  get stale(): boolean {
    return !this.started || this.paintedVersion !== this.context.store.version;
  }

  /** Stale, and not painted a moment ago. */
  get due(): boolean {
    const interval = !this.seen ? UNSEEN_INTERVAL_MS : this.context.hurried ? HURRIED_INTERVAL_MS : this.intervalMs;
    return this.stale && !this.element.hidden && pageNow() - this.paintedAt >= interval;
  }

  setOnScreen(seen: boolean): void {
    this.awaited = seen && (!this.seen || this.awaited);
    this.seen = seen;
    this.frame.classList.toggle('iw-unseen', !seen);
    if (seen) {
      this.onSelection();
    }
  }

  restyle(): void {
    this.drawLegend();
  }

  dispose(): void {
    this.disposed = true;
    this.stopSelection();
  }

  /** Called once, before the first painting. */
  protected start(): void {
    this.drawLegend();
  }

  /** Draw what the store knows, and return the caption: the same in words. `null` keeps the one there is. */
  protected abstract draw(): string | null;
  protected abstract legend(): LegendEntry[];
  protected abstract table(): Table;
  /** What is pointed at, in words; null shows the caption. */
  protected abstract describe(): string | null;
  /** A key was pressed in the figure; true where it meant something. */
  protected abstract onArrow(key: string): boolean;

  /** The selection moved. */
  protected onSelection(): void {
    this.showCaption();
  }

  protected repaint(): void {
    if (!this.started) {
      this.started = true;
      this.start();
    }
    this.paintedVersion = this.context.store.version;
    this.paintedAt = pageNow();
    this.awaited = false;
    this.caption = this.draw() ?? this.caption;
    this.showCaption();
    if (!this.tableElement.hidden) {
      this.drawTable();
    }
  }

  protected showCaption(): void {
    const text = this.describe() ?? this.caption;
    if (text === this.shownCaption) {
      return;
    }
    this.shownCaption = text;
    setText(this.captionElement, text);
    this.captionElement.hidden = text === '';
    if (!this.readable) {
      this.frame.setAttribute('aria-label', `${this.title}. ${text}`);
    }
  }

  protected drawLegend(): void {
    this.legendElement.replaceChildren(
      ...this.legend().map(entry => {
        const key = h('span', { class: `iw-key iw-key-${entry.look ?? 'fill'}`, attrs: { 'aria-hidden': 'true' } });
        key.style.setProperty('--iw-key', entry.colour);
        if (entry.hatch) {
          key.classList.add('iw-part', `iw-part-${entry.hatch}`);
          key.style.setProperty('--iw-part-fill', entry.colour);
          key.style.setProperty('--iw-part-line', entry.line ?? 'currentcolor');
        }
        return h('span', { class: 'iw-legend-entry' }, key, h('span', { text: entry.text }));
      })
    );
  }

  private toggleTable(): void {
    const show = this.tableElement.hidden;
    this.tableElement.hidden = !show;
    this.frame.hidden = show;
    this.legendElement.hidden = show;
    this.tableButton.setAttribute('aria-pressed', String(show));
    if (show) {
      // A figure out of sight is seldom painted: its table shows what there is now.
      this.repaint();
    }
  }

  private drawTable(): void {
    const { columns, rows } = this.table();
    if (rows.length === 0) {
      this.tableElement.replaceChildren(h('p', { class: 'iw-empty', text: this.context.trans.__('Nothing yet.') }));
      return;
    }
    const table = h(
      'table',
      { class: 'iw-table', attrs: { 'data-table': this.name } },
      h('thead', {}, h('tr', {}, ...columns.map(text => h('th', { text, attrs: { scope: 'col' } })))),
      h('tbody', {}, ...rows.map(row => h('tr', {}, ...row.map(cell => h('td', { text: String(cell) })))))
    );
    this.tableElement.replaceChildren(table);
  }

  private onKey(event: KeyboardEvent): void {
    if (event.key === 'Escape') {
      this.context.selection.set(null);
      this.context.selection.highlight(null);
    } else if (this.onArrow(event.key)) {
      event.preventDefault();
      event.stopPropagation();
    }
  }
}
