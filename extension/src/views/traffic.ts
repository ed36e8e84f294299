/** The server's own load: which workload arrives, how, how long its texts are; start, change while it runs, stop. */

import type { TrafficEvent, TrafficValues } from '../telemetry/protocol';
import { h, setText, uniqueId } from './dom';
import { count } from './format';
import type { Translation } from './translation';
import type { View, ViewContext } from './view';

/** Whoever gets an answer asks again, or requests arrive by themselves. */
type Arrivals = 'closed' | 'poisson';

/** Names of `PRESETS` in `inference_server/workloads/workload.py`, and what each starts with. */
export const TRAFFIC_PRESETS = {
  chat: { arrivals: 'closed', concurrency: 4, rate: 1, output: 128, shared: 0 },
  summarize: { arrivals: 'closed', concurrency: 4, rate: 1, output: 64, shared: 0 },
  code: { arrivals: 'closed', concurrency: 4, rate: 1, output: 192, shared: 0 },
  'long context': { arrivals: 'closed', concurrency: 2, rate: 0.5, output: 128, shared: 0 },
  'shared prefix': { arrivals: 'closed', concurrency: 4, rate: 1, output: 128, shared: 400 },
  bursty: { arrivals: 'poisson', concurrency: 4, rate: 1.5, output: 128, shared: 0 }
} as const satisfies Record<
  string,
  { arrivals: Arrivals; concurrency: number; rate: number; output: number; shared: number }
>;

type PresetName = keyof typeof TRAFFIC_PRESETS;

/** Slider positions of the rate: even steps of its logarithm. */
const RATES = [0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50];
const COUNTS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256];
const OUTPUTS = [16, 32, 64, 128, 192, 256, 512, 1024];
const SHARED = [0, 100, 200, 400, 600, 800, 1000];
const BURSTS = 0.3;

export class Traffic implements View {
  readonly element: HTMLElement;
  private readonly preset: HTMLSelectElement;
  private readonly arrivals: HTMLSelectElement;
  private readonly concurrency: Slider;
  private readonly rate: Slider;
  private readonly output: Slider;
  private readonly shared: Slider;
  private readonly start: HTMLButtonElement;
  private readonly stop: HTMLButtonElement;
  private readonly state = h('p', { class: 'iw-traffic-state', attrs: { role: 'status' } });
  private readonly refusal = h('p', { class: 'iw-refusal', attrs: { role: 'alert', hidden: true } });
  private pending = false;

  constructor(private readonly context: ViewContext) {
    const { trans } = context;
    const changed = () => this.change();
    this.preset = select(presetNames(trans), () => this.choose());
    this.preset.dataset.traffic = 'preset';
    this.arrivals = select({ closed: trans.__('one after another'), poisson: trans.__('by themselves') }, () => {
      this.showArrivals();
      this.change();
    });
    this.arrivals.dataset.traffic = 'arrivals';
    this.concurrency = new Slider('concurrency', trans.__('requests at once'), COUNTS, changed);
    this.rate = new Slider('rate', trans.__('requests per second'), RATES, changed);
    this.output = new Slider('output', trans.__('output tokens, at most'), OUTPUTS, changed);
    this.shared = new Slider('shared', trans.__('shared prefix, tokens'), SHARED, changed);
    this.start = h('button', {
      class: 'iw-button iw-button-primary',
      text: trans.__('Start traffic'),
      attrs: { type: 'button', 'data-action': 'start-traffic' },
      on: { click: () => this.send('start', this.values(true)) }
    });
    this.stop = h('button', {
      class: 'iw-button',
      text: trans.__('Stop traffic'),
      title: trans.__('Requests under way are cancelled'),
      attrs: { type: 'button', 'data-action': 'stop-traffic', hidden: true },
      on: { click: () => this.send('stop', {}) }
    });
    const body = h(
      'div',
      { class: 'iw-traffic-body' },
      field(trans.__('workload'), this.preset),
      field(trans.__('requests arrive'), this.arrivals),
      this.concurrency.element,
      this.rate.element,
      this.output.element,
      this.shared.element,
      h('span', { class: 'iw-prompt-buttons' }, this.start, this.stop)
    );
    this.element = h(
      'details',
      { class: 'iw-card iw-traffic', attrs: { 'aria-label': trans.__('Traffic') } },
      h(
        'summary',
        {
          title: trans.__('The server sends requests to itself, so that there is load to watch')
        },
        h('h3', { text: trans.__('Traffic') }),
        this.state
      ),
      body,
      this.refusal
    );
    this.choose();
  }

  update(): void {
    const { store, connection, trans } = this.context;
    const { traffic } = store;
    const running = traffic?.state === 'running';
    const connected = connection.status.state === 'connected';
    this.start.disabled = !connected || this.pending;
    this.stop.disabled = !connected || this.pending;
    this.stop.hidden = !running;
    setText(this.start, running ? trans.__('Restart traffic') : trans.__('Start traffic'));
    this.element.dataset.state = traffic?.state ?? '';
    setText(this.state, traffic ? describe(traffic, trans) : trans.__('the server can send requests to itself'));
  }

  private choose(): void {
    const preset = TRAFFIC_PRESETS[this.preset.value as PresetName];
    this.arrivals.value = preset.arrivals;
    this.concurrency.set(preset.concurrency);
    this.rate.set(preset.rate);
    this.output.set(preset.output);
    this.shared.set(preset.shared);
    this.showArrivals();
  }

  private showArrivals(): void {
    this.concurrency.element.hidden = this.arrivals.value !== 'closed';
    this.rate.element.hidden = this.arrivals.value !== 'poisson';
  }

  private values(whole: boolean): TrafficValues {
    const bursty = this.preset.value === 'bursty';
    const most = this.output.value;
    return {
      ...(whole && { preset: this.preset.value }),
      arrivals:
        this.arrivals.value === 'closed'
          ? { kind: 'closed', concurrency: this.concurrency.value }
          : { kind: 'poisson', rate: this.rate.value, burstiness: bursty ? BURSTS : 1 },
      output_tokens: { low: Math.max(1, Math.floor(most / 8)), high: most },
      shared_prefix_tokens: this.shared.value
    };
  }

  /** A control was moved: what runs goes on with the new value, from its next request on. */
  private change(): void {
    if (this.context.store.traffic?.state === 'running') {
      this.send('change', this.values(false));
    }
  }

  private send(action: 'start' | 'change' | 'stop', values: TrafficValues): void {
    this.pending = true;
    this.refusal.hidden = true;
    this.update();
    this.context.connection
      .traffic({ action, values })
      .catch((error: unknown) => {
        this.refusal.hidden = false;
        setText(this.refusal, error instanceof Error ? error.message : String(error));
      })
      .finally(() => {
        this.pending = false;
        this.update();
      });
  }
}

/** A range input over a list of values, with its value beside it. */
class Slider {
  readonly element: HTMLElement;
  private readonly input: HTMLInputElement;
  private readonly shown = h('output');

  constructor(
    name: string,
    label: string,
    private readonly steps: readonly number[],
    changed: () => void
  ) {
    const id = uniqueId('traffic');
    this.input = h('input', {
      attrs: { id, type: 'range', min: 0, max: steps.length - 1, step: 1, 'data-traffic': name },
      on: { input: () => this.show(), change: changed }
    });
    this.element = h(
      'span',
      { class: 'iw-field iw-slider' },
      h('label', { text: label, attrs: { for: id } }),
      this.input,
      this.shown
    );
    this.show();
  }

  get value(): number {
    return this.steps[Number(this.input.value)];
  }

  set(value: number): void {
    const nearest = this.steps.reduce((best, each) => (Math.abs(each - value) < Math.abs(best - value) ? each : best));
    this.input.value = String(this.steps.indexOf(nearest));
    this.show();
  }

  private show(): void {
    this.shown.textContent = String(this.value);
    this.input.setAttribute('aria-valuetext', String(this.value));
  }
}

function presetNames(trans: Translation): Record<PresetName, string> {
  return {
    chat: trans.__('Chat'),
    summarize: trans.__('Summarize: long prompts, short answers'),
    code: trans.__('Code'),
    'long context': trans.__('Long context'),
    'shared prefix': trans.__('Shared prefix'),
    bursty: trans.__('Bursty questions')
  };
}

function select(options: Record<string, string>, changed: () => void): HTMLSelectElement {
  return h(
    'select',
    { attrs: { id: uniqueId('traffic') }, on: { change: changed } },
    ...Object.entries(options).map(([value, text]) => h('option', { text, attrs: { value } }))
  );
}

function field(label: string, control: HTMLElement): HTMLElement {
  return h('span', { class: 'iw-field' }, h('label', { text: label, attrs: { for: control.id } }), control);
}

function describe(event: TrafficEvent, trans: Translation): string {
  const parts = [
    event.state === 'running'
      ? trans.__('%1: %2 under way', event.workload.name, event.in_flight)
      : trans.__('%1: stopped', event.workload.name),
    trans.__('%1 finished', count(event.finished)),
    trans.__('%1 output tokens', count(event.output_tokens))
  ];
  if (event.failed > 0) {
    parts.push(trans.__('%1 failed', count(event.failed)));
  }
  if (event.dropped > 0) {
    parts.push(trans.__('%1 left out: too many at once', count(event.dropped)));
  }
  if (event.message) {
    parts.push(event.message);
  }
  return parts.join(' · ');
}
