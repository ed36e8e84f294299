/** The record button: start, time and size while it runs, stop, and what to do with the file. */

import type { RecordingEvent } from '../telemetry/protocol';
import { h, setText } from './dom';
import { bytes, count, percent } from './format';
import type { View, ViewContext } from './view';

/** What a page can do with a finished recording; a host that can do nothing leaves it out. */
export interface RecordingHost {
  /** Show a finished recording. */
  open(event: RecordingEvent): Promise<void>;
  /** What that is called on a button. */
  readonly openLabel: string;
}

export class Recorder implements View {
  readonly element: HTMLElement;
  private readonly button: HTMLButtonElement;
  private readonly sign = h('span', { class: 'iw-record-sign', attrs: { 'aria-hidden': 'true' } });
  private readonly label = h('span');
  private readonly state = h('span', { class: 'iw-record-state', attrs: { role: 'status' } });
  private readonly open: HTMLButtonElement;
  private readonly ticking: ReturnType<typeof setInterval>;
  private pending = false;
  private refusal = '';

  constructor(
    private readonly context: ViewContext,
    private readonly host: () => RecordingHost | null
  ) {
    const { trans } = context;
    this.button = h(
      'button',
      {
        class: 'iw-button iw-button-quiet iw-record',
        attrs: { type: 'button', 'data-action': 'record' },
        on: { click: () => this.toggle() }
      },
      this.sign,
      this.label
    );
    this.open = h('button', {
      class: 'iw-button iw-button-quiet',
      title: trans.__('Replay the recording that was made last'),
      attrs: { type: 'button', 'data-action': 'open-recording', hidden: true },
      on: { click: () => this.openNewest() }
    });
    this.element = h('span', { class: 'iw-recorder' }, this.state, this.open, this.button);
    // The elapsed time goes on between two of the server's events.
    this.ticking = setInterval(() => {
      if (this.active() !== null) {
        this.update();
      }
    }, 500);
  }

  update(): void {
    const { connection, store, trans } = this.context;
    const active = this.active();
    const finishing = [...store.recordings.values()].find(each => each.state === 'finishing');
    const newest = [...store.recordings.values()].at(-1);
    this.element.dataset.state = active ? 'recording' : (newest?.state ?? '');
    this.button.disabled = connection.status.state !== 'connected' || this.pending;
    this.button.setAttribute('aria-pressed', String(active !== null));
    setText(this.sign, active ? '■' : '●');
    setText(this.label, active ? trans.__('Stop recording') : trans.__('Record'));
    this.button.title = active
      ? trans.__('End the recording “%1” and turn it into a file', active.name)
      : trans.__('Record everything that happens on the server into one file');
    const host = this.host();
    setText(this.open, host?.openLabel ?? '');
    this.open.hidden = host === null || active !== null || newest?.state !== 'finished';
    let text = this.refusal;
    if (active) {
      text = trans.__('%1 · %2 · %3 tokens', clock(this.elapsedS(active)), bytes(active.bytes), count(active.tokens));
    } else if (finishing) {
      text = trans.__('making the file%1', finishing.fraction === null ? '…' : ` ${percent(finishing.fraction)}`);
    } else if (!text && newest?.state === 'finished') {
      text = trans.__('%1 · %2', newest.file ?? newest.name, bytes(newest.bytes));
    } else if (!text && newest?.state === 'failed') {
      text = newest.message;
    }
    setText(this.state, text);
    this.state.title = [text, newest?.message ?? ''].filter(Boolean).join(' · ');
    this.state.classList.toggle('iw-refusal', this.refusal !== '' || newest?.state === 'failed');
  }

  dispose(): void {
    clearInterval(this.ticking);
  }

  private active(): RecordingEvent | null {
    return [...this.context.store.recordings.values()].findLast(each => each.state === 'recording') ?? null;
  }

  /** By the server's clock where it is known, else as of its last word. */
  private elapsedS(event: RecordingEvent): number {
    const now = this.context.connection.clock.serverTime(performance.now());
    return now === null ? event.seconds : Math.max(event.seconds, (now - event.started_ns) / 1e9);
  }

  private toggle(): void {
    this.refusal = '';
    this.pending = true;
    this.update();
    this.context.connection
      .record(this.active() ? { action: 'stop' } : { action: 'start' })
      .catch((error: unknown) => {
        this.refusal = error instanceof Error ? error.message : String(error);
      })
      .finally(() => {
        this.pending = false;
        this.update();
      });
  }

  private openNewest(): void {
    const newest = [...this.context.store.recordings.values()].findLast(each => each.state === 'finished');
    const host = this.host();
    if (newest && host) {
      this.refusal = '';
      host.open(newest).catch((error: unknown) => {
        this.refusal = error instanceof Error ? error.message : String(error);
        this.update();
      });
    }
  }
}

/** "1:02:03", "2:03". */
export function clock(seconds: number): string {
  const whole = Math.floor(seconds);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const tail = `${String(rest).padStart(2, '0')}`;
  return hours > 0 ? `${hours}:${String(minutes).padStart(2, '0')}:${tail}` : `${minutes}:${tail}`;
}
