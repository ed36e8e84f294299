/** What lies in the window that the reader has chosen. Pure functions of the store's records. */

import type { StepRecord, TelemetryStore } from './store';

/** The steps that ended within the newest `windowNs`, oldest first. */
export function stepsWithin(store: TelemetryStore, windowNs: number): StepRecord[] {
  const { steps } = store;
  const newest = steps.at(-1);
  if (!newest) {
    return [];
  }
  let from = steps.length;
  while (from > 0 && steps.at(from - 1)!.event.end_ns >= newest.event.end_ns - windowNs) {
    from -= 1;
  }
  return steps.last(steps.length - from);
}
