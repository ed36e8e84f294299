/**
 * What a view may ask of the server, and how it hears how the connection is. Owns no transport: the panel uses
 * {@link SocketConnection}, a notebook widget {@link ModelConnection}.
 */

import { ClockOffset, pageNow, pauseAfter } from './clock';
import { decodeServerMessage } from './decode';
import type { FeatureValue, GenerateBody, ServerMessage, TrafficValues } from './protocol';
import { PROTOCOL_VERSION } from './protocol';
import type { TelemetryStore } from './store';

/**
 * - `connecting`: on the way, nothing wrong yet
 * - `connected`: frames arrive
 * - `waiting`: lost or not there, trying again by itself; the reason says what is wrong
 * - `failed`: needs a person; the reason says what to do
 * - `closed`: not wanted
 */
/** Of `failed`, trying again may help once a person has acted; a server that has `ended` never comes back. */
export type ConnectionState = 'connecting' | 'connected' | 'waiting' | 'failed' | 'ended' | 'closed';

export interface ConnectionStatus {
  state: ConnectionState;
  reason: string;
  /** When the next attempt is due, on the page's clock (ms). */
  retryAt: number | null;
}

export type EngineAction = 'restart' | 'stop' | 'start' | 'sleep' | 'wake';

/** What can be asked of a server's recorder. */
export type RecordingCommand = { action: 'start'; name?: string; note?: string } | { action: 'stop' };

/** What can be asked of the server's own load. */
export interface TrafficCommand {
  action: 'start' | 'change' | 'stop';
  values: TrafficValues;
}

/** The server said no, and why. */
export class RefusedError extends Error {}

export interface TelemetryConnection {
  readonly store: TelemetryStore;
  readonly clock: ClockOffset;
  readonly status: ConnectionStatus;
  readonly reconnects: number;
  /** Whether {@link engine} works here. */
  readonly controlsEngine: boolean;
  /** What is shown has happened already: nothing can be started, switched or recorded. */
  readonly readOnly: boolean;
  connect(): void;
  /** Try again now instead of waiting. */
  retry(): void;
  onStatus(listener: () => void): () => void;
  /** Switch; resolves once applied, rejects with {@link RefusedError}. */
  setFeatures(values: Record<string, FeatureValue>): Promise<void>;
  /** Resolves when the generation is over; rejects with {@link RefusedError} if it was refused or broke off. */
  generate(body: GenerateBody): Promise<void>;
  /** End every generation that was started through this connection. */
  stopGenerating(): void;
  engine(action: EngineAction): Promise<void>;
  record(command: RecordingCommand): Promise<void>;
  traffic(command: TrafficCommand): Promise<void>;
  dispose(): void;
}

/** What both transports share: the status, and what to do with a message. */
export abstract class ConnectionBase {
  readonly clock = new ClockOffset();
  status: ConnectionStatus = { state: 'connecting', reason: '', retryAt: null };
  reconnects = 0;
  readonly readOnly = false;
  private readonly statusListeners = new Set<() => void>();
  private clockTimer: ReturnType<typeof setTimeout> | undefined;
  private sawSnapshot = false;
  private asked = false;

  constructor(readonly store: TelemetryStore) {}

  onStatus(listener: () => void): () => void {
    this.statusListeners.add(listener);
    return () => this.statusListeners.delete(listener);
  }

  /** Id of the recording that runs, if one does. */
  protected activeRecording(): string | null {
    return [...this.store.recordings.values()].findLast(each => each.state === 'recording')?.id ?? null;
  }

  protected setStatus(state: ConnectionState, reason: string, retryAt: number | null = null): void {
    const before = this.status;
    if (before.state === state && before.reason === reason && before.retryAt === retryAt) {
      return;
    }
    this.status = { state, reason, retryAt };
    if (state === 'connected' && before.state !== 'connected' && this.reconnects > 0) {
      this.store.note('connection', 'Connected again.');
    } else if (before.state === 'connected' && (state === 'waiting' || state === 'failed' || state === 'ended')) {
      this.store.note('error', reason);
    }
    this.statusListeners.forEach(listener => listener());
  }

  /** Exchange times with the server from now on, at first often. A new connection begins anew. */
  protected keepTime(made = 0): void {
    clearTimeout(this.clockTimer);
    if (this.askTime()) {
      this.clockTimer = setTimeout(() => this.keepTime(made + 1), pauseAfter(made + 1));
    }
  }

  protected stopKeepingTime(): void {
    clearTimeout(this.clockTimer);
  }

  /** Ask for the server's time. Returns whether there was somebody to ask. */
  protected abstract askTime(): boolean;

  /** Have the server send a new snapshot. */
  protected abstract askSnapshot(): void;

  /** Take in one binary message. Returns what it was, for the transport's own needs. */
  protected receive(data: ArrayBuffer | ArrayBufferView): ServerMessage {
    const message = decodeServerMessage(data);
    switch (message.t) {
      case 'snapshot':
        if (message.server.protocol === PROTOCOL_VERSION) {
          if (this.store.server !== null && this.store.server.instance !== message.server.instance) {
            this.clock.reset();
          }
          if (this.sawSnapshot && !this.asked) {
            this.reconnects += 1;
          }
          this.sawSnapshot = true;
          this.asked = false;
          this.store.applySnapshot(message);
        }
        break;
      case 'frame': {
        const wasReady = this.store.engine?.state === 'ready';
        this.store.applyFrame(message);
        if (!wasReady && this.store.engine?.state === 'ready') {
          // Which model is loaded and what can be switched is said in snapshots only.
          this.asked = true;
          this.askSnapshot();
        }
        break;
      }
      case 'clock':
        this.clock.add(message.client_time, pageNow(), message.now_ns);
        break;
      case 'error':
        this.store.note('error', `The server did not understand this page: ${message.message}`);
        break;
    }
    return message;
  }
}

/** Says which side of a version mismatch is the old one and what to do. */
export function mismatchReason(serverProtocol: number, serverVersion: string): string {
  const older = serverProtocol < PROTOCOL_VERSION ? 'server' : 'page';
  const cure =
    older === 'server'
      ? 'Restart the inference server so that it runs the installed version.'
      : 'Reload this page; if that does not help, update the inference-workbench package that JupyterLab runs from.';
  return `The ${older} is too old: the server (version ${serverVersion}) speaks protocol ${serverProtocol}, this page ${PROTOCOL_VERSION}. ${cure}`;
}
