/** What was made in a window and whose time it took: the basis of a price per token. Pure functions of the store's records. */

import { Kind } from './protocol';
import { percentile } from './statistics';
import type { StepRecord, TelemetryStore } from './store';
import { stepsWithin } from './window';

export interface Production {
  /** From the first step's beginning to the newest step's end, ns. */
  spanNs: number;
  /** Of the span, with a step or with what the engine does between steps. */
  decodeNs: number;
  prefillNs: number;
  /** Positions computed a second time, after preemptions and switches. */
  recomputeNs: number;
  idleNs: number;
  /** Output tokens sent. */
  outputTokens: number;
  /** Prompt positions computed. */
  inputTokens: number;
  /** Prompt positions that the prefix cache supplied. */
  cachedTokens: number;
  finishedRequests: number;
}

/**
 * Time is divided as `docs/attribution.md` divides it: a step that decodes and prefills costs decoding what a step that
 * only decodes as many positions takes, and the prompts the rest.
 */
export function production(store: TelemetryStore, windowNs: number): Production | null {
  const steps = stepsWithin(store, windowNs);
  if (steps.length === 0) {
    return null;
  }
  const result: Production = {
    spanNs: 0,
    decodeNs: 0,
    prefillNs: 0,
    recomputeNs: 0,
    idleNs: 0,
    outputTokens: 0,
    inputTokens: 0,
    cachedTokens: 0,
    finishedRequests: 0
  };
  const alone = decodingAlone(steps);
  let busy = 0;
  for (const step of steps) {
    const time = timeOf(step);
    busy += time;
    const prefill = step.byKind[Kind.Prefill];
    const recompute = step.byKind[Kind.Recompute];
    const decoding = step.total - prefill - recompute;
    let decodeNs = time;
    if (prefill + recompute > 0) {
      decodeNs = decoding === 0 ? 0 : Math.min(time, alone(decoding) ?? (time * decoding) / step.total);
      const share = prefill / (prefill + recompute);
      result.prefillNs += (time - decodeNs) * share;
      result.recomputeNs += (time - decodeNs) * (1 - share);
    }
    result.decodeNs += decodeNs;
    result.inputTokens += prefill;
  }
  const beginNs = steps[0].event.begin_ns;
  const endNs = steps[steps.length - 1].event.end_ns;
  result.spanNs = Math.max(1, endNs - beginNs);
  result.idleNs = Math.max(0, result.spanNs - busy);
  for (let at = store.tokens.length - 1; at >= 0 && store.tokens.at(at)!.sentNs >= beginNs; at--) {
    result.outputTokens += 1;
  }
  for (const { event } of store.requests.values()) {
    if (event?.started_ns && event.started_ns >= beginNs) {
      result.cachedTokens += event.cached_tokens;
    }
    if (event?.state === 'finished' && (event.last_token_ns ?? 0) >= beginNs) {
      result.finishedRequests += 1;
    }
  }
  return result;
}

export interface Prices {
  /** All the money of the window over all its tokens, input and output. */
  perMillionTokens: number | null;
  perMillionOutput: number | null;
  perMillionInput: number | null;
  /** Of input, computed and cached together: what the cache makes of the price. */
  perMillionInputWithCache: number | null;
}

/** Dollars per million tokens, for a machine that costs `perHour` dollars an hour. */
export function prices(made: Production, perHour: number): Prices {
  const perMillion = (ns: number, tokens: number) => (tokens === 0 ? null : (((ns / 3.6e12) * perHour) / tokens) * 1e6);
  return {
    perMillionTokens: perMillion(made.spanNs, made.outputTokens + made.inputTokens + made.cachedTokens),
    perMillionOutput: perMillion(made.decodeNs, made.outputTokens),
    perMillionInput: perMillion(made.prefillNs, made.inputTokens),
    perMillionInputWithCache: perMillion(made.prefillNs, made.inputTokens + made.cachedTokens)
  };
}

/** What a step and the work before it took, ns. */
export function timeOf({ event }: StepRecord): number {
  return event.end_ns - event.begin_ns + (event.before_ns ?? 0);
}

/** How long a step takes that only decodes so many positions: the median, or between the nearest two that are known. */
function decodingAlone(steps: readonly StepRecord[]): (positions: number) => number | null {
  const times = new Map<number, number[]>();
  for (const step of steps) {
    if (step.total > 0 && step.byKind[Kind.Prefill] + step.byKind[Kind.Recompute] === 0) {
      const list = times.get(step.total) ?? [];
      list.push(timeOf(step));
      times.set(step.total, list);
    }
  }
  const known = [...times].map(([positions, list]) => ({ positions, ns: percentile(list, 0.5)! }));
  known.sort((a, b) => a.positions - b.positions);
  return positions => {
    const above = known.find(each => each.positions >= positions);
    const below = known.findLast(each => each.positions <= positions);
    if (!above || !below || above.positions === below.positions) {
      return (above ?? below)?.ns ?? null;
    }
    const share = (positions - below.positions) / (above.positions - below.positions);
    return below.ns + share * (above.ns - below.ns);
  };
}
