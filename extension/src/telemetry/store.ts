/**
 * Everything the views know: the newest steps, tokens, requests, switches and the engine's state, and what follows
 * from them. Owns no connection and no drawing; a snapshot replaces all of it, frames add to it.
 */

import { KvBlocks } from './kv-blocks';
import { Ring } from './ring';
import { Origin } from './protocol';
import { percentiles } from './statistics';
import type {
  Capacity,
  Ceilings,
  DeviceEvent,
  EngineEvent,
  FeaturePreset,
  FeatureSpec,
  FeaturesEvent,
  FeatureValue,
  Frame,
  Kind,
  KvEvents,
  ModelInfo,
  RecordingEvent,
  RequestEvent,
  ServerInfo,
  Snapshot,
  StepEvent,
  TelemetryCostEvent,
  TelemetryEvent,
  TaskEvent,
  TokensEvent,
  TrafficEvent
} from './protocol';
import { KvOp } from './protocol';

/** A step and its sums. */
export interface StepRecord {
  event: StepEvent;
  /** Token positions computed, by {@link Kind}. */
  byKind: [number, number, number, number, number];
  total: number;
}

export interface TokenRecord {
  request: number;
  index: number;
  step: number;
  tokenId: number;
  text: string;
  logprob: number | null;
  sentNs: number;
  /** TTFT for index 0, else the gap to the request's previous token. */
  latencyNs: number;
  /** What is known of the step that made it; `null` until (or unless) its record arrives. */
  epoch: number | null;
  batch: number | null;
  kind: Kind | null;
  /** Where the latency went, ns, in the order of `PARTS`; `null` where it was not measured. */
  parts: readonly number[] | null;
  origin: Origin;
  /** Said by the same step as the request's token before it, so that its latency is no gap between steps. */
  follows: boolean;
}

export interface RequestRecord {
  handle: number;
  event: RequestEvent | null;
  /** The newest tokens, oldest first. */
  tokens: TokenRecord[];
  /** How many older ones were forgotten. */
  forgotten: number;
  /** When it was preempted, each time. */
  preemptedNs: number[];
}

export type FeedKind = 'switch' | 'request' | 'eviction' | 'engine' | 'recording' | 'error' | 'gap' | 'connection';

/** One thing worth telling. The view finds the words; `text` is for what has no event of its own. */
export interface FeedEntry {
  /** Rises by one per entry. */
  serial: number;
  atNs: number | null;
  kind: FeedKind;
  event: RequestEvent | FeaturesEvent | EngineEvent | RecordingEvent | null;
  /** Events that were left out just before, for a gap. */
  missing: number;
  /** Cached blocks given up since the line before that told of some, for an eviction. */
  evicted: number;
  text: string;
}

export interface Metrics {
  /** Output tokens per second of all requests over the window. */
  outputRate: number | null;
  /** Of the gaps between steps: tokens that came with another one are left out. */
  itlP50Ms: number | null;
  itlP95Ms: number | null;
  itlCount: number;
  /** Mean time of a token after the first, ms, where steps said several at once; else null, and the same as the ITL. */
  perTokenMs: number | null;
  /** Of the requests that began within the window, or, if none did, of the newest one. */
  ttftP50Ms: number | null;
  /** How many began within the window. */
  ttftCount: number;
  /** used blocks / total blocks. */
  kvBlocks: number | null;
  /** filled slots / total slots. */
  kvSlots: number | null;
  running: number;
  waiting: number;
  /** Nothing is running: the figures are of the last activity. */
  idle: boolean;
}

/** All that a store holds, made elsewhere: what a replay shows at one moment. */
export interface StoreState {
  server: ServerInfo | null;
  engine: EngineEvent | null;
  failure: EngineEvent | null;
  model: ModelInfo | null;
  capacity: Capacity | null;
  specs: FeatureSpec[];
  features: FeaturesEvent | null;
  ceilings: Ceilings | null;
  device: DeviceEvent | null;
  telemetryCost: TelemetryCostEvent | null;
  epochs: readonly FeaturesEvent[];
  requests: readonly RequestRecord[];
  /**
   * Oldest first, as the tokens and the feed: the newest within the store's limits are kept. The store keeps these
   * arrays as its own.
   */
  steps: StepRecord[];
  tokens: TokenRecord[];
  feed: FeedEntry[];
  newestSentNs: number | null;
  /** The store's own from now on. */
  kv: KvBlocks;
}

export interface StoreLimits {
  steps: number;
  tokens: number;
  requests: number;
  tokensPerRequest: number;
  feed: number;
}

export const DEFAULT_LIMITS: StoreLimits = {
  steps: 20_000,
  tokens: 50_000,
  requests: 512,
  tokensPerRequest: 8192,
  feed: 500
};
const ENDED: ReadonlySet<string> = new Set(['finished', 'cancelled', 'failed']);
/** Without the engine's process there is no KV cache. */
const CACHELESS: ReadonlySet<string> = new Set(['starting', 'restarting', 'failed', 'stopped']);
/** Evictions come in every step of a full cache: they are told of at most so often. */
const EVICTIONS_EVERY_NS = 1e9;

export function isActive(request: RequestRecord): boolean {
  return request.event === null || !ENDED.has(request.event.state);
}

/** Whether nothing is known of the KV blocks after `event`: they are gone, or nobody tells of them any more. */
export function endsCache(event: TelemetryEvent): boolean {
  return event.t === 'engine'
    ? CACHELESS.has(event.state)
    : event.t === 'features' && (event.values['instrumentation'] ?? 'full') !== 'full';
}

export class TelemetryStore {
  /** Rises with every change; a view repaints when it differs from what it painted. */
  version = 0;
  /** Rises when what is known was exchanged for something else instead of added to: a view begins anew. */
  generation = 0;
  server: ServerInfo | null = null;
  engine: EngineEvent | null = null;
  /** The engine's last death, until a request has succeeded since: what a person wants to know while it comes back. */
  failure: EngineEvent | null = null;
  model: ModelInfo | null = null;
  capacity: Capacity | null = null;
  specs: FeatureSpec[] = [];
  presets: FeaturePreset[] = [];
  features: FeaturesEvent | null = null;
  /** What the machine can do at best, once measured. */
  ceilings: Ceilings | null = null;
  /** The newest sample of the hardware. */
  device: DeviceEvent | null = null;
  /** What watching costs, as of the newest second in which steps ran. */
  telemetryCost: TelemetryCostEvent | null = null;
  /** Recordings that are being made or that ended lately, by id, oldest first. */
  /** What the server's own load generator does, or did last. */
  traffic: TrafficEvent | null = null;
  /** What the engine does beside serving, by name, until it is over. */
  readonly tasks = new Map<string, TaskEvent>();
  readonly recordings = new Map<string, RecordingEvent>();
  /** Switches since the page connected, by epoch. */
  readonly epochs = new Map<number, FeaturesEvent>();
  readonly requests = new Map<number, RequestRecord>();
  readonly steps: Ring<StepRecord>;
  readonly tokens: Ring<TokenRecord>;
  readonly feed: Ring<FeedEntry>;
  /** How many events were taken in. */
  events = 0;
  /** The KV cache, block by block. */
  kv = new KvBlocks();
  /** Events that the server had to leave out because this page was too slow. */
  dropped = 0;
  /** Newest `sent_ns` taken in. */
  newestSentNs: number | null = null;

  private readonly limits: StoreLimits;
  private readonly listeners = new Set<() => void>();
  private stepByNumber = new Map<number, StepRecord>();
  private waitingForStep = new Map<number, TokenRecord[]>();
  private evictedUntold = 0;
  private evictionsToldNs = -Infinity;
  private newestFirstToken: TokenRecord | null = null;
  private nextSerial = 1;
  /** The history of a snapshot repeats notices that are known. */
  private newestNoticeNs = 0;
  private lastSeq: number | null = null;
  private metricsCache: { version: number; windowNs: number; value: Metrics } | null = null;

  constructor(limits: Partial<StoreLimits> = {}) {
    this.limits = { ...DEFAULT_LIMITS, ...limits };
    this.steps = new Ring(this.limits.steps);
    this.tokens = new Ring(this.limits.tokens);
    this.feed = new Ring(this.limits.feed);
  }

  /** Be told of every change. Returns the way to stop it. */
  onChange(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  /** Replace everything, as after each (re)connection. */
  applySnapshot(snapshot: Snapshot): void {
    const sameServer = this.server?.instance === snapshot.server.instance;
    if (this.server !== null && !sameServer) {
      this.failure = null;
      this.newestNoticeNs = 0;
      this.note('connection', 'Connected to a new server: what the old one measured is gone.', snapshot.now_ns);
    }
    const previous = this.requests;
    const keptTokens = sameServer ? new Map([...previous].map(([handle, each]) => [handle, each])) : new Map();
    this.server = snapshot.server;
    this.engine = snapshot.engine;
    this.model = snapshot.model;
    this.capacity = snapshot.capacity;
    this.specs = snapshot.specs;
    this.presets = snapshot.presets ?? [];
    this.features = snapshot.features;
    this.ceilings = snapshot.ceilings ?? null;
    this.tasks.clear();
    this.traffic = snapshot.traffic ?? null;
    this.recordings.clear();
    for (const event of snapshot.recordings ?? []) {
      this.recordings.set(event.id, event);
    }
    this.device = snapshot.device ?? (sameServer ? this.device : null);
    if (!sameServer) {
      this.telemetryCost = null;
    }
    const lastStep = sameServer ? this.steps.at(-1)?.event.step : undefined;
    this.steps.clear();
    this.tokens.clear();
    this.stepByNumber = new Map();
    this.waitingForStep = new Map();
    this.newestFirstToken = null;
    this.requests.clear();
    this.epochs.clear();
    this.lastSeq = snapshot.seq;
    this.kv = new KvBlocks();
    if (snapshot.kv) {
      this.kv.apply(snapshot.kv);
    }
    if (snapshot.features) {
      this.epochs.set(snapshot.features.epoch, snapshot.features);
    }
    for (const event of snapshot.requests) {
      const preemptedNs = event.state === 'preempted' ? [event.at_ns] : [];
      this.requests.set(event.request, { handle: event.request, event, tokens: [], forgotten: 0, preemptedNs });
    }
    for (const event of snapshot.history) {
      this.take(event, false);
    }
    // A token seen before the gap is still true if the history no longer holds it.
    for (const [handle, before] of keptTokens as Map<number, RequestRecord>) {
      const now = this.requests.get(handle);
      if (now) {
        const firstIndex = now.tokens[0]?.index ?? Infinity;
        now.tokens.unshift(...before.tokens.filter(token => token.index < firstIndex));
        now.preemptedNs = [...new Set([...before.preemptedNs, ...now.preemptedNs])];
      }
    }
    const unseen = lastStep === undefined ? 0 : (this.steps.at(0)?.event.step ?? 0) - lastStep - 1;
    if (unseen > 0) {
      this.tell({
        kind: 'gap',
        atNs: snapshot.now_ns,
        text: `${unseen} steps went by while this page was not connected; their tokens are not shown.`
      });
    }
    this.trimRequests();
    this.changed();
  }

  /** Replace everything by what somebody else made of the events: as if they all had been taken in, one by one. */
  restore(state: StoreState): void {
    this.server = state.server;
    this.engine = state.engine;
    this.failure = state.failure;
    this.model = state.model;
    this.capacity = state.capacity;
    this.specs = state.specs;
    this.features = state.features;
    this.ceilings = state.ceilings;
    this.device = state.device;
    this.telemetryCost = state.telemetryCost;
    this.epochs.clear();
    state.epochs.forEach(event => this.epochs.set(event.epoch, event));
    this.requests.clear();
    state.requests.forEach(record => this.requests.set(record.handle, record));
    this.steps.adopt(state.steps);
    this.tokens.adopt(state.tokens);
    this.feed.adopt(state.feed);
    this.stepByNumber.clear();
    for (let index = 0; index < this.steps.length; index++) {
      const record = this.steps.at(index)!;
      this.stepByNumber.set(record.event.step, record);
    }
    this.waitingForStep.clear();
    this.newestFirstToken = null;
    for (let index = this.tokens.length - 1; index >= 0 && this.newestFirstToken === null; index--) {
      const token = this.tokens.at(index)!;
      this.newestFirstToken = token.index === 0 ? token : null;
    }
    this.newestSentNs = state.newestSentNs;
    this.kv = state.kv;
    this.nextSerial = (this.feed.at(-1)?.serial ?? 0) + 1;
    this.dropped = 0;
    this.lastSeq = null;
    this.trimRequests();
    this.generation += 1;
    this.changed();
  }

  /** Take in a batch of events. */
  applyFrame(frame: Frame): void {
    const missed = this.lastSeq !== null && frame.seq > this.lastSeq + 1 ? frame.seq - this.lastSeq - 1 : 0;
    this.lastSeq = frame.seq;
    if (frame.dropped > 0 || missed > 0) {
      this.dropped += frame.dropped;
      this.tell({ kind: 'gap', atNs: frame.now_ns, missing: Math.max(frame.dropped, missed) });
    }
    for (const event of frame.events) {
      this.take(event, true);
    }
    this.events += frame.events.length;
    this.trimRequests();
    this.changed();
  }

  /** Add a line to the event feed. */
  note(kind: FeedKind, text: string, atNs: number | null = null): void {
    this.tell({ kind, atNs, text });
    this.changed();
  }

  step(number: number): StepRecord | undefined {
    return this.stepByNumber.get(number);
  }

  get activeRequests(): RequestRecord[] {
    return [...this.requests.values()].filter(isActive);
  }

  /**
   * Figures over the newest `windowNs` nanoseconds of activity, ending at the newest token. Infinity takes all there is.
   */
  metrics(windowNs: number): Metrics {
    if (this.metricsCache?.version === this.version && this.metricsCache.windowNs === windowNs) {
      return this.metricsCache.value;
    }
    const newest = this.tokens.at(-1);
    const itl: number[] = [];
    const ttft: number[] = [];
    let following = 0;
    let followingMs = 0;
    let outputRate: number | null = null;
    if (newest) {
      const since = newest.sentNs - windowNs;
      let oldest = newest.sentNs;
      let count = 0;
      for (let index = this.tokens.length - 1; index >= 0; index--) {
        const token = this.tokens.at(index)!;
        if (token.sentNs < since) {
          break;
        }
        oldest = Math.min(oldest, token.sentNs);
        count += 1;
        if (token.follows) {
          following += 1;
          followingMs += token.latencyNs / 1e6;
        } else {
          (token.index === 0 ? ttft : itl).push(token.latencyNs / 1e6);
        }
      }
      // The oldest tokens open the span; only what came after them was made within it.
      let opening = 0;
      for (let index = this.tokens.length - count; index < this.tokens.length; index++) {
        if (this.tokens.at(index)!.sentNs - oldest < 1e6) {
          opening += 1;
        }
      }
      if (newest.sentNs > oldest && count > opening) {
        outputRate = (count - opening) / ((newest.sentNs - oldest) / 1e9);
      }
    }
    // A request that outlasts the window still has its TTFT: that of the newest one stands until there is another.
    const lastTtft = ttft.length === 0 ? this.newestFirstToken : null;
    const [itlP50Ms, itlP95Ms] = percentiles(itl, [0.5, 0.95]);
    const [ttftP50Ms] = percentiles(ttft, [0.5]);
    const active = this.activeRequests;
    const kv = this.steps.at(-1)?.event.kv;
    // The last step's record still counts the blocks of requests that ended in it.
    const released = active.length === 0;
    const value: Metrics = {
      outputRate,
      itlP50Ms,
      itlP95Ms,
      itlCount: itl.length,
      perTokenMs: following > 0 ? itl.reduce((sum, each) => sum + each, followingMs) / (itl.length + following) : null,
      ttftP50Ms: lastTtft === null ? ttftP50Ms : lastTtft.latencyNs / 1e6,
      ttftCount: ttft.length,
      kvBlocks: kv ? (released ? 0 : kv.used_blocks / Math.max(1, kv.total_blocks)) : null,
      kvSlots: kv ? (released ? 0 : kv.filled_slots / Math.max(1, kv.total_blocks * kv.block_size)) : null,
      running: active.filter(each => each.event?.state !== 'queued').length,
      waiting: active.filter(each => each.event?.state === 'queued').length,
      idle: released
    };
    this.metricsCache = { version: this.version, windowNs, value };
    return value;
  }

  private take(event: TelemetryEvent, live: boolean): void {
    switch (event.t) {
      case 'step':
        this.takeStep(event);
        break;
      case 'tokens':
        this.takeTokens(event);
        break;
      case 'request':
        this.takeRequest(event, live);
        break;
      case 'features':
        this.takeFeatures(event, live);
        break;
      case 'engine':
        this.takeEngine(event, live);
        break;
      case 'task':
        if (event.fraction === 1) {
          this.tasks.delete(event.name);
          if (live) {
            this.tell({ kind: 'engine', atNs: event.at_ns, text: `${event.name}: ${event.detail}` });
          }
        } else {
          this.tasks.set(event.name, event);
        }
        break;
      case 'traffic':
        this.traffic = event;
        break;
      case 'notice_event':
        if (event.at_ns > this.newestNoticeNs) {
          this.newestNoticeNs = event.at_ns;
          this.tell({ kind: event.severity === 'info' ? 'engine' : 'error', atNs: event.at_ns, text: event.text });
        }
        break;
      case 'kv':
        this.takeKv(event, live);
        break;
      case 'device':
        this.device = event;
        break;
      case 'telemetry_cost':
        this.telemetryCost = event;
        break;
      case 'ceilings':
        this.ceilings = event.ceilings;
        break;
      case 'recording':
        this.takeRecording(event, live);
        break;
    }
  }

  private takeStep(event: StepEvent): void {
    const previous = this.steps.at(-1);
    if (previous && event.step <= previous.event.step) {
      // A restarted engine counts from the beginning: the old steps are of another life.
      this.steps.clear();
      this.stepByNumber.clear();
      this.waitingForStep.clear();
    }
    const record = makeStepRecord(event);
    const forgotten = this.steps.push(record);
    if (forgotten) {
      this.stepByNumber.delete(forgotten.event.step);
    }
    this.stepByNumber.set(event.step, record);
    const waiting = this.waitingForStep.get(event.step);
    if (waiting) {
      waiting.forEach(token => complete(token, record));
      this.waitingForStep.delete(event.step);
    }
  }

  private takeTokens(event: TokensEvent): void {
    const step = this.stepByNumber.get(event.step);
    for (let index = 0; index < event.request.length; index++) {
      const request = this.request(event.request[index]);
      const token: TokenRecord = {
        request: request.handle,
        index: event.index[index],
        step: event.step,
        tokenId: event.token_id[index],
        text: event.text[index],
        logprob: event.logprob[index],
        sentNs: event.sent_ns[index],
        latencyNs: event.latency_ns[index],
        epoch: null,
        batch: null,
        kind: null,
        parts: event.parts?.length ? event.parts.map(each => each[index]) : null,
        origin: event.origin?.[index] ?? Origin.Plain,
        follows: request.tokens.at(-1)?.step === event.step
      };
      if (step) {
        complete(token, step);
      } else {
        const list = this.waitingForStep.get(event.step) ?? [];
        list.push(token);
        this.waitingForStep.set(event.step, list);
      }
      request.tokens.push(token);
      if (request.tokens.length > this.limits.tokensPerRequest) {
        const excess = request.tokens.length - this.limits.tokensPerRequest;
        request.tokens.splice(0, excess);
        request.forgotten += excess;
      }
      this.tokens.push(token);
      if (token.index === 0) {
        this.newestFirstToken = token;
      }
      this.newestSentNs = Math.max(this.newestSentNs ?? 0, token.sentNs);
    }
    if (this.waitingForStep.size > 1000) {
      this.waitingForStep.delete(this.waitingForStep.keys().next().value!);
    }
  }

  private takeKv(event: KvEvents, live: boolean): void {
    this.kv.apply(event);
    const evicted = event.op.filter(op => op === KvOp.Evict).length;
    if (evicted === 0 || !live) {
      return;
    }
    this.evictedUntold += evicted;
    const atNs = this.stepByNumber.get(event.step)?.event.end_ns ?? null;
    if (atNs === null || atNs - this.evictionsToldNs >= EVICTIONS_EVERY_NS) {
      this.tell({ kind: 'eviction', atNs, evicted: this.evictedUntold });
      this.evictionsToldNs = atNs ?? this.evictionsToldNs;
      this.evictedUntold = 0;
    }
  }

  private takeRecording(event: RecordingEvent, live: boolean): void {
    const before = this.recordings.get(event.id);
    this.recordings.set(event.id, event);
    if (live && before?.state !== event.state && event.state !== 'finishing') {
      this.tell({ kind: event.state === 'failed' ? 'error' : 'recording', atNs: event.at_ns, event });
    }
  }

  private takeRequest(event: RequestEvent, live: boolean): void {
    const before = this.requests.get(event.request)?.event?.state;
    const record = this.request(event.request);
    record.event = event;
    if (event.state === 'preempted' && before !== 'preempted') {
      record.preemptedNs.push(event.at_ns);
    }
    if (event.state === 'finished' && live) {
      this.failure = null;
    }
    if (live && before !== event.state && event.state !== 'queued' && event.state !== 'running') {
      this.tell({ kind: event.state === 'failed' ? 'error' : 'request', atNs: event.at_ns, event });
    }
  }

  private takeFeatures(event: FeaturesEvent, live: boolean): void {
    const known = this.epochs.has(event.epoch);
    this.epochs.set(event.epoch, event);
    if (this.features === null || event.epoch >= this.features.epoch) {
      this.features = event;
      if (endsCache(event)) {
        this.kv.forget();
      }
    }
    if (live && !known && event.changed.length > 0) {
      this.tell({ kind: 'switch', atNs: event.applied_ns, event });
    } else if (live && known && event.settled_ns !== null && event.preempted > 0) {
      this.tell({ kind: 'switch', atNs: event.settled_ns, event });
    }
  }

  private takeEngine(event: EngineEvent, live: boolean): void {
    const before = this.engine;
    this.engine = event;
    if ((event.state === 'failed' || event.state === 'restarting') && event.message !== '') {
      this.failure = event;
    }
    if (endsCache(event)) {
      this.kv.forget();
    }
    if (event.state === 'starting' || event.state === 'restarting') {
      this.tasks.clear();
      this.waitingForStep.clear();
    }
    if (live && before?.state !== event.state) {
      const bad = event.state === 'failed' || event.state === 'restarting';
      this.tell({ kind: bad ? 'error' : 'engine', atNs: event.at_ns, event });
    }
  }

  private tell(entry: Pick<FeedEntry, 'kind' | 'atNs'> & Partial<FeedEntry>): void {
    this.feed.push({ event: null, missing: 0, evicted: 0, text: '', ...entry, serial: this.nextSerial++ });
  }

  private request(handle: number): RequestRecord {
    let record = this.requests.get(handle);
    if (!record) {
      record = { handle, event: null, tokens: [], forgotten: 0, preemptedNs: [] };
      this.requests.set(handle, record);
    }
    return record;
  }

  private trimRequests(): void {
    if (this.requests.size <= this.limits.requests) {
      return;
    }
    for (const [handle, record] of this.requests) {
      if (this.requests.size <= this.limits.requests) {
        break;
      }
      if (!isActive(record)) {
        this.requests.delete(handle);
      }
    }
  }

  private changed(): void {
    this.version += 1;
    this.listeners.forEach(listener => listener());
  }
}

/** The value of a feature now, or its default while nothing is known. */
export function currentValue(store: TelemetryStore, spec: FeatureSpec): FeatureValue {
  return store.features?.values[spec.name] ?? spec.default;
}

export function makeStepRecord(event: StepEvent): StepRecord {
  const record: StepRecord = { event, byKind: [0, 0, 0, 0, 0], total: 0 };
  for (let index = 0; index < event.scheduled.length; index++) {
    record.byKind[event.kind[index]] += event.scheduled[index];
    record.total += event.scheduled[index];
  }
  return record;
}

function complete(token: TokenRecord, step: StepRecord): void {
  token.epoch = step.event.epoch;
  token.batch = step.event.request.length;
  const at = step.event.request.indexOf(token.request);
  token.kind = at < 0 ? null : step.event.kind[at];
}
