import assert from 'node:assert/strict';
import { test } from 'node:test';

import type { DeviceEvent } from '../src/telemetry/protocol';
import { Kind } from '../src/telemetry/protocol';
import { TelemetryStore } from '../src/telemetry/store';
import { epochSlopes, pointsOf } from '../src/views/latency-plot';
import { untranslated } from '../src/views/translation';
import { describeSwitch } from '../src/views/words';
import { features, frame, MS, request, snapshot, step, tokens } from './events';

function connected(): TelemetryStore {
  const store = new TelemetryStore();
  store.applySnapshot(snapshot('a'));
  return store;
}

test('a token learns its epoch, batch and kind from its step, whichever of the two comes first', () => {
  const store = connected();
  store.applyFrame(frame(1, [step(1, [1, 2], Kind.Prefill, 12, 3), tokens(1, [1, 2], 0, 80, 100)]));
  store.applyFrame(frame(2, [tokens(2, [1, 2], 1, 20, 120)]));
  const early = store.requests.get(1)!.tokens[1];
  assert.equal(early.kind, null);
  store.applyFrame(frame(3, [step(2, [1, 2], Kind.Decode, 1, 3)]));
  const [first, second] = store.requests.get(2)!.tokens;
  assert.deepEqual([first.kind, first.batch, first.epoch], [Kind.Prefill, 2, 3]);
  assert.deepEqual([second.kind, second.batch, second.epoch], [Kind.Decode, 2, 3]);
});

test('the output rate counts the tokens made within the span, not those that open it', () => {
  const store = connected();
  for (let index = 0; index <= 10; index++) {
    store.applyFrame(frame(index + 1, [tokens(index, [1, 2], index, 100, index * 100)]));
  }
  // 2 requests, one token each per 100 ms.
  assert.equal(Math.round(store.metrics(Infinity).outputRate!), 20);
  assert.equal(Math.round(store.metrics(500 * MS).outputRate!), 20);
});

test('first tokens are TTFT and later ones are ITL', () => {
  const store = connected();
  store.applyFrame(frame(1, [tokens(1, [1], 0, 300, 300), tokens(2, [1], 1, 20, 320), tokens(3, [1], 2, 40, 360)]));
  const metrics = store.metrics(Infinity);
  assert.equal(metrics.ttftP50Ms, 300);
  assert.equal(metrics.itlP50Ms, 30);
  assert.equal(metrics.itlCount, 2);
});

test('a request that outlasts the window keeps its TTFT on the screen', () => {
  const store = connected();
  store.applyFrame(frame(1, [tokens(1, [1], 0, 300, 300), tokens(2, [1], 1, 20, 9000)]));
  const metrics = store.metrics(1000 * MS);
  assert.equal(metrics.ttftP50Ms, 300);
  assert.equal(metrics.ttftCount, 0);
});

test('positions computed are summed by what they were for', () => {
  const store = connected();
  const mixed = {
    ...step(1, [1, 2, 3], Kind.Decode),
    scheduled: [50, 1, 30],
    kind: [Kind.Prefill, Kind.Decode, Kind.Recompute]
  };
  store.applyFrame(frame(1, [mixed]));
  assert.deepEqual(store.steps.at(-1)!.byKind, [50, 1, 30, 0, 0]);
  assert.equal(store.steps.at(-1)!.total, 81);
});

test('events that the server dropped are counted and said', () => {
  const store = connected();
  store.applyFrame(frame(1, [], 17));
  assert.equal(store.dropped, 17);
  assert.equal(store.feed.at(-1)!.missing, 17);
});

test('the newest sample of the hardware comes with the snapshot, and outlasts one without it of the same server', () => {
  const store = new TelemetryStore();
  const device = { t: 'device', at_ns: 1, cores: 2 } as DeviceEvent;
  store.applySnapshot({ ...snapshot('a'), device });
  assert.equal(store.device, device);
  store.applySnapshot(snapshot('a'));
  assert.equal(store.device, device);
  store.applySnapshot(snapshot('b'));
  assert.equal(store.device, null);
});

test('a reconnection says how many steps nobody saw, and says nothing where there are none', () => {
  const store = new TelemetryStore();
  const gaps = () =>
    Array.from({ length: store.feed.length }, (_, at) => store.feed.at(at)!).filter(each => each.kind === 'gap');
  store.applySnapshot(snapshot('a', [step(3, [1], Kind.Decode)], [request(1, 'running')]));
  store.applySnapshot(snapshot('a', [step(3, [1], Kind.Decode), step(4, [1], Kind.Decode)], [request(1, 'running')]));
  store.applySnapshot(snapshot('a', [step(5, [1], Kind.Decode)], [request(1, 'running')]));
  assert.equal(gaps().length, 0);
  store.applySnapshot(snapshot('a', [step(12, [1], Kind.Decode)], [request(1, 'running')]));
  assert.match(gaps()[0]!.text, /^6 steps went by/);
  // Another server counts for itself.
  store.applySnapshot(snapshot('b', [step(90, [1], Kind.Decode)], [request(1, 'running')]));
  assert.equal(gaps().length, 1);
});

test('a reconnection to the same server keeps the tokens that its history no longer holds', () => {
  const store = connected();
  store.applyFrame(frame(1, [request(1, 'running'), tokens(1, [1], 0, 50, 50), tokens(2, [1], 1, 20, 70)]));
  store.applySnapshot(snapshot('a', [tokens(3, [1], 2, 20, 90)], [request(1, 'running', 3)]));
  assert.deepEqual(
    store.requests.get(1)!.tokens.map(token => token.index),
    [0, 1, 2]
  );
});

test('a new server’s handles are not mixed with the old one’s', () => {
  const store = connected();
  store.applyFrame(frame(1, [request(1, 'running'), tokens(1, [1], 0, 50, 50)]));
  store.applySnapshot(snapshot('b', [], [request(1, 'running')]));
  assert.equal(store.requests.get(1)!.tokens.length, 0);
  assert.match(store.feed.at(-1)!.text, /new server/);
});

test('why the engine died is remembered while it comes back, and forgotten once a request has succeeded', () => {
  const store = connected();
  const engine = snapshot('a').engine;
  store.applyFrame(frame(1, [{ ...engine, state: 'restarting', message: 'It was killed by SIGKILL. See the log.' }]));
  store.applyFrame(
    frame(2, [
      { ...engine, state: 'loading' },
      { ...engine, state: 'ready' }
    ])
  );
  store.applySnapshot(snapshot('a'));
  assert.match(store.failure!.message, /SIGKILL/);
  store.applyFrame(frame(1, [request(1, 'finished', 3)]));
  assert.equal(store.failure, null);
});

test('a restarted engine’s step numbers begin a new series', () => {
  const store = connected();
  store.applyFrame(frame(1, [step(40, [1], Kind.Decode), step(41, [1], Kind.Decode)]));
  store.applyFrame(frame(2, [step(1, [2], Kind.Prefill, 9)]));
  assert.equal(store.steps.length, 1);
  assert.equal(store.step(41), undefined);
});

test('a request’s end frees its figures: nothing runs, nothing is occupied', () => {
  const store = connected();
  store.applyFrame(frame(1, [request(1, 'running'), step(1, [1], Kind.Decode)]));
  assert.equal(store.metrics(Infinity).kvBlocks, 0.1);
  assert.equal(store.metrics(Infinity).running, 1);
  store.applyFrame(frame(2, [request(1, 'finished', 5)]));
  assert.equal(store.metrics(Infinity).idle, true);
  assert.equal(store.metrics(Infinity).kvBlocks, 0);
});

test('the oldest tokens of a very long request are forgotten, and counted', () => {
  const store = new TelemetryStore({ tokensPerRequest: 10 });
  for (let index = 0; index < 25; index++) {
    store.applyFrame(frame(index + 1, [tokens(index, [1], index, 10, index * 10)]));
  }
  const record = store.requests.get(1)!;
  assert.equal(record.tokens.length, 10);
  assert.equal(record.forgotten, 15);
  assert.equal(record.tokens[0].index, 15);
});

test('a switch is told once when applied and once when the interrupted requests have caught up', () => {
  const store = connected();
  store.applyFrame(frame(1, [features(1, false, null, 3)]));
  assert.equal(
    describeSwitch(store.epochs.get(1)!, untranslated),
    'applied in 0.42 ms · 3 requests catching up on 300 tokens'
  );
  store.applyFrame(frame(2, [features(1, false, 8_100 * MS, 3)]));
  assert.equal(store.feed.length, 2);
  assert.equal(
    describeSwitch(store.epochs.get(1)!, untranslated),
    'applied in 0.42 ms · caught up after 8.00 s, 3 requests recomputed 300 tokens'
  );
});

test('latency that grows with position shows as the slope of its epoch alone', () => {
  const store = connected();
  store.applyFrame(frame(1, [request(1, 'running')]));
  for (let index = 0; index < 60; index++) {
    const off = index >= 30;
    const latency = off ? 20 + 0.5 * index : 20 + (index % 2);
    store.applyFrame(
      frame(index + 2, [
        step(index, [1], off ? Kind.Recompute : Kind.Decode, 1, off ? 1 : 0),
        tokens(index, [1], index, latency, index * 50)
      ])
    );
  }
  const [on, off] = epochSlopes(pointsOf(store.requests.get(1)!));
  assert.ok(Math.abs(on.slopeMs) < 0.02, String(on.slopeMs));
  assert.ok(Math.abs(off.slopeMs - 0.5) < 1e-9, String(off.slopeMs));
});
