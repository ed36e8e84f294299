/** What a switch did to the main figures: equally many steps on either side of it. Pure functions of the store's records. */

import { timeOf } from './cost';
import { percentile } from './statistics';
import type { StepRecord, TelemetryStore } from './store';

export interface Side {
  /** Median inter-token latency, ms; null where the steps made no second token. */
  itlMs: number | null;
  /** Median time to first token of the requests whose first token these steps made, ms. */
  ttftMs: number | null;
  /** How many those are. */
  firstTokens: number;
  /** Output tokens per second of the steps' own time: pauses without work do not count. */
  rate: number;
  /** Mean requests a step. */
  batch: number;
}

export interface BeforeAfter {
  epoch: number;
  /** On either side. */
  steps: number;
  before: Side;
  after: Side;
}

/** Fewer steps on a side say more about chance than about the switch. */
export const LEAST_STEPS = 12;
const MOST_STEPS = 200;

/**
 * Compare the last steps before the switch that began `epoch` with the first ones after it, those in which interrupted
 * requests catch up left out. `null` while either side has fewer than {@link LEAST_STEPS}.
 */
export function beforeAfter(store: TelemetryStore, epoch: number): BeforeAfter | null {
  const { steps } = store;
  const event = store.epochs.get(epoch);
  if (!event || (event.settled_ns === null && event.preempted > 0)) {
    return null;
  }
  const fromNs = event.settled_ns ?? event.applied_ns;
  const before: StepRecord[] = [];
  let after: StepRecord[] = [];
  let previous: number | null = null;
  for (let at = steps.length - 1; at >= 0; at--) {
    const step = steps.at(at)!;
    if (step.event.epoch === epoch && step.event.begin_ns >= fromNs) {
      after.push(step);
    } else if (step.event.epoch < epoch) {
      previous ??= step.event.epoch;
      if (step.event.epoch !== previous || before.length === MOST_STEPS) {
        break;
      }
      before.push(step);
    }
  }
  after = after.reverse().slice(0, MOST_STEPS);
  const count = Math.min(before.length, after.length);
  if (count < LEAST_STEPS) {
    return null;
  }
  return {
    epoch,
    steps: count,
    before: side(store, before.slice(0, count)),
    after: side(store, after.slice(0, count))
  };
}

function side(store: TelemetryStore, steps: readonly StepRecord[]): Side {
  const numbers = new Set(steps.map(step => step.event.step));
  const oldest = Math.min(...numbers);
  const itl: number[] = [];
  const ttft: number[] = [];
  let tokens = 0;
  for (let at = store.tokens.length - 1; at >= 0; at--) {
    const token = store.tokens.at(at)!;
    if (token.step < oldest - 8) {
      break; // tokens of neighbouring steps may have been sent out of their order
    }
    if (numbers.has(token.step)) {
      tokens += 1;
      if (!token.follows) {
        (token.index > 0 ? itl : ttft).push(token.latencyNs / 1e6);
      }
    }
  }
  const busyNs = steps.reduce((sum, step) => sum + timeOf(step), 0);
  return {
    itlMs: percentile(itl, 0.5),
    ttftMs: percentile(ttft, 0.5),
    firstTokens: ttft.length,
    rate: tokens / (busyNs / 1e9),
    batch: steps.reduce((sum, { event }) => sum + event.request.length, 0) / steps.length
  };
}
