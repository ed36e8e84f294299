/**
 * One row a request, over time: when it waited, computed its prompt, decoded, was left out or preempted. A raw canvas of
 * what is scrolled to, so that hundreds of rows stay smooth; the crosshair over it stands at the engine step that is
 * pointed at.
 */

import type { Phase, Stretch } from '../telemetry/request-phases';
import { PHASES, RequestPhases, timeByPhase } from '../telemetry/request-phases';
import type { RequestRecord, StepRecord } from '../telemetry/store';
import { isActive } from '../telemetry/store';
import type { LegendEntry, Table } from './card';
import { Card } from './card';
import { PHASE, PHASE_ON_DARK } from './colours';
import { h } from './dom';
import { count, duration } from './format';
import type { Translation } from './translation';
import type { ViewContext } from './view';

/** Below this a row cannot be pointed at: from there on the rows scroll. */
const SMALLEST_ROW = 3;
/** Room for the picture, the requests' numbers and the axis, and the size of print; on a desk and for a room. */
const DESK = { height: 232, gutter: 46, axis: 18, print: 11, legible: 11, row: 18, line: 1.5 };
const ROOM = { height: 460, gutter: 96, axis: 34, print: 24, legible: 22, row: 40, line: 3 };
const TABLE_ROWS = 100;

interface Row {
  request: RequestRecord;
  stretches: Stretch[];
}

export class RequestTimeline extends Card {
  private readonly canvas = h('canvas', { class: 'iw-grid-canvas', attrs: { 'aria-hidden': 'true' } });
  private readonly crosshair = h('div', { class: 'iw-timeline-crosshair' });
  private readonly pointedRow = h('div', { class: 'iw-timeline-row' });
  private readonly overlay = h(
    'div',
    { class: 'iw-grid-overlay', attrs: { 'aria-hidden': 'true' } },
    this.crosshair,
    this.pointedRow
  );
  private readonly content = h('div', { class: 'iw-grid' }, this.canvas, this.overlay);
  private readonly phases: RequestPhases;
  private readonly resized: ResizeObserver;
  private rows: Row[] = [];
  private fromNs = 0;
  private toNs = 1;
  private rowHeight = DESK.row;
  private width = 0;
  private lit: number | null = null;
  private cursor: number | null = null;
  /** How long the newest painting took, ms. */
  paintMs = 0;

  constructor(context: ViewContext) {
    const { trans } = context;
    super(context, {
      name: 'timeline',
      title: trans.__('Requests over time'),
      definition: trans.__(
        'One row a request, the newest on top. Queued: from its arrival at the front to the first step that computed it. Prefill, decode, recompute: the steps it was part of, the host’s time between them included. Stalled: steps ran without it. Preempted: it had to give its memory back. The axis is seconds since the server started, on the server’s clock.'
      ),
      keys: trans.__(
        'Left and right arrow keys move the crosshair from step to step, up and down from request to request, Enter highlights the request.'
      )
    });
    this.phases = new RequestPhases(context.store);
    this.element.classList.add('iw-wide');
    this.frame.classList.add('iw-grid-frame');
    this.frame.replaceChildren(this.content);
    this.frame.addEventListener('scroll', () => this.paint());
    this.overlay.addEventListener('mousemove', event => this.point(event.offsetX, event.offsetY));
    this.overlay.addEventListener('mouseleave', () => {
      this.cursor = null;
      context.selection.set(null);
      this.paintOverlay();
    });
    this.overlay.addEventListener('click', () => this.toggle());
    this.resized = new ResizeObserver(() => {
      if (Math.abs(this.frame.clientWidth - this.width) > 1) {
        this.paint();
      }
    });
    this.resized.observe(this.frame);
  }

  override restyle(): void {
    super.restyle();
    this.paint();
  }

  override dispose(): void {
    super.dispose();
    this.resized.disconnect();
  }

  protected draw(): string {
    const { store, trans, windowNs } = this.context;
    const begin = performance.now();
    this.phases.advance();
    const newestNs = Math.max(store.steps.at(-1)?.event.end_ns ?? 0, store.newestSentNs ?? 0);
    const waiting = store.activeRequests.filter(each => each.event?.state === 'queued');
    this.toNs = Math.max(newestNs, ...waiting.map(each => each.event!.at_ns));
    const sinceNs = this.toNs - windowNs;
    const all = [...store.requests.values()]
      .map(request => ({ request, stretches: this.phases.of(request, this.toNs) }))
      .filter(({ stretches }) => stretches.length > 0 && stretches.at(-1)!.toNs >= sinceNs);
    all.sort((a, b) => b.request.handle - a.request.handle);
    this.rows = all;
    const earliest = all.reduce((least, { stretches }) => Math.min(least, stretches[0].fromNs), this.toNs);
    this.fromNs = Math.max(earliest, sinceNs);
    this.paint();
    this.paintMs = performance.now() - begin;
    if (all.length === 0) {
      return trans.__('No request yet.');
    }
    return this.sentence();
  }

  protected override onSelection(): void {
    super.onSelection();
    if (this.lit !== this.context.selection.highlighted) {
      this.paint();
    } else {
      this.paintOverlay();
    }
  }

  protected legend(): LegendEntry[] {
    const { trans, theme } = this.context;
    return PHASES.filter(phase => phase !== 'verify' || this.has('verify')).map(phase => {
      const look = this.look(phase);
      return {
        colour: look.fill,
        text: phaseName(phase, trans),
        hatch: look.hatch ?? undefined,
        line: phase === 'recompute' ? theme.ground : theme.ink
      };
    });
  }

  protected table(): Table {
    const { trans } = this.context;
    return {
      columns: [
        trans.__('request'),
        trans.__('state'),
        trans.__('tokens'),
        ...PHASES.filter(phase => phase !== 'verify').map(phase => phaseName(phase, trans)),
        trans.__('preemptions')
      ],
      rows: this.rows.slice(0, TABLE_ROWS).map(({ request, stretches }) => {
        const times = timeByPhase(stretches);
        return [
          `#${request.handle}`,
          request.event?.state ?? '–',
          request.event?.output_tokens ?? request.tokens.length,
          ...PHASES.flatMap((phase, at) => (phase === 'verify' ? [] : [times[at] > 0 ? duration(times[at]) : '–'])),
          request.event?.preemptions ?? 0
        ];
      })
    };
  }

  protected describe(): string | null {
    const row = this.cursor === null ? undefined : this.rows[this.cursor];
    if (!row) {
      return null;
    }
    const { trans, store, selection } = this.context;
    const { request, stretches } = row;
    const times = timeByPhase(stretches);
    const parts = PHASES.flatMap((phase, at) =>
      times[at] > 0 ? [`${phaseName(phase, trans)} ${duration(times[at])}`] : []
    );
    const step = selection.value ? store.step(selection.value.step) : undefined;
    const now = step
      ? stretches.find(each => each.fromNs <= step.event.end_ns && step.event.end_ns <= each.toNs)
      : null;
    const there = step
      ? trans.__(' · step %1: %2', step.event.step, now ? phaseName(now.phase, trans) : trans.__('it had no part'))
      : '';
    const preview = request.event?.preview ? ` “${request.event.preview.slice(0, 40)}”` : '';
    return trans.__('request #%1%2: %3', request.handle, preview, parts.join(', ')) + there;
  }

  protected onArrow(key: string): boolean {
    const { selection, store } = this.context;
    if (key === 'Enter') {
      this.toggle();
    } else if (key === 'ArrowUp' || key === 'ArrowDown') {
      const move = key === 'ArrowUp' ? -1 : 1;
      this.cursor = Math.min(this.rows.length - 1, Math.max(0, (this.cursor ?? -move) + move));
      this.frame.scrollTop = this.cursor * this.rowHeight - this.size.height / 2;
      this.paintOverlay();
      this.showCaption();
    } else if (key === 'ArrowLeft' || key === 'ArrowRight') {
      const from = selection.value?.step ?? store.steps.at(-1)?.event.step ?? null;
      const to = from === null ? null : selection.value ? from + (key === 'ArrowLeft' ? -1 : 1) : from;
      if (to !== null && store.step(to)) {
        selection.set({ step: to, request: null, index: null });
      }
    } else {
      return false;
    }
    return true;
  }

  private get size(): typeof DESK {
    return this.context.projector ? ROOM : DESK;
  }

  private sentence(): string {
    const { trans } = this.context;
    const active = this.rows.filter(each => isActive(each.request));
    const states = (state: string) => active.filter(each => each.request.event?.state === state).length;
    let longest: { handle: number; ns: number } | null = null;
    for (const { request, stretches } of this.rows) {
      for (const { phase, fromNs, toNs } of stretches) {
        if ((phase === 'stalled' || phase === 'preempted') && toNs - fromNs > (longest?.ns ?? 0)) {
          longest = { handle: request.handle, ns: toNs - fromNs };
        }
      }
    }
    const preemptions = this.rows.reduce((sum, each) => sum + each.request.preemptedNs.length, 0);
    return [
      trans.__('%1 requests in this window', count(this.rows.length)),
      active.length > 0
        ? trans.__('%1 running, %2 queued', states('running'), states('queued'))
        : trans.__('none runs'),
      preemptions > 0 ? trans.__('%1 preemptions', count(preemptions)) : '',
      longest ? trans.__('longest time left out %1 (#%2)', duration(longest.ns), longest.handle) : ''
    ]
      .filter(Boolean)
      .join(' · ');
  }

  private has(phase: Phase): boolean {
    return this.rows.some(({ stretches }) => stretches.some(each => each.phase === phase));
  }

  private toggle(): void {
    const { selection } = this.context;
    const handle = this.cursor === null ? undefined : this.rows[this.cursor]?.request.handle;
    if (handle !== undefined) {
      selection.highlight(selection.highlighted === handle ? null : handle);
    }
  }

  private point(x: number, y: number): void {
    const { gutter } = this.size;
    const row = Math.floor(y / this.rowHeight);
    this.cursor = row >= 0 && row < this.rows.length ? row : null;
    const atNs = this.fromNs + ((x - gutter) / (this.width - gutter)) * (this.toNs - this.fromNs);
    const step = x >= gutter ? this.stepAt(atNs) : null;
    this.context.selection.follow(step === null ? null : { step: step.event.step, request: null, index: null });
    this.paintOverlay();
    this.showCaption();
  }

  /** The step that ran at `atNs`, or the one before it. */
  private stepAt(atNs: number): StepRecord | null {
    const { steps } = this.context.store;
    let low = 0;
    let high = steps.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (steps.at(middle)!.event.begin_ns <= atNs) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return steps.at(Math.max(0, low - 1)) ?? null;
  }

  private look(phase: Phase): { fill: string; hatch: 'diagonal' | 'cross' | null } {
    const { theme } = this.context;
    const phases = theme.dark ? PHASE_ON_DARK : PHASE;
    switch (phase) {
      case 'queued':
        return { fill: phases.queued, hatch: null };
      case 'prefill':
        return { fill: phases.prefill, hatch: null };
      case 'decode':
        return { fill: phases.decode, hatch: null };
      case 'recompute':
        return { fill: phases.recompute, hatch: 'diagonal' };
      case 'verify':
        return { fill: phases.accepted, hatch: null };
      case 'stalled':
        return { fill: theme.ground, hatch: 'diagonal' };
      case 'preempted':
        return { fill: theme.ground, hatch: 'cross' };
    }
  }

  private paint(): void {
    const { gutter, axis } = this.size;
    const width = this.frame.clientWidth - 4;
    const context = this.canvas.getContext('2d');
    if (width <= gutter || !context) {
      return;
    }
    this.width = width;
    // A pixel less than the frame, so that what fits does not scroll.
    const height = this.size.height - 1;
    const space = height - axis - 5;
    this.rowHeight = Math.min(this.size.row, Math.max(SMALLEST_ROW, Math.floor(space / Math.max(1, this.rows.length))));
    const below = height - axis;
    this.content.style.width = `${width}px`;
    this.content.style.height = `${Math.max(below, this.rows.length * this.rowHeight) + axis}px`;
    const scale = window.devicePixelRatio || 1;
    const { canvas } = this;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
    }
    context.setTransform(scale, 0, 0, scale, 0, 0);
    this.crosshair.style.borderLeftWidth = this.pointedRow.style.outlineWidth = `${this.size.line}px`;
    const { theme, selection } = this.context;
    this.lit = selection.highlighted;
    context.clearRect(0, 0, width, height);
    this.paintAxis(context, width, height);
    const hatches = {
      diagonal: hatch(context, theme.ink, false),
      cross: hatch(context, theme.ink, true)
    };
    context.save();
    context.beginPath();
    context.rect(0, 0, width, below);
    context.clip();
    const scrolled = this.frame.scrollTop;
    const first = Math.floor(scrolled / this.rowHeight);
    const last = Math.ceil((scrolled + below) / this.rowHeight);
    const perNs = (width - gutter) / Math.max(1, this.toNs - this.fromNs);
    const bar = Math.max(2, this.rowHeight - (this.rowHeight >= 6 ? 2 : this.rowHeight >= 4 ? 1 : 0));
    this.rows.slice(first, last).forEach(({ request, stretches }, at) => {
      const y = (first + at) * this.rowHeight - scrolled;
      const lit = selection.highlighted === null || selection.highlighted === request.handle;
      context.globalAlpha = lit ? 1 : 0.3;
      for (const { phase, fromNs, toNs } of stretches) {
        if (toNs < this.fromNs) {
          continue;
        }
        const x = gutter + Math.max(0, fromNs - this.fromNs) * perNs;
        const right = gutter + (toNs - this.fromNs) * perNs;
        const look = this.look(phase);
        // A stall survives however short it is on this scale.
        const wide = Math.max(
          phase === 'stalled' || phase === 'preempted' || phase === 'prefill' ? 1.5 : 0.5,
          right - x
        );
        context.fillStyle = look.fill;
        context.fillRect(x, y, wide, bar);
        if (look.hatch) {
          context.fillStyle = hatches[look.hatch] ?? theme.ink;
          context.fillRect(x, y, wide, bar);
        }
        if (bar >= 6 && (phase === 'queued' || look.hatch) && wide > 3) {
          context.strokeStyle = theme.softInk;
          context.lineWidth = 1;
          context.strokeRect(x + 0.5, y + 0.5, wide - 1, bar - 1);
        }
      }
      if (this.rowHeight >= this.size.legible) {
        context.fillStyle = theme.softInk;
        context.font = `${this.size.print}px ${theme.font}`;
        context.textAlign = 'right';
        context.textBaseline = 'middle';
        context.fillText(`#${request.handle}`, gutter - 6, y + bar / 2 + 0.5, gutter - 8);
      }
    });
    context.restore();
    this.paintOverlay();
  }

  private paintAxis(context: CanvasRenderingContext2D, width: number, height: number): void {
    const { gutter, axis } = this.size;
    const { theme, store, trans } = this.context;
    const startedNs = store.server?.started_ns ?? this.fromNs;
    const [from, to] = [(this.fromNs - startedNs) / 1e9, (this.toNs - startedNs) / 1e9];
    const step = niceStep((to - from) / Math.max(2, Math.floor((width - gutter) / (this.size.print * 10))));
    context.font = `${this.size.print}px ${theme.font}`;
    context.textBaseline = 'bottom';
    context.textAlign = 'center';
    context.lineWidth = 1;
    for (let at = Math.ceil(from / step) * step; at <= to && step > 0; at += step) {
      const x = gutter + ((at - from) / Math.max(1e-9, to - from)) * (width - gutter);
      context.strokeStyle = theme.line;
      context.beginPath();
      context.moveTo(x, 0);
      context.lineTo(x, height - axis + 3);
      context.stroke();
      context.fillStyle = theme.softInk;
      if (x < width - 16) {
        context.fillText(trans.__('%1 s', Number(at.toFixed(3))), x, height);
      }
    }
  }

  /** Elements of their own: they follow the pointer, and the picture below them stays. */
  private paintOverlay(): void {
    const { gutter } = this.size;
    const { selection, store } = this.context;
    const step = selection.value ? store.step(selection.value.step) : undefined;
    const shown = step !== undefined && step.event.end_ns >= this.fromNs && step.event.end_ns <= this.toNs;
    this.crosshair.hidden = !shown;
    if (shown) {
      const perNs = (this.width - gutter) / Math.max(1, this.toNs - this.fromNs);
      this.crosshair.style.transform = `translateX(${gutter + (step.event.end_ns - this.fromNs) * perNs}px)`;
    }
    const pointed = this.cursor !== null && this.cursor < this.rows.length;
    this.pointedRow.hidden = !pointed;
    if (pointed) {
      this.pointedRow.style.transform = `translate(${gutter - 2}px, ${this.cursor! * this.rowHeight}px)`;
      this.pointedRow.style.width = `${this.width - gutter + 2}px`;
      this.pointedRow.style.height = `${this.rowHeight}px`;
    }
  }
}

export function phaseName(phase: Phase, trans: Translation): string {
  const names: Record<Phase, string> = {
    queued: trans.__('queued'),
    prefill: trans.__('prefill'),
    decode: trans.__('decode'),
    recompute: trans.__('recompute'),
    verify: trans.__('draft and verify'),
    stalled: trans.__('stalled'),
    preempted: trans.__('preempted')
  };
  return names[phase];
}

/** 1, 2 or 5 times a power of ten, at least `least`. */
export function niceStep(least: number): number {
  if (!(least > 0)) {
    return 0;
  }
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map(each => each * power).find(each => each >= least * (1 - 1e-9))!;
}

function hatch(context: CanvasRenderingContext2D, colour: string, crossed: boolean): CanvasPattern | null {
  const tile = document.createElement('canvas');
  tile.width = tile.height = 5;
  const pen = tile.getContext('2d');
  if (!pen) {
    return null;
  }
  pen.strokeStyle = colour;
  pen.lineWidth = crossed ? 1.4 : 1;
  pen.beginPath();
  for (const shift of [-5, 0, 5]) {
    pen.moveTo(shift, 5);
    pen.lineTo(shift + 5, 0);
    if (crossed) {
      pen.moveTo(shift, 0);
      pen.lineTo(shift + 5, 5);
    }
  }
  pen.stroke();
  return context.createPattern(tile, 'repeat');
}
