/** Puts the server's clock beside the page's. Owns the offset estimate, as NTP does it: the quickest exchange wins. */

interface Sample {
  /** Server time minus page time, nanoseconds. */
  offsetNs: number;
  roundTripMs: number;
}

const KEPT = 12;

/** Pauses between the first exchanges of a connection (ms), before a page that builds its figures is slow to hear. */
const FIRST_PAUSES_MS = [200, 400];
/** Then so often until as many as are kept were made: one of them falls into a quiet moment. */
const SETTLING_PAUSE_MS = 1000;
const PAUSE_MS = 5000;

/** The page's monotonic clock in milliseconds. */
export function pageNow(): number {
  return performance.now();
}

/** How long to wait for the next exchange (ms) when `made` of a connection have begun. */
export function pauseAfter(made: number): number {
  return FIRST_PAUSES_MS[made - 1] ?? (made < KEPT ? SETTLING_PAUSE_MS : PAUSE_MS);
}

export class ClockOffset {
  private samples: Sample[] = [];

  /** Take in one exchange: sent and received on the page's clock (ms), answered on the server's (ns). */
  add(sentMs: number, receivedMs: number, serverNs: number): void {
    const middle = (sentMs + receivedMs) / 2;
    this.samples.push({ offsetNs: serverNs - middle * 1e6, roundTripMs: receivedMs - sentMs });
    if (this.samples.length > KEPT) {
      this.samples.shift();
    }
  }

  /** Forget everything: another server, another clock. */
  reset(): void {
    this.samples = [];
  }

  get known(): boolean {
    return this.samples.length > 0;
  }

  /** Half of the quickest round trip: the largest error the offset can have. */
  get uncertaintyMs(): number | null {
    return this.known ? this.best().roundTripMs / 2 : null;
  }

  /** The server's time (ns) at `pageMs`, or `null` while unknown. */
  serverTime(pageMs: number): number | null {
    return this.known ? pageMs * 1e6 + this.best().offsetNs : null;
  }

  private best(): Sample {
    return this.samples.reduce((best, each) => (each.roundTripMs < best.roundTripMs ? each : best));
  }
}
