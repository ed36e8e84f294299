import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { test } from 'node:test';

import type { FeatureSpec } from '../src/telemetry/protocol';
import { TelemetryStore } from '../src/telemetry/store';
import { figuresOf, LAYOUTS } from '../src/views/arrangement';
import { connectLine, python, reproducingCell } from '../src/views/reproduce';
import { snapshot } from './events';

function spec(name: string, value: boolean | number | string, available = true): FeatureSpec {
  return { name, default: value, available } as FeatureSpec;
}

/** What Python makes of code in which `wb` only writes down what it is asked. */
function asked(code: string): unknown {
  const recorder = `
import json, sys, types
told = []
class Asked:
    def __init__(self, name): self.name = name
    def __getattr__(self, name): return Asked(f"{self.name}.{name}" if self.name else name)
    def __call__(self, *args, **kwargs): told.append([self.name, list(args), kwargs])
module = types.ModuleType("inference_workbench")
module.connect = lambda: Asked("")
sys.modules["inference_workbench"] = module
exec(sys.stdin.read())
print(json.dumps(told))
`;
  return JSON.parse(execFileSync('python3', ['-c', recorder], { input: code, encoding: 'utf8' }));
}

test('the cell asks Python for the switches that differ, the traffic and the prompt', () => {
  const store = new TelemetryStore();
  store.applySnapshot({
    ...snapshot('a'),
    specs: [
      spec('kv_cache', true),
      spec('max_num_seqs', 32),
      spec('batching', 'continuous'),
      spec('overlap', true, false)
    ]
  });
  store.features = {
    ...store.features!,
    values: { kv_cache: false, max_num_seqs: 32, batching: 'static', overlap: false }
  };
  store.traffic = {
    state: 'running',
    workload: {
      name: 'shared prefix',
      arrivals: { kind: 'poisson', rate: 1.5, burstiness: 1 },
      output_tokens: { low: 8, high: 64 },
      shared_prefix_tokens: 400
    }
  } as typeof store.traffic;
  const prompt = 'Say "hi"\nto Ada – 🌍 \\ and more than fits on one line, so that the call has to be broken up';
  const cell = reproducingCell(store, {
    messages: [{ role: 'user', content: prompt }],
    max_tokens: 200,
    temperature: 0.9,
    n: 1,
    ignore_eos: true
  });
  assert.deepEqual(asked(cell), [
    ['features.update', [], { kv_cache: false, batching: 'static' }],
    [
      'traffic.start',
      ['shared prefix'],
      { rate: 1.5, burstiness: 1, output_tokens: [8, 64], shared_prefix_tokens: 400 }
    ],
    ['generate', [[{ role: 'user', content: prompt }]], { max_tokens: 200, temperature: 0.9, ignore_eos: true }],
    ['panel', [], {}]
  ]);
});

test('several at once are several prompts, plain text is text, and with nothing to say only the views are shown', () => {
  const store = new TelemetryStore();
  store.applySnapshot(snapshot('a'));
  assert.deepEqual(asked(reproducingCell(store, { prompt: 'def f(', max_tokens: 8, temperature: 0, n: 2 })), [
    ['generate_many', [['def f(', 'def f(']], { max_tokens: 8, temperature: 0 }],
    ['panel', [], {}]
  ]);
  assert.deepEqual(asked(reproducingCell(store, null)), [['panel', [], {}]]);
  assert.deepEqual([true, false, 3, 'a"b'].map(python), ['True', 'False', '3', '"a\\"b"']);
});

test('every layout shows some of the figures there are', () => {
  const all = [
    'timeline',
    'latency',
    'attribution',
    'batch',
    'kv',
    'kv-map',
    'memory',
    'histogram',
    'roofline',
    'economy'
  ];
  for (const layout of LAYOUTS) {
    assert.ok(figuresOf(layout, all).length >= 3, layout);
  }
  assert.deepEqual(figuresOf('all', all), all);
});

test('a server that connect() would not find by itself is named by its instance', () => {
  const store = new TelemetryStore();
  store.applySnapshot(snapshot('a'));
  const first = (cell: string) => cell.split('\n').find(line => line.startsWith('wb ='));
  assert.match(first(reproducingCell(store, null))!, /^wb = iw\.connect\(\)/);
  assert.match(first(reproducingCell(store, null, '9f2c'))!, /^wb = iw\.connect\(instance="9f2c"\)/);
  assert.equal(connectLine(null), 'wb = iw.connect()');
});
