import assert from 'node:assert/strict';
import { test } from 'node:test';

import {
  contrast,
  HEAT_DARK,
  HEAT_LIGHT,
  LATENCY_EDGES_MS,
  latencyClass,
  ORIGIN_DARK,
  ORIGIN_LIGHT,
  PHASE,
  PHASE_ON_DARK
} from '../src/views/colours';
import { bytes, duration, magnitude, percent } from '../src/views/format';

test('text on every colour of tokens has a contrast of at least 4.5', () => {
  const origins = [ORIGIN_LIGHT, ORIGIN_DARK].flatMap(each => Object.values(each));
  for (const { fill, ink } of [...HEAT_LIGHT, ...HEAT_DARK, ...origins]) {
    assert.ok(contrast(fill, ink) >= 4.5, `${ink} on ${fill}: ${contrast(fill, ink).toFixed(2)}`);
  }
});

test('the scales run steadily from quick to slow', () => {
  for (const scale of [HEAT_LIGHT, HEAT_DARK]) {
    assert.equal(scale.length, LATENCY_EDGES_MS.length + 1);
    const brightness = scale.map(shade => contrast(shade.fill, '#000000'));
    const sorted = [...brightness].sort((a, b) => a - b);
    assert.ok([sorted.join(), sorted.reverse().join()].includes(brightness.join()), brightness.join());
  }
});

test('plotted phases stand out from light and dark grounds by at least 2 and 3', () => {
  for (const name of ['prefill', 'cacheHit', 'rejected', 'accepted'] as const) {
    assert.ok(contrast(PHASE[name], '#ffffff') >= 3, name);
    assert.ok(contrast(PHASE_ON_DARK[name], '#111111') >= 3, name);
  }
  assert.ok(contrast(PHASE.decode, '#ffffff') >= 2);
});

test('latencies fall into classes whose upper edge is included', () => {
  assert.deepEqual([0, 10, 10.1, 40, 320, 321].map(latencyClass), [0, 0, 1, 2, 5, 6]);
});

test('durations, sizes and shares are written in the unit that fits', () => {
  assert.equal(duration(51_000), '51 µs');
  assert.equal(duration(420_000), '0.42 ms');
  assert.equal(duration(17_340_000), '17.3 ms');
  assert.equal(duration(8_920_000_000), '8.92 s');
  assert.equal(duration(123_000_000_000), '123 s');
  assert.equal(magnitude(134_515_008), '135M');
  assert.equal(bytes(1_610_612_736), '1.50 GiB');
  assert.equal(percent(0), '0 %');
  assert.equal(percent(0.0004), '< 0.1 %');
  assert.equal(percent(0.37), '37 %');
});
