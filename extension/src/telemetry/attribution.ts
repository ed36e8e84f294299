/** Sums of the parts of latencies: per step, over a stretch of tokens. Pure functions of the store's records. */

import { PARTS } from './protocol';
import type { TelemetryStore, TokenRecord } from './store';
import { tokensWithin } from './window';

/** Where the latency of a step's tokens went, on average over them. */
export interface StepParts {
  step: number;
  tokens: number;
  /** Of them, first tokens: their latency counts from the arrival. */
  first: number;
  /** Mean, ns. */
  latencyNs: number;
  /** Mean of each part, ns, in the order of `PARTS`. */
  parts: number[];
}

/** The steps whose tokens were sent within the newest `windowNs`, by number; tokens without parts are left out. */
export function partsByStep(store: TelemetryStore, windowNs: number): Map<number, StepParts> {
  const result = new Map<number, StepParts>();
  for (const token of tokensWithin(store, windowNs)) {
    if (token.parts !== null) {
      add(result, token, token.parts);
    }
  }
  for (const each of result.values()) {
    each.latencyNs /= each.tokens;
    each.parts.forEach((value, at) => (each.parts[at] = value / each.tokens));
  }
  return result;
}

/** How far the parts of a token are from adding up to its latency, ns; they should never be. */
export function imbalance(token: TokenRecord): number {
  return token.parts === null ? 0 : token.parts.reduce((sum, each) => sum + each, 0) - token.latencyNs;
}

function add(result: Map<number, StepParts>, token: TokenRecord, parts: readonly number[]): void {
  let entry = result.get(token.step);
  if (!entry) {
    entry = { step: token.step, tokens: 0, first: 0, latencyNs: 0, parts: PARTS.map(() => 0) };
    result.set(token.step, entry);
  }
  entry.tokens += 1;
  entry.first += token.index === 0 ? 1 : 0;
  entry.latencyNs += token.latencyNs;
  for (let at = 0; at < parts.length; at++) {
    entry.parts[at] += parts[at];
  }
}
