/** The status bar's summary: engine state, output rate, KV cache occupancy. Silent until something connects. */

import { Widget } from '@lumino/widgets';

import type { SocketConnection } from '../telemetry/socket';
import { h, setText } from '../views/dom';
import { percent, significant } from '../views/format';
import type { Translation } from '../views/translation';

const INTERVAL_MS = 1000;

export class StatusItem extends Widget {
  private readonly button: HTMLButtonElement;
  private timer: ReturnType<typeof setInterval> | null = null;
  private connection: SocketConnection | null = null;

  private unwatch: (() => void) | null = null;

  /** `name` says which server that is, where there are several. */
  constructor(
    private readonly trans: Translation,
    open: () => void,
    private readonly name: () => string | null
  ) {
    super();
    this.addClass('iw-status-item');
    this.button = h('button', {
      class: 'iw-status-item-button',
      title: trans.__('Open the Inference Workbench'),
      attrs: { type: 'button' },
      on: { click: open }
    });
    this.node.append(this.button);
    this.show_();
  }

  watch(connection: SocketConnection): void {
    this.connection = connection;
    this.timer ??= setInterval(() => this.show_(), INTERVAL_MS);
    this.unwatch?.();
    this.unwatch = connection.onStatus(() => this.show_());
    this.show_();
  }

  override dispose(): void {
    if (this.timer !== null) {
      clearInterval(this.timer);
    }
    this.unwatch?.();
    super.dispose();
  }

  private show_(): void {
    const name = this.name();
    const state = this.text();
    setText(
      this.button,
      name === null ? this.trans.__('Inference: %1', state) : this.trans.__('Inference (%1): %2', name, state)
    );
  }

  private text(): string {
    const { trans, connection } = this;
    if (!connection) {
      return trans.__('off');
    }
    if (connection.status.state !== 'connected') {
      switch (connection.status.state) {
        case 'failed':
          return trans.__('not connected');
        case 'ended':
          return trans.__('ended');
        default:
          return trans.__('connecting…');
      }
    }
    const { store } = connection;
    const engine = store.engine;
    if (engine && engine.state !== 'ready') {
      const share = engine.state === 'loading' && engine.fraction !== null ? ` ${percent(engine.fraction)}` : '';
      return `${engine.state}${share}`;
    }
    const metrics = store.metrics(5e9);
    const rate = metrics.idle
      ? trans.__('idle')
      : metrics.outputRate === null
        ? trans.__('working')
        : `${significant(metrics.outputRate)} tok/s`;
    const kv = metrics.kvBlocks === null ? '' : ` · KV ${percent(metrics.kvBlocks)}`;
    return rate + kv;
  }
}
