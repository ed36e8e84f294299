/**
 * One animation loop for all views of a page. It repaints when data arrived, at most `rate` times a second, never while
 * the views cannot be seen, and measures how old the newest token is when it reaches the screen.
 */

import { pageNow } from '../telemetry/clock';
import { Ring } from '../telemetry/ring';
import { percentiles } from '../telemetry/statistics';

/**
 * How much longer than the interval data may wait for the next data to be painted with. While tokens stream, each painting
 * is thereby set off by a token that has just arrived; only the last ones of a burst wait this long.
 */
const GRACE_MS = 150;

export interface Painter {
  /** Draw what changed. */
  paint(): void;
  /** The frame is on the screen: time for what need not be as quick. */
  painted(): void;
  /** Can anybody see it? */
  visible(): boolean;
  /** The server's time at `pageMs`, or null while unknown. */
  serverTime(pageMs: number): number | null;
  /** `sent_ns` of the newest token there is. */
  newestSentNs(): number | null;
}

export interface PaintStats {
  /** Repaints that brought a new token to the screen. */
  count: number;
  latencyP50Ms: number | null;
  latencyP95Ms: number | null;
  latencyMaxMs: number | null;
  /** Repaints per second over the last second in which there were any. */
  repaintRate: number | null;
}

export class PaintLoop {
  private readonly latencies = new Ring<number>(2000);
  private readonly paints = new Ring<number>(200);
  private count = 0;
  private lastPaint = -Infinity;
  private lastPaintedSentNs = 0;
  private dirty = false;
  private frame: number | null = null;
  private timer: ReturnType<typeof setTimeout> | null = null;
  private readonly channel = new MessageChannel();
  private pendingSentNs: number | null = null;
  private readonly begun = pageNow();

  constructor(
    private readonly painter: Painter,
    private rate: number
  ) {
    this.channel.port1.onmessage = () => this.onPainted();
    document.addEventListener('visibilitychange', this.requestNow);
  }

  setRate(rate: number): void {
    this.rate = Math.min(60, Math.max(1, rate));
  }

  /** Data came: paint it at once if the last painting was long enough ago, else with what comes next. */
  readonly request = (): void => this.schedule(GRACE_MS);

  /** The reader did something: paint as soon as the rate allows. */
  readonly requestNow = (): void => this.schedule(0);

  stats(): PaintStats {
    const values = this.latencies.last(this.latencies.length);
    const [p50, p95, max] = percentiles(values, [0.5, 0.95, 1]);
    return {
      count: this.count,
      latencyP50Ms: p50,
      latencyP95Ms: p95,
      latencyMaxMs: max,
      repaintRate: this.repaintRate()
    };
  }

  resetStats(): void {
    this.latencies.clear();
    this.paints.clear();
    this.count = 0;
  }

  dispose(): void {
    if (this.frame !== null) {
      cancelAnimationFrame(this.frame);
    }
    this.clearTimer();
    this.channel.port1.close();
    document.removeEventListener('visibilitychange', this.requestNow);
  }

  private schedule(graceMs: number): void {
    this.dirty = true;
    if (this.frame !== null || document.hidden || !this.painter.visible()) {
      return;
    }
    const interval = 1000 / this.rate;
    const since = pageNow() - this.lastPaint;
    if (since >= interval) {
      this.clearTimer();
      this.frame = requestAnimationFrame(this.paint);
    } else if (this.timer === null || graceMs === 0) {
      this.clearTimer();
      this.timer = setTimeout(
        () => {
          this.timer = null;
          if (this.dirty) {
            this.schedule(0);
          }
        },
        interval - since + graceMs
      );
    }
  }

  private clearTimer(): void {
    if (this.timer !== null) {
      clearTimeout(this.timer);
      this.timer = null;
    }
  }

  private readonly paint = (): void => {
    this.frame = null;
    this.dirty = false;
    this.lastPaint = pageNow();
    const newest = this.painter.newestSentNs();
    this.painter.paint();
    if (newest !== null && newest > this.lastPaintedSentNs) {
      this.lastPaintedSentNs = newest;
      // What the server had sent before there was a view, and told again, was not on its way to this one.
      const begun = this.painter.serverTime(this.begun);
      this.pendingSentNs = begun !== null && newest >= begun ? newest : null;
    }
    // Handled after the browser has laid out and painted this frame.
    this.channel.port2.postMessage(null);
  };

  private onPainted(): void {
    const now = pageNow();
    const server = this.painter.serverTime(now);
    if (this.pendingSentNs !== null && server !== null) {
      this.count += 1;
      this.latencies.push((server - this.pendingSentNs) / 1e6);
      this.paints.push(now);
    }
    this.pendingSentNs = null;
    this.painter.painted();
  }

  private repaintRate(): number | null {
    const newest = this.paints.at(-1);
    if (newest === undefined) {
      return null;
    }
    let oldest = newest;
    let gaps = 0;
    for (let index = this.paints.length - 2; index >= 0; index--) {
      const at = this.paints.at(index)!;
      if (newest - at > 1000) {
        break;
      }
      oldest = at;
      gaps += 1;
    }
    return gaps > 0 ? gaps / ((newest - oldest) / 1000) : null;
  }
}
