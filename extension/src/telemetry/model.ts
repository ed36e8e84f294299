/**
 * A notebook widget's transport: custom messages of an anywidget model. The Python half holds the real connection and
 * passes the server's MessagePack on unchanged, so the store cannot tell the difference.
 */

import type { AnyModel } from '@anywidget/types';

import { pageNow } from './clock';
import type {
  ConnectionState,
  EngineAction,
  RecordingCommand,
  TelemetryConnection,
  TrafficCommand
} from './connection';
import { ConnectionBase, mismatchReason, RefusedError } from './connection';
import type { FeatureValue, GenerateBody } from './protocol';
import { PROTOCOL_VERSION } from './protocol';
import type { TelemetryStore } from './store';

type FromPython =
  | { t: 'telemetry' }
  | { t: 'connection'; state: ConnectionState; reason: string }
  | { t: 'clock'; client_time: number; now_ns: number }
  | { t: 'reply'; ok: boolean; message: string; for: string };

type Pending = { resolve: () => void; reject: (error: Error) => void };

export class ModelConnection extends ConnectionBase implements TelemetryConnection {
  readonly controlsEngine = true;
  private readonly pending = new Map<string, Pending[]>();

  constructor(
    store: TelemetryStore,
    private readonly model: AnyModel
  ) {
    super(store);
    model.on('msg:custom', this.onMessage);
  }

  connect(): void {
    this.askSnapshot();
    this.keepTime();
  }

  retry(): void {
    this.connect();
  }

  setFeatures(values: Record<string, FeatureValue>): Promise<void> {
    return this.ask('features', { t: 'features', values });
  }

  generate(body: GenerateBody): Promise<void> {
    return this.ask('generate', { t: 'generate', body });
  }

  stopGenerating(): void {
    const ids = new Set(this.store.activeRequests.map(each => each.event?.id));
    for (const id of ids) {
      if (id !== undefined) {
        this.model.send({ t: 'cancel', id });
      }
    }
  }

  engine(action: EngineAction): Promise<void> {
    return this.ask('engine', { t: 'engine', action });
  }

  record(command: RecordingCommand): Promise<void> {
    return this.ask('record', { t: 'record', id: this.activeRecording(), ...command });
  }

  traffic(command: TrafficCommand): Promise<void> {
    return this.ask('traffic', { t: 'traffic', ...command });
  }

  dispose(): void {
    this.stopKeepingTime();
    this.model.off('msg:custom', this.onMessage);
    this.pending.forEach(list => list.forEach(each => each.reject(new RefusedError('The view was closed.'))));
    this.setStatus('closed', '');
  }

  private readonly onMessage = (message: FromPython, buffers: DataView[]): void => {
    switch (message.t) {
      case 'telemetry':
        this.hear(buffers[0]);
        break;
      case 'connection':
        this.setStatus(message.state, message.reason);
        break;
      case 'clock':
        this.clock.add(message.client_time, pageNow(), message.now_ns);
        break;
      case 'reply': {
        const waiting = this.pending.get(message.for)?.shift();
        if (message.ok) {
          waiting?.resolve();
        } else if (waiting) {
          waiting.reject(new RefusedError(message.message));
        } else {
          this.store.note('error', message.message);
        }
        break;
      }
    }
  };

  private hear(data: DataView): void {
    try {
      const message = this.receive(data);
      if (message.t === 'snapshot') {
        if (message.server.protocol !== PROTOCOL_VERSION) {
          this.setStatus('failed', mismatchReason(message.server.protocol, message.server.version));
          return;
        }
        this.setStatus('connected', '');
      } else if (message.t === 'frame') {
        this.model.send({ t: 'credit', frames: 1 });
      }
    } catch (error) {
      this.setStatus('failed', `The kernel and this page do not understand each other: ${String(error)}.`);
    }
  }

  protected askSnapshot(): void {
    this.model.send({ t: 'ready' });
  }

  protected askTime(): boolean {
    this.model.send({ t: 'clock', client_time: pageNow() });
    return true;
  }

  private ask(topic: string, message: object): Promise<void> {
    return new Promise((resolve, reject) => {
      const list = this.pending.get(topic) ?? [];
      list.push({ resolve, reject });
      this.pending.set(topic, list);
      this.model.send(message);
    });
  }
}
