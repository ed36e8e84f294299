/** Throughput and money: what was made in the window, and what a million tokens of it cost at the user's price per hour. */

import type { Prices, Production } from '../telemetry/cost';
import { prices, production } from '../telemetry/cost';
import type { LegendEntry, Table } from './card';
import { Card } from './card';
import { PHASE, PHASE_ON_DARK } from './colours';
import { h, setText } from './dom';
import { count, duration, percent, significant } from './format';
import { keep, kept } from './kept';
import type { ViewContext } from './view';

/** The price that was typed last. */
const KEPT = 'dollars-per-hour';

type Share = 'decode' | 'prefill' | 'recompute' | 'idle';
const SHARES: readonly Share[] = ['prefill', 'decode', 'recompute', 'idle'];

export class Economy extends Card {
  protected override readonly intervalMs = 500;
  private readonly price: HTMLInputElement;
  private readonly bar = h('div', { class: 'iw-share-bar', attrs: { role: 'img' } });
  private readonly segments: Record<Share, HTMLElement>;
  private readonly figures = h('dl', { class: 'iw-figures' });
  private readonly values = new Map<string, HTMLElement>();
  private made: Production | null = null;

  constructor(context: ViewContext) {
    const { trans } = context;
    const price = h('input', {
      class: 'iw-number iw-price',
      attrs: { type: 'number', min: 0, step: 'any', placeholder: '–', value: kept(KEPT), 'data-figure': 'price' },
      on: {
        input: () => {
          keep(KEPT, price.value);
          this.repaint();
        }
      }
    });
    super(context, {
      name: 'economy',
      title: trans.__('Throughput and cost'),
      definition: trans.__(
        'Money per token = your price per hour × time ÷ tokens. Time of steps is measured; a step that decodes and prefills at once costs decoding what a step that only decodes as many positions takes (median), and the prompts the rest. Output counts decoding time, input the computed prompt positions’ time; “all tokens” counts every second of the window, idle ones too. Prompt positions from the prefix cache took no computing.'
      ),
      keys: '',
      readable: true,
      controls: [
        h(
          'label',
          { class: 'iw-field', title: trans.__('What one hour of this machine costs you, in dollars') },
          h('span', { text: trans.__('$/hour') }),
          price
        )
      ]
    });
    this.price = price;
    this.segments = Object.fromEntries(
      SHARES.map(share => [share, h('span', { class: 'iw-why-segment iw-part' })])
    ) as Record<Share, HTMLElement>;
    this.bar.append(...SHARES.map(share => this.segments[share]));
    this.frame.append(this.figures, this.bar);
    const figure = (name: string, label: string) => {
      const value = h('dd', { text: '–', attrs: { 'data-figure': name } });
      this.values.set(name, value);
      this.figures.append(h('div', {}, h('dt', { text: label }), value));
    };
    figure('output-rate', trans.__('output tokens/s'));
    figure('total-rate', trans.__('all tokens/s'));
    figure('request-rate', trans.__('requests/s'));
    figure('cost-output', trans.__('$ per million output'));
    figure('cost-input', trans.__('$ per million input'));
    figure('cost-cached', trans.__('… with what the cache supplied'));
    figure('cost-all', trans.__('$ per million, all tokens'));
    figure('cost-ratio', trans.__('output ÷ input price'));
  }

  protected draw(): string {
    const { store, trans, windowNs } = this.context;
    this.made = production(store, windowNs);
    const { made } = this;
    const price = this.perHour();
    const costs = made && price !== null ? prices(made, price) : null;
    const perS = (number: number) => (made ? significant(number / (made.spanNs / 1e9)) : '–');
    this.show('output-rate', made ? perS(made.outputTokens) : '–');
    this.show('total-rate', made ? perS(made.outputTokens + made.inputTokens + made.cachedTokens) : '–');
    this.show('request-rate', made ? perS(made.finishedRequests) : '–');
    this.show('cost-output', dollars(costs?.perMillionOutput));
    this.show('cost-input', dollars(costs?.perMillionInput));
    this.show('cost-cached', dollars(costs?.perMillionInputWithCache));
    this.show('cost-all', dollars(costs?.perMillionTokens));
    this.show('cost-ratio', ratio(made));
    this.drawShares();
    if (!made) {
      return trans.__('No step yet.');
    }
    const total = made.inputTokens + made.cachedTokens;
    return [
      trans.__(
        '%1: %2 output tokens, %3 prompt positions computed',
        duration(made.spanNs),
        count(made.outputTokens),
        count(made.inputTokens)
      ),
      made.cachedTokens > 0
        ? trans.__('%1 of the prompts came from the cache', percent(made.cachedTokens / Math.max(1, total)))
        : '',
      price === null ? trans.__('Type what an hour of this machine costs you to see prices.') : ''
    ]
      .filter(Boolean)
      .join(' · ');
  }

  protected legend(): LegendEntry[] {
    return SHARES.map(share => this.entry(share));
  }

  protected table(): Table {
    const { trans } = this.context;
    const { made } = this;
    if (!made) {
      return { columns: [], rows: [] };
    }
    const price = this.perHour();
    const costs: Prices | null = price === null ? null : prices(made, price);
    const row = (what: string, ns: number, tokens: number | null, cost: number | null | undefined) => [
      what,
      duration(ns),
      percent(ns / made.spanNs),
      tokens === null ? '–' : count(tokens),
      dollars(cost)
    ];
    return {
      columns: [
        trans.__('what for'),
        trans.__('time'),
        trans.__('of the window'),
        trans.__('tokens'),
        trans.__('$ per million')
      ],
      rows: [
        row(trans.__('output (decode)'), made.decodeNs, made.outputTokens, costs?.perMillionOutput),
        row(trans.__('input (prefill)'), made.prefillNs, made.inputTokens, costs?.perMillionInput),
        row(trans.__('cached input'), 0, made.cachedTokens, costs && made.cachedTokens > 0 ? 0 : null),
        row(trans.__('recompute'), made.recomputeNs, null, null),
        row(trans.__('idle'), made.idleNs, null, null),
        row(
          trans.__('all'),
          made.spanNs,
          made.outputTokens + made.inputTokens + made.cachedTokens,
          costs?.perMillionTokens
        )
      ]
    };
  }

  protected describe(): null {
    return null;
  }

  protected onArrow(): boolean {
    return false;
  }

  private perHour(): number | null {
    const value = this.price.valueAsNumber;
    return Number.isFinite(value) && value >= 0 ? value : null;
  }

  private show(name: string, text: string): void {
    setText(this.values.get(name)!, text);
  }

  private entry(share: Share): LegendEntry {
    const { theme, trans } = this.context;
    const phase = theme.dark ? PHASE_ON_DARK : PHASE;
    const entries: Record<Share, LegendEntry> = {
      prefill: { colour: phase.prefill, text: trans.__('input (prefill)') },
      decode: { colour: phase.decode, text: trans.__('output (decode)') },
      recompute: { colour: phase.recompute, text: trans.__('recompute'), hatch: 'diagonal', line: theme.ground },
      idle: { colour: phase.queued, text: trans.__('idle') }
    };
    return entries[share];
  }

  private drawShares(): void {
    const { made } = this;
    const times: Record<Share, number> = {
      prefill: made?.prefillNs ?? 0,
      decode: made?.decodeNs ?? 0,
      recompute: made?.recomputeNs ?? 0,
      idle: made?.idleNs ?? 0
    };
    const total = Math.max(
      1,
      SHARES.reduce((sum, share) => sum + times[share], 0)
    );
    const words: string[] = [];
    for (const share of SHARES) {
      const entry = this.entry(share);
      const segment = this.segments[share];
      segment.style.flexGrow = String(times[share] / total);
      segment.hidden = times[share] === 0;
      segment.style.setProperty('--iw-part-fill', entry.colour);
      segment.style.setProperty('--iw-part-line', entry.line ?? 'transparent');
      segment.classList.toggle('iw-part-diagonal', entry.hatch === 'diagonal');
      segment.title = `${entry.text} ${percent(times[share] / total)}`;
      if (times[share] > 0) {
        words.push(segment.title);
      }
    }
    this.bar.setAttribute('aria-label', words.join(', '));
  }
}

function dollars(value: number | null | undefined): string {
  if (value === null || value === undefined) {
    return '–';
  }
  return value === 0 ? '0' : value < 0.01 ? value.toPrecision(2) : significant(value);
}

/** How many times dearer a token of output is than one of input, whatever the hour costs. */
function ratio(made: Production | null): string {
  if (!made) {
    return '–';
  }
  const { perMillionInput, perMillionOutput } = prices(made, 1);
  return perMillionInput && perMillionOutput ? significant(perMillionOutput / perMillionInput) : '–';
}
