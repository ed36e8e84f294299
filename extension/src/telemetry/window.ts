/** What lies in the window that the reader has chosen. Pure functions of the store's records. */

import type { StepRecord, TelemetryStore, TokenRecord } from './store';

/** The steps that ended within the newest `windowNs`, from step number `since` on, oldest first. */
export function stepsWithin(store: TelemetryStore, windowNs: number, since = -Infinity): StepRecord[] {
  const { steps } = store;
  const newest = steps.at(-1);
  if (!newest) {
    return [];
  }
  const sinceNs = newest.event.end_ns - windowNs;
  let from = steps.length;
  while (from > 0 && steps.at(from - 1)!.event.end_ns >= sinceNs && steps.at(from - 1)!.event.step >= since) {
    from -= 1;
  }
  return steps.last(steps.length - from);
}

/** The tokens that were sent within the newest `windowNs`, oldest first. */
export function tokensWithin(store: TelemetryStore, windowNs: number): TokenRecord[] {
  const { tokens } = store;
  const newest = tokens.at(-1);
  if (!newest) {
    return [];
  }
  let from = tokens.length;
  while (from > 0 && tokens.at(from - 1)!.sentNs >= newest.sentNs - windowNs) {
    from -= 1;
  }
  return tokens.last(tokens.length - from);
}
