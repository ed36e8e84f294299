/**
 * What all plots share: a card with title, legend, caption and a table behind it; a Bokeh figure in the page's colours;
 * the common crosshair, by mouse and by arrow keys. A plot itself only says what to draw.
 */

import { pageNow } from '../telemetry/clock';
import { measuredBadge } from './badge';
import type { Bokeh, Figure, Span } from './bokeh';
import { loadBokeh } from './bokeh';
import { h, setText, uniqueId } from './dom';
import type { View, ViewContext } from './view';

export interface LegendEntry {
  colour: string;
  text: string;
  look?: 'fill' | 'hatch' | 'line' | 'dashed' | 'dot' | 'triangle';
  /** Of the hatch, where it is not the ground's. */
  line?: string;
  /** Which hatch; see `parts.ts`. */
  hatch?: string;
}

export interface Table {
  columns: string[];
  rows: (string | number)[][];
}

/** Plots repaint less often than text: a canvas costs more. */
const PLOT_INTERVAL_MS = 190;

export abstract class Plot implements View {
  readonly element: HTMLElement;
  protected figure: Figure | null = null;
  protected crosshair: Span | null = null;
  private readonly frame: HTMLElement;
  private readonly legendElement = h('div', { class: 'iw-legend' });
  private readonly captionElement = h('p', { class: 'iw-caption' });
  private readonly tableElement = h('div', {
    class: 'iw-table-holder',
    attrs: { hidden: true, tabindex: 0, role: 'region' }
  });
  private readonly tableButton: HTMLButtonElement;
  private started = false;
  private disposed = false;
  private paintedVersion = -1;
  /** When it was last painted, on the page's clock. */
  paintedAt = -Infinity;
  private removeFigure: () => void = () => undefined;
  private readonly stopSelection: () => void;

  constructor(
    protected readonly context: ViewContext,
    private readonly name: string,
    title: string,
    definition: string
  ) {
    const { trans } = context;
    const tableId = uniqueId('table');
    this.tableElement.id = tableId;
    this.tableElement.setAttribute('aria-label', trans.__('%1, as a table', title));
    this.tableButton = h('button', {
      class: 'iw-button iw-button-quiet iw-table-button',
      text: trans.__('Table'),
      attrs: { type: 'button', 'aria-pressed': 'false', 'aria-controls': tableId },
      on: { click: () => this.toggleTable() }
    });
    this.frame = h('div', {
      class: 'iw-plot',
      attrs: {
        tabindex: 0,
        role: 'img',
        'aria-label': title,
        'aria-description': trans.__('Left and right arrow keys move the crosshair from step to step.')
      },
      on: {
        keydown: event => this.onKey(event),
        blur: () => context.selection.set(null)
      }
    });
    this.frame.append(h('p', { class: 'iw-plot-wait', text: trans.__('Loading the plot…') }));
    this.element = h(
      'section',
      { class: `iw-card iw-plot-card iw-plot-${name}`, attrs: { 'aria-label': title } },
      h(
        'div',
        { class: 'iw-card-head' },
        h('h3', { text: title }),
        measuredBadge(trans, title, definition),
        h('span', { class: 'iw-spring' }),
        this.tableButton
      ),
      this.legendElement,
      this.frame,
      this.tableElement,
      this.captionElement
    );
    this.stopSelection = context.selection.onChange(() => this.onSelection());
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
    return this.stale && pageNow() - this.paintedAt >= PLOT_INTERVAL_MS;
  }

  restyle(): void {
    if (this.figure) {
      this.dress(this.figure);
      this.recolour();
      this.repaint();
    }
    this.drawLegend();
  }

  dispose(): void {
    this.disposed = true;
    this.stopSelection();
    this.removeFigure();
  }

  /** Make the figure: ranges, glyphs. */
  protected abstract build(bokeh: Bokeh, shared: { tools: string; height: number }): Figure;
  /** Give the figure new data, and return the caption: the same in words. */
  protected abstract draw(): string;
  /** Set theme-dependent colours of the glyphs. */
  protected abstract recolour(): void;
  protected abstract legend(): LegendEntry[];
  protected abstract table(): Table;
  /** The step under `x`, `y` of the plot, or null. */
  protected abstract pick(x: number, y: number): void;
  /** Where the crosshair belongs for the selection; null hides it. */
  protected abstract crosshairAt(): number | null;
  /** What is at the selection, in words; null shows the caption. */
  protected abstract describe(): string | null;
  /** Move the selection by one. */
  protected abstract walk(direction: -1 | 1): void;

  protected repaint(): void {
    if (!this.started) {
      this.started = true;
      this.start();
    }
    this.paintedVersion = this.context.store.version;
    this.paintedAt = pageNow();
    if (this.figure) {
      this.caption = this.draw();
    }
    this.showCaption();
    if (!this.tableElement.hidden) {
      this.drawTable();
    }
  }

  private caption = '';

  private start(): void {
    this.drawLegend();
    loadBokeh()
      .then(async bokeh => {
        if (this.disposed) {
          return;
        }
        const figure = this.build(bokeh, { tools: '', height: 210 });
        this.crosshair = new bokeh.Span({ dimension: 'height', location: null, line_width: 1.5, line_dash: 'dashed' });
        figure.add_layout(this.crosshair);
        figure.on_event(bokeh.MouseMove, event => this.pick(event.x, event.y));
        figure.on_event(bokeh.MouseLeave, () => this.context.selection.set(null));
        this.dress(figure);
        this.figure = figure;
        this.recolour();
        this.repaint();
        const document = new bokeh.Document();
        document.add_root(figure);
        this.frame.replaceChildren();
        const views = await bokeh.embed(document, this.frame);
        this.removeFigure = () => views.clear();
      })
      .catch((error: unknown) => {
        const reason = error instanceof Error ? error.message : String(error);
        this.frame.replaceChildren(
          h('p', { class: 'iw-refusal', text: this.context.trans.__('The plot could not be loaded: %1', reason) })
        );
      });
  }

  private dress(figure: Figure): void {
    const { theme } = this.context;
    figure.background_fill_color = null;
    figure.border_fill_color = null;
    figure.outline_line_color = null;
    for (const axis of figure.axes) {
      axis.axis_line_color = theme.line;
      axis.major_tick_line_color = theme.line;
      axis.minor_tick_line_color = null;
      axis.axis_label_text_color = theme.softInk;
      axis.major_label_text_color = theme.softInk;
      axis.axis_label_text_font = theme.font;
      axis.major_label_text_font = theme.font;
      axis.axis_label_text_font_style = 'normal';
      axis.axis_label_text_font_size = '12px';
      axis.major_label_text_font_size = '11px';
    }
    for (const grid of figure.grids) {
      grid.grid_line_color = grid.dimension === 1 ? theme.line : null;
      grid.grid_line_alpha = 0.7;
    }
    if (this.crosshair) {
      this.crosshair.line_color = theme.ink;
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
      this.drawTable();
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

  private onSelection(): void {
    if (this.crosshair) {
      this.crosshair.location = this.crosshairAt();
    }
    this.showCaption();
  }

  private showCaption(): void {
    const text = this.describe() ?? this.caption;
    setText(this.captionElement, text);
    this.captionElement.hidden = text === '';
    this.frame.setAttribute('aria-label', `${this.element.getAttribute('aria-label') ?? ''}. ${text}`);
  }

  private onKey(event: KeyboardEvent): void {
    if (event.key === 'ArrowLeft' || event.key === 'ArrowRight') {
      event.preventDefault();
      this.walk(event.key === 'ArrowLeft' ? -1 : 1);
    } else if (event.key === 'Escape') {
      this.context.selection.set(null);
    }
  }
}
