/**
 * The panel's transport: one WebSocket for telemetry and HTTP for commands, both through JupyterLab's proxy. Owns the
 * reconnection, and finding out *why* there is no connection. Knows no JupyterLab: its host hands it URLs and a fetch.
 */

import { pageNow } from './clock';
import type { EngineAction, RecordingCommand, TelemetryConnection, TrafficCommand } from './connection';
import { ConnectionBase, mismatchReason, RefusedError } from './connection';
import { encodeClientMessage } from './decode';
import type { ClientMessage, EngineState, FeatureValue, GenerateBody, RecordingEvent } from './protocol';
import { PROTOCOL_VERSION } from './protocol';
import type { TelemetryStore } from './store';

/** How to reach the server from this page. */
export interface ServerAddress {
  /** WebSocket URL of `/telemetry`, with whatever authorization the page needs. */
  telemetryUrl(): string;
  /** `fetch` for a path of the server, e.g. `features`, with cookies, tokens and XSRF headers in place. */
  fetch(path: string, init: RequestInit): Promise<Response>;
  /** Does the host that proxies us (JupyterLab's server) answer at all? */
  hostAnswers(): Promise<boolean>;
}

const FIRST_BACKOFF_MS = 250;
const LAST_BACKOFF_MS = 8000;
/** The server says something at least every 20 s. */
const SILENCE_MS = 45_000;
const CREDITS = 16;
const MIN_INTERVAL_MS = 8;
/** Browsers open six connections to one host; JupyterLab needs some of them, whichever server the streams come from. */
const MAX_STREAMS = 3;
let pageStreams = 0;

export class SocketConnection extends ConnectionBase implements TelemetryConnection {
  readonly controlsEngine = true;
  private socket: WebSocket | null = null;
  private wanted = false;
  private backoffMs = FIRST_BACKOFF_MS;
  private retryTimer: ReturnType<typeof setTimeout> | null = null;
  private readonly upkeep: ReturnType<typeof setInterval>;
  private lastHeard = 0;
  private readonly streams = new Map<AbortController, string | null>();

  constructor(
    store: TelemetryStore,
    private readonly address: ServerAddress
  ) {
    super(store);
    this.upkeep = setInterval(() => this.tend(), 5000);
    window.addEventListener('online', this.retry);
    document.addEventListener('visibilitychange', this.onVisible);
  }

  connect(): void {
    if (!this.wanted) {
      this.wanted = true;
      this.open();
    }
  }

  readonly retry = (): void => {
    if (this.wanted && this.socket === null && this.status.state !== 'ended') {
      this.backoffMs = FIRST_BACKOFF_MS;
      this.open();
    }
  };

  async setFeatures(values: Record<string, FeatureValue>): Promise<void> {
    await this.command('features', 'PATCH', values);
  }

  async generate(body: GenerateBody): Promise<void> {
    if (pageStreams >= MAX_STREAMS) {
      throw new RefusedError(
        `${MAX_STREAMS} generations of this page are running already. Stop them, or ask for more parallel requests in one.`
      );
    }
    const abort = new AbortController();
    this.streams.set(abort, null);
    pageStreams += 1;
    try {
      const response = await this.address.fetch(body.messages ? 'v1/chat/completions' : 'v1/completions', {
        method: 'POST',
        headers: { 'Content-Type': 'application/json', Accept: 'text/event-stream' },
        body: JSON.stringify({ model: this.store.model?.name ?? 'default', stream: true, ...body }),
        signal: abort.signal
      });
      if (!response.ok || !response.body) {
        throw new RefusedError(await errorText(response));
      }
      this.streams.set(abort, response.headers.get('X-Request-Id'));
      const error = await drain(response.body);
      if (error !== null) {
        throw new RefusedError(error);
      }
    } catch (error) {
      if (!abort.signal.aborted) {
        throw error instanceof RefusedError ? error : new RefusedError(`The generation broke off: ${reasonOf(error)}`);
      }
    } finally {
      this.streams.delete(abort);
      pageStreams -= 1;
    }
  }

  /** Whether somebody still waits for an answer that comes through here. */
  get generating(): boolean {
    return this.streams.size > 0;
  }

  stopGenerating(): void {
    for (const [abort, id] of this.streams) {
      abort.abort();
      if (id !== null) {
        // Closing the stream is enough for the server, unless a proxy in between keeps it open.
        this.command(`requests/${encodeURIComponent(id)}/cancel`, 'POST', {}).catch(() => undefined);
      }
    }
  }

  async engine(action: EngineAction): Promise<void> {
    await this.command(`engine/${action}`, 'POST', {});
  }

  async record(command: RecordingCommand): Promise<void> {
    if (command.action === 'start') {
      const { name, note } = command;
      await this.command('recordings', 'POST', { ...(name && { name }), ...(note && { note }) });
      return;
    }
    const active = this.activeRecording();
    if (active === null) {
      throw new RefusedError('Nothing is being recorded.');
    }
    await this.command(`recordings/${encodeURIComponent(active)}/stop`, 'POST', {});
  }

  async traffic({ action, values }: TrafficCommand): Promise<void> {
    if (action === 'stop') {
      await this.command('traffic/stop', 'POST', {});
    } else {
      await this.command('traffic', action === 'start' ? 'POST' : 'PATCH', values);
    }
  }

  /** The bytes of a finished recording. */
  async download(recording: string): Promise<Uint8Array<ArrayBuffer>> {
    const response = await this.address.fetch(`recordings/${encodeURIComponent(recording)}/download`, {});
    if (!response.ok) {
      throw new RefusedError(await errorText(response));
    }
    return new Uint8Array(await response.arrayBuffer());
  }

  /** The recordings in the server's folder, newest first. */
  async recordings(): Promise<{ folder: string; recordings: RecordingEvent[] }> {
    const response = await this.address.fetch('recordings', {});
    if (!response.ok) {
      throw new RefusedError(await errorText(response));
    }
    return (await response.json()) as { folder: string; recordings: RecordingEvent[] };
  }

  dispose(): void {
    this.wanted = false;
    clearInterval(this.upkeep);
    this.stopKeepingTime();
    if (this.retryTimer !== null) {
      clearTimeout(this.retryTimer);
    }
    window.removeEventListener('online', this.retry);
    document.removeEventListener('visibilitychange', this.onVisible);
    this.streams.forEach((_, abort) => abort.abort());
    this.socket?.close();
    this.socket = null;
    this.setStatus('closed', '');
  }

  /** A snapshot comes with a connection; the old one stays until the new one is there to be asked. */
  protected askSnapshot(): void {
    const socket = this.socket;
    this.open();
    socket?.close();
  }

  private open(): void {
    if (this.retryTimer !== null) {
      clearTimeout(this.retryTimer);
      this.retryTimer = null;
    }
    if (this.status.state === 'closed') {
      this.setStatus('connecting', '');
    }
    const socket = new WebSocket(this.address.telemetryUrl());
    socket.binaryType = 'arraybuffer';
    this.socket = socket;
    this.lastHeard = pageNow();
    socket.onopen = () => {
      this.send({
        t: 'subscribe',
        protocol: PROTOCOL_VERSION,
        credits: CREDITS,
        history: 2000,
        min_interval_ms: MIN_INTERVAL_MS
      });
      this.keepTime();
    };
    socket.onmessage = event => {
      if (socket === this.socket) {
        this.hear(event.data as ArrayBuffer);
      }
    };
    socket.onclose = event => {
      if (socket === this.socket) {
        this.lose(event);
      }
    };
  }

  private hear(data: ArrayBuffer): void {
    this.lastHeard = pageNow();
    try {
      const message = this.receive(data);
      if (message.t === 'snapshot') {
        if (message.server.protocol !== PROTOCOL_VERSION) {
          this.refuse(mismatchReason(message.server.protocol, message.server.version));
          return;
        }
        this.backoffMs = FIRST_BACKOFF_MS;
        this.setStatus('connected', '');
      } else if (message.t === 'frame') {
        this.send({ t: 'credit', frames: 1 });
      } else if (message.t === 'error' && this.status.state !== 'connected') {
        // Without a snapshot there is nothing to show: the server refused the subscription itself.
        this.refuse(message.message);
      }
    } catch (error) {
      this.refuse(`The server and this page do not understand each other: ${reasonOf(error)}.`);
    }
  }

  /** Give up: until a person acts, or for good. */
  private refuse(reason: string, state: 'failed' | 'ended' = 'failed'): void {
    const socket = this.socket;
    this.socket = null;
    socket?.close();
    if (this.retryTimer !== null) {
      clearTimeout(this.retryTimer);
      this.retryTimer = null;
    }
    this.setStatus(state, reason);
  }

  private lose(event: CloseEvent): void {
    this.socket = null;
    if (!this.wanted) {
      return;
    }
    const delay = this.backoffMs;
    this.backoffMs = Math.min(LAST_BACKOFF_MS, this.backoffMs * 2);
    this.retryTimer = setTimeout(() => this.open(), delay);
    const retryAt = pageNow() + delay;
    if (this.status.state === 'connected') {
      this.setStatus('waiting', 'The connection to the inference server was lost.', retryAt);
    } else if (this.status.state === 'waiting') {
      this.setStatus('waiting', this.status.reason, retryAt);
    }
    void this.diagnose(event).then(
      reason => {
        if (this.wanted && this.status.state !== 'connected') {
          this.setStatus('waiting', reason, this.retryTimer === null ? null : retryAt);
        }
      },
      (error: unknown) => {
        if (this.wanted) {
          this.refuse(reasonOf(error), 'ended');
        }
      }
    );
  }

  /**
   * A browser is told nothing about a WebSocket that failed; plain HTTP tells which link of the chain is broken. Rejects
   * with {@link RefusedError} where the server has ended for good.
   */
  private async diagnose(event: CloseEvent): Promise<string> {
    if (event.code !== 1006 && event.reason) {
      return `The server closed the connection: ${event.reason}`;
    }
    let response: Response;
    try {
      response = await this.address.fetch('health', { method: 'GET' });
    } catch {
      return (await this.address.hostAnswers())
        ? 'JupyterLab answers, but the inference server behind it does not.'
        : 'JupyterLab’s server does not answer: it was shut down, or the network is gone.';
    }
    if (response.ok) {
      const health = (await response.json().catch(() => null)) as { engine?: EngineState } | null;
      return health?.engine
        ? `The inference server answers (engine ${health.engine}); connecting.`
        : 'Something answers in place of the inference server that is not one.';
    }
    switch (response.status) {
      case 401:
      case 403:
        return 'JupyterLab no longer accepts this page: its token changed or the login ran out. Reload the page.';
      case 404:
        return 'JupyterLab does not know the inference server: the jupyter-server-proxy extension is missing or disabled.';
      case 410:
        throw new RefusedError(await errorText(response));
      case 500:
      case 502:
      case 503:
      case 504:
        return `The inference server is not up: ${await errorText(response)}`;
      default:
        return `The inference server answered ${response.status}.`;
    }
  }

  private tend(): void {
    if (this.socket?.readyState === WebSocket.OPEN && pageNow() - this.lastHeard > SILENCE_MS) {
      const socket = this.socket;
      socket.onclose = null;
      socket.close();
      this.lose(new CloseEvent('close', { code: 1006 }));
    }
  }

  private readonly onVisible = (): void => {
    if (!document.hidden) {
      this.retry();
      this.tend();
    }
  };

  protected askTime(): boolean {
    return this.send({ t: 'clock', client_time: pageNow() });
  }

  private send(message: ClientMessage): boolean {
    const open = this.socket?.readyState === WebSocket.OPEN;
    if (open) {
      this.socket?.send(encodeClientMessage(message));
    }
    return open;
  }

  private async command(path: string, method: string, body: unknown): Promise<unknown> {
    let response: Response;
    try {
      response = await this.address.fetch(path, {
        method,
        headers: { 'Content-Type': 'application/json' },
        body: JSON.stringify(body)
      });
    } catch (error) {
      throw new RefusedError(`The server could not be reached: ${reasonOf(error)}`);
    }
    if (!response.ok) {
      throw new RefusedError(await errorText(response));
    }
    return response.json();
  }
}

/** The message of an OpenAI-shaped error, or the best there is. */
async function errorText(response: Response): Promise<string> {
  const text = await response.text().catch(() => '');
  try {
    const message = (JSON.parse(text) as { error?: { message?: unknown } }).error?.message;
    if (typeof message === 'string') {
      return message;
    }
  } catch {
    // Not JSON: a proxy's own page.
  }
  return `the server answered ${response.status} ${response.statusText}`;
}

/** Read server-sent events to the end; returns the error that ended them, if one did. */
async function drain(body: ReadableStream<Uint8Array>): Promise<string | null> {
  const reader = body.pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array>).getReader();
  let rest = '';
  let error: string | null = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) {
      return error;
    }
    const lines = (rest + value).split('\n');
    rest = lines.pop() ?? '';
    for (const line of lines) {
      if (line.startsWith('data: {"error"')) {
        error = errorOf(line.slice(6)) ?? 'the server reported an error';
      }
    }
  }
}

function errorOf(json: string): string | null {
  try {
    const message = (JSON.parse(json) as { error?: { message?: unknown } }).error?.message;
    return typeof message === 'string' ? message : null;
  } catch {
    return null;
  }
}

function reasonOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
