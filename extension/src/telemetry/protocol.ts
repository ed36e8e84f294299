/**
 * The wire types, mirroring `server/inference_server/protocol.py` name for name. Owns no behaviour.
 *
 * Every `*_ns` is a count of nanoseconds on the server's monotonic clock.
 */

export const PROTOCOL_VERSION = 1;

export type FeatureValue = boolean | number | string;
export type Cost = 'free' | 'prebuilt' | 'catch-up' | 'recompute' | 'rebuild';
export type EngineState = 'starting' | 'loading' | 'ready' | 'asleep' | 'failed' | 'restarting' | 'stopped';
export type RequestState = 'queued' | 'running' | 'preempted' | 'finished' | 'cancelled' | 'failed';
export type FinishReason = 'stop' | 'length' | 'cancelled' | 'error';

export type RecordingState = 'recording' | 'finishing' | 'finished' | 'failed';

/** Where a token's latency went, in the order of {@link TokensEvent.parts}; `docs/attribution.md` defines each. */
export const PARTS = [
  'tokenize',
  'queue',
  'prefill',
  'recompute',
  'others_prefill',
  'stall',
  'draft',
  'forward',
  'attention',
  'sampling',
  'host',
  'transport',
  'detokenize',
  'send',
  'unexplained'
] as const;
export type Part = (typeof PARTS)[number];

/** What one request's share of a step was for. */
export enum Kind {
  Prefill = 0,
  Decode = 1,
  Recompute = 2,
  Draft = 3,
  Verify = 4
}

/** How an output token came about. */
export enum Origin {
  /** Chosen where nothing was proposed. */
  Plain = 0,
  /** Proposed, and what the model chose too. */
  Accepted = 1,
  /** The model's choice where the token proposed was another one. */
  Corrected = 2,
  /** The model's choice after everything proposed was accepted. */
  Bonus = 3
}

export interface ModelInfo {
  name: string;
  source: string;
  architecture: string;
  path: string;
  num_parameters: number;
  num_layers: number;
  num_kv_heads: number;
  head_dim: number;
  vocab_size: number;
  max_model_len: number;
  dtype: string;
  device: string;
  device_name: string;
  weight_bytes: number;
  eos_token_ids: number[];
  quantized_source: string | null;
  revision: string | null;
  notes: string[];
}

export interface Capacity {
  block_size: number;
  num_blocks: number;
  kv_bytes: number;
  kv_bytes_per_token: number;
  max_num_seqs: number;
  max_model_len: number;
}

/** How one feature's value depends on another feature. */
export interface FeatureRelation {
  /** The value this is about; null for every value. */
  value: FeatureValue | null;
  other: string;
  values: FeatureValue[];
  reason: string;
}

/** Feature values that are thrown together. */
export interface FeaturePreset {
  name: string;
  title: string;
  description: string;
  values: Record<string, FeatureValue>;
}

export interface FeatureSpec {
  name: string;
  title: string;
  group: string;
  kind: 'bool' | 'int' | 'choice';
  default: FeatureValue;
  cost: Cost;
  description: string;
  choices: string[];
  minimum: number | null;
  maximum: number | null;
  available: boolean;
  unavailable_reason: string | null;
  /** With which values of other features a value cannot hold together. */
  conflicts?: FeatureRelation[];
  /** Which values another feature must have for this one to make a difference. */
  needs?: FeatureRelation[];
  /** Choices that cannot be made here, and why. */
  unavailable_choices?: Record<string, string>;
}

export interface KvUsage {
  total_blocks: number;
  used_blocks: number;
  cached_blocks: number;
  filled_slots: number;
  block_size: number;
}

export interface StepEvent {
  t: 'step';
  step: number;
  epoch: number;
  begin_ns: number;
  schedule_ns: number;
  prepare_ns: number;
  forward_ns: number;
  sample_ns: number;
  update_ns: number;
  end_ns: number;
  path: string;
  request: number[];
  start: number[];
  scheduled: number[];
  kind: Kind[];
  running: number;
  waiting: number;
  kv: KvUsage;
  idle_slots: number;
  device_ns?: number | null;
  before_ns?: number;
  draft_ns?: number;
  attention_ns?: number | null;
  read_bytes?: number | null;
  flops?: number | null;
  /** Who proposed tokens that the step verified; several are joined by `+`. */
  speculation?: string;
  /** Tokens proposed for each scheduled request; empty where nothing was proposed in the step. */
  drafted?: number[];
  accepted?: number[];
}

export interface TokensEvent {
  t: 'tokens';
  step: number;
  request: number[];
  index: number[];
  token_id: number[];
  text: string[];
  logprob: (number | null)[];
  sent_ns: number[];
  latency_ns: number[];
  /** One list per name in {@link PARTS}, each with one entry (ns) per token; empty where it was not measured. */
  parts?: number[][];
  /** Of each token; empty where all are {@link Origin.Plain}. */
  origin?: Origin[];
}

export interface RequestEvent {
  t: 'request';
  request: number;
  id: string;
  state: RequestState;
  at_ns: number;
  arrival_ns: number;
  prompt_tokens: number;
  cached_tokens: number;
  output_tokens: number;
  max_tokens: number;
  preview: string;
  first_token_ns: number | null;
  finish_reason: FinishReason | null;
  error: string | null;
  group: number | null;
  submitted_ns?: number | null;
  started_ns?: number | null;
  last_token_ns?: number | null;
  preemptions?: number;
  seed?: number | null;
  priority?: number;
  /** How often a token was proposed for it as the first, second … of a step, and how often that one was accepted. */
  drafted?: number[];
  accepted?: number[];
}

export interface FeaturesEvent {
  t: 'features';
  epoch: number;
  values: Record<string, FeatureValue>;
  changed: string[];
  cost: Cost;
  requested_ns: number;
  applied_ns: number;
  apply_ns: number;
  preempted: number;
  recompute_tokens: number;
  settled_ns: number | null;
}

export interface EngineEvent {
  t: 'engine';
  state: EngineState;
  at_ns: number;
  stage: string;
  fraction: number | null;
  message: string;
  pid: number | null;
  restarts: number;
  failed_requests: number;
}

/** What happened to a KV block; `KvOp` of the server says each precisely. */
export enum KvOp {
  Allocate = 0,
  Hash = 1,
  Share = 2,
  Evict = 3,
  Free = 4,
  Copy = 5,
  Release = 6,
  Reset = 7
}

/** In place of a request's handle: the operation was not done for one. */
export const NOBODY = -1;

/** What happened to KV blocks in one step, in order. */
export interface KvEvents {
  t: 'kv';
  step: number;
  op: KvOp[];
  block: number[];
  /** Handle of the request whose block table changed, or {@link NOBODY}. */
  request: number[];
}

/** The hardware, sampled about once a second. What a machine does not tell is null. */
export interface DeviceEvent {
  t: 'device';
  at_ns: number;
  cores: number;
  system_cpu: number;
  system_memory_used: number;
  system_memory_total: number;
  process: string[];
  pid: number[];
  cpu: number[];
  rss: number[];
  gpu_name: string | null;
  gpu_memory_used: number | null;
  gpu_memory_total: number | null;
  gpu_power_w: number | null;
  gpu_clock_mhz: number | null;
  gpu_memory_clock_mhz: number | null;
  gpu_utilization: number | null;
  gpu_memory_utilization: number | null;
  gpu_temperature_c: number | null;
}

/** A recording began, grew, ended, or turned into a file. */
export interface RecordingEvent {
  t: 'recording';
  id: string;
  name: string;
  note: string;
  state: RecordingState;
  at_ns: number;
  started_ns: number;
  /** Of the journal while recording, of the file once finished. */
  bytes: number;
  rows: number;
  tokens: number;
  seconds: number;
  /** Progress of turning the journal into a file. */
  fraction: number | null;
  file: string | null;
  message: string;
  lost: number;
}

/** What watching costs. All times are sums over `window_ns`. */
export interface TelemetryCostEvent {
  t: 'telemetry_cost';
  at_ns: number;
  window_ns: number;
  level: string;
  steps: number;
  step_ns: number;
  engine_ns: number;
  encode_ns: number;
  front_ns: number;
  journal_ns: number;
  events: number;
  bytes: number;
}

/** What this machine can do at best, measured. */
export interface Ceilings {
  device: string;
  device_name: string;
  dtype: string;
  threads: number;
  read_bytes_per_s: number;
  copy_bytes_per_s: number;
  flops_per_s: number;
  measured_at: string;
  seconds: number;
  /** Cores that other processes kept busy meanwhile. */
  others_cores?: number;
  versions: Record<string, string>;
}

export interface CeilingsEvent {
  t: 'ceilings';
  at_ns: number;
  ceilings: Ceilings;
}

/** Fields of a workload, `inference_server/workloads/workload.py`, or some of them. */
export interface TrafficValues {
  preset?: string;
  arrivals?:
    | { kind: 'closed'; concurrency: number }
    | { kind: 'poisson'; rate: number; burstiness: number }
    | { kind: 'trace'; times_s: number[] };
  output_tokens?: { low: number; high: number };
  shared_prefix_tokens?: number;
}

/** What the server's own load generator does. */
export interface TrafficEvent {
  t: 'traffic';
  at_ns: number;
  state: 'running' | 'stopped';
  workload: { name: string } & TrafficValues;
  started_ns: number;
  sent: number;
  in_flight: number;
  finished: number;
  failed: number;
  dropped: number;
  output_tokens: number;
  message: string;
}

/** How far something is that the engine does beside serving, such as compiling the model; over at fraction 1. */
export interface TaskEvent {
  t: 'task';
  name: string;
  fraction: number | null;
  detail: string;
  at_ns: number;
}

/** Something a person should know that ends no request. */
export interface NoticeEvent {
  t: 'notice_event';
  severity: 'info' | 'warning' | 'error';
  at_ns: number;
  text: string;
}

export type TelemetryEvent =
  | StepEvent
  | TokensEvent
  | RequestEvent
  | FeaturesEvent
  | EngineEvent
  | KvEvents
  | NoticeEvent
  | DeviceEvent
  | RecordingEvent
  | TelemetryCostEvent
  | CeilingsEvent
  | TrafficEvent
  | TaskEvent;

export interface ServerInfo {
  version: string;
  protocol: number;
  instance: string;
  pid: number;
  started_ns: number;
}

export interface Snapshot {
  t: 'snapshot';
  seq: number;
  now_ns: number;
  server: ServerInfo;
  engine: EngineEvent;
  model: ModelInfo | null;
  capacity: Capacity | null;
  specs: FeatureSpec[];
  features: FeaturesEvent | null;
  requests: RequestEvent[];
  history: TelemetryEvent[];
  traffic?: TrafficEvent | null;
  device?: DeviceEvent | null;
  recordings?: RecordingEvent[];
  ceilings?: Ceilings | null;
  presets?: FeaturePreset[];
  /** Operations that lead from nothing to the KV cache as it is now. */
  kv?: KvEvents | null;
}

export interface Frame {
  t: 'frame';
  seq: number;
  now_ns: number;
  dropped: number;
  events: TelemetryEvent[];
}

export interface ClockReply {
  t: 'clock';
  client_time: number;
  now_ns: number;
}

export interface ServerError {
  t: 'error';
  message: string;
}

export type ServerMessage = Snapshot | Frame | ClockReply | ServerError;

export type ClientMessage =
  | { t: 'subscribe'; protocol: number; credits: number; history: number; min_interval_ms: number }
  | { t: 'credit'; frames: number }
  | { t: 'clock'; client_time: number };

/** Body of a completion request: OpenAI's fields and the server's extras. `messages` makes it a chat. */
export interface GenerateBody {
  messages?: { role: 'system' | 'user' | 'assistant'; content: string }[];
  prompt?: string;
  max_tokens: number;
  temperature: number;
  n: number;
  ignore_eos?: boolean;
  seed?: number;
}
