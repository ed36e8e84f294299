import assert from 'node:assert/strict';
import { test } from 'node:test';

import { Kind } from '../src/telemetry/protocol';
import { PHASES, RequestPhases, timeByPhase } from '../src/telemetry/request-phases';
import { TelemetryStore } from '../src/telemetry/store';
import { niceStep } from '../src/views/request-timeline';
import { frame, MS, request, snapshot, step } from './events';

function connected(): TelemetryStore {
  const store = new TelemetryStore();
  store.applySnapshot(snapshot('a'));
  return store;
}

/** The steps of `test/events.ts` begin every 20 ms and take 15. */
const at = (number: number) => number * 20 * MS;

test('waiting, prefill, decode and being left out follow one another without a gap', () => {
  const store = connected();
  store.applyFrame(frame(1, [{ ...request(1, 'running'), arrival_ns: 10 * MS, started_ns: at(1) }]));
  store.applyFrame(frame(2, [step(1, [1], Kind.Prefill, 12), step(2, [1], Kind.Decode), step(3, [1], Kind.Decode)]));
  store.applyFrame(
    frame(3, [step(4, [2], Kind.Prefill, 500), step(5, [2], Kind.Decode), step(6, [1, 2], Kind.Decode)])
  );
  const phases = new RequestPhases(store);
  phases.advance();
  const stretches = phases.of(store.requests.get(1)!, at(6) + 15 * MS);
  assert.deepEqual(
    stretches.map(each => [each.phase, each.fromNs / MS, each.toNs / MS]),
    [
      ['queued', 10, 20],
      ['prefill', 20, 35],
      ['decode', 35, 75],
      ['stalled', 75, 120],
      ['decode', 120, 135]
    ]
  );
  const times = timeByPhase(stretches);
  assert.equal(
    times.reduce((sum, each) => sum + each, 0),
    125 * MS
  );
  assert.equal(times[PHASES.indexOf('stalled')], 45 * MS);
});

test('a request that gave its memory back was preempted, also while it still waits', () => {
  const store = connected();
  store.applyFrame(frame(1, [request(1, 'running'), step(1, [1], Kind.Prefill, 12), step(2, [1], Kind.Decode)]));
  store.applyFrame(frame(2, [step(3, [2], Kind.Decode), { ...request(1, 'preempted'), at_ns: at(3) + 16 * MS }]));
  const phases = new RequestPhases(store);
  phases.advance();
  const waits = phases.of(store.requests.get(1)!, at(3) + 20 * MS).at(-1)!;
  assert.deepEqual([waits.phase, waits.fromNs, waits.toNs], ['preempted', at(2) + 15 * MS, at(3) + 20 * MS]);
  store.applyFrame(frame(3, [request(1, 'running'), step(4, [1, 2], Kind.Recompute, 14), step(5, [1], Kind.Decode)]));
  phases.advance();
  assert.deepEqual(
    phases.of(store.requests.get(1)!, at(6)).map(each => each.phase),
    ['queued', 'prefill', 'decode', 'preempted', 'recompute', 'decode']
  );
});

test('what is shown is the same however the steps came, and begins anew with another engine', () => {
  const [whole, parts] = [connected(), connected()];
  const steps = Array.from({ length: 50 }, (_, number) =>
    step(number, number % 7 === 0 ? [2] : [1, 2], number < 2 ? Kind.Prefill : Kind.Decode)
  );
  whole.applyFrame(frame(1, [request(1, 'running'), request(2, 'running'), ...steps]));
  const [atOnce, piecemeal] = [new RequestPhases(whole), new RequestPhases(parts)];
  atOnce.advance();
  parts.applyFrame(frame(1, [request(1, 'running'), request(2, 'running')]));
  steps.forEach((each, number) => {
    parts.applyFrame(frame(number + 2, [each]));
    piecemeal.advance();
  });
  for (const handle of [1, 2]) {
    assert.deepEqual(piecemeal.of(parts.requests.get(handle)!, at(60)), atOnce.of(whole.requests.get(handle)!, at(60)));
  }
  parts.applySnapshot(snapshot('b', [step(0, [1], Kind.Prefill, 12)], [request(1, 'running')]));
  piecemeal.advance();
  assert.deepEqual(
    piecemeal.of(parts.requests.get(1)!, at(0) + 15 * MS).map(each => each.phase),
    ['prefill']
  );
});

test('a queued request waits until now', () => {
  const store = connected();
  store.applyFrame(frame(1, [{ ...request(1, 'queued'), arrival_ns: 5 * MS }]));
  const phases = new RequestPhases(store);
  phases.advance();
  assert.deepEqual(
    phases.of(store.requests.get(1)!, 30 * MS).map(each => [each.phase, each.toNs - each.fromNs]),
    [['queued', 25 * MS]]
  );
});

test('an axis has steps of 1, 2 and 5', () => {
  assert.deepEqual([0.7, 1, 1.2, 3, 6, 0.03].map(niceStep), [1, 1, 2, 5, 10, 0.05]);
});
