/** The whole workbench: all views over one store, one repaint loop, one selection. The same in every host. */

import { pageNow } from '../telemetry/clock';
import type { TelemetryConnection } from '../telemetry/connection';
import type { TelemetryStore } from '../telemetry/store';
import type { Manifest } from '../replay/recording';
import type { ReplaySource } from '../replay/source';
import type { LayoutName, Shown } from './arrangement';
import { Arrangement } from './arrangement';
import { AttributionPlot } from './attribution-plot';
import { BatchPlot } from './batch-plot';
import { h } from './dom';
import { Economy } from './economy';
import { EventFeed } from './event-feed';
import type { Card } from './card';
import { KvMap } from './kv-map';
import { KvPlot } from './kv-plot';
import { LatencyHistogram } from './latency-histogram';
import { LatencyPlot } from './latency-plot';
import { PaintLoop } from './loop';
import { MemoryBar } from './memory-bar';
import type { PaintStats } from './loop';
import type { CellHost } from './prompt-box';
import { PromptBox } from './prompt-box';
import type { RecordingHost } from './recorder';
import { Recorder } from './recorder';
import { RequestTimeline } from './request-timeline';
import { Roofline } from './roofline';
import type { ServerHost } from './server-chooser';
import { ServerChooser } from './server-chooser';
import { Selection } from './selection';
import { SpeculationPlot } from './speculation-plot';
import { StatusBar } from './status-bar';
import { Switchboard } from './switchboard';
import type { Theme } from './theme';
import { readTheme, watchTheme } from './theme';
import { Tiles } from './tiles';
import { TokenStrip } from './token-strip';
import { TokenWhy } from './token-why';
import { Traffic } from './traffic';
import type { Translation } from './translation';
import { untranslated } from './translation';
import { Transport } from './transport';
import type { View, ViewContext } from './view';

export interface WorkbenchOptions {
  trans?: Translation;
  /** Repaints per second, at most. */
  repaintRate?: number;
  /** Seconds that figures and plots look back; 0 for everything kept. */
  windowSeconds?: number;
  /** Which figures are shown at first. */
  layout?: LayoutName;
  /** Show this figure alone, without prompt and switches. */
  only?: string;
  /** Where the page can put a notebook cell. */
  cells?: () => CellHost | null;
  /** What this page can do with a recording that was made here. */
  recordings?: () => RecordingHost | null;
  /** Which server this is, and which others there are. */
  servers?: ServerHost;
  /** Shown instead of a server: a recording, moved through by its own controls. */
  replay?: { source: ReplaySource; manifest: Manifest; bytes: number };
}

export interface WorkbenchStats extends PaintStats {
  /** Events the server left out because the page was too slow. */
  dropped: number;
  reconnects: number;
  connection: string;
  engine: string | null;
  /** Half the quickest clock exchange: the largest error of the latencies. */
  clockUncertaintyMs: number | null;
}

/** Scrubbing follows the hand. */
const REPLAY_RATE = 60;
/** After two jumps within this time the views are drawn in a hurry, and in full once there was none for as long. */
const HURRY_MS = 200;
/** For drawing plots after a frame. What Bokeh puts on the canvas in the next frame takes about as long again. */
const PLOTS_MS = 8;
/** Longer than from one frame to the next while tokens stream. */
const TAIL_MS = 300;
/** Then the next ones may follow soon: there is nothing to hold up. */
const NEXT_MS = 40;

export class Workbench {
  readonly element: HTMLElement;
  readonly switchboard: Switchboard;
  private readonly views: View[];
  private readonly plots: Card[];
  private readonly context: ViewContext & { theme: Theme; windowNs: number; hurried: boolean; projector: boolean };
  private readonly loop: PaintLoop;
  private readonly prompt: PromptBox | null;
  private readonly chooser: ServerChooser | null;
  private readonly stops: (() => void)[] = [];
  readonly arrangement: Arrangement;
  /** Those that stand still while the figures are paused. */
  private readonly frozen: ReadonlySet<View>;
  private pausedAt = 0;
  private tail: ReturnType<typeof setTimeout> | null = null;
  private calm: ReturnType<typeof setTimeout> | null = null;
  private generation = 0;
  private jumpedAt = -Infinity;

  constructor(
    private readonly connection: TelemetryConnection,
    options: WorkbenchOptions = {}
  ) {
    const trans = options.trans ?? untranslated;
    const { store } = connection;
    this.element = h('div', {
      class: 'iw-workbench',
      attrs: { role: 'region', 'aria-label': trans.__('Inference Workbench') }
    });
    this.context = {
      store,
      connection,
      selection: new Selection(),
      trans,
      theme: readTheme(this.element),
      windowNs: Infinity,
      hurried: false,
      projector: false
    };
    this.loop = new PaintLoop(
      {
        paint: () => this.paint(),
        painted: () => this.paintPlots(),
        visible: () => this.element.isConnected && this.element.checkVisibility(),
        serverTime: pageMs => connection.clock.serverTime(pageMs),
        newestSentNs: () => store.newestSentNs
      },
      options.replay ? REPLAY_RATE : (options.repaintRate ?? 10)
    );
    const { replay } = options;
    const recorder = replay ? null : new Recorder(this.context, options.recordings ?? (() => null));
    this.chooser = options.servers ? new ServerChooser(options.servers, trans) : null;
    const status = new StatusBar(
      this.context,
      () => this.loop.stats(),
      recorder?.element ?? null,
      this.chooser?.element ?? null
    );
    const transport = replay ? new Transport(this.context, replay.source, replay.manifest, replay.bytes) : null;
    const tiles = new Tiles(this.context);
    const instance = options.servers?.instance ?? null;
    const prompt = replay ? null : new PromptBox(this.context, options.cells ?? (() => null), instance);
    this.prompt = prompt;
    const traffic = replay ? null : new Traffic(this.context);
    this.switchboard = new Switchboard(this.context);
    const strip = new TokenStrip(this.context);
    const why = new TokenWhy(this.context);
    this.plots = [
      new RequestTimeline(this.context),
      new LatencyPlot(this.context),
      new AttributionPlot(this.context),
      new BatchPlot(this.context),
      new SpeculationPlot(this.context),
      new KvPlot(this.context),
      new KvMap(this.context),
      new MemoryBar(this.context),
      new LatencyHistogram(this.context),
      new Roofline(this.context),
      new Economy(this.context)
    ];
    const feed = new EventFeed(this.context);
    this.views = [status, recorder, transport, tiles, prompt, traffic, this.switchboard, strip, why, feed].filter(
      each => each !== null
    );
    this.frozen = new Set<View>([tiles, strip, feed]);
    const figures: Shown[] = [
      ...this.plots.map(card => ({ name: card.name, title: card.title, element: card.element })),
      { name: 'events', title: trans.__('Events'), element: feed.element }
    ];
    this.arrangement = new Arrangement(
      {
        trans,
        figures,
        setWindow: seconds => this.setWindow(seconds),
        setPaused: paused => this.setPaused(paused),
        arranged: () => this.rearrange()
      },
      this.element
    );
    this.element.append(
      status.element,
      transport?.element ?? '',
      h(
        'div',
        { class: replay ? 'iw-body iw-replayed' : 'iw-body' },
        tiles.element,
        prompt && traffic && h('div', { class: 'iw-ask-area' }, prompt.element, traffic.element),
        h('div', { class: 'iw-strip-area' }, strip.element, why.element),
        this.switchboard.element,
        h(
          'div',
          { class: 'iw-plots-area' },
          this.arrangement.element,
          h('div', { class: 'iw-plots' }, ...this.plots.map(plot => plot.element), feed.element)
        )
      )
    );
    this.setWindow(options.windowSeconds ?? 30);
    if (options.only !== undefined) {
      this.element.dataset.only = options.only;
      this.arrangement.showOnly([options.only]);
    } else {
      this.arrangement.setLayout(options.layout ?? 'all');
    }
    this.stops.push(
      // A replay moves when somebody moves it; a server's frames come when they come.
      store.onChange(connection.readOnly ? this.loop.requestNow : this.loop.request),
      connection.onStatus(this.loop.requestNow),
      watchTheme(() => this.restyle())
    );
    if (replay && transport) {
      this.element.addEventListener('keydown', transport.onKey);
      this.stops.push(
        replay.source.onMove(() => {
          // What plays by itself is read like a live server; only a hand wants to be followed at once.
          this.loop.setRate(replay.source.playing ? (options.repaintRate ?? 10) : REPLAY_RATE);
          this.loop.requestNow();
        })
      );
    }
    const seen = new IntersectionObserver(() => this.loop.requestNow());
    seen.observe(this.element);
    this.stops.push(() => seen.disconnect(), this.watchScrolling());
    // Colours come from CSS, which applies once the element is in the page.
    requestAnimationFrame(() => this.restyle());
    this.loop.requestNow();
  }

  get store(): TelemetryStore {
    return this.connection.store;
  }

  setRepaintRate(rate: number): void {
    this.loop.setRate(rate);
  }

  setWindow(seconds: number): void {
    this.context.windowNs = seconds === 0 ? Infinity : seconds * 1e9;
    this.arrangement.markWindow(seconds);
    this.connection.store.version += 1;
    this.loop.requestNow();
  }

  /** Take over what somebody arranged and wrote in another workbench, whose place this one takes. */
  resemble(other: Workbench): void {
    this.arrangement.resemble(other.arrangement);
    this.setWindow(Number.isFinite(other.context.windowNs) ? other.context.windowNs / 1e9 : 0);
    if (this.prompt && other.prompt) {
      this.prompt.resemble(other.prompt);
    }
  }

  /** Let a person choose the server, even if there is only one. */
  askServer(): void {
    this.chooser?.ask();
  }

  /** Draw soon: the view may have become visible. */
  refresh(): void {
    this.loop.requestNow();
  }

  stats(): WorkbenchStats {
    return {
      ...this.loop.stats(),
      dropped: this.connection.store.dropped,
      reconnects: this.connection.reconnects,
      connection: this.connection.status.state,
      engine: this.connection.store.engine?.state ?? null,
      clockUncertaintyMs: this.connection.clock.uncertaintyMs
    };
  }

  resetStats(): void {
    this.loop.resetStats();
  }

  dispose(): void {
    for (const timer of [this.tail, this.calm]) {
      if (timer !== null) {
        clearTimeout(timer);
      }
    }
    this.stops.forEach(stop => stop());
    this.chooser?.dispose();
    this.loop.dispose();
    [...this.views, ...this.plots].forEach(view => view.dispose?.());
    this.element.remove();
  }

  private paint(): void {
    this.watchJumps();
    const { paused } = this.arrangement;
    this.views.forEach(view => {
      if (!paused || !this.frozen.has(view)) {
        view.update();
      }
    });
    if (paused) {
      this.arrangement.sayMissed(this.connection.store.events - this.pausedAt);
    }
  }

  private setPaused(paused: boolean): void {
    this.pausedAt = this.connection.store.events;
    if (!paused) {
      this.connection.store.version += 1;
    }
    this.loop.requestNow();
  }

  /** Figures came, went or changed their size. */
  private rearrange(): void {
    if (this.context.projector !== this.arrangement?.projector) {
      this.context.projector = this.arrangement?.projector ?? false;
      this.plots.forEach(card => card.restyle());
    }
    this.loop.requestNow();
  }

  /** Know which figures are scrolled out of sight. */
  private watchScrolling(): () => void {
    const cards = new Map<Element, Card>(this.plots.map(card => [card.element, card]));
    const observer = new IntersectionObserver(
      entries => {
        for (const { target, isIntersecting } of entries) {
          cards.get(target)!.setOnScreen(isIntersecting);
        }
        this.loop.requestNow();
      },
      { rootMargin: '240px' }
    );
    cards.forEach((_, element) => observer.observe(element));
    return () => observer.disconnect();
  }

  /** Notice when the store is exchanged many times a second, and when that is over. */
  private watchJumps(): void {
    const { generation } = this.connection.store;
    if (generation !== this.generation) {
      this.generation = generation;
      const now = pageNow();
      this.context.hurried = now - this.jumpedAt < HURRY_MS;
      this.jumpedAt = now;
      if (this.context.hurried) {
        if (this.calm !== null) {
          clearTimeout(this.calm);
        }
        this.calm = setTimeout(() => {
          this.calm = null;
          this.context.hurried = false;
          this.loop.requestNow();
        }, HURRY_MS);
      }
    }
  }

  /**
   * Paint the plots that came into view or else waited longest, as many as are drawn in {@link PLOTS_MS}. A canvas costs more than all the text,
   * so this comes right after a frame with new tokens is on the screen, when the next ones are furthest away: drawn in that
   * frame, or at a time of its own, it would hold them up. Only when no more frames come do the others follow by a timer,
   * those out of sight too: their captions are read aloud, and their tables opened, wherever the page is scrolled to.
   */
  private paintPlots(pauseMs = TAIL_MS): void {
    if (this.tail !== null) {
      clearTimeout(this.tail);
      this.tail = null;
    }
    if (this.arrangement.paused) {
      return;
    }
    const due = this.plots
      .filter(plot => plot.due)
      .sort((a, b) => Number(b.awaited) - Number(a.awaited) || a.paintedAt - b.paintedAt);
    const begin = pageNow();
    for (const plot of due) {
      plot.update();
      if (pageNow() - begin >= PLOTS_MS) {
        break;
      }
    }
    if (this.plots.some(plot => plot.stale && !plot.element.hidden)) {
      this.tail = setTimeout(() => {
        this.tail = null;
        if (!document.hidden && this.element.checkVisibility()) {
          this.paintPlots(NEXT_MS);
        }
      }, pauseMs);
    }
  }

  private restyle(): void {
    this.context.theme = readTheme(this.element);
    this.element.dataset.dark = String(this.context.theme.dark);
    [...this.views, ...this.plots].forEach(view => view.restyle?.());
    this.loop.requestNow();
  }
}
