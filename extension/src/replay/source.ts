/**
 * Plays a recording into a store, as a connection would: play and pause, speed, seeking by time and by step. To the views
 * it is a connection whose server can only be looked at.
 */

import { ClockOffset, pageNow } from '../telemetry/clock';
import type { ConnectionStatus, TelemetryConnection } from '../telemetry/connection';
import { RefusedError } from '../telemetry/connection';
import { TelemetryStore } from '../telemetry/store';
import type { Timeline } from './timeline';

/** Times faster than it was; `max` plays the whole recording in {@link MAX_SPEED_S} seconds. */
export type Speed = number | 'max';

export const SPEEDS: readonly Speed[] = [0.25, 0.5, 1, 2, 4, 8, 16, 'max'];
export const MAX_SPEED_S = 10;

/** More events than this are not told one by one: the store is given what came of them. */
const MOST_EVENTS = 6000;
/** A pause of the recording longer than this is skipped where that is wanted. */
const LONG_PAUSE_NS = 1e9;
const BEFORE_NEXT_NS = 2e8;
const TICK_MS = 30;

const REFUSAL = 'This is a recording: nothing can be started or switched in it.';

export class ReplaySource implements TelemetryConnection {
  readonly store = new TelemetryStore();
  /** Without exchanges: the age of a recorded token says nothing. */
  readonly clock = new ClockOffset();
  readonly status: ConnectionStatus = { state: 'connected', reason: '', retryAt: null };
  readonly reconnects = 0;
  readonly controlsEngine = false;
  readonly readOnly = true;
  private now: number;
  private running = false;
  private rate: Speed = 1;
  private skipping = true;
  private lastTick = 0;
  private timer: ReturnType<typeof setTimeout> | null = null;
  private seq = 0;
  private readonly listeners = new Set<() => void>();

  constructor(readonly timeline: Timeline) {
    this.now = timeline.beginNs;
    this.store.applySnapshot(timeline.snapshot());
  }

  // -- where it is ---------------------------------------------------------------------------------------------------

  /** The moment shown, on the recorded server's clock. */
  get nowNs(): number {
    return this.now;
  }

  /** Since the beginning of the recording. */
  get elapsedNs(): number {
    return this.now - this.timeline.beginNs;
  }

  get playing(): boolean {
    return this.running;
  }

  get speed(): Speed {
    return this.rate;
  }

  get skipsPauses(): boolean {
    return this.skipping;
  }

  /** Row of the newest step that had ended by now; -1 before the first. */
  get stepRow(): number {
    return this.timeline.stepsBy(this.now) - 1;
  }

  /** Be told when the position, the speed or play and pause have changed. */
  onMove(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  // -- moving --------------------------------------------------------------------------------------------------------

  play(): void {
    if (this.running) {
      return;
    }
    if (this.now >= this.timeline.endNs) {
      this.seek(this.timeline.beginNs);
    }
    this.running = true;
    this.lastTick = pageNow();
    this.schedule();
    this.moved();
  }

  pause(): void {
    if (this.running) {
      this.running = false;
      this.stopTimer();
      this.moved();
    }
  }

  toggle(): void {
    if (this.running) {
      this.pause();
    } else {
      this.play();
    }
  }

  setSpeed(speed: Speed): void {
    this.advance();
    this.rate = speed;
    this.moved();
  }

  /** The next speed up or down. */
  changeSpeed(direction: -1 | 1): void {
    const at = SPEEDS.indexOf(this.rate) + direction;
    if (at >= 0 && at < SPEEDS.length) {
      this.setSpeed(SPEEDS[at]);
    }
  }

  setSkipsPauses(skips: boolean): void {
    this.skipping = skips;
    this.moved();
  }

  /** Show the moment `atNs`, wherever it lies. */
  seek(atNs: number): void {
    const to = Math.min(this.timeline.endNs, Math.max(this.timeline.beginNs, atNs));
    this.lastTick = pageNow();
    this.show(to);
    this.moved();
  }

  seekStep(row: number): void {
    const { timeline } = this;
    if (timeline.stepCount > 0) {
      this.seek(timeline.momentOfStep(Math.min(timeline.stepCount - 1, Math.max(0, row))));
    }
  }

  /** Go to the next or previous step, and stay there. */
  walk(steps: number): void {
    this.pause();
    const row = this.stepRow + steps;
    if (row < 0) {
      this.seek(this.timeline.beginNs);
    } else {
      this.seekStep(row);
    }
  }

  // -- what a connection does ----------------------------------------------------------------------------------------

  connect(): void {
    // There is nothing to wait for.
  }

  retry(): void {
    // Nothing was lost.
  }

  onStatus(): () => void {
    return () => undefined;
  }

  setFeatures(): Promise<void> {
    return Promise.reject(new RefusedError(REFUSAL));
  }

  generate(): Promise<void> {
    return Promise.reject(new RefusedError(REFUSAL));
  }

  stopGenerating(): void {
    // Nothing runs.
  }

  engine(): Promise<void> {
    return Promise.reject(new RefusedError(REFUSAL));
  }

  traffic(): Promise<void> {
    return Promise.reject(new RefusedError(REFUSAL));
  }

  record(): Promise<void> {
    return Promise.reject(new RefusedError(REFUSAL));
  }

  dispose(): void {
    this.running = false;
    this.stopTimer();
    this.listeners.clear();
  }

  // -- the clock -----------------------------------------------------------------------------------------------------

  private schedule(): void {
    this.timer = setTimeout(() => {
      this.advance();
      if (this.running) {
        this.schedule();
      }
    }, TICK_MS);
  }

  private stopTimer(): void {
    if (this.timer !== null) {
      clearTimeout(this.timer);
      this.timer = null;
    }
  }

  private advance(): void {
    if (!this.running) {
      return;
    }
    const { timeline } = this;
    const at = pageNow();
    const rate = this.rate === 'max' ? Math.max(16, timeline.durationNs / (MAX_SPEED_S * 1e9)) : this.rate;
    let to = this.now + (at - this.lastTick) * 1e6 * rate;
    this.lastTick = at;
    if (this.skipping) {
      const next = timeline.nextMoment(to);
      if (next - to > LONG_PAUSE_NS * rate && timeline.countBetween(this.now, to) === 0) {
        to = next - BEFORE_NEXT_NS * rate;
      }
    }
    this.show(Math.min(to, timeline.endNs));
    if (this.now >= timeline.endNs) {
      this.running = false;
      this.stopTimer();
    }
    this.moved();
  }

  private show(toNs: number): void {
    const { timeline, store } = this;
    if (toNs >= this.now && timeline.countBetween(this.now, toNs) <= MOST_EVENTS) {
      const events = timeline.between(this.now, toNs);
      this.now = toNs;
      if (events.length > 0) {
        store.applyFrame({ t: 'frame', seq: ++this.seq, now_ns: toNs, dropped: 0, events });
      }
    } else {
      this.now = toNs;
      this.seq = 0;
      store.restore(timeline.at(toNs));
    }
  }

  private moved(): void {
    this.listeners.forEach(listener => listener());
  }
}
