/** Puts the server's clock beside the page's. Owns the offset estimate, as NTP does it: the quickest exchange wins. */

interface Sample {
  /** Server time minus page time, nanoseconds. */
  offsetNs: number;
  roundTripMs: number;
  /** When it arrived, on the page's clock (ms). */
  atMs: number;
}

/** Ten minutes' worth. */
const KEPT = 128;
/** How fast two machines' clocks may run apart: an old exchange is worth less by so much. */
const DRIFT = 5e-5;
/** Exchanges after which one has most likely fallen into a quiet moment. */
const SETTLED = 12;

/** Pauses between the first exchanges of a connection (ms), before a page that builds its figures is slow to hear. */
const FIRST_PAUSES_MS = [200, 400];
/** Then so often until it has settled. */
const SETTLING_PAUSE_MS = 1000;
const PAUSE_MS = 5000;

/** The page's monotonic clock in milliseconds. */
export function pageNow(): number {
  return performance.now();
}

/** How long to wait for the next exchange (ms) when `made` of a connection have begun. */
export function pauseAfter(made: number): number {
  return FIRST_PAUSES_MS[made - 1] ?? (made < SETTLED ? SETTLING_PAUSE_MS : PAUSE_MS);
}

export class ClockOffset {
  private samples: Sample[] = [];
  private best: Sample | null = null;

  /** Take in one exchange: sent and received on the page's clock (ms), answered on the server's (ns). */
  add(sentMs: number, receivedMs: number, serverNs: number): void {
    const middle = (sentMs + receivedMs) / 2;
    this.samples.push({ offsetNs: serverNs - middle * 1e6, roundTripMs: receivedMs - sentMs, atMs: receivedMs });
    if (this.samples.length > KEPT) {
      this.samples.shift();
    }
    this.best = this.samples.reduce((best, each) => (this.error(each) <= this.error(best) ? each : best));
  }

  /** Forget everything: another server, another clock. */
  reset(): void {
    this.samples = [];
    this.best = null;
  }

  get known(): boolean {
    return this.best !== null;
  }

  /** Half of the quickest round trip, and what the clocks may have drifted since: the largest error of the offset. */
  get uncertaintyMs(): number | null {
    return this.best && this.error(this.best);
  }

  /** The server's time (ns) at `pageMs`, or `null` while unknown. */
  serverTime(pageMs: number): number | null {
    return this.best && pageMs * 1e6 + this.best.offsetNs;
  }

  private error(sample: Sample): number {
    const newest = this.samples[this.samples.length - 1] ?? sample;
    return sample.roundTripMs / 2 + DRIFT * (newest.atMs - sample.atMs);
  }
}
