/** The four latencies of `docs/metrics.md`, of everything in a window. Pure functions of the store's records. */

import { percentiles } from './statistics';
import type { TelemetryStore } from './store';
import { tokensWithin } from './window';

export type LatencyName = 'ttft' | 'itl' | 'tpot' | 'e2e';
export const LATENCIES: readonly LatencyName[] = ['ttft', 'itl', 'tpot', 'e2e'];
/** The percentiles that are listed, and the largest. */
export const QUANTILES: readonly number[] = [0.5, 0.9, 0.95, 0.99, 1];

/**
 * Every value in the newest `windowNs`, ms: TTFT and ITL of the tokens that were sent in it, the newest first (of several
 * that one step said, the first: the others came with it), TPOT and E2E of the requests that finished in it.
 */
export function latencies(store: TelemetryStore, windowNs: number): Record<LatencyName, number[]> {
  const found: Record<LatencyName, number[]> = { ttft: [], itl: [], tpot: [], e2e: [] };
  const newest = store.tokens.at(-1);
  if (!newest) {
    return found;
  }
  const since = newest.sentNs - windowNs;
  for (const token of tokensWithin(store, windowNs).reverse()) {
    if (!token.follows) {
      (token.index === 0 ? found.ttft : found.itl).push(token.latencyNs / 1e6);
    }
  }
  for (const { event } of store.requests.values()) {
    const last = event?.last_token_ns ?? null;
    if (event?.state !== 'finished' || last === null || last < since) {
      continue;
    }
    found.e2e.push((last - event.arrival_ns) / 1e6);
    if (event.first_token_ns !== null && event.output_tokens > 1) {
      found.tpot.push((last - event.first_token_ns) / (event.output_tokens - 1) / 1e6);
    }
  }
  return found;
}

export interface LatencySummary {
  name: LatencyName;
  count: number;
  /** In the order of {@link QUANTILES}, ms; null where there is no value. */
  quantiles: (number | null)[];
}

export function summarizeLatencies(values: Record<LatencyName, number[]>): LatencySummary[] {
  return LATENCIES.map(name => ({
    name,
    count: values[name].length,
    quantiles: percentiles(values[name], QUANTILES)
  }));
}

export interface Bin {
  from: number;
  to: number;
  count: number;
}

/** A histogram with `perDecade` bins in every power of ten, without the empty ones on either side. */
export function logBins(values: readonly number[], perDecade: number): Bin[] {
  const counts = new Map<number, number>();
  for (const value of values) {
    // A token of the same step as the one before has a latency of nothing.
    const bin = Math.floor(Math.log10(Math.max(value, 1e-3)) * perDecade);
    counts.set(bin, (counts.get(bin) ?? 0) + 1);
  }
  if (counts.size === 0) {
    return [];
  }
  const [first, last] = [Math.min(...counts.keys()), Math.max(...counts.keys())];
  return Array.from({ length: last - first + 1 }, (_, at) => ({
    from: 10 ** ((first + at) / perDecade),
    to: 10 ** ((first + at + 1) / perDecade),
    count: counts.get(first + at) ?? 0
  }));
}
