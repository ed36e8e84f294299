/**
 * The KV cache, one square a physical block: whose it is or what it holds, how full, shared, cached, just evicted. A raw
 * canvas that repaints only the squares that changed; a second one above it carries the cursor.
 */

import type { BlockLooks } from '../telemetry/kv-looks';
import { BlockLook, blockLooks, computedPositions, summarize } from '../telemetry/kv-looks';
import type { LegendEntry, Table } from './card';
import { Card } from './card';
import { PHASE, PHASE_ON_DARK, REQUEST_COLOURS } from './colours';
import type { Colourings } from './colourings';
import { colourings } from './colourings';
import { h } from './dom';
import { count, percent } from './format';
import type { ViewContext } from './view';

type Colouring = 'phase' | 'request';

/** Room for the picture and the largest square, on a desk and for a room. */
const DESK = { height: 232, largest: 22 };
const ROOM = { height: 460, largest: 44 };
const SMALLEST = 2;
/** From here on there is room for a number in a square. */
const LEGIBLE = 13;
/** An eviction is marked for so many steps. */
const MARKED_STEPS = 40;
/** More requests than this cannot be told apart by hue. */
const MOST_HUES = REQUEST_COLOURS.length;

interface Palette {
  free: string;
  border: string;
  cached: string;
  prompt: string;
  output: string;
  shared: string;
  evicted: string;
  ink: string;
  ground: string;
}

export class KvMap extends Card {
  private readonly canvas = h('canvas', { class: 'iw-grid-canvas', attrs: { 'aria-hidden': 'true' } });
  private readonly overlay = h('canvas', {
    class: 'iw-grid-canvas iw-grid-overlay',
    attrs: { 'aria-hidden': 'true' }
  });
  private readonly holder: HTMLElement;
  private readonly missing = h('p', { class: 'iw-empty', attrs: { hidden: true } });
  private readonly buttons: Colourings<Colouring>;
  private readonly resized: ResizeObserver;
  private colouring: Colouring = 'phase';
  private looks: BlockLooks | null = null;
  /** What each square was painted as. */
  private painted = new Uint32Array(0);
  private columns = 1;
  private cell = DESK.largest;
  private width = 0;
  private scale = 1;
  private cursor: number | null = null;
  /** Hue of each request that holds blocks, while they are few. */
  private readonly hues = new Map<number, number>();
  /** How long the newest painting took, ms. */
  paintMs = 0;

  constructor(context: ViewContext) {
    const { trans } = context;
    const buttons = colourings<Colouring>(
      trans.__('Colours of the blocks'),
      { phase: trans.__('by phase'), request: trans.__('by request') },
      colouring => this.colourBy(colouring)
    );
    super(context, {
      name: 'kv-map',
      title: trans.__('KV cache, block by block'),
      definition: trans.__(
        'Every physical block of the KV cache at the end of the newest step, in the order of memory. Prompt and output: what the positions in the block are. Shared: several requests refer to it; the number says how many. Cached: nobody refers to it, and it can be picked up by its prefix until the memory is needed. The pale part of a used block is reserved and empty. Told by the engine’s own log of its blocks.'
      ),
      keys: trans.__(
        'Arrow keys move from block to block, Enter highlights the request that holds the block, Escape ends that.'
      ),
      controls: [buttons.element]
    });
    this.buttons = buttons;
    buttons.show(this.colouring);
    this.holder = h('div', { class: 'iw-grid' }, this.canvas, this.overlay);
    this.frame.replaceChildren(this.holder, this.missing);
    this.element.classList.add('iw-wide');
    this.frame.classList.add('iw-grid-frame');
    this.overlay.addEventListener('mousemove', event => this.point(this.at(event.offsetX, event.offsetY)));
    this.overlay.addEventListener('mouseleave', () => this.point(null));
    this.overlay.addEventListener('click', event => this.toggle(this.at(event.offsetX, event.offsetY)));
    this.resized = new ResizeObserver(() => {
      if (Math.abs(this.frame.clientWidth - this.width) > 1) {
        this.paintAnew();
      }
    });
    this.resized.observe(this.frame);
  }

  override restyle(): void {
    super.restyle();
    this.paintAnew();
  }

  override dispose(): void {
    super.dispose();
    this.resized.disconnect();
  }

  protected draw(): string {
    const { store, trans } = this.context;
    const { kv } = store;
    const known = kv.numBlocks !== null;
    this.holder.hidden = !known;
    this.missing.hidden = known;
    if (!known) {
      this.looks = null;
      this.missing.textContent =
        (store.features?.values['instrumentation'] ?? 'full') === 'full'
          ? trans.__('No block is known yet: they are told of once the engine computes.')
          : trans.__('Blocks are not logged at this level of the switch Instrumentation: set it to full.');
      return '';
    }
    const begin = performance.now();
    this.looks = blockLooks(store);
    this.assignHues();
    this.lay(kv.numBlocks!);
    this.paintChanged();
    this.paintMs = performance.now() - begin;
    const sums = summarize(kv, this.looks);
    const parts = [
      trans.__('%1 blocks of %2 positions', count(sums.total), this.looks.blockSize),
      sums.shared > 0
        ? trans.__('%1 used, of them %2 shared', count(sums.used), count(sums.shared))
        : trans.__('%1 used', count(sums.used)),
      trans.__('%1 cached · %2 free', count(sums.cached), count(sums.free))
    ];
    if (sums.slots > 0) {
      parts.push(trans.__('%1 of the used positions filled', percent(sums.filled / sums.slots)));
    }
    if (kv.evictions > 0) {
      parts.push(trans.__('%1 evictions', count(kv.evictions)));
    }
    if (this.colouring === 'request' && kv.tables.size > MOST_HUES) {
      parts.push(trans.__('%1 requests: more than hues can tell apart; point at a block', count(kv.tables.size)));
    }
    return parts.join(' · ');
  }

  protected override onSelection(): void {
    super.onSelection();
    if (this.looks) {
      this.paintChanged();
    }
  }

  protected legend(): LegendEntry[] {
    const { trans } = this.context;
    const palette = this.palette();
    const rest: LegendEntry[] = [
      { colour: palette.shared, text: trans.__('shared (count)') },
      { colour: palette.cached, text: trans.__('cached, evictable'), look: 'outline' },
      { colour: palette.border, text: trans.__('free'), look: 'outline' },
      { colour: palette.evicted, text: trans.__('just evicted'), look: 'triangle' }
    ];
    if (this.colouring === 'request') {
      const held = [...this.hues].sort(([a], [b]) => a - b);
      return held
        .map(([request, hue]): LegendEntry => ({ colour: REQUEST_COLOURS[hue], text: `#${request}` }))
        .concat(rest);
    }
    return [
      { colour: palette.prompt, text: trans.__('prompt') },
      { colour: palette.output, text: trans.__('output') },
      ...rest
    ];
  }

  protected table(): Table {
    const { store, trans } = this.context;
    const { kv } = store;
    const computed = computedPositions(store);
    const size = this.looks?.blockSize ?? 1;
    const rows = [...kv.tables]
      .sort(([a], [b]) => b - a)
      .slice(0, 100)
      .map(([request, table]) => {
        const filled = Math.min(computed.get(request) ?? 0, table.length * size);
        return [
          `#${request}`,
          table.length,
          table.filter(block => kv.references[block] > 1).length,
          filled,
          table.length * size - filled,
          ranges(table)
        ];
      });
    return {
      columns: [
        trans.__('request'),
        trans.__('blocks'),
        trans.__('of them shared'),
        trans.__('positions filled'),
        trans.__('reserved and empty'),
        trans.__('where')
      ],
      rows
    };
  }

  protected describe(): string | null {
    const { store, trans } = this.context;
    const { kv } = store;
    const block = this.cursor;
    if (block === null || this.looks === null || kv.numBlocks === null || block >= kv.numBlocks) {
      return null;
    }
    const size = this.looks.blockSize;
    const evicted = kv.evictedAt[block] >= 0 ? ` · ${trans.__('evicted in step %1', kv.evictedAt[block])}` : '';
    const state = kv.state(block);
    if (state !== 'used') {
      return (
        (state === 'free' ? trans.__('block %1: free', block) : trans.__('block %1: cached, evictable', block)) +
        evicted
      );
    }
    const holdings = kv.holdings(block);
    const { request, index } = holdings[0] ?? { request: kv.owner[block], index: 0 };
    const range = `${index * size}–${(index + 1) * size - 1}`;
    const filled = trans.__('%1 of %2 filled', this.looks.filled[block], size);
    const others = holdings.slice(1).map(each => `#${each.request}`);
    const shared =
      others.length > 0
        ? ` · ${trans.__('shared by %1, also of %2', holdings.length, others.slice(0, 8).join(', '))}`
        : '';
    const what = this.looks.look[block] === (BlockLook.Output as number) ? trans.__('output') : trans.__('prompt');
    return (
      trans.__('block %1: positions %2 of request #%3 (%4), %5', block, range, request, what, filled) + shared + evicted
    );
  }

  protected onArrow(key: string): boolean {
    const total = this.context.store.kv.numBlocks ?? 0;
    const moves: Record<string, number> = {
      ArrowLeft: -1,
      ArrowRight: 1,
      ArrowUp: -this.columns,
      ArrowDown: this.columns
    };
    if (key === 'Enter') {
      this.toggle(this.cursor);
      return true;
    }
    if (!(key in moves) || total === 0) {
      return false;
    }
    const to = this.cursor === null ? 0 : this.cursor + moves[key];
    this.point(Math.min(total - 1, Math.max(0, to)));
    return true;
  }

  private colourBy(colouring: Colouring): void {
    this.colouring = colouring;
    this.buttons.show(colouring);
    this.drawLegend();
    this.paintAnew();
    this.repaint();
  }

  private point(block: number | null): void {
    if (block === this.cursor) {
      return;
    }
    this.cursor = block;
    this.paintCursor();
    this.showCaption();
  }

  private toggle(block: number | null): void {
    const { selection, store } = this.context;
    const owner = block === null ? -1 : store.kv.owner[block];
    selection.highlight(owner < 0 || selection.highlighted === owner ? null : owner);
  }

  private at(x: number, y: number): number | null {
    const total = this.context.store.kv.numBlocks ?? 0;
    const column = Math.floor(x / this.cell);
    const block = Math.floor(y / this.cell) * this.columns + column;
    return column < this.columns && block >= 0 && block < total ? block : null;
  }

  /** Choose the size of a square, so that all blocks fit if they can be seen at all. */
  private lay(total: number): void {
    const width = this.frame.clientWidth - 4;
    if (width <= 0) {
      return;
    }
    const { height: space, largest } = this.context.projector ? ROOM : DESK;
    let cell = Math.min(largest, Math.max(SMALLEST, Math.floor(Math.sqrt((width * space) / Math.max(1, total)))));
    while (cell > SMALLEST && Math.ceil(total / Math.floor(width / cell)) * cell > space) {
      cell -= 1;
    }
    const columns = Math.max(1, Math.floor(width / cell));
    const height = Math.ceil(total / columns) * cell;
    const scale = window.devicePixelRatio || 1;
    const same =
      this.painted.length === total && columns === this.columns && cell === this.cell && scale === this.scale;
    this.width = this.frame.clientWidth;
    if (same) {
      return;
    }
    [this.cell, this.columns, this.scale] = [cell, columns, scale];
    for (const canvas of [this.canvas, this.overlay]) {
      canvas.width = Math.round(columns * cell * scale);
      canvas.height = Math.round(height * scale);
      canvas.style.width = `${columns * cell}px`;
      canvas.style.height = `${height}px`;
      canvas.getContext('2d')?.setTransform(scale, 0, 0, scale, 0, 0);
    }
    this.painted = new Uint32Array(total);
    this.paintCursor();
  }

  private paintAnew(): void {
    this.painted = new Uint32Array(0);
    if (this.looks) {
      this.lay(this.context.store.kv.numBlocks ?? 0);
      this.paintChanged();
    }
  }

  /** Requests keep their hue as long as they hold blocks. */
  private assignHues(): void {
    const { tables } = this.context.store.kv;
    let changed = false;
    for (const request of this.hues.keys()) {
      if (!tables.has(request) || tables.size > MOST_HUES) {
        this.hues.delete(request);
        changed = true;
      }
    }
    if (tables.size <= MOST_HUES) {
      for (const request of tables.keys()) {
        if (!this.hues.has(request)) {
          const taken = new Set(this.hues.values());
          this.hues.set(
            request,
            REQUEST_COLOURS.findIndex((_, hue) => !taken.has(hue))
          );
          changed = true;
        }
      }
    }
    if (changed && this.colouring === 'request') {
      this.drawLegend();
    }
  }

  private paintChanged(): void {
    const { store, selection } = this.context;
    const { kv } = store;
    const context = this.canvas.getContext('2d');
    const { looks, painted, cell } = this;
    if (!context || !looks || painted.length !== looks.look.length) {
      return;
    }
    const lit = selection.highlighted;
    const inLight = lit === null ? null : new Set(kv.tables.get(lit) ?? []);
    const palette = this.palette();
    const byRequest = this.colouring === 'request';
    const quarters = cell >= 5 ? 4 : 1;
    for (let block = 0; block < painted.length; block++) {
      const look = looks.look[block];
      const quarter = Math.ceil((looks.filled[block] * quarters) / looks.blockSize);
      const evicted = kv.evictedAt[block] >= 0 && kv.step - kv.evictedAt[block] < MARKED_STEPS ? 1 : 0;
      const dim = inLight !== null && !inLight.has(block) ? 1 : 0;
      const hue = byRequest && kv.owner[block] >= 0 ? (this.hues.get(kv.owner[block]) ?? MOST_HUES) + 1 : 0;
      const shared = look === (BlockLook.Shared as number) ? Math.min(99, kv.references[block]) : 0;
      // The top bit tells "free and painted" from "not painted".
      const code =
        (0x80000000 | look | (quarter << 3) | (evicted << 6) | (dim << 7) | (hue << 8) | (shared << 13)) >>> 0;
      if (painted[block] !== code) {
        painted[block] = code;
        this.paintBlock(context, palette, block, look, quarter / quarters, evicted === 1, dim === 1, hue, shared);
      }
    }
  }

  private paintBlock(
    context: CanvasRenderingContext2D,
    palette: Palette,
    block: number,
    look: BlockLook,
    filled: number,
    evicted: boolean,
    dim: boolean,
    hue: number,
    shared: number
  ): void {
    const { cell } = this;
    const gap = cell >= 5 ? 1 : 0;
    const size = cell - gap;
    const x = (block % this.columns) * cell;
    const y = Math.floor(block / this.columns) * cell;
    context.globalAlpha = 1;
    context.fillStyle = palette.ground;
    context.fillRect(x, y, cell, cell);
    context.globalAlpha = dim ? 0.25 : look === BlockLook.Free ? 0.35 : 1;
    if (look === BlockLook.Free || look === BlockLook.Cached) {
      const colour = look === BlockLook.Cached ? palette.cached : palette.border;
      if (cell >= 5) {
        context.strokeStyle = colour;
        context.lineWidth = 1;
        context.strokeRect(x + 0.5, y + 0.5, size - 1, size - 1);
        if (look === BlockLook.Cached) {
          // Never colour alone: cached blocks carry a dot.
          const dot = Math.max(1, Math.round(cell / 4));
          context.fillStyle = colour;
          context.fillRect(x + Math.floor((size - dot) / 2), y + Math.floor((size - dot) / 2), dot, dot);
        }
      } else {
        context.globalAlpha *= look === BlockLook.Cached ? 0.55 : 0.3;
        context.fillStyle = colour;
        context.fillRect(x, y, Math.max(1, cell - 1), Math.max(1, cell - 1));
      }
    } else {
      const plain =
        look === BlockLook.Shared ? palette.shared : look === BlockLook.Output ? palette.output : palette.prompt;
      const colour = hue === 0 ? plain : hue <= MOST_HUES ? REQUEST_COLOURS[hue - 1] : palette.border;
      const alpha = context.globalAlpha;
      context.fillStyle = colour;
      if (filled < 1) {
        context.globalAlpha = alpha * 0.28;
        context.fillRect(x, y, size, size);
        context.globalAlpha = alpha;
      }
      const height = Math.round(size * filled);
      context.fillRect(x, y + size - height, size, height);
      if (shared > 0) {
        if (cell >= LEGIBLE) {
          context.fillStyle = hue === 0 ? '#ffffff' : palette.ink;
          context.font = `600 ${Math.min(this.context.projector ? 24 : 12, cell - 5)}px sans-serif`;
          context.textAlign = 'center';
          context.textBaseline = 'middle';
          context.fillText(String(shared), x + size / 2, y + size / 2 + 0.5, size);
        } else if (cell >= 4) {
          context.fillStyle = '#ffffff';
          context.fillRect(x + 1, y + 1, Math.max(1, size - 3), 1);
        }
      }
    }
    if (evicted && cell >= 4) {
      const corner = Math.max(2, Math.round(cell * 0.45));
      context.globalAlpha = 1;
      context.fillStyle = palette.evicted;
      context.beginPath();
      context.moveTo(x + size, y);
      context.lineTo(x + size, y + corner);
      context.lineTo(x + size - corner, y);
      context.fill();
    }
    context.globalAlpha = 1;
  }

  private paintCursor(): void {
    const context = this.overlay.getContext('2d');
    if (!context) {
      return;
    }
    const { cell, cursor } = this;
    context.clearRect(0, 0, this.columns * cell, this.overlay.height);
    if (cursor !== null) {
      context.strokeStyle = this.context.theme.ink;
      context.lineWidth = 2;
      const grown = Math.max(cell, 6);
      const x = (cursor % this.columns) * cell - (grown - cell) / 2;
      const y = Math.floor(cursor / this.columns) * cell - (grown - cell) / 2;
      context.strokeRect(Math.max(1, x), Math.max(1, y), grown - 1, grown - 1);
    }
  }

  private palette(): Palette {
    const { theme } = this.context;
    const phase = theme.dark ? PHASE_ON_DARK : PHASE;
    return {
      free: theme.ground,
      border: theme.softInk,
      cached: phase.cacheHit,
      prompt: phase.prefill,
      output: phase.decode,
      shared: phase.cacheHit,
      evicted: phase.rejected,
      ink: theme.ink,
      ground: theme.ground
    };
  }
}

/** "3–7, 12": neighbouring blocks together, the first few. */
export function ranges(blocks: readonly number[], most = 6): string {
  const found: [number, number][] = [];
  for (const block of [...blocks].sort((a, b) => a - b)) {
    const last = found.at(-1);
    if (last && block === last[1] + 1) {
      last[1] = block;
    } else {
      found.push([block, block]);
    }
  }
  const text = found.slice(0, most).map(([from, to]) => (from === to ? String(from) : `${from}–${to}`));
  return text.join(', ') + (found.length > most ? ', …' : '');
}
