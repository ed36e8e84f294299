import assert from 'node:assert/strict';
import { test } from 'node:test';

import type { Gain } from '../src/telemetry/speculation';
import type { StepEvent, TokensEvent } from '../src/telemetry/protocol';
import { latencies } from '../src/telemetry/latencies';
import { Kind, Origin } from '../src/telemetry/protocol';
import { acceptanceLength, gapsOf, proposalBehind, proposalsOf, speculation } from '../src/telemetry/speculation';
import { TelemetryStore } from '../src/telemetry/store';
import { ordinal } from '../src/views/format';
import { provenance } from '../src/views/words';
import { untranslated } from '../src/views/translation';
import { frame, MS, snapshot, step, tokens } from './events';

function connected(): TelemetryStore {
  const store = new TelemetryStore();
  store.applySnapshot(snapshot('a'));
  return store;
}

/** A step that verifies what was proposed for its requests; 0 proposes nothing for one. Takes 15 ms, 1 ms of it proposing. */
function verify(number: number, drafted: number[], accepted: number[], by = 'ngram'): StepEvent {
  const event = step(
    number,
    drafted.map((_, at) => at + 1),
    Kind.Verify
  );
  return {
    ...event,
    kind: drafted.map(count => (count > 0 ? Kind.Verify : Kind.Decode)),
    scheduled: drafted.map(count => count + 1),
    speculation: by,
    drafted,
    accepted,
    draft_ns: MS
  };
}

/** What requests 1, 2 … say in a step: so many tokens each. */
function said(number: number, counts: number[]): TokensEvent[] {
  return counts.flatMap((count, at) =>
    Array.from({ length: count }, (_, place) => tokens(number, [at + 1], number * 10 + place, 5, number * 20 + 16))
  );
}

/** Of the only proposer. */
function gain(store: TelemetryStore): Gain {
  const { proposers } = speculation(store, Infinity)!;
  assert.equal(proposers.length, 1);
  return proposers[0].gain;
}

test('acceptance by place is counted over all proposals, and over those that came so far', () => {
  const store = connected();
  // Proposals of 4, 4 and 2 tokens, of which 2, 4 and 0 are accepted; one request goes without.
  store.applyFrame(frame(1, [verify(1, [4, 0], [2, 0]), verify(2, [4, 2], [4, 0])]));
  const known = speculation(store, Infinity)!;
  assert.deepEqual([known.proposals, known.drafted, known.accepted, known.steps.length], [3, 10, 6, 2]);
  assert.equal(acceptanceLength(known), 3);
  assert.deepEqual(known.places, [
    { place: 1, drafted: 3, accepted: 2, reached: 3 },
    { place: 2, drafted: 3, accepted: 2, reached: 2 },
    { place: 3, drafted: 2, accepted: 1, reached: 2 },
    { place: 4, drafted: 2, accepted: 1, reached: 1 }
  ]);
  assert.deepEqual(proposalsOf(store.step(1)!), { proposals: 1, drafted: 4, accepted: 2 });
});

test('each proposer has its own sums, and only the steps in the window count', () => {
  const store = connected();
  assert.equal(speculation(store, Infinity), null);
  store.applyFrame(frame(1, [step(1, [1], Kind.Decode)]));
  assert.equal(speculation(store, Infinity), null);
  store.applyFrame(
    frame(2, [verify(2, [4], [4]), verify(3, [2], [0], 'draft'), step(4, [1], Kind.Decode), verify(5, [4], [1])])
  );
  const [ngram, draft] = speculation(store, Infinity)!.proposers;
  assert.deepEqual([ngram.name, ngram.steps, ngram.accepted, ngram.firstStep, ngram.lastStep], ['ngram', 2, 5, 2, 5]);
  assert.deepEqual([draft.name, draft.steps, draft.accepted, acceptanceLength(draft)], ['draft', 1, 0, 1]);
  const newest = speculation(store, 25 * MS)!;
  assert.deepEqual([newest.steps.length, newest.drafted, newest.proposers.length], [1, 4, 1]);
});

test('the gain is measured against plain steps with as many requests, and is nothing without them', () => {
  const store = connected();
  store.applyFrame(frame(1, [verify(1, [4], [2]), ...said(1, [3]), verify(2, [4], [0]), ...said(2, [1])]));
  const alone = gain(store);
  assert.deepEqual(alone, {
    speculating: 2,
    plain: 0,
    plainOthers: 0,
    speculatingNs: (30 / 4) * MS,
    plainNs: null
  });
  // Two requests: no measure for one. A step that prefills besides: no measure for anything.
  const mixed = { ...step(4, [1, 2], Kind.Decode), kind: [Kind.Decode, Kind.Prefill] };
  store.applyFrame(frame(2, [step(3, [1, 2], Kind.Decode), ...said(3, [1, 1]), mixed, ...said(4, [1, 1])]));
  assert.deepEqual(gain(store), { ...alone, plainOthers: 1 });
  // 15 ms, of them 3 looking for a proposal in vain.
  store.applyFrame(frame(3, [{ ...step(5, [1], Kind.Decode), draft_ns: 3 * MS }, ...said(5, [1])]));
  assert.deepEqual(gain(store), { ...alone, plain: 1, plainOthers: 1, plainNs: 12 * MS });
  const known = speculation(store, Infinity)!;
  assert.deepEqual([known.vainSteps, known.vainNs], [1, 3 * MS]);
  assert.deepEqual([known.proposers[0].draftNs, known.proposers[0].stepsNs], [2 * MS, 30 * MS]);
  // Another proposer is compared with the same plain steps, by itself.
  store.applyFrame(frame(4, [verify(6, [2], [1], 'draft'), ...said(6, [2])]));
  const [, draft] = speculation(store, Infinity)!.proposers;
  assert.deepEqual([draft.gain.speculating, draft.gain.plain, draft.gain.speculatingNs], [1, 1, 7.5 * MS]);
});

test('numbers of requests count on either side as often as tokens were said with proposals', () => {
  const store = connected();
  const quick = { ...step(1, [1], Kind.Decode), end_ns: 20 * MS + 9 * MS };
  store.applyFrame(frame(1, [quick, ...said(1, [1]), step(2, [1, 2], Kind.Decode), ...said(2, [1, 1])]));
  store.applyFrame(frame(2, [verify(3, [2], [2]), ...said(3, [3]), verify(4, [2, 2], [2, 1]), ...said(4, [3, 2])]));
  const measured = gain(store);
  // A request alone waits 9 ms for a token, one of two waits 15; three and five tokens.
  assert.ok(Math.abs(measured.plainNs! - ((3 * 9 + 5 * 15) / 8) * MS) < 1);
  assert.ok(Math.abs(measured.speculatingNs! - ((15 + 2 * 15) / 8) * MS) < 1);
});

test('tokens that were chosen but never sent do not make speculation look better', () => {
  const store = connected();
  store.applyFrame(frame(1, [verify(1, [4], [4]), ...said(1, [2])]));
  assert.equal(gain(store).speculatingNs, (15 / 2) * MS);
  store.applyFrame(frame(2, [verify(2, [4], [4])]));
  assert.equal(gain(store).speculating, 1, 'of the second step no token is known yet');
});

test('a token says which proposal it came out of', () => {
  const store = connected();
  const origin = [Origin.Accepted, Origin.Accepted, Origin.Corrected];
  const spoken: TokensEvent = { ...tokens(118, [1, 1, 1], 0, 5, 1000), index: [0, 1, 2], origin };
  const plain: TokensEvent = { ...tokens(119, [1], 3, 5, 1020) };
  const bonus: TokensEvent = { ...tokens(120, [1, 1], 4, 5, 1040), index: [4, 5], origin: [1, 3] };
  store.applyFrame(frame(1, [verify(118, [4], [2]), spoken, step(119, [1], Kind.Decode), plain]));
  store.applyFrame(frame(2, [verify(120, [1], [1]), bonus]));
  const words = store.requests.get(1)!.tokens.map(token => provenance(store, token, untranslated));
  assert.deepEqual(words, [
    'accepted, 1st of 4 proposed in step 118',
    'accepted, 2nd of 4 proposed in step 118',
    'corrected: the model’s own in place of the 3rd of 4 proposed in step 118; 2 rejected',
    'plain: nothing was proposed in its place',
    'accepted, 1st of 1 proposed in step 120',
    'bonus: the model’s own after all 1 proposed in step 120 were accepted'
  ]);
  // The step is forgotten, or never came.
  const lost = { ...store.requests.get(1)!.tokens[1], step: 7 };
  assert.equal(proposalBehind(store, lost), null);
  assert.equal(provenance(store, lost, untranslated), 'accepted');
});

test('ordinal numbers are written as they are said', () => {
  assert.deepEqual([1, 2, 3, 4, 11, 12, 13, 16].map(ordinal).join(' '), '1st 2nd 3rd 4th 11th 12th 13th 16th');
});

test('a step and a token are told apart where a step says several', () => {
  const store = connected();
  // The first one is the end of a step that is not wholly there.
  const spoken: [number, number][] = [
    [1, 0],
    [2, 30],
    [2, 0],
    [2, 0],
    [3, 20],
    [4, 40],
    [4, 2]
  ];
  store.applyFrame(
    frame(
      1,
      spoken.map(([number, ms], at) => tokens(number, [1], at + 5, ms, at))
    )
  );
  assert.deepEqual(gapsOf(store.requests.get(1)!.tokens), { stepNs: (92 / 3) * MS, tokenNs: (92 / 6) * MS });
  assert.equal(gapsOf(store.requests.get(1)!.tokens.slice(1, 4)), null);
});

test('the gap between steps and the time of a token are told apart where a step says several', () => {
  const store = connected();
  const several = (number: number, index: number, itlMs: number, sentMs: number): TokensEvent => {
    const event = tokens(number, [1, 1], index, itlMs, sentMs);
    return { ...event, index: [index, index + 1], latency_ns: [itlMs * MS, 0] };
  };
  store.applyFrame(frame(1, [verify(1, [1], [1]), several(1, 1, 30, 30), verify(2, [1], [1]), several(2, 3, 50, 80)]));
  const made = store.metrics(Infinity);
  assert.deepEqual([made.itlP50Ms, made.itlCount, made.perTokenMs], [40, 2, 20]);
  assert.deepEqual(latencies(store, Infinity).itl, [50, 30]);
  store.applyFrame(frame(2, [step(3, [1], Kind.Decode), tokens(3, [1], 5, 40, 120)]));
  assert.equal(store.metrics(10 * MS).perTokenMs, null, 'every step of the window says one');
});
