import assert from 'node:assert/strict';
import { test } from 'node:test';

import { ClockOffset, pauseAfter } from '../src/telemetry/clock';
import { Ring } from '../src/telemetry/ring';
import { minMaxIndices, percentile, percentiles, robustLine } from '../src/telemetry/statistics';

test('percentiles are those of the sorted values, many alike or none', () => {
  let state = 1;
  const random = () => (state = (state * 48271) % 2147483647) / 2147483647;
  for (let length = 1; length < 300; length += 7) {
    for (const kinds of [2, 10, 1e9]) {
      const values = Array.from({ length }, () => Math.floor(random() * kinds));
      const sorted = [...values].sort((a, b) => a - b);
      const qs = [0.95, 0, 0.5, 1, 0.013];
      const expected = qs.map(q => {
        const rank = (length - 1) * q;
        const low = sorted[Math.floor(rank)];
        return low + (sorted[Math.ceil(rank)] - low) * (rank - Math.floor(rank));
      });
      assert.deepEqual(percentiles(values, qs), expected);
    }
  }
});

test('percentiles interpolate as numpy does', () => {
  assert.equal(percentile([4, 1, 3, 2], 0.5), 2.5);
  assert.equal(percentile([1, 2, 3, 4, 5], 0.95), 4.8);
  assert.equal(percentile([], 0.5), null);
});

test('a robust line ignores a few stalls', () => {
  const xs = Array.from({ length: 100 }, (_, index) => index);
  const ys = xs.map(x => 5 + 0.25 * x + (x % 10 === 0 ? 300 : 0));
  const line = robustLine(xs, ys)!;
  assert.ok(Math.abs(line.slope - 0.25) < 1e-9);
  assert.ok(Math.abs(line.intercept - 5) < 1e-6);
});

test('thinning keeps each stall and stays in order', () => {
  const values = Array.from({ length: 5000 }, (_, index) => (index === 3217 ? 900 : 20));
  const kept = minMaxIndices(values, 100);
  assert.ok(kept.length <= 200);
  assert.ok(kept.includes(3217));
  assert.deepEqual(
    kept,
    [...kept].sort((a, b) => a - b)
  );
});

test('a ring forgets the oldest first', () => {
  const ring = new Ring<number>(3);
  const forgotten = [1, 2, 3, 4, 5].map(value => ring.push(value));
  assert.deepEqual(forgotten, [undefined, undefined, undefined, 1, 2]);
  assert.deepEqual(ring.last(2), [4, 5]);
  assert.equal(ring.at(0), 3);
  assert.equal(ring.at(-1), 5);
  assert.equal(ring.at(3), undefined);
  assert.throws(() => new Ring(0), RangeError);
});

test('the clock offset comes from the quickest exchange', () => {
  const clock = new ClockOffset();
  assert.equal(clock.serverTime(10), null);
  clock.add(0, 40, 1_000e6); // a slow one, off by up to 20 ms
  clock.add(100, 102, 1_101e6 + 5e6); // a quick one: server is 1005 ms ahead
  assert.equal(clock.serverTime(200), 200e6 + 1005e6);
  assert.equal(clock.uncertaintyMs, 1);
  clock.reset();
  assert.equal(clock.known, false);
});

test('a quick exchange counts for minutes, until the clocks may have drifted by more than a slow one errs', () => {
  const clock = new ClockOffset();
  clock.add(0, 2, 1e9);
  clock.add(60_000, 60_030, 61e9); // a minute later drift may be 3 ms, this one may err by 15
  assert.equal(clock.serverTime(1), 1e9);
  assert.ok(Math.abs(clock.uncertaintyMs! - 4) < 0.01);
  clock.add(400_000, 400_030, 401e9);
  assert.equal(clock.serverTime(400_015), 401e9);
  assert.equal(clock.uncertaintyMs, 15);
});

test('a connection asks for the time often until one exchange was likely quick, then seldom', () => {
  const pauses = Array.from({ length: 14 }, (_, made) => pauseAfter(made + 1));
  assert.deepEqual(pauses.slice(0, 3), [200, 400, 1000]);
  assert.ok(pauses.slice(2, 11).every(pause => pause === 1000));
  assert.deepEqual(pauses.slice(11), [5000, 5000, 5000]);
});
