/** What became of tokens that were proposed ahead, and what that was worth. Pure functions of the store's records. */

import { timeOf } from './cost';
import { Kind } from './protocol';
import type { StepRecord, TelemetryStore, TokenRecord } from './store';
import { stepsWithin } from './window';

/** Tokens proposed, and how many of them were accepted. */
export interface Proposed {
  drafted: number;
  accepted: number;
}

/** Sums over verified proposals: a proposal is what one request was given in one step. */
export interface Proposals extends Proposed {
  proposals: number;
}

/** The first, second … token of the proposals. */
export interface Place extends Proposed {
  /** From 1. */
  place: number;
  /** Of `drafted`, how often all tokens before it were accepted: only then is it looked at. */
  reached: number;
}

/** Who proposed, over the steps of a window. */
export interface Proposer extends Proposals {
  /** As the engine calls it; several in one step are joined by `+`. */
  name: string;
  steps: number;
  firstStep: number;
  lastStep: number;
  /** Time of its steps, ns, and the part of it that went into proposing. */
  stepsNs: number;
  draftNs: number;
  gain: Gain;
}

/** Steps that only decode: those with proposals against those without that have as many requests. */
export interface Gain {
  /** Steps with proposals that are compared, or, where there is nothing to compare them with, all of them. */
  speculating: number;
  plain: number;
  /** Steps without proposals, but with numbers of requests that no step with proposals had. */
  plainOthers: number;
  /** What a request waits for a token, ns; null where no step stands behind it. */
  speculatingNs: number | null;
  plainNs: number | null;
}

export interface Speculation extends Proposals {
  /** Steps that verified something, oldest first. */
  steps: StepRecord[];
  places: Place[];
  /** In the order in which they began. */
  proposers: Proposer[];
  /** Steps in which something to propose was looked for and not found, and how long that took, ns. */
  vainSteps: number;
  vainNs: number;
}

/** What a step verified; null where nothing was proposed in it. */
export function proposalsOf({ event }: StepRecord): Proposals | null {
  if (!event.speculation) {
    return null;
  }
  const sums: Proposals = { proposals: 0, drafted: 0, accepted: 0 };
  eachProposal(event.drafted, event.accepted, (drafted, accepted) => {
    sums.proposals += 1;
    sums.drafted += drafted;
    sums.accepted += accepted;
  });
  return sums.proposals > 0 ? sums : null;
}

/** Mean acceptance length: tokens that a request says in a verifying step, the model's own one included. */
export function acceptanceLength({ proposals, accepted }: Proposals): number | null {
  return proposals > 0 ? 1 + accepted / proposals : null;
}

/** The proposal that a token came out of, and the token's place among what the step said, from 1. */
export function proposalBehind(store: TelemetryStore, token: TokenRecord): (Proposed & { place: number }) | null {
  const event = store.step(token.step)?.event;
  const at = event?.request.indexOf(token.request) ?? -1;
  const drafted = event?.drafted?.[at] ?? 0;
  if (drafted === 0) {
    return null;
  }
  const tokens = store.requests.get(token.request)?.tokens ?? [];
  const found = tokens.findLastIndex(each => each.index === token.index);
  let first = found;
  while (first > 0 && tokens[first].follows) {
    first -= 1;
  }
  return { drafted, accepted: event?.accepted?.[at] ?? 0, place: found - first + 1 };
}

/**
 * How far apart the steps are that say something for a request, and what that makes for each token, on average: where a step
 * says several, most of them come at once. `tokens` of one request, in order; null while two steps are not there.
 */
export function gapsOf(tokens: readonly TokenRecord[]): { stepNs: number; tokenNs: number } | null {
  const begins = (each: TokenRecord, at: number) => at > 0 && !each.follows;
  // What the stretch begins with may have come together with a token before it.
  const from = tokens.findIndex(begins);
  if (from < 0) {
    return null;
  }
  const total = tokens.slice(from).reduce((sum, each) => sum + each.latencyNs, 0);
  return { stepNs: total / tokens.filter(begins).length, tokenNs: total / (tokens.length - from) };
}

/** Everything about the proposals of the window; null where there was none. */
export function speculation(store: TelemetryStore, windowNs: number): Speculation | null {
  const all = stepsWithin(store, windowNs);
  const result: Speculation = {
    steps: [],
    proposals: 0,
    drafted: 0,
    accepted: 0,
    places: [],
    proposers: [],
    vainSteps: 0,
    vainNs: 0
  };
  const byProposer = new Map<string, StepRecord[]>();
  const plain: StepRecord[] = [];
  for (const step of all) {
    const { event } = step;
    const sums = proposalsOf(step);
    if (sums === null) {
      plain.push(step);
      result.vainSteps += event.draft_ns ? 1 : 0;
      result.vainNs += event.draft_ns ?? 0;
      continue;
    }
    result.steps.push(step);
    add(result, sums);
    eachProposal(event.drafted, event.accepted, (drafted, accepted) => count(result.places, drafted, accepted));
    const name = event.speculation!;
    const own = byProposer.get(name);
    if (own) {
      own.push(step);
    } else {
      byProposer.set(name, [step]);
    }
  }
  if (result.steps.length === 0) {
    return null;
  }
  const tokens = tokensByStep(store, all[0].event.step);
  const groups = byRequests(plain, tokens);
  result.proposers = [...byProposer].map(([name, steps]) =>
    proposerOf(name, steps, gainOf(byRequests(steps, tokens), groups))
  );
  return result;
}

function proposerOf(name: string, steps: readonly StepRecord[], gain: Gain): Proposer {
  const result: Proposer = {
    name,
    steps: steps.length,
    firstStep: steps[0].event.step,
    lastStep: steps[steps.length - 1].event.step,
    proposals: 0,
    drafted: 0,
    accepted: 0,
    stepsNs: 0,
    draftNs: 0,
    gain
  };
  for (const step of steps) {
    add(result, proposalsOf(step)!);
    result.stepsNs += timeOf(step);
    result.draftNs += step.event.draft_ns ?? 0;
  }
  return result;
}

/** Steps with as many requests, together. */
interface Group {
  steps: number;
  /** That were sent: what is cut off behind the end of a text does not count. */
  tokens: number;
  ns: number;
}

/**
 * Steps that do nothing but decode, by their number of requests: a step takes longer with more. From steps without proposals
 * the time of looking for some in vain is taken away: they stand for steps without speculation.
 */
function byRequests(steps: readonly StepRecord[], tokens: ReadonlyMap<number, number>): Map<number, Group> {
  const groups = new Map<number, Group>();
  for (const step of steps) {
    const { event, byKind } = step;
    const said = tokens.get(event.step);
    if (said === undefined || byKind[Kind.Decode] + byKind[Kind.Verify] !== step.total) {
      continue;
    }
    const group = groups.get(event.request.length) ?? { steps: 0, tokens: 0, ns: 0 };
    groups.set(event.request.length, group);
    group.steps += 1;
    group.tokens += said;
    group.ns += timeOf(step) - (event.speculation ? 0 : (event.draft_ns ?? 0));
  }
  return groups;
}

function gainOf(speculating: ReadonlyMap<number, Group>, plain: ReadonlyMap<number, Group>): Gain {
  const matched = [...speculating].filter(([requests]) => plain.has(requests));
  const shown = matched.length > 0 ? matched : [...speculating];
  let said = 0;
  let waited = 0;
  let waitedPlain = 0;
  let stepsPlain = 0;
  for (const [requests, group] of shown) {
    said += group.tokens;
    waited += group.ns * requests;
    const other = plain.get(requests);
    if (other) {
      // Each number of requests counts as much on either side: as often as tokens were said with proposals.
      waitedPlain += (group.tokens * other.ns * requests) / other.tokens;
      stepsPlain += other.steps;
    }
  }
  return {
    speculating: stepsIn(shown.map(([, group]) => group)),
    plain: stepsPlain,
    plainOthers: stepsIn([...plain.values()]) - stepsPlain,
    speculatingNs: said > 0 ? waited / said : null,
    plainNs: stepsPlain > 0 ? waitedPlain / said : null
  };
}

function stepsIn(groups: readonly Group[]): number {
  return groups.reduce((sum, each) => sum + each.steps, 0);
}

/** How many tokens were sent of each step from `first` on. */
function tokensByStep({ tokens }: TelemetryStore, first: number): Map<number, number> {
  const result = new Map<number, number>();
  for (let at = tokens.length - 1; at >= 0; at--) {
    const { step } = tokens.at(at)!;
    if (step < first - 8) {
      break; // tokens of neighbouring steps may have been sent out of their order
    }
    result.set(step, (result.get(step) ?? 0) + 1);
  }
  return result;
}

function eachProposal(
  drafted: readonly number[] = [],
  accepted: readonly number[] = [],
  take: (drafted: number, accepted: number) => void
): void {
  drafted.forEach((tokens, at) => {
    if (tokens > 0) {
      take(tokens, accepted[at] ?? 0);
    }
  });
}

function add(to: Proposals, sums: Proposals): void {
  to.proposals += sums.proposals;
  to.drafted += sums.drafted;
  to.accepted += sums.accepted;
}

function count(places: Place[], drafted: number, accepted: number): void {
  for (let at = 0; at < drafted; at++) {
    places[at] ??= { place: at + 1, drafted: 0, accepted: 0, reached: 0 };
    places[at].drafted += 1;
    places[at].reached += at <= accepted ? 1 : 0;
    places[at].accepted += at < accepted ? 1 : 0;
  }
}
