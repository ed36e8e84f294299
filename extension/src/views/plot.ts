/**
 * What all plots share: a Bokeh figure in the page's colours on a card, and the common crosshair, by mouse and by arrow
 * keys. A plot itself only says what to draw.
 */

import type { Bokeh, Figure, FigureView } from './bokeh';
import { loadBokeh } from './bokeh';
import { Card } from './card';
import type { Child } from './dom';
import { h } from './dom';
import type { ViewContext } from './view';

const HEIGHT = 210;
const PROJECTED_HEIGHT = 460;

/** The properties of a glyph that grow on a projector, where it has them. */
interface Thick {
  line_width?: unknown;
  text_font_size?: unknown;
  size?: unknown;
  line_color?: unknown;
  setv(values: Record<string, unknown>): void;
}

export abstract class Plot extends Card {
  protected figure: Figure | null = null;
  private figureView: FigureView | null = null;
  /**
   * Not a part of Bokeh's figure: that is painted anew, all of it, whenever something in it moves, and this follows the
   * pointer.
   */
  private readonly crosshair = h('div', { attrs: { 'aria-hidden': 'true' } });
  private removeFigure: () => void = () => undefined;
  private ownHeight: number | null = null;
  /** What the glyphs of the figure look like outside the projector's mode. */
  private readonly ownLooks = new Map<Thick, { line: number | null; text: string | null; size: number | null }>();

  constructor(context: ViewContext, name: string, title: string, definition: string, controls: Child[] = []) {
    const { trans } = context;
    super(context, {
      name,
      title,
      definition,
      keys: trans.__('Left and right arrow keys move the crosshair from step to step.'),
      controls
    });
    this.frame.append(h('p', { class: 'iw-plot-wait', text: trans.__('Loading the plot…') }));
  }

  override restyle(): void {
    if (this.figure) {
      this.dress(this.figure);
      this.recolour();
      this.repaint();
    }
    super.restyle();
  }

  override dispose(): void {
    super.dispose();
    this.removeFigure();
  }

  /** Make the figure: ranges, glyphs. */
  protected abstract build(bokeh: Bokeh, shared: { tools: string; height: number }): Figure;
  /** Give the figure new data, and return the caption: the same in words. */
  protected abstract fill(): string;
  /** Set theme-dependent colours of the glyphs. */
  protected abstract recolour(): void;
  /** The step under `x`, `y` of the plot, or null. */
  protected abstract pick(x: number, y: number): void;
  /** Where the crosshair belongs for the selection; null hides it. */
  protected abstract crosshairAt(): number | null;
  /** Move the selection by one. */
  protected abstract walk(direction: -1 | 1): void;

  protected draw(): string | null {
    return this.figure ? this.fill() : null;
  }

  protected override start(): void {
    super.start();
    loadBokeh()
      .then(async bokeh => {
        if (this.disposed) {
          return;
        }
        const figure = this.build(bokeh, { tools: '', height: HEIGHT });
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
        this.showFigure(views.get(figure)!);
      })
      .catch((error: unknown) => {
        const reason = error instanceof Error ? error.message : String(error);
        this.frame.replaceChildren(
          h('p', { class: 'iw-refusal', text: this.context.trans.__('The plot could not be loaded: %1', reason) })
        );
      });
  }

  private showFigure(view: FigureView): void {
    this.figureView = view;
    view.shadow_el.append(this.crosshair);
    view.repainted.connect(() => this.placeCrosshair());
    // Nothing of ours is drawn on it, and a canvas costs something in every frame of the page.
    view.canvas_view.overlays.el.style.display = 'none';
    this.placeCrosshair();
  }

  protected override onSelection(): void {
    this.placeCrosshair();
    super.onSelection();
  }

  private placeCrosshair(): void {
    const { style } = this.crosshair;
    const at = this.crosshairAt();
    const frame = this.figureView?.frame;
    const x = at === null || !frame ? NaN : frame.x_scale.compute(at);
    const within = frame !== undefined && x >= frame.bbox.left && x <= frame.bbox.right;
    style.visibility = within ? 'visible' : 'hidden';
    if (within) {
      style.height = `${frame.bbox.height}px`;
      style.transform = `translate(${x}px, ${frame.bbox.top}px)`;
    }
  }

  protected onArrow(key: string): boolean {
    if (key !== 'ArrowLeft' && key !== 'ArrowRight') {
      return false;
    }
    this.walk(key === 'ArrowLeft' ? -1 : 1);
    return true;
  }

  private dress(figure: Figure): void {
    const { theme, projector } = this.context;
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
      axis.axis_label_text_font_size = projector ? '24px' : '12px';
      axis.major_label_text_font_size = projector ? '24px' : '11px';
    }
    this.thicken(figure);
    for (const grid of figure.grids) {
      grid.grid_line_color = grid.dimension === 1 ? theme.line : null;
      grid.grid_line_alpha = 0.7;
    }
    // Within Bokeh's shadow, where the page's style sheet does not reach.
    this.crosshair.style.cssText =
      `position: absolute; top: 0; left: -${projector ? 1.5 : 0.75}px; pointer-events: none; visibility: hidden; ` +
      `border-left: ${projector ? 3 : 1.5}px dashed ${theme.ink}`;
    this.placeCrosshair();
  }

  /** For a room: lines of three pixels at least, labels of 18 points, and room for both; and back. */
  private thicken(figure: Figure): void {
    const { projector } = this.context;
    this.ownHeight ??= figure.height;
    figure.height = projector ? PROJECTED_HEIGHT : this.ownHeight;
    for (const renderer of figure.renderers) {
      const { glyph } = renderer as unknown as { glyph?: Thick };
      if (!glyph) {
        continue;
      }
      if (!this.ownLooks.has(glyph)) {
        this.ownLooks.set(glyph, { line: plainWidth(glyph), text: plainSize(glyph), size: plainDot(glyph) });
      }
      const own = this.ownLooks.get(glyph)!;
      glyph.setv({
        ...(own.line !== null && { line_width: projector ? Math.max(3, own.line) : own.line }),
        ...(own.text !== null && { text_font_size: projector ? '24px' : own.text }),
        ...(own.size !== null && { size: projector ? own.size * 2.5 : own.size })
      });
    }
  }
}

/** Bokeh holds a constant as `{ value }`, or as what it is; a column's name is left alone. */
function constant(property: unknown): unknown {
  return typeof property === 'object' && property !== null ? (property as { value?: unknown }).value : property;
}

function plainWidth(glyph: Thick): number | null {
  const width = constant(glyph.line_width);
  return typeof width === 'number' && width >= 1 ? width : null;
}

function plainSize(glyph: Thick): string | null {
  const size = constant(glyph.text_font_size);
  return typeof size === 'string' ? size : null;
}

function plainDot(glyph: Thick): number | null {
  const size = constant(glyph.size);
  return typeof size === 'number' ? size : null;
}
