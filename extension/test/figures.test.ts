import assert from 'node:assert/strict';
import { test } from 'node:test';

import { beforeAfter } from '../src/telemetry/before-after';
import { prices, production } from '../src/telemetry/cost';
import { latencies, logBins, summarizeLatencies } from '../src/telemetry/latencies';
import type { RequestEvent } from '../src/telemetry/protocol';
import { Kind } from '../src/telemetry/protocol';
import { TelemetryStore } from '../src/telemetry/store';
import { memoryParts } from '../src/views/memory-bar';
import { rooflinePoint } from '../src/views/roofline';
import { features, frame, MS, request, snapshot, step, tokens } from './events';

function connected(): TelemetryStore {
  const store = new TelemetryStore();
  store.applySnapshot(snapshot('a'));
  return store;
}

function finished(handle: number, arrivalMs: number, firstMs: number, lastMs: number, count: number): RequestEvent {
  return {
    ...request(handle, 'finished', count),
    arrival_ns: arrivalMs * MS,
    first_token_ns: firstMs * MS,
    last_token_ns: lastMs * MS
  };
}

test('TTFT and ITL are of tokens, TPOT and E2E of finished requests, each as defined', () => {
  const store = connected();
  store.applyFrame(frame(1, [tokens(1, [1], 0, 300, 300), tokens(2, [1], 1, 20, 320), tokens(3, [1], 2, 40, 360)]));
  // One token: it has no TPOT. A running one: it has neither.
  store.applyFrame(frame(2, [finished(1, 0, 300, 360, 3), finished(2, 100, 350, 350, 1), request(3, 'running', 2)]));
  assert.deepEqual(latencies(store, Infinity), { ttft: [300], itl: [40, 20], tpot: [30], e2e: [360, 250] });
  const near = latencies(store, 5 * MS);
  assert.deepEqual([near.ttft, near.itl, near.e2e], [[], [40], [360]]);
  const [, itl] = summarizeLatencies(latencies(store, Infinity));
  assert.deepEqual([itl.count, itl.quantiles[0], itl.quantiles[4]], [2, 30, 40]);
});

test('every value falls into one bin of a histogram, also nothing and the edges', () => {
  const values = [0, 1, 9.99, 10, 31, 99, 100];
  const bins = logBins(values, 4);
  assert.equal(
    bins.reduce((sum, bin) => sum + bin.count, 0),
    values.length
  );
  for (let at = 1; at < bins.length; at++) {
    assert.equal(bins[at].from, bins[at - 1].to);
  }
  assert.deepEqual(logBins([], 4), []);
});

test('a step that decodes and prefills costs decoding what such a step costs alone', () => {
  const store = connected();
  // Steps of 15 ms that decode two, and one of 55 ms that decodes two and computes 38 prompt positions.
  const mixed = { ...step(4, [1, 2, 3], Kind.Decode), scheduled: [1, 1, 38], kind: [1, 1, 0] };
  mixed.end_ns = mixed.begin_ns + 55 * MS;
  store.applyFrame(
    frame(
      1,
      [1, 2, 3].map(number => step(number, [1, 2], Kind.Decode))
    )
  );
  store.applyFrame(frame(2, [mixed, tokens(1, [1, 2], 1, 20, 40), tokens(4, [1, 2, 3], 2, 20, 140)]));
  const cached = { ...request(3, 'running'), started_ns: mixed.begin_ns, cached_tokens: 62 };
  store.applyFrame(frame(3, [cached, finished(1, 0, 20, 140, 9)]));
  const made = production(store, Infinity)!;
  assert.equal(made.decodeNs, 60 * MS);
  assert.equal(made.prefillNs, 40 * MS);
  assert.equal(made.spanNs, 115 * MS);
  assert.equal(made.idleNs, 15 * MS);
  assert.deepEqual([made.inputTokens, made.outputTokens, made.cachedTokens, made.finishedRequests], [38, 5, 62, 1]);
  // At 3.6 $ an hour a millisecond costs a millionth of a dollar.
  const cost = prices(made, 3.6);
  assert.ok(Math.abs(cost.perMillionOutput! - 60 / 5) < 1e-9);
  assert.ok(Math.abs(cost.perMillionInput! - 40 / 38) < 1e-9);
  assert.ok(Math.abs(cost.perMillionInputWithCache! - 40 / 100) < 1e-9);
  assert.ok(Math.abs(cost.perMillionTokens! - 115 / 105) < 1e-9);
});

test('positions computed a second time have a cost of their own', () => {
  const store = connected();
  const mixed = { ...step(1, [1, 2], Kind.Prefill), scheduled: [30, 10], kind: [2, 0] };
  store.applyFrame(frame(1, [mixed]));
  const made = production(store, Infinity)!;
  assert.deepEqual([made.recomputeNs, made.prefillNs, made.decodeNs], [11.25 * MS, 3.75 * MS, 0]);
});

test('a switch is judged by as many steps before it as after it, those of catching up left out', () => {
  const store = connected();
  const decode = (number: number, epoch: number, itlMs: number) => [
    step(number, [1, 2], Kind.Decode, 1, epoch),
    tokens(number, [1, 2], number, itlMs, number * 20 + 16)
  ];
  for (let number = 0; number < 40; number++) {
    store.applyFrame(frame(number + 1, decode(number, 0, 20)));
  }
  const applied = { ...features(1, false, null, 2), applied_ns: 800 * MS };
  store.applyFrame(frame(41, [applied, ...decode(40, 1, 900), ...decode(41, 1, 500)]));
  assert.equal(beforeAfter(store, 1), null, 'requests still catch up');
  store.applyFrame(frame(42, [{ ...applied, settled_ns: 840 * MS }]));
  for (let number = 42; number < 53; number++) {
    store.applyFrame(frame(number + 1, decode(number, 1, 80)));
  }
  assert.equal(beforeAfter(store, 1), null, 'eleven steps are too few');
  for (let number = 53; number < 60; number++) {
    store.applyFrame(frame(number + 1, decode(number, 1, 80)));
  }
  const effect = beforeAfter(store, 1)!;
  assert.equal(effect.steps, 18);
  assert.deepEqual([effect.before.itlMs, effect.after.itlMs], [20, 80]);
  // Two tokens every 15 ms of work.
  assert.ok(Math.abs(effect.before.rate - 2 / 0.015) < 1e-6);
  assert.equal(effect.after.batch, 2);
  assert.deepEqual([effect.before.firstTokens, effect.before.ttftMs], [0, null], 'both requests began earlier');
});

test('a step stands in the roofline where its work and its time put it', () => {
  const store = connected();
  store.applyFrame(
    frame(1, [{ ...step(1, [1], Kind.Decode), flops: 30e9, read_bytes: 15e9 }, step(2, [1], Kind.Decode)])
  );
  const point = rooflinePoint(store.step(1)!)!;
  assert.equal(point.intensity, 2);
  assert.ok(Math.abs(point.achieved - 30e9 / 0.015) < 1);
  assert.equal(rooflinePoint(store.step(2)!), null, 'of this step nobody knows the work');
});

test('the parts of the memory add up to all of it', () => {
  const store = connected();
  assert.equal(memoryParts(store), null);
  const gib = 2 ** 30;
  store.model = { device: 'cpu', weight_bytes: gib } as typeof store.model;
  store.capacity = { kv_bytes: 4 * gib } as typeof store.capacity;
  store.device = { system_memory_total: 16 * gib, system_memory_used: 6 * gib } as typeof store.device;
  // 10 of 100 blocks used, 5 cached.
  store.applyFrame(frame(1, [request(1, 'running'), step(1, [1], Kind.Decode)]));
  const { parts, total } = memoryParts(store)!;
  assert.equal(
    Object.values(parts).reduce((sum, each) => sum + each, 0),
    total
  );
  assert.ok(Math.abs(parts.used - 0.4 * gib) < 1);
  assert.ok(Math.abs(parts.cached - 0.2 * gib) < 1);
  assert.ok(Math.abs(parts.other - 4.4 * gib) < 1);
});
