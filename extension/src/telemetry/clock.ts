/** Puts the server's clock beside the page's. Owns the offset estimate, as NTP does it: the quickest exchange wins. */

interface Sample {
  /** Server time minus page time, nanoseconds. */
  offsetNs: number;
  roundTripMs: number;
}

const KEPT = 12;

/** The page's monotonic clock in milliseconds. */
export function pageNow(): number {
  return performance.now();
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
