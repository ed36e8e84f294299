/** Where a person says what to generate: presets, the prompt, a few parameters, Generate and Stop. */

import type { GenerateBody } from '../telemetry/protocol';
import { h, setText, uniqueId } from './dom';
import { reproducingCell } from './reproduce';
import type { Translation } from './translation';
import type { View, ViewContext } from './view';

interface Preset {
  name: string;
  title: string;
  prompt: string;
  maxTokens: number;
  temperature: number;
  parallel: number;
  /** Go on to the token limit even if the model would stop. */
  toLimit: boolean;
  /** Continue the text as it is, without a chat template. */
  plain: boolean;
}

function presets(trans: Translation): Preset[] {
  return [
    {
      name: 'chat',
      title: trans.__('Chat'),
      prompt: 'Why is the sky blue? Explain it to a curious ten-year-old.',
      maxTokens: 160,
      temperature: 0.7,
      parallel: 1,
      toLimit: false,
      plain: false
    },
    {
      name: 'story',
      title: trans.__('Story'),
      prompt: 'Write a short story about a lighthouse keeper who finds a message in a bottle.',
      maxTokens: 256,
      temperature: 0.9,
      parallel: 1,
      toLimit: false,
      plain: false
    },
    {
      name: 'code',
      title: trans.__('Code'),
      prompt: 'def fibonacci(n: int) -> int:\n    """Return the n-th Fibonacci number."""\n',
      maxTokens: 128,
      temperature: 0,
      parallel: 1,
      toLimit: true,
      plain: true
    },
    {
      name: 'long',
      title: trans.__('Long answer'),
      prompt: 'Tell the history of computing from the abacus to today, in as much detail as you can.',
      maxTokens: 512,
      temperature: 0.7,
      parallel: 1,
      toLimit: true,
      plain: false
    },
    {
      name: 'crowd',
      title: trans.__('Eight at once'),
      prompt: 'Describe a day in the life of a city, from sunrise to midnight.',
      maxTokens: 200,
      temperature: 0.9,
      parallel: 8,
      toLimit: true,
      plain: false
    }
  ];
}

/** Puts code into a notebook's new cell; resolves to whether there was a notebook. */
export type CellHost = (code: string) => Promise<boolean>;

export class PromptBox implements View {
  readonly element: HTMLElement;
  private readonly prompt: HTMLTextAreaElement;
  private readonly maxTokens: HTMLInputElement;
  private readonly temperature: HTMLInputElement;
  private readonly parallel: HTMLInputElement;
  private readonly toLimit: HTMLInputElement;
  private readonly plain: HTMLInputElement;
  private readonly start: HTMLButtonElement;
  private readonly stop: HTMLButtonElement;
  private readonly refusal = h('p', { class: 'iw-refusal', attrs: { role: 'alert', hidden: true } });
  private readonly chips: HTMLButtonElement[];
  private readonly done = h('p', { class: 'iw-hint', attrs: { role: 'status', hidden: true } });
  private running = 0;

  constructor(
    private readonly context: ViewContext,
    /** Where the page can put a cell; null where it cannot. */
    private readonly cells: () => CellHost | null,
    /** The server's instance, where `connect()` would find another one. */
    private readonly instance: string | null
  ) {
    const { trans } = context;
    const all = presets(trans);
    const promptId = uniqueId('prompt');
    this.prompt = h('textarea', {
      class: 'iw-prompt-text',
      attrs: { id: promptId, rows: 2, spellcheck: 'false' },
      on: {
        keydown: event => {
          if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
            event.preventDefault();
            event.stopPropagation();
            this.generate();
          }
        }
      }
    });
    this.maxTokens = number(1, 8192, 1);
    this.temperature = number(0, 2, 0.1);
    this.parallel = number(1, 32, 1);
    this.toLimit = h('input', { attrs: { type: 'checkbox' } });
    this.plain = h('input', { attrs: { type: 'checkbox' } });
    this.chips = all.map(preset =>
      h('button', {
        class: 'iw-preset',
        text: preset.title,
        attrs: { type: 'button', 'aria-pressed': 'false', 'data-preset': preset.name },
        on: { click: () => this.choose(preset) }
      })
    );
    this.start = h('button', {
      class: 'iw-button iw-button-main',
      text: trans.__('Generate'),
      title: trans.__('Ctrl+Enter in the prompt'),
      attrs: { type: 'button', 'data-action': 'generate' },
      on: { click: () => this.generate() }
    });
    this.stop = h('button', {
      class: 'iw-button',
      text: trans.__('Stop'),
      attrs: { type: 'button', 'data-action': 'stop' },
      on: { click: () => context.connection.stopGenerating() }
    });
    this.element = h(
      'section',
      { class: 'iw-card iw-prompt', attrs: { 'aria-label': trans.__('Prompt') } },
      h('div', { class: 'iw-presets', attrs: { role: 'group', 'aria-label': trans.__('Presets') } }, ...this.chips),
      h('label', { class: 'iw-hidden', text: trans.__('Prompt'), attrs: { for: promptId } }),
      this.prompt,
      h(
        'div',
        { class: 'iw-prompt-controls' },
        field(trans.__('Tokens'), this.maxTokens, trans.__('At most so many output tokens per request')),
        field(trans.__('Temperature'), this.temperature, trans.__('0 always takes the likeliest token')),
        field(trans.__('Parallel'), this.parallel, trans.__('So many requests with this prompt at once')),
        tick(trans.__('to the limit'), this.toLimit, trans.__('Go on even where the model would stop')),
        tick(trans.__('plain text'), this.plain, trans.__('Continue the text as it is, without a chat template')),
        h(
          'span',
          { class: 'iw-prompt-buttons' },
          h('button', {
            class: 'iw-button iw-button-quiet',
            text: trans.__('As notebook cell'),
            title: trans.__('Insert a cell that sets these switches and asks this again, or copy it'),
            attrs: { type: 'button', 'data-action': 'reproduce' },
            on: { click: () => void this.reproduce() }
          }),
          this.stop,
          this.start
        )
      ),
      this.done,
      this.refusal
    );
    this.choose(all[0]);
  }

  update(): void {
    const { connection, store } = this.context;
    const ready = connection.status.state === 'connected' && (store.engine?.state ?? 'ready') === 'ready';
    this.start.disabled = !ready;
    this.stop.disabled = this.running === 0 && store.activeRequests.length === 0;
  }

  /** Ask the same as another one. */
  resemble(other: PromptBox): void {
    for (const name of ['prompt', 'maxTokens', 'temperature', 'parallel'] as const) {
      this[name].value = other[name].value;
    }
    for (const name of ['toLimit', 'plain'] as const) {
      this[name].checked = other[name].checked;
    }
    this.chips.forEach((chip, at) =>
      chip.setAttribute('aria-pressed', other.chips[at].getAttribute('aria-pressed') ?? 'false')
    );
  }

  /** What Generate asks for. */
  body(): GenerateBody {
    const body: GenerateBody = {
      max_tokens: this.maxTokens.valueAsNumber,
      temperature: this.temperature.valueAsNumber,
      n: this.parallel.valueAsNumber
    };
    if (this.toLimit.checked) {
      body.ignore_eos = true;
    }
    if (this.plain.checked) {
      body.prompt = this.prompt.value;
    } else {
      body.messages = [{ role: 'user', content: this.prompt.value }];
    }
    return body;
  }

  private async reproduce(): Promise<void> {
    const { trans, store } = this.context;
    const code = reproducingCell(store, this.prompt.value.trim() === '' ? null : this.body(), this.instance);
    try {
      const host = this.cells();
      if (host !== null && (await host(code))) {
        this.tell(trans.__('The cell is in the notebook, below the active one.'));
      } else {
        await navigator.clipboard.writeText(code);
        this.tell(trans.__('Copied: paste it into a notebook’s cell.'));
      }
    } catch (error) {
      this.say(
        trans.__('The cell could not be inserted or copied: %1', error instanceof Error ? error.message : String(error))
      );
    }
  }

  private tell(text: string): void {
    setText(this.done, text);
    this.done.hidden = false;
    setTimeout(() => (this.done.hidden = true), 6000);
  }

  private choose(preset: Preset): void {
    this.prompt.value = preset.prompt;
    this.maxTokens.value = String(preset.maxTokens);
    this.temperature.value = String(preset.temperature);
    this.parallel.value = String(preset.parallel);
    this.toLimit.checked = preset.toLimit;
    this.plain.checked = preset.plain;
    for (const chip of this.chips) {
      chip.setAttribute('aria-pressed', String(chip.dataset.preset === preset.name));
    }
  }

  private generate(): void {
    const { trans, connection } = this.context;
    const problem = [this.maxTokens, this.temperature, this.parallel].find(input => !input.checkValidity());
    if (problem) {
      problem.reportValidity();
      return;
    }
    if (this.prompt.value.trim() === '') {
      this.say(trans.__('Write a prompt first, or choose one above.'));
      this.prompt.focus();
      return;
    }
    const body = this.body();
    this.say('');
    this.running += 1;
    this.update();
    connection
      .generate(body)
      .catch((error: unknown) => this.say(error instanceof Error ? error.message : String(error)))
      .finally(() => {
        this.running -= 1;
        this.update();
      });
  }

  private say(text: string): void {
    this.refusal.textContent = text;
    this.refusal.hidden = text === '';
  }
}

function number(min: number, max: number, step: number): HTMLInputElement {
  return h('input', { class: 'iw-number', attrs: { type: 'number', min, max, step, required: true } });
}

function field(text: string, input: HTMLInputElement, title: string): HTMLElement {
  return h('label', { class: 'iw-field', title }, h('span', { text }), input);
}

function tick(text: string, input: HTMLInputElement, title: string): HTMLElement {
  return h('label', { class: 'iw-tick', title }, input, h('span', { text }));
}
