import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';

import { openRecording, RecordingError } from '../src/replay/recording';
import { ReplaySource } from '../src/replay/source';
import { Timeline } from '../src/replay/timeline';
import { crc32, readZip } from '../src/replay/zip';
import { imbalance, partsByStep } from '../src/telemetry/attribution';
import { PARTS } from '../src/telemetry/protocol';
import { TelemetryStore } from '../src/telemetry/store';

const DATA = join(process.env.EXTENSION_ROOT!, 'test', 'data');

function bytesOf(name: string): Uint8Array<ArrayBuffer> {
  return new Uint8Array(readFileSync(join(DATA, name)));
}

async function open(): Promise<Timeline> {
  return new Timeline((await openRecording(bytesOf('small.iwrec'))).recorded);
}

/** Everything a view can read of a store, as plain values. */
function content(store: TelemetryStore): unknown {
  return {
    engine: store.engine,
    failure: store.failure,
    model: store.model?.name,
    features: store.features,
    epochs: [...store.epochs],
    requests: [...store.requests],
    steps: store.steps.last(store.steps.length),
    tokens: store.tokens.last(store.tokens.length),
    feed: store.feed.last(store.feed.length),
    device: store.device,
    cost: store.telemetryCost,
    newest: store.newestSentNs,
    kv: store.kv,
    metrics: [store.metrics(1e8), store.metrics(Infinity)],
    parts: [...partsByStep(store, Infinity).values()].sort((a, b) => a.step - b.step)
  };
}

/** The oracle of seeking: a page that was connected from the beginning and got every event as it happened. */
function lived(timeline: Timeline, atNs: number): TelemetryStore {
  const store = new TelemetryStore();
  store.applySnapshot(timeline.snapshot());
  timeline.between(timeline.beginNs, atNs).forEach((event, at) => {
    store.applyFrame({ t: 'frame', seq: at + 1, now_ns: atNs, dropped: 0, events: [event] });
  });
  return store;
}

test('after every step the blocks are where Python says they are', async () => {
  const { kv } = JSON.parse(readFileSync(join(DATA, 'small.json'), 'utf8')) as {
    kv: Record<string, { tables: [number, number[]][]; cached: number[] }>;
  };
  const timeline = await open();
  assert.ok(Object.keys(kv).length > 20);
  for (const [step, expected] of Object.entries(kv)) {
    const blocks = timeline.at(timeline.momentOfStep(timeline.rowOf(Number(step))!)).kv;
    assert.deepEqual(
      [...blocks.tables].sort(([a], [b]) => a - b),
      expected.tables
    );
    const cached = Array.from({ length: blocks.numBlocks! }, (_, block) => block).filter(
      block => blocks.state(block) === 'cached'
    );
    assert.deepEqual(cached, expected.cached);
    const held = new Map<number, number>();
    expected.tables.forEach(([, table]) => table.forEach(block => held.set(block, (held.get(block) ?? 0) + 1)));
    held.forEach((count, block) => assert.equal(blocks.references[block], count));
  }
});

test('the columns that Python wrote are the columns that are read', async () => {
  const expected = JSON.parse(readFileSync(join(DATA, 'small.json'), 'utf8')) as {
    steps: Record<string, unknown>[];
    tokens: Record<string, unknown>[];
    requests: number;
    features: number;
  };
  const { recorded } = await openRecording(bytesOf('small.iwrec'));
  assert.equal(recorded.steps.rows, expected.steps.length);
  expected.steps.forEach((row, at) => {
    const { t, kv, request, start, scheduled, kind, ...scalars } = recorded.steps.event(at);
    assert.equal(t, 'step');
    assert.deepEqual({ ...scalars, ...kv, request, start, scheduled, kind }, row);
  });
  const { tokens } = recorded;
  assert.equal(tokens.rows, expected.tokens.length);
  expected.tokens.forEach((row, at) => {
    assert.deepEqual(
      {
        step: tokens.step[at],
        request: tokens.request[at],
        index: tokens.index[at],
        token_id: tokens.token_id[at],
        text: tokens.text[at],
        logprob: Number.isNaN(tokens.logprob[at]) ? null : tokens.logprob[at],
        sent_ns: tokens.sent_ns[at],
        latency_ns: tokens.latency_ns[at],
        parts: tokens.parts!.map(column => column[at]),
        origin: tokens.origin[at]
      },
      row
    );
  });
  assert.equal(recorded.requests.length, expected.requests);
  assert.equal(recorded.features.length, expected.features + 1, 'and the switches at the start');
});

test('the parts of every recorded token add up to its latency', async () => {
  const timeline = await open();
  for (let row = 0; row < timeline.tokenCount; row++) {
    const token = timeline.tokenRecord(row);
    assert.equal(token.parts!.length, PARTS.length);
    assert.equal(imbalance(token), 0);
  }
});

test('seeking shows exactly what a page would know that had been there from the beginning', async () => {
  const timeline = await open();
  const source = new ReplaySource(timeline);
  const { beginNs, durationNs } = timeline;
  // Back and forth, so that each seek starts from somewhere else.
  const shares = Array.from({ length: 40 }, (_, at) => (at * 0.618034) % 1).concat([1, 0, 0.5, 0.5]);
  for (const share of shares) {
    const atNs = Math.round(beginNs + share * durationNs);
    source.seek(atNs);
    assert.deepEqual(content(source.store), content(lived(timeline, atNs)), `at ${share}`);
  }
});

test('going through the recording step by step visits every step once, forwards and backwards', async () => {
  const timeline = await open();
  const source = new ReplaySource(timeline);
  for (let row = 0; row < timeline.stepCount; row++) {
    source.walk(1);
    assert.equal(source.stepRow, row);
    assert.equal(source.store.steps.at(-1)!.event.step, timeline.stepNumber(row));
  }
  for (let row = timeline.stepCount - 2; row >= 0; row--) {
    source.walk(-1);
    assert.equal(source.stepRow, row);
  }
  source.walk(-1);
  assert.equal(source.stepRow, -1);
  assert.equal(source.store.tokens.length, 0);
});

test('playing comes to the same end as seeking there, at any speed, and skips the pause', async t => {
  t.mock.timers.enable({ apis: ['setTimeout'] });
  let now = 1000;
  t.mock.method(performance, 'now', () => now);
  const timeline = await open();
  for (const speed of [1, 16, 'max'] as const) {
    const source = new ReplaySource(timeline);
    source.setSpeed(speed);
    source.play();
    const began = now;
    for (let tick = 0; source.playing && tick < 10_000; tick++) {
      now += 30;
      t.mock.timers.tick(30);
    }
    assert.equal(source.playing, false);
    assert.deepEqual(content(source.store), content(lived(timeline, timeline.endNs)));
    if (speed === 1) {
      assert.ok(now - began < timeline.durationNs / 1e6 - 2000, 'three seconds of silence are not sat out');
    }
  }
});

test('at one moment the views have the switches of that epoch, and none of them can be thrown', async () => {
  const timeline = await open();
  const source = new ReplaySource(timeline);
  const [thrown] = timeline.switches;
  source.seek(thrown.atNs - 1);
  assert.equal(source.store.features!.values['prefix_cache_read'], true);
  source.seek(thrown.atNs);
  assert.equal(source.store.features!.values['prefix_cache_read'], false);
  assert.equal(source.readOnly, true);
  await assert.rejects(source.setFeatures(), /recording/);
});

// -- what is not a recording ------------------------------------------------------------------------------------------

async function refused(bytes: Uint8Array<ArrayBuffer>, words: RegExp): Promise<void> {
  await assert.rejects(openRecording(bytes), (error: unknown) => {
    assert.ok(error instanceof RecordingError, String(error));
    assert.match(error.message, words);
    return true;
  });
}

test('an empty file, a foreign file and a foreign ZIP are each called what they are', async () => {
  await refused(new Uint8Array(), /empty/);
  await refused(new TextEncoder().encode('step,token\n1,2\n'), /not a recording.*ZIP/);
  await refused(zip({ 'letter.txt': 'Dear reader' }), /no manifest\.json/);
  await refused(zip({ 'manifest.json': '{"format": "cake"}' }), /format "cake"/);
  await refused(zip({ 'manifest.json': 'not json' }), /not JSON/);
});

test('a recording of a later version names both versions and says what to do', async () => {
  await refused(
    zip({ 'manifest.json': '{"format": "inference-workbench-recording", "format_version": 99}' }),
    /version 99.*up to 1.*newer version/
  );
});

test('a recording cut off anywhere is refused with a reason', async () => {
  const whole = bytesOf('small.iwrec');
  for (let part = 1; part < 40; part++) {
    await refused(whole.slice(0, Math.floor((whole.length * part) / 40)), /cut off/);
  }
  await refused(whole.slice(0, whole.length - 1), /cut off/);
});

test('a changed byte in any table that is read is found', async () => {
  const whole = bytesOf('small.iwrec');
  for (const { name, bytes } of readZip(whole).values()) {
    if (bytes.length > 0 && !/^(kv_events|requests)\./.test(name)) {
      const spoiled = whole.slice();
      spoiled[bytes.byteOffset + Math.floor(bytes.length / 2)] ^= 0x10;
      await refused(spoiled, new RegExp(`checksum of ${name.replace('.', '\\.')}`));
    }
  }
});

test('a table that is missing or another one is found', async () => {
  const entries = readZip(bytesOf('small.iwrec'));
  const files = Object.fromEntries([...entries.values()].map(each => [each.name, each.bytes]));
  const without = Object.entries(files).filter(([name]) => name !== 'steps.parquet');
  await refused(zip(Object.fromEntries(without)), /table steps is missing/);
  await refused(zip({ ...files, 'steps.parquet': files['tokens.parquet'] }), /table steps/);
  await refused(zip({ ...files, 'steps.parquet': 'PAR1 and then nothing' }), /steps is not Parquet/);
});

/** A ZIP archive of stored entries, made independently of the reader. */
function zip(files: Record<string, string | Uint8Array>): Uint8Array<ArrayBuffer> {
  const parts: Buffer[] = [];
  const directory: Buffer[] = [];
  let offset = 0;
  for (const [name, content] of Object.entries(files)) {
    const data = Buffer.from(content as Uint8Array);
    const head = Buffer.alloc(30);
    head.writeUInt32LE(0x04034b50, 0);
    head.writeUInt32LE(crc32(data), 14);
    head.writeUInt32LE(data.length, 18);
    head.writeUInt32LE(data.length, 22);
    head.writeUInt16LE(name.length, 26);
    const entry = Buffer.alloc(46);
    entry.writeUInt32LE(0x02014b50, 0);
    head.copy(entry, 16, 14, 28);
    entry.writeUInt32LE(offset, 42);
    parts.push(head, Buffer.from(name), data);
    directory.push(entry, Buffer.from(name));
    offset += 30 + name.length + data.length;
  }
  const end = Buffer.alloc(22);
  end.writeUInt32LE(0x06054b50, 0);
  end.writeUInt16LE(Object.keys(files).length, 8);
  end.writeUInt16LE(Object.keys(files).length, 10);
  end.writeUInt32LE(Buffer.concat(directory).length, 12);
  end.writeUInt32LE(offset, 16);
  return new Uint8Array(Buffer.concat([...parts, ...directory, end]));
}
