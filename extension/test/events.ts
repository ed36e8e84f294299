/** Events as the server sends them, for the tests of this folder. */

import type {
  EngineEvent,
  EngineState,
  FeaturesEvent,
  Frame,
  Kind,
  RequestEvent,
  Snapshot,
  StepEvent,
  TelemetryEvent,
  TokensEvent
} from '../src/telemetry/protocol';

export const MS = 1e6;

export function step(number: number, requests: number[], kind: Kind, scheduled = 1, epoch = 0): StepEvent {
  const begin = number * 20 * MS;
  return {
    t: 'step',
    step: number,
    epoch,
    begin_ns: begin,
    schedule_ns: MS,
    prepare_ns: MS,
    forward_ns: 10 * MS,
    sample_ns: MS,
    update_ns: MS,
    end_ns: begin + 15 * MS,
    path: 'eager',
    request: requests,
    start: requests.map(() => 0),
    scheduled: requests.map(() => scheduled),
    kind: requests.map(() => kind),
    running: requests.length,
    waiting: 0,
    kv: { total_blocks: 100, used_blocks: 10, cached_blocks: 5, filled_slots: 120, block_size: 16 },
    idle_slots: 0
  };
}

export function tokens(
  number: number,
  requests: number[],
  index: number,
  latencyMs: number,
  sentMs: number
): TokensEvent {
  return {
    t: 'tokens',
    step: number,
    request: requests,
    index: requests.map(() => index),
    token_id: requests.map(() => 7),
    text: requests.map(() => ' a'),
    logprob: requests.map(() => null),
    sent_ns: requests.map(() => sentMs * MS),
    latency_ns: requests.map(() => latencyMs * MS)
  };
}

export function request(handle: number, state: RequestEvent['state'], outputTokens = 0): RequestEvent {
  return {
    t: 'request',
    request: handle,
    id: `cmpl-${handle}`,
    state,
    at_ns: 0,
    arrival_ns: 0,
    prompt_tokens: 12,
    cached_tokens: 0,
    output_tokens: outputTokens,
    max_tokens: 100,
    preview: 'Once',
    first_token_ns: null,
    finish_reason: state === 'finished' ? 'length' : null,
    error: null,
    group: null
  };
}

export function features(epoch: number, kvCache: boolean, settled: number | null, preempted = 0): FeaturesEvent {
  return {
    t: 'features',
    epoch,
    values: { kv_cache: kvCache },
    changed: epoch === 0 ? [] : ['kv_cache'],
    cost: 'recompute',
    requested_ns: 0,
    applied_ns: 100 * MS,
    apply_ns: 0.42 * MS,
    preempted,
    recompute_tokens: preempted * 100,
    settled_ns: settled
  };
}

export function engine(state: EngineState): EngineEvent {
  return {
    t: 'engine',
    state,
    at_ns: 0,
    stage: '',
    fraction: null,
    message: '',
    pid: 2,
    restarts: 0,
    failed_requests: 0
  };
}

export function snapshot(instance: string, history: TelemetryEvent[] = [], requests: RequestEvent[] = []): Snapshot {
  return {
    t: 'snapshot',
    seq: 0,
    now_ns: 0,
    server: { version: '0.1.0', protocol: 1, instance, pid: 1, started_ns: 0 },
    engine: engine('ready'),
    model: null,
    capacity: null,
    specs: [],
    features: features(0, true, 0),
    requests,
    history
  };
}

export function frame(seq: number, events: TelemetryEvent[], dropped = 0): Frame {
  return { t: 'frame', seq, now_ns: 0, dropped, events };
}
