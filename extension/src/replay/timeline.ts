/**
 * A recording laid out in time: what had happened by any moment, and what happened between two. Owns the typed arrays'
 * order and the lazily made records; seeking is a few binary searches and some slicing.
 */

import type {
  Capacity,
  Ceilings,
  DeviceEvent,
  EngineEvent,
  FeaturesEvent,
  FeatureSpec,
  KvEvents,
  KvOp,
  ModelInfo,
  RequestEvent,
  ServerInfo,
  Snapshot,
  StepEvent,
  TelemetryCostEvent,
  TelemetryEvent,
  TokensEvent
} from '../telemetry/protocol';
import { KvBlocks } from '../telemetry/kv-blocks';
import { KvOp as Op, Origin } from '../telemetry/protocol';
import type { FeedEntry, RequestRecord, StepRecord, StoreState, TokenRecord } from '../telemetry/store';
import { DEFAULT_LIMITS, endsCache, makeStepRecord, TelemetryStore } from '../telemetry/store';

/** The tokens of a recording, a row a token, in the order they were sent. */
export interface TokenColumns {
  rows: number;
  step: Float64Array;
  request: Float64Array;
  index: Float64Array;
  token_id: Float64Array;
  text: readonly (string | null)[];
  logprob: Float64Array;
  sent_ns: Float64Array;
  latency_ns: Float64Array;
  /** One column per name in `PARTS`; null where no token has parts. */
  parts: readonly Float64Array[] | null;
  /** NaN where a recording does not say it yet. */
  origin: Float64Array;
}

/** What happened to KV blocks, a row an operation, in order. */
export interface KvColumns {
  rows: number;
  step: Float64Array;
  op: ArrayLike<KvOp>;
  block: Float64Array;
  request: Float64Array;
}

/** What a timeline is made of: a recording's tables as events, each list in the order in which it happened. */
export interface Recorded {
  /** On the server's clock, ns. */
  beginNs: number;
  endNs: number;
  server: ServerInfo;
  /** The models that were served, in order. */
  served: readonly { since_ns: number; model: ModelInfo; capacity: Capacity; specs: FeatureSpec[] }[];
  ceilings: Ceilings | null;
  steps: { rows: number; step: Float64Array; end_ns: Float64Array; event(row: number): StepEvent };
  tokens: TokenColumns;
  kv: KvColumns;
  requests: readonly RequestEvent[];
  features: readonly FeaturesEvent[];
  engine: readonly EngineEvent[];
  device: readonly DeviceEvent[];
  costs: readonly TelemetryCostEvent[];
}

interface RequestTrack {
  handle: number;
  firstNs: number;
  endNs: number;
  events: RequestEvent[];
  moments: number[];
  /** Rows of its tokens. */
  rows: number[];
}

/** Something that happens rarely, and when. */
interface Rare {
  atNs: number;
  event: RequestEvent | FeaturesEvent | EngineEvent | DeviceEvent | TelemetryCostEvent;
}

const ENDED: ReadonlySet<string> = new Set(['finished', 'cancelled', 'failed']);
const LEAST_SPAN_NS = 1e6;
/** Operations between two remembered states of the KV cache: what seeking goes through at most. */
const KV_STRIDE = 16_384;
const NO_SPECS: FeatureSpec[] = [];

export class Timeline {
  readonly beginNs: number;
  readonly endNs: number;
  /** When each step's record is there. */
  private readonly stepMoments: Float64Array;
  /** When each token is there. */
  private readonly tokenMoments: Float64Array;
  private readonly stepRecords: (StepRecord | undefined)[];
  private readonly tokenRecords: (TokenRecord | undefined)[];
  private readonly rowOfStep = new Map<number, number>();
  /** When a step's last token had been sent. */
  private readonly stepDone: Float64Array;
  private readonly tracks: RequestTrack[];
  private readonly rare: Rare[] = [];
  private readonly rareMoments: Float64Array;
  private readonly feed: FeedEntry[];
  /** When each line of the feed was told. */
  private readonly feedMoments: number[] = [];
  /** The engine's last failure and the newest switch after each rare event. */
  private readonly told: { failure: EngineEvent | null; features: FeaturesEvent | null }[] = [];
  /** How many operations on KV blocks there are before the first step, and after each. */
  private readonly kvBefore: number;
  private readonly kvAfter: Int32Array;
  private readonly kvStates: { rows: number; blocks: KvBlocks }[] = [{ rows: 0, blocks: new KvBlocks() }];
  private readonly initial: Snapshot;

  constructor(readonly recorded: Recorded) {
    const { steps, tokens } = recorded;
    this.beginNs = recorded.beginNs;
    this.stepMoments = rising(steps.end_ns);
    this.tokenMoments = rising(tokens.sent_ns);
    this.stepRecords = new Array<StepRecord | undefined>(steps.rows);
    this.tokenRecords = new Array<TokenRecord | undefined>(tokens.rows);
    this.stepDone = Float64Array.from(this.stepMoments);
    for (let row = 0; row < steps.rows; row++) {
      this.rowOfStep.set(steps.step[row], row);
    }
    const { kv } = recorded;
    const first = steps.rows > 0 ? steps.step[0] : Infinity;
    this.kvBefore = countUpTo(kv.step, first - 1);
    this.kvAfter = new Int32Array(steps.rows);
    for (let row = 0, at = this.kvBefore; row < steps.rows; row++) {
      while (at < kv.rows && kv.step[at] <= steps.step[row]) {
        at += 1;
      }
      this.kvAfter[row] = at;
    }
    const byHandle = new Map<number, RequestTrack>();
    const track = (handle: number, atNs: number) => {
      let found = byHandle.get(handle);
      if (!found) {
        found = { handle, firstNs: atNs, endNs: Infinity, events: [], moments: [], rows: [] };
        byHandle.set(handle, found);
      }
      return found;
    };
    this.collectRare(track);
    for (let row = 0; row < tokens.rows; row++) {
      track(tokens.request[row], this.tokenMoments[row]).rows.push(row);
      const step = this.rowOfStep.get(tokens.step[row]);
      if (step !== undefined) {
        this.stepDone[step] = Math.max(this.stepDone[step], this.tokenMoments[row]);
      }
    }
    // Pointing at a step must come back to the same step, so its moment lies before the next one's record.
    for (let row = 0; row + 1 < steps.rows; row++) {
      const next = this.stepMoments[row + 1];
      this.stepDone[row] = Math.max(this.stepMoments[row], Math.min(this.stepDone[row], next - 1));
    }
    this.tracks = [...byHandle.values()].sort((a, b) => a.firstNs - b.firstNs);
    this.rareMoments = Float64Array.from(this.rare, each => each.atNs);
    this.endNs = Math.max(
      recorded.endNs,
      this.stepMoments.at(-1) ?? 0,
      this.tokenMoments.at(-1) ?? 0,
      this.rareMoments.at(-1) ?? 0,
      this.beginNs + LEAST_SPAN_NS
    );
    this.initial = this.makeInitial();
    this.feed = this.tellAll();
  }

  get durationNs(): number {
    return this.endNs - this.beginNs;
  }

  get stepCount(): number {
    return this.recorded.steps.rows;
  }

  get tokenCount(): number {
    return this.recorded.tokens.rows;
  }

  /** How many steps had ended by `atNs`. */
  stepsBy(atNs: number): number {
    return countUpTo(this.stepMoments, atNs);
  }

  tokensBy(atNs: number): number {
    return countUpTo(this.tokenMoments, atNs);
  }

  /** The number that the engine gave the step in `row`. */
  stepNumber(row: number): number {
    return this.recorded.steps.step[row];
  }

  /** When everything about the step in `row` had been told. */
  momentOfStep(row: number): number {
    return this.stepDone[row];
  }

  rowOf(step: number): number | null {
    return this.rowOfStep.get(step) ?? null;
  }

  /** The first moment after `atNs` at which anything happens; the end if nothing does. */
  nextMoment(atNs: number): number {
    const next = (moments: Float64Array) => moments[countUpTo(moments, atNs)] ?? Infinity;
    return Math.min(next(this.stepMoments), next(this.tokenMoments), next(this.rareMoments), this.endNs);
  }

  /** When the switches were thrown, and what they were. */
  get switches(): { atNs: number; event: FeaturesEvent }[] {
    const first = new Map<number, { atNs: number; event: FeaturesEvent }>();
    for (const { atNs, event } of this.rare) {
      if (event.t === 'features' && event.changed.length > 0 && atNs > this.beginNs && !first.has(event.epoch)) {
        first.set(event.epoch, { atNs, event });
      }
    }
    return [...first.values()];
  }

  /** Requests in each step of the recording, thinned to the largest in each of `buckets` stretches of time. */
  activity(buckets: number, byStep: boolean): Float64Array {
    const result = new Float64Array(buckets);
    const { stepCount } = this;
    const bucket = (share: number) => Math.min(buckets - 1, Math.max(0, Math.floor(share * buckets)));
    const ofTime = (atNs: number) => bucket((atNs - this.beginNs) / this.durationNs);
    for (let row = 0; row < stepCount; row++) {
      const { event } = this.stepRecord(row);
      const from = byStep ? bucket(row / stepCount) : ofTime(event.begin_ns);
      const to = byStep ? bucket((row + 1) / stepCount - 1e-9) : ofTime(event.end_ns);
      for (let at = from; at <= to; at++) {
        result[at] = Math.max(result[at], event.request.length);
      }
    }
    return result;
  }

  /** How many events of all kinds lie in `(fromNs, toNs]`. */
  countBetween(fromNs: number, toNs: number): number {
    const within = (moments: Float64Array) => countUpTo(moments, toNs) - countUpTo(moments, fromNs);
    return within(this.stepMoments) + within(this.tokenMoments) + within(this.rareMoments);
  }

  /** What a store holds that took in everything up to and including `atNs`. */
  at(atNs: number): StoreState {
    const { recorded } = this;
    const steps = this.stepsBy(atNs);
    const tokens = this.tokensBy(atNs);
    const rare = countUpTo(this.rareMoments, atNs);
    const told = rare > 0 ? this.told[rare - 1] : { failure: null, features: this.initial.features };
    const lines = countUpTo(this.feedMoments, atNs);
    const epochs = new Map<number, FeaturesEvent>();
    let engine: EngineEvent = this.initial.engine;
    let device: DeviceEvent | null = null;
    let cost: TelemetryCostEvent | null = null;
    if (this.initial.features) {
      epochs.set(this.initial.features.epoch, this.initial.features);
    }
    for (let index = 0; index < rare; index++) {
      const { event } = this.rare[index];
      if (event.t === 'features') {
        epochs.set(event.epoch, event);
      } else if (event.t === 'engine') {
        engine = event;
      } else if (event.t === 'device') {
        device = event;
      } else if (event.t === 'telemetry_cost') {
        cost = event;
      }
    }
    return {
      server: recorded.server,
      engine,
      failure: told.failure,
      ...this.servedAt(atNs),
      ceilings: recorded.ceilings,
      features: told.features,
      device,
      telemetryCost: cost,
      epochs: [...epochs.values()],
      requests: this.requestsAt(atNs, tokens),
      steps: newestOf(this.stepRecords, steps, DEFAULT_LIMITS.steps, row => this.stepRecord(row)),
      tokens: newestOf(this.tokenRecords, tokens, DEFAULT_LIMITS.tokens, row => this.tokenRecord(row)),
      newestSentNs: tokens > 0 ? this.tokenMoments[tokens - 1] : null,
      feed: this.feed.slice(Math.max(0, lines - DEFAULT_LIMITS.feed), lines),
      kv: this.kvAt(atNs, steps)
    };
  }

  /** The snapshot with which a page would have connected when the recording began. */
  snapshot(): Snapshot {
    return this.initial;
  }

  /** Everything that happened in `(fromNs, toNs]`, in order, as the server told it. */
  between(fromNs: number, toNs: number): TelemetryEvent[] {
    const events: { atNs: number; order: number; event: TelemetryEvent }[] = [];
    for (let row = countUpTo(this.stepMoments, fromNs); row < this.stepsBy(toNs); row++) {
      events.push({ atNs: this.stepMoments[row], order: 1, event: this.recorded.steps.event(row) });
      const kv = this.kvEvents(row);
      if (kv) {
        events.push({ atNs: this.stepMoments[row], order: 1, event: kv });
      }
    }
    const last = this.tokensBy(toNs);
    for (let row = countUpTo(this.tokenMoments, fromNs); row < last;) {
      const event = this.tokensEvent(row, last);
      events.push({ atNs: this.tokenMoments[row + event.request.length - 1], order: 2, event });
      row += event.request.length;
    }
    for (let index = countUpTo(this.rareMoments, fromNs); index < countUpTo(this.rareMoments, toNs); index++) {
      events.push({ atNs: this.rare[index].atNs, order: 0, event: this.rare[index].event });
    }
    // Stable: events of one kind keep their order.
    return events.sort((a, b) => a.atNs - b.atNs || a.order - b.order).map(each => each.event);
  }

  /** The token in `row`, made once. */
  tokenRecord(row: number): TokenRecord {
    let record = this.tokenRecords[row];
    if (!record) {
      const { tokens } = this.recorded;
      const request = tokens.request[row];
      const stepRow = this.rowOfStep.get(tokens.step[row]);
      const step = stepRow === undefined ? null : this.stepRecord(stepRow).event;
      const share = step === null ? -1 : step.request.indexOf(request);
      const { parts } = tokens;
      record = {
        request,
        index: tokens.index[row],
        step: tokens.step[row],
        tokenId: tokens.token_id[row],
        text: tokens.text[row] ?? '',
        logprob: orNull(tokens.logprob[row]),
        sentNs: tokens.sent_ns[row],
        latencyNs: tokens.latency_ns[row],
        epoch: step === null ? null : step.epoch,
        batch: step === null ? null : step.request.length,
        kind: share < 0 ? null : step!.kind[share],
        parts: parts === null || Number.isNaN(parts[0][row]) ? null : parts.map(column => column[row]),
        origin: tokens.origin[row] || Origin.Plain,
        follows: row > 0 && tokens.request[row - 1] === request && tokens.step[row - 1] === tokens.step[row]
      };
      this.tokenRecords[row] = record;
    }
    return record;
  }

  private stepRecord(row: number): StepRecord {
    let record = this.stepRecords[row];
    if (!record) {
      record = makeStepRecord(this.recorded.steps.event(row));
      this.stepRecords[row] = record;
    }
    return record;
  }

  /** The tokens of one step from `row` on, as far as they follow one another. */
  private tokensEvent(row: number, end: number): TokensEvent {
    const { tokens } = this.recorded;
    const step = tokens.step[row];
    let to = row + 1;
    while (to < end && tokens.step[to] === step) {
      to += 1;
    }
    const parts = tokens.parts !== null && !Number.isNaN(tokens.parts[0][row]) ? tokens.parts : [];
    return {
      t: 'tokens',
      step,
      request: [...tokens.request.subarray(row, to)],
      index: [...tokens.index.subarray(row, to)],
      token_id: [...tokens.token_id.subarray(row, to)],
      text: tokens.text.slice(row, to).map(text => text ?? ''),
      logprob: [...tokens.logprob.subarray(row, to)].map(orNull),
      sent_ns: [...tokens.sent_ns.subarray(row, to)],
      latency_ns: [...tokens.latency_ns.subarray(row, to)],
      parts: parts.map(column => [...column.subarray(row, to)]),
      origin: [...tokens.origin.subarray(row, to)].map(origin => origin || Origin.Plain)
    };
  }

  private servedAt(atNs: number): { model: ModelInfo | null; capacity: Capacity | null; specs: FeatureSpec[] } {
    const { served } = this.recorded;
    const found = served.filter(each => each.since_ns <= atNs).at(-1) ?? served.at(0);
    return { model: found?.model ?? null, capacity: found?.capacity ?? null, specs: found?.specs ?? NO_SPECS };
  }

  private requestsAt(atNs: number, tokens: number): RequestRecord[] {
    const { tracks } = this;
    const result: RequestRecord[] = [];
    let seen = tracks.length;
    while (seen > 0 && tracks[seen - 1].firstNs > atNs) {
      seen -= 1;
    }
    for (let index = seen - 1; index >= 0; index--) {
      const track = tracks[index];
      if (result.length < DEFAULT_LIMITS.requests || track.endNs > atNs) {
        result.push(this.requestAt(track, atNs, tokens));
      }
    }
    return result.reverse();
  }

  private requestAt(track: RequestTrack, atNs: number, tokens: number): RequestRecord {
    const events = countUpTo(track.moments, atNs);
    const made = countUpTo(track.rows, tokens - 1);
    const forgotten = Math.max(0, made - DEFAULT_LIMITS.tokensPerRequest);
    const list: TokenRecord[] = [];
    for (let at = forgotten; at < made; at++) {
      list.push(this.tokenRecord(track.rows[at]));
    }
    const told = track.events.slice(0, events);
    const preemptedNs = told
      .filter((event, at) => event.state === 'preempted' && told[at - 1]?.state !== 'preempted')
      .map(event => event.at_ns);
    return { handle: track.handle, event: told.at(-1) ?? null, tokens: list, forgotten, preemptedNs };
  }

  private collectRare(track: (handle: number, atNs: number) => RequestTrack): void {
    const { recorded, rare } = this;
    const from = (atNs: number) => Math.max(atNs, recorded.beginNs);
    let latest = 0;
    for (const event of recorded.requests) {
      // As the front logged them: their own clock may be a hair out of order between threads.
      latest = Math.max(latest, from(event.at_ns));
      rare.push({ atNs: latest, event });
      const own = track(event.request, latest);
      own.events.push(event);
      own.moments.push(latest);
      if (ENDED.has(event.state)) {
        own.endNs = latest;
      }
    }
    for (const event of recorded.features) {
      const settled = event.settled_ns;
      if (settled !== null && event.preempted > 0 && settled > event.applied_ns) {
        rare.push({ atNs: from(event.applied_ns), event: { ...event, settled_ns: null } });
        rare.push({ atNs: from(settled), event });
      } else {
        rare.push({ atNs: from(event.applied_ns), event });
      }
    }
    for (const event of [...recorded.engine, ...recorded.device, ...recorded.costs]) {
      rare.push({ atNs: from(event.at_ns), event });
    }
    rare.sort((a, b) => a.atNs - b.atNs);
  }

  /** Split off what was so when the recording began: nobody is told of it as news. */
  private makeInitial(): Snapshot {
    const before = this.rare.filter(each => each.atNs <= this.beginNs).map(each => each.event);
    const newest = <T extends Rare['event']['t']>(tag: T) =>
      (before.filter(each => each.t === tag).at(-1) ?? null) as Extract<Rare['event'], { t: T }> | null;
    const engine: EngineEvent = newest('engine') ?? {
      t: 'engine',
      state: 'ready',
      at_ns: this.beginNs,
      stage: '',
      fraction: null,
      message: '',
      pid: null,
      restarts: 0,
      failed_requests: 0
    };
    const requests = new Map<number, RequestEvent>();
    for (const event of before) {
      if (event.t === 'request') {
        requests.set(event.request, event);
      }
    }
    const { server, ceilings } = this.recorded;
    const kv = this.kvRows(0, this.kvBefore);
    return {
      t: 'snapshot',
      seq: 0,
      kv,
      now_ns: this.beginNs,
      server,
      engine,
      ...this.servedAt(this.beginNs),
      features: newest('features') ?? null,
      requests: [...requests.values()],
      history: [],
      ceilings
    };
  }

  /** Let a store tell the whole story once: which lines of the event feed there were by when. */
  private tellAll(): FeedEntry[] {
    const evicting = this.evictingSteps();
    const store = new TelemetryStore({
      steps: 1,
      tokens: 1,
      feed: Math.max(1, this.rare.length * 2 + evicting.length)
    });
    store.applySnapshot(this.initial);
    let seq = 0;
    const tell = (atNs: number, events: TelemetryEvent[]) => {
      store.applyFrame({ t: 'frame', seq: ++seq, now_ns: atNs, dropped: 0, events });
      while (this.feedMoments.length < store.feed.length) {
        this.feedMoments.push(atNs);
      }
    };
    let next = 0;
    const tellEvictions = (untilNs: number) => {
      for (; next < evicting.length && this.stepMoments[evicting[next]] < untilNs; next++) {
        const row = evicting[next];
        tell(this.stepMoments[row], [this.recorded.steps.event(row), this.kvEvents(row)!]);
      }
    };
    for (const { atNs, event } of this.rare) {
      if (atNs > this.beginNs) {
        tellEvictions(atNs);
        tell(atNs, [event]);
      }
      this.told.push({ failure: store.failure, features: store.features });
    }
    tellEvictions(Infinity);
    return store.feed.last(store.feed.length);
  }

  // -- the KV cache ----------------------------------------------------------------------------------------------------

  /** Rows of the steps in which cached blocks were given up. */
  private evictingSteps(): number[] {
    const { kv } = this.recorded;
    const result: number[] = [];
    for (let row = 0, at = this.kvBefore; row < this.kvAfter.length; row++) {
      let evicts = false;
      for (; at < this.kvAfter[row]; at++) {
        evicts ||= kv.op[at] === Op.Evict;
      }
      if (evicts) {
        result.push(row);
      }
    }
    return result;
  }

  private kvEvents(row: number): KvEvents | null {
    return this.kvRows(row === 0 ? this.kvBefore : this.kvAfter[row - 1], this.kvAfter[row]);
  }

  private kvRows(from: number, to: number): KvEvents | null {
    const { kv } = this.recorded;
    const range = Array.from({ length: to - from }, (_, at) => from + at);
    return to === from
      ? null
      : {
          t: 'kv',
          step: kv.step[to - 1],
          op: range.map(at => kv.op[at]),
          block: range.map(at => kv.block[at]),
          request: range.map(at => kv.request[at])
        };
  }

  /** A new copy of the blocks after so many steps. */
  private kvAt(atNs: number, steps: number): KvBlocks {
    const { kv } = this.recorded;
    const rows = steps > 0 ? this.kvAfter[steps - 1] : this.kvBefore;
    const states = this.kvStates;
    let from = states[Math.min(states.length - 1, Math.floor(rows / KV_STRIDE))];
    let blocks = from.blocks.clone();
    for (let at = from.rows; at < rows; at++) {
      blocks.take(kv.op[at], kv.block[at], kv.request[at], kv.step[at]);
      if (at + 1 === states.length * KV_STRIDE) {
        from = { rows: at + 1, blocks };
        states.push(from);
        blocks = blocks.clone();
      }
    }
    const lost = this.cacheLost(atNs);
    if (lost !== null && (steps === 0 || this.stepMoments[steps - 1] < lost)) {
      blocks.forget();
    }
    return blocks;
  }

  /** When the newest event by `atNs` that ends all knowledge of the blocks came; see {@link TelemetryStore}. */
  private cacheLost(atNs: number): number | null {
    for (let index = countUpTo(this.rareMoments, atNs) - 1; index >= 0; index--) {
      const { event, atNs: moment } = this.rare[index];
      if (endsCache(event) && moment > this.beginNs) {
        return moment;
      }
    }
    return null;
  }
}

/** How many of the rising `values` are at most `limit`. */
export function countUpTo(values: ArrayLike<number>, limit: number): number {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (values[middle] <= limit) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/** The running maximum: rows in the order of the log, at moments that never go back. */
function rising(values: Float64Array): Float64Array {
  const result = Float64Array.from(values);
  for (let row = 1; row < result.length; row++) {
    result[row] = Math.max(result[row], result[row - 1]);
  }
  return result;
}

/** A new array of the last `most` records before row `end`; those that are not there yet are made. */
function newestOf<T>(records: (T | undefined)[], end: number, most: number, make: (row: number) => T): T[] {
  const from = Math.max(0, end - most);
  const result = records.slice(from, end);
  for (let at = 0; at < result.length; at++) {
    result[at] ??= make(from + at);
  }
  return result as T[];
}

export function orNull(value: number): number | null {
  return Number.isNaN(value) ? null : value;
}
