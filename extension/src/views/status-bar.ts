/** The first line of the panel: is there a server, an engine, a model; if not, why; and the buttons to act on it. */

import { measuredBadge } from './badge';
import { h, setText } from './dom';
import { magnitude, significant } from './format';
import type { ConnectionState, EngineAction } from '../telemetry/connection';
import { pageNow } from '../telemetry/clock';
import type { PaintStats } from './loop';
import type { View, ViewContext } from './view';
import { describeEngine, firstSentence } from './words';

type Level = 'good' | 'busy' | 'bad' | 'off';

const SIGNS: Record<Level, string> = { good: '●', busy: '◐', bad: '▲', off: '○' };

export class StatusBar implements View {
  readonly element: HTMLElement;
  private readonly chip = h('span', { class: 'iw-chip', attrs: { role: 'status' } });
  private readonly sign = h('span', { class: 'iw-chip-sign', attrs: { 'aria-hidden': 'true' } });
  private readonly label = h('span', { class: 'iw-chip-label' });
  private readonly model = h('span', { class: 'iw-model' });
  private readonly lag = h('span', { class: 'iw-lag-number' });
  private readonly progress = h('progress', { class: 'iw-progress', attrs: { max: 1, hidden: true } });
  private readonly message = h('div', { class: 'iw-message', attrs: { role: 'alert', hidden: true } });
  private readonly messageText = h('span');
  private readonly retry: HTMLButtonElement;
  private readonly buttons: Record<EngineAction, HTMLButtonElement>;
  private readonly countdown: ReturnType<typeof setInterval>;
  private refusal = '';

  constructor(
    private readonly context: ViewContext,
    private readonly stats: () => PaintStats,
    recorder: HTMLElement | null = null,
    chooser: HTMLElement | null = null
  ) {
    const { trans, connection } = context;
    this.chip.append(this.sign, this.label);
    this.progress.setAttribute('aria-label', trans.__('Loading'));
    const button = (action: EngineAction, text: string, title: string) =>
      h('button', {
        class: 'iw-button iw-button-quiet',
        text,
        title,
        attrs: { type: 'button', 'data-engine-action': action },
        on: { click: () => this.act(action) }
      });
    this.buttons = {
      start: button('start', trans.__('Start engine'), trans.__('Load the model again')),
      restart: button('restart', trans.__('Restart'), trans.__('Restart the engine; running requests fail')),
      sleep: button(
        'sleep',
        trans.__('Sleep'),
        trans.__('Give the device’s memory back between two steps; running requests wait and lose nothing')
      ),
      wake: button('wake', trans.__('Wake engine'), trans.__('Take the memory again and go on with the requests')),
      stop: button('stop', trans.__('Stop engine'), trans.__('Stop the engine and free the device’s memory'))
    };
    this.retry = h('button', {
      class: 'iw-button',
      text: trans.__('Try now'),
      attrs: { type: 'button' },
      on: { click: () => connection.retry() }
    });
    this.message.append(this.messageText, this.retry);
    this.element = h(
      'header',
      { class: 'iw-status' },
      h(
        'div',
        { class: 'iw-status-line' },
        this.chip,
        chooser,
        this.model,
        !connection.readOnly &&
          h(
            'span',
            { class: 'iw-lag' },
            h('span', { text: trans.__('view lag') }),
            this.lag,
            measuredBadge(
              trans,
              trans.__('View lag'),
              trans.__(
                'Age of the newest token when it appears on this screen: time of painting minus the time the server sent it, on the server’s clock (offset estimated like NTP, from the quickest exchange). Median of the recent repaints.'
              )
            )
          ),
        recorder,
        connection.controlsEngine &&
          h(
            'span',
            { class: 'iw-engine-buttons' },
            this.buttons.start,
            this.buttons.wake,
            this.buttons.sleep,
            this.buttons.restart,
            this.buttons.stop
          )
      ),
      this.progress,
      this.message
    );
    this.countdown = setInterval(() => {
      if (connection.status.retryAt !== null) {
        this.update();
      }
    }, 500);
  }

  update(): void {
    const { store, trans, connection } = this.context;
    const { status } = connection;
    const engine = store.engine;
    const connected = status.state === 'connected';
    let level: Level;
    let text: string;
    let reason: string;
    let fraction: number | null | undefined;
    if (connection.readOnly) {
      level = 'off';
      text = trans.__('Recording');
      reason =
        engine === null || engine.state === 'ready'
          ? ''
          : trans.__('At this moment: %1', describeEngine(engine, trans));
    } else if (!connected) {
      [level, text] = this.unconnected(status.state);
      reason = status.reason;
      if (status.retryAt !== null && reason) {
        const seconds = Math.max(0, (status.retryAt - pageNow()) / 1000);
        reason += ' ' + (seconds > 0.5 ? trans.__('Next attempt in %1 s.', Math.ceil(seconds)) : trans.__('Trying…'));
      }
    } else if (engine === null || engine.state === 'ready') {
      level = 'good';
      text = trans.__('Ready');
      reason = store.failure ? trans.__('Back again after: %1', firstSentence(store.failure.message)) : '';
      const task = [...store.tasks.values()].at(-1);
      if (task) {
        fraction = task.fraction;
        reason = [reason, `${task.name}: ${task.detail}`].filter(Boolean).join(' · ');
      }
    } else if (engine.state === 'loading' || engine.state === 'starting') {
      level = 'busy';
      fraction = engine.fraction;
      const stage = engine.stage || engine.message;
      text = fraction === null ? trans.__('Loading') : trans.__('Loading %1 %', Math.round(fraction * 100));
      reason = stage ? trans.__('Engine: %1', stage) : '';
      if (engine.stage && engine.message) {
        reason += ` · ${engine.message}`;
      }
      if (store.failure) {
        reason = `${firstSentence(store.failure.message)} ${trans.__('It is being started again.')} ${reason}`;
      }
    } else if (engine.state === 'restarting') {
      level = 'bad';
      text = trans.__('Restarting');
      fraction = engine.fraction;
      reason = engine.message || trans.__('The engine ended and is being started again.');
    } else if (engine.state === 'failed') {
      level = 'bad';
      text = trans.__('Engine failed');
      reason = engine.message || trans.__('The engine ended without a message.');
    } else if (engine.state === 'asleep') {
      level = 'off';
      text = trans.__('Asleep');
      reason = engine.message;
    } else {
      level = 'off';
      text = trans.__('Engine stopped');
      reason = engine.message || trans.__('The device’s memory is free. Start the engine to generate.');
    }
    if (this.refusal) {
      reason = reason ? `${reason} · ${this.refusal}` : this.refusal;
    }
    this.element.dataset.level = level;
    this.element.dataset.connection = status.state;
    this.element.dataset.engine = engine?.state ?? '';
    setText(this.sign, SIGNS[level]);
    setText(this.label, text);
    setText(this.model, this.describeModel());
    const loading = fraction !== undefined;
    this.progress.hidden = !loading;
    if (loading) {
      if (fraction === null || fraction === undefined) {
        this.progress.removeAttribute('value');
      } else {
        this.progress.value = fraction;
      }
    }
    this.message.hidden = reason === '';
    setText(this.messageText, reason);
    this.retry.hidden = status.state !== 'waiting' && status.state !== 'failed';
    const lag = this.stats().latencyP50Ms;
    setText(this.lag, lag === null ? '–' : `${significant(lag)} ms`);
    const state = engine?.state;
    const down = state === 'stopped' || state === 'failed';
    this.buttons.start.hidden = !down;
    this.buttons.restart.hidden = down;
    this.buttons.stop.hidden = down;
    this.buttons.sleep.hidden = down || state === 'asleep';
    this.buttons.wake.hidden = state !== 'asleep';
    for (const each of Object.values(this.buttons)) {
      each.disabled = !connected;
    }
  }

  dispose(): void {
    clearInterval(this.countdown);
  }

  private unconnected(state: ConnectionState): [Level, string] {
    const { trans } = this.context;
    switch (state) {
      case 'failed':
        return ['bad', trans.__('Not connected')];
      case 'ended':
        return ['off', trans.__('Ended')];
      case 'closed':
        return ['off', trans.__('Closed')];
      case 'waiting':
        return ['busy', trans.__('Reconnecting')];
      default:
        return ['busy', trans.__('Connecting')];
    }
  }

  private describeModel(): string {
    const { model } = this.context.store;
    if (model === null) {
      return '';
    }
    const parts = [
      model.name,
      this.context.trans.__('%1 parameters', magnitude(model.num_parameters)),
      model.quantized_source ? `${model.dtype} (from ${model.quantized_source})` : model.dtype,
      model.device_name || model.device
    ];
    return parts.filter(Boolean).join(' · ');
  }

  private act(action: EngineAction): void {
    this.refusal = '';
    this.context.connection.engine(action).catch((error: unknown) => {
      this.refusal = error instanceof Error ? error.message : String(error);
      this.update();
    });
  }
}
