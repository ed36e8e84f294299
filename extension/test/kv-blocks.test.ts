import assert from 'node:assert/strict';
import { test } from 'node:test';

import { KvBlocks } from '../src/telemetry/kv-blocks';
import { BlockLook, blockLooks, summarize } from '../src/telemetry/kv-looks';
import { Kind, KvOp, NOBODY } from '../src/telemetry/protocol';
import { TelemetryStore } from '../src/telemetry/store';
import { ranges } from '../src/views/kv-map';
import { engine, features, frame, request, snapshot, step } from './events';

const { Allocate, Copy, Evict, Free, Hash, Release, Reset, Share } = KvOp;

function told(blocks: KvBlocks, number: number, ...rows: [KvOp, number, number?][]): KvBlocks {
  blocks.apply({
    t: 'kv',
    step: number,
    op: rows.map(([op]) => op),
    block: rows.map(([, block]) => block),
    request: rows.map(([, , handle]) => handle ?? NOBODY)
  });
  return blocks;
}

test('before a reset nothing is known of any block', () => {
  const blocks = told(new KvBlocks(), 1, [Allocate, 3, 1]);
  assert.equal(blocks.numBlocks, null);
  assert.equal(blocks.tables.size, 0);
});

test('a shared block has all its holders, and the last one’s end makes it cached', () => {
  const blocks = told(new KvBlocks(), 1, [Reset, 8], [Allocate, 0, 1], [Hash, 0], [Share, 0, 2], [Allocate, 1, 2]);
  assert.equal(blocks.references[0], 2);
  assert.deepEqual(blocks.holdings(0), [
    { request: 1, index: 0 },
    { request: 2, index: 0 }
  ]);
  told(blocks, 2, [Free, 1, 2], [Release, 0, 2]);
  assert.equal(blocks.owner[0], 1);
  assert.deepEqual([...blocks.tables], [[1, [0]]]);
  told(blocks, 3, [Free, 0, 1]);
  assert.equal(blocks.state(0), 'cached');
  assert.equal(blocks.owner[0], NOBODY);
  told(blocks, 9, [Evict, 0], [Allocate, 0, 3]);
  assert.equal(blocks.state(0), 'used');
  assert.equal(blocks.evictedAt[0], 9);
  assert.equal(blocks.evictions, 1);
});

test('a copy on write takes the place of the block that it was copied from', () => {
  const blocks = told(new KvBlocks(), 1, [Reset, 8], [Allocate, 0, 1], [Allocate, 1, 1], [Share, 0, 2], [Share, 1, 2]);
  told(blocks, 2, [Allocate, 5, 2], [Copy, 5, 2], [Release, 1, 2], [Allocate, 6, 2]);
  assert.deepEqual(blocks.tables.get(2), [0, 5, 6]);
  assert.deepEqual(blocks.tables.get(1), [0, 1]);
  assert.equal(blocks.references[1], 1);
});

test('a clone goes its own way', () => {
  const blocks = told(new KvBlocks(), 1, [Reset, 4], [Allocate, 0, 1]);
  const clone = blocks.clone();
  told(blocks, 2, [Free, 0, 1]);
  assert.equal(clone.state(0), 'used');
  assert.deepEqual(clone.tables.get(1), [0]);
});

test('prompt, output, shared and cached blocks are told apart, with what is filled of them', () => {
  const store = new TelemetryStore();
  store.applySnapshot(snapshot('a', [], [request(1, 'running'), request(2, 'running')]));
  const compute = { ...step(4, [1, 2], Kind.Decode), start: [36, 12] };
  store.applyFrame(frame(1, [compute]));
  // Request 1 holds three blocks of 16: 12 prompt positions, 37 computed; request 2 shares the first.
  told(store.kv, 4, [Reset, 6], [Allocate, 0, 1], [Allocate, 1, 1], [Allocate, 2, 1], [Share, 0, 2]);
  told(store.kv, 4, [Allocate, 3, NOBODY], [Hash, 3], [Free, 3, NOBODY]);
  const looks = blockLooks(store);
  const { Cached, Free: Empty, Output, Shared } = BlockLook;
  assert.deepEqual([...looks.look], [Shared, Output, Output, Cached, Empty, Empty]);
  assert.deepEqual([...looks.filled], [16, 16, 5, 0, 0, 0]);
  assert.deepEqual(summarize(store.kv, looks), {
    total: 6,
    used: 3,
    shared: 1,
    cached: 1,
    free: 2,
    slots: 48,
    filled: 37
  });
});

test('blocks are forgotten when the engine is gone or nobody logs them, and known again from a snapshot', () => {
  const store = new TelemetryStore();
  const state = { t: 'kv' as const, step: 7, op: [Reset, Allocate], block: [4, 2], request: [NOBODY, 1] };
  store.applySnapshot({ ...snapshot('a'), kv: state });
  assert.deepEqual([...store.kv.tables], [[1, [2]]]);
  store.applyFrame(frame(1, [engine('restarting')]));
  assert.equal(store.kv.numBlocks, null);
  store.applySnapshot({ ...snapshot('a'), kv: state });
  const off = features(1, true, null);
  store.applyFrame(frame(1, [{ ...off, values: { ...off.values, instrumentation: 'steps' } }]));
  assert.equal(store.kv.numBlocks, null);
});

test('evictions are told at most once a second, and none is left out of the count', () => {
  const store = new TelemetryStore();
  store.applySnapshot(snapshot('a'));
  for (let number = 0; number < 100; number++) {
    // A step every 20 ms.
    const evict = { t: 'kv' as const, step: number, op: [Evict, Evict], block: [1, 2], request: [NOBODY, NOBODY] };
    store.applyFrame(frame(number + 1, [step(number, [1], Kind.Decode), evict]));
  }
  const lines = store.feed.last(100).filter(entry => entry.kind === 'eviction');
  assert.deepEqual(
    lines.map(line => line.evicted),
    [2, 100]
  );
});

test('neighbouring blocks are written as ranges', () => {
  assert.equal(ranges([7, 3, 4, 5, 12]), '3–5, 7, 12');
  assert.equal(ranges([1, 3, 5, 7], 2), '1, 3, …');
});
