/**
 * Opens a recording: checks that it is one, whole and of a version this page knows, and turns its tables into the events
 * that the server sent. Format: `docs/recording-format.md`.
 */

import type {
  Capacity,
  Ceilings,
  Cost,
  DeviceEvent,
  EngineEvent,
  EngineState,
  FeaturesEvent,
  FeatureSpec,
  FeatureValue,
  FinishReason,
  Kind,
  KvOp,
  ModelInfo,
  RequestEvent,
  RequestState,
  StepEvent,
  TelemetryCostEvent
} from '../telemetry/protocol';
import { NOBODY, PARTS, PROTOCOL_VERSION } from '../telemetry/protocol';
import type { Columns } from './columns';
import { readColumns } from './columns';
import type { KvColumns, Recorded, TokenColumns } from './timeline';
import { orNull } from './timeline';
import { damaged, readZip, RecordingError, verify } from './zip';
import type { ZipEntry } from './zip';

export { RecordingError } from './zip';

const FORMAT = 'inference-workbench-recording';
export const FORMAT_VERSION = 1;
const MANIFEST = 'manifest.json';

/** A model that was served from `since_ns` on. */
export interface Served {
  since_ns: number;
  model: ModelInfo;
  capacity: Capacity;
  specs: FeatureSpec[];
}

/** The part of the manifest that a page shows. */
export interface Manifest {
  format: string;
  format_version: number;
  id: string;
  name: string;
  note: string;
  created: string;
  clock: { monotonic_ns: number; wall_ns: number };
  started_ns: number;
  ended_ns: number | null;
  end_reason: string;
  recovered: boolean;
  torn_bytes: number;
  lost_events: number;
  instance: string;
  versions: Record<string, string>;
  hardware: Record<string, string | number>;
  features: FeaturesEvent | null;
  parts: string[];
  models: Served[];
  ceilings: Ceilings[];
  tables: Record<string, { file: string; rows: number; bytes: number }>;
}

export interface Recording {
  manifest: Manifest;
  recorded: Recorded;
  /** Of the file. */
  bytes: number;
}

/** What a page reads; the other tables are for Python. */
const TABLES = [
  'steps',
  'step_requests',
  'tokens',
  'request_events',
  'features',
  'kv_events',
  'engine_events',
  'device',
  'device_processes',
  'telemetry_cost'
] as const;
type TableName = (typeof TABLES)[number];

/**
 * Open the bytes of an `.iwrec` file.
 *
 * Rejects with a {@link RecordingError}, whose message is for a person, if they are not one.
 */
export async function openRecording(bytes: Uint8Array<ArrayBuffer>): Promise<Recording> {
  const entries = readZip(bytes);
  const manifest = readManifest(entries);
  const tables = {} as Record<TableName, Columns>;
  for (const name of TABLES) {
    const info = manifest.tables[name];
    const entry = info ? entries.get(info.file) : undefined;
    if (!entry) {
      throw damaged(`the table ${name} is missing`);
    }
    verify(entry);
    tables[name] = await readColumns(name, entry.bytes);
    if (tables[name].rows !== info.rows) {
      throw damaged(`the table ${name} has ${tables[name].rows} rows instead of ${info.rows}`);
    }
  }
  return { manifest, recorded: toEvents(manifest, tables), bytes: bytes.length };
}

function readManifest(entries: Map<string, ZipEntry>): Manifest {
  const entry = entries.get(MANIFEST);
  if (!entry) {
    throw new RecordingError(`This ZIP file is not a recording: it has no ${MANIFEST}.`);
  }
  verify(entry);
  let found: Partial<Manifest>;
  try {
    found = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(entry.bytes)) as Partial<Manifest>;
  } catch {
    throw damaged(`its ${MANIFEST} is not JSON`);
  }
  if (found.format !== FORMAT) {
    throw new RecordingError(
      `This ZIP file is not a recording: its ${MANIFEST} is of the format ${JSON.stringify(found.format ?? null)}.`
    );
  }
  const version = found.format_version;
  if (typeof version !== 'number' || version < 1 || version > FORMAT_VERSION) {
    throw new RecordingError(
      `This recording has format version ${String(version)}; this page reads versions up to ${FORMAT_VERSION}. Open it with a newer version of inference-workbench.`
    );
  }
  if (typeof found.started_ns !== 'number' || typeof found.tables !== 'object' || !Array.isArray(found.models)) {
    throw damaged(`its ${MANIFEST} is incomplete`);
  }
  return found as Manifest;
}

function toEvents(manifest: Manifest, tables: Record<TableName, Columns>): Recorded {
  return {
    beginNs: manifest.started_ns,
    endNs: manifest.ended_ns ?? manifest.started_ns,
    server: {
      version: manifest.versions['inference-workbench'] ?? '',
      protocol: PROTOCOL_VERSION,
      instance: manifest.instance,
      pid: 0,
      started_ns: manifest.started_ns
    },
    served: manifest.models,
    ceilings: manifest.ceilings.at(-1) ?? null,
    steps: stepEvents(tables.steps, tables.step_requests),
    tokens: tokenColumns(tables.tokens),
    kv: kvColumns(tables.kv_events),
    requests: rows(tables.request_events, requestEvent),
    features: [...(manifest.features ? [manifest.features] : []), ...rows(tables.features, featuresEvent)],
    engine: rows(tables.engine_events, engineEvent),
    device: deviceEvents(tables.device, tables.device_processes),
    costs: rows(tables.telemetry_cost, costEvent)
  };
}

// -- tables to events -------------------------------------------------------------------------------------------------

function stepEvents(steps: Columns, shares: Columns): Recorded['steps'] {
  const number = steps.numbers('step');
  const ends = steps.numbers('end_ns');
  const path = steps.texts('path');
  const speculation = steps.textsOrNull('speculation');
  const column = (name: string) => steps.numbers(name);
  const plain = ['epoch', 'begin_ns', 'schedule_ns', 'prepare_ns', 'forward_ns', 'sample_ns', 'update_ns', 'end_ns']
    .concat(['running', 'waiting', 'idle_slots', 'before_ns', 'draft_ns'])
    .map(name => [name, column(name)] as const);
  const nullable = ['device_ns', 'attention_ns', 'read_bytes', 'flops'].map(
    name => [name, steps.numbersOrNull(name)] as const
  );
  const kv = ['total_blocks', 'used_blocks', 'cached_blocks', 'filled_slots', 'block_size'].map(
    name => [name, column(name)] as const
  );
  const share = {
    step: shares.numbers('step'),
    request: shares.numbers('request'),
    start: shares.numbers('start'),
    scheduled: shares.numbers('scheduled'),
    kind: shares.numbers('kind'),
    drafted: shares.numbersOrNull('drafted'),
    accepted: shares.numbersOrNull('accepted')
  };
  // The shares lie in the order of the steps.
  const begin = new Int32Array(steps.rows + 1);
  let at = 0;
  for (let row = 0; row < steps.rows; row++) {
    begin[row] = at;
    while (at < shares.rows && share.step[at] === number[row]) {
      at += 1;
    }
  }
  begin[steps.rows] = at;
  if (at !== shares.rows) {
    throw damaged('the table step_requests does not belong to the table steps');
  }
  return {
    rows: steps.rows,
    step: number,
    end_ns: ends,
    event: row => {
      const [from, to] = [begin[row], begin[row + 1]];
      return {
        t: 'step',
        step: number[row],
        path: path[row] ?? '',
        request: [...share.request.subarray(from, to)],
        start: [...share.start.subarray(from, to)],
        scheduled: [...share.scheduled.subarray(from, to)],
        kind: [...share.kind.subarray(from, to)] as Kind[],
        drafted: [...share.drafted.subarray(from, to)].map(count => count || 0),
        accepted: [...share.accepted.subarray(from, to)].map(count => count || 0),
        speculation: speculation?.[row] ?? '',
        kv: Object.fromEntries(kv.map(([name, values]) => [name, values[row]])),
        ...Object.fromEntries(plain.map(([name, values]) => [name, values[row]])),
        ...Object.fromEntries(nullable.map(([name, values]) => [name, orNull(values[row])]))
      } as unknown as StepEvent;
    }
  };
}

function tokenColumns(table: Columns): TokenColumns {
  return {
    rows: table.rows,
    step: table.numbers('step'),
    request: table.numbers('request'),
    index: table.numbers('index'),
    token_id: table.numbers('token_id'),
    text: table.texts('text'),
    logprob: table.numbersOrNull('logprob'),
    sent_ns: table.numbers('sent_ns'),
    latency_ns: table.numbers('latency_ns'),
    parts: PARTS.map(part => table.numbersOrNull(`${part}_ns`)),
    origin: table.numbersOrNull('origin')
  };
}

function kvColumns(table: Columns): KvColumns {
  return {
    rows: table.rows,
    step: table.numbers('step'),
    op: table.numbers('op') as unknown as ArrayLike<KvOp>,
    block: table.numbers('block'),
    request: table.numbersOrNull('request').map(handle => (Number.isNaN(handle) ? NOBODY : handle))
  };
}

function rows<T>(table: Columns, make: (table: Columns, row: number) => T): T[] {
  return Array.from({ length: table.rows }, (_, row) => make(table, row));
}

function requestEvent(table: Columns, row: number): RequestEvent {
  const number = (name: string) => table.numbers(name)[row];
  const optional = (name: string) => orNull(table.numbers(name)[row]);
  const text = (name: string) => table.texts(name)[row];
  return {
    t: 'request',
    request: number('request'),
    id: text('id') ?? '',
    state: text('state') as RequestState,
    at_ns: number('at_ns'),
    arrival_ns: number('arrival_ns'),
    prompt_tokens: number('prompt_tokens'),
    cached_tokens: number('cached_tokens'),
    output_tokens: number('output_tokens'),
    max_tokens: number('max_tokens'),
    preview: text('preview') ?? '',
    first_token_ns: optional('first_token_ns'),
    finish_reason: text('finish_reason') as FinishReason | null,
    error: text('error'),
    group: optional('group'),
    submitted_ns: optional('submitted_ns'),
    started_ns: optional('started_ns'),
    last_token_ns: optional('last_token_ns'),
    preemptions: number('preemptions'),
    seed: optional('seed'),
    priority: number('priority'),
    drafted: [...(table.numberLists('drafted')[row] ?? [])],
    accepted: [...(table.numberLists('accepted')[row] ?? [])]
  };
}

function featuresEvent(table: Columns, row: number): FeaturesEvent {
  const number = (name: string) => table.numbers(name)[row];
  return {
    t: 'features',
    epoch: number('epoch'),
    values: parse<Record<string, FeatureValue>>(table, 'values', row),
    changed: [...table.textLists('changed')[row]],
    cost: table.texts('cost')[row] as Cost,
    requested_ns: number('requested_ns'),
    applied_ns: number('applied_ns'),
    apply_ns: number('apply_ns'),
    preempted: number('preempted'),
    recompute_tokens: number('recompute_tokens'),
    settled_ns: orNull(number('settled_ns'))
  };
}

function engineEvent(table: Columns, row: number): EngineEvent {
  return {
    t: 'engine',
    state: table.texts('state')[row] as EngineState,
    at_ns: table.numbers('at_ns')[row],
    stage: table.texts('stage')[row] ?? '',
    fraction: orNull(table.numbers('fraction')[row]),
    message: table.texts('message')[row] ?? '',
    pid: orNull(table.numbers('pid')[row]),
    restarts: table.numbers('restarts')[row],
    failed_requests: table.numbers('failed_requests')[row]
  };
}

function deviceEvents(table: Columns, processes: Columns): DeviceEvent[] {
  const sampled = processes.numbers('at_ns');
  let at = 0;
  return rows(table, (_, row) => {
    const number = (name: string) => table.numbers(name)[row];
    const optional = (name: string) => orNull(table.numbers(name)[row]);
    const from = at;
    while (at < processes.rows && sampled[at] === number('at_ns')) {
      at += 1;
    }
    return {
      t: 'device',
      at_ns: number('at_ns'),
      cores: number('cores'),
      system_cpu: number('system_cpu'),
      system_memory_used: number('system_memory_used'),
      system_memory_total: number('system_memory_total'),
      process: processes.texts('process').slice(from, at).map(String),
      pid: [...processes.numbers('pid').subarray(from, at)],
      cpu: [...processes.numbers('cpu').subarray(from, at)],
      rss: [...processes.numbers('rss').subarray(from, at)],
      gpu_name: table.texts('gpu_name')[row],
      gpu_memory_used: optional('gpu_memory_used'),
      gpu_memory_total: optional('gpu_memory_total'),
      gpu_power_w: optional('gpu_power_w'),
      gpu_clock_mhz: optional('gpu_clock_mhz'),
      gpu_memory_clock_mhz: optional('gpu_memory_clock_mhz'),
      gpu_utilization: optional('gpu_utilization'),
      gpu_memory_utilization: optional('gpu_memory_utilization'),
      gpu_temperature_c: optional('gpu_temperature_c')
    };
  });
}

function costEvent(table: Columns, row: number): TelemetryCostEvent {
  const number = (name: string) => table.numbers(name)[row];
  return {
    t: 'telemetry_cost',
    at_ns: number('at_ns'),
    window_ns: number('window_ns'),
    level: table.texts('level')[row] ?? '',
    steps: number('steps'),
    step_ns: number('step_ns'),
    engine_ns: number('engine_ns'),
    encode_ns: number('encode_ns'),
    front_ns: number('front_ns'),
    journal_ns: number('journal_ns'),
    events: number('events'),
    bytes: number('bytes')
  };
}

function parse<T>(table: Columns, column: string, row: number): T {
  try {
    return JSON.parse(table.texts(column)[row] ?? '') as T;
  } catch {
    throw damaged(`row ${row} of ${table.name}.${column} is not JSON`);
  }
}
