/**
 * Speculation: tokens a request says per verifying step and what was rejected, step by step; how often each place of a
 * proposal is accepted; what it gains, measured against plain steps.
 */

import type { Gain, Proposals, Proposer, Speculation } from '../telemetry/speculation';
import { acceptanceLength, proposalsOf, speculation } from '../telemetry/speculation';
import { timeOf } from '../telemetry/cost';
import type { StepRecord } from '../telemetry/store';
import { measuredBadge } from './badge';
import type { Bokeh, ColumnDataSource, Figure } from './bokeh';
import type { LegendEntry, Table } from './card';
import { PHASE, PHASE_ON_DARK } from './colours';
import { h, setText } from './dom';
import { count, duration, percent, significant } from './format';
import { StepPlot } from './step-plot';
import type { ViewContext } from './view';
import { nothingProposed } from './words';

const TABLE_ROWS = 100;

type Layer = 'own' | 'accepted' | 'rejected';
/** From the axis upwards. */
const LAYERS: readonly Layer[] = ['own', 'accepted', 'rejected'];

/** Neighbouring steps that are drawn as one bar. */
interface Column extends Proposals {
  left: number;
  right: number;
}

export class SpeculationPlot extends StepPlot {
  protected override readonly intervalMs = 500;
  private known: Speculation | null = null;
  private readonly places = h('tbody');
  private readonly proposers = h('tbody');
  private readonly numbers: HTMLElement[];
  private readonly sources = new Map<Layer, ColumnDataSource>();
  private means: ColumnDataSource | null = null;
  private paintGlyphs: () => void = () => undefined;

  constructor(context: ViewContext) {
    const { trans } = context;
    super(
      context,
      'speculation',
      trans.__('Speculation'),
      trans.__(
        'Tokens that a request says in a step that verifies a proposal: the model’s own one, and those proposed before it that it agrees with (1 + accepted ÷ proposals, at most one more than was proposed). Above it what was rejected. Averaged over the requests of a step, and over neighbouring steps where there are more than fit. The line is the mean of the window for whoever proposed.'
      )
    );
    const acceptance = this.numbersTable('acceptance', trans.__('Acceptance by place in the proposal'), this.places, [
      [
        trans.__('place'),
        trans.__('The first, second … token of a proposal. A proposal is what one request was given in one step.')
      ],
      [
        trans.__('accepted ÷ proposals'),
        trans.__(
          'Of all verified proposals of the window, also shorter ones, how many had the token at this place accepted. Unconditional: from place to place it can only fall.'
        )
      ],
      [
        trans.__('if all before were'),
        trans.__(
          'Accepted, of those tokens at this place that were looked at because all before them were accepted. Conditional, as Leviathan’s α.'
        )
      ],
      [trans.__('proposed')],
      [trans.__('accepted')]
    ]);
    const gains = this.numbersTable('proposers', trans.__('What each proposer was worth'), this.proposers, [
      [trans.__('proposer')],
      [
        trans.__('tokens a verifying step'),
        trans.__(
          'Mean acceptance length: 1 + accepted tokens ÷ verified proposals, over the window. The 1 is the model’s own token, a bonus or a correction. At most the number proposed plus one.'
        )
      ],
      [
        trans.__('acceptance rate'),
        trans.__('Accepted ÷ proposed tokens, over the window. The model’s own token is in neither.')
      ],
      [
        trans.__('of the time, proposing'),
        trans.__('Time spent on proposing ÷ time of the steps in which something was proposed. Engine’s clock.')
      ],
      [
        trans.__('a token, speculating'),
        trans.__(
          'What a request waits for a token in steps that verified a proposal: step time (proposing included) × requests ÷ tokens sent. Of steps that do nothing but decode.'
        )
      ],
      [
        trans.__('a token, plain'),
        trans.__(
          'The same of steps of the window in which nothing was proposed, with as many requests each, weighted as these occur among the steps with proposals. Time that was spent on looking for a proposal in vain is taken away.'
        )
      ],
      [
        trans.__('plain ÷ speculating'),
        trans.__(
          'How many times quicker a request gets its tokens in the steps with proposals. Measured on both sides, never estimated; they are different steps, so what else changed between them, such as the length of the text, is in it too.'
        )
      ],
      [trans.__('measured in')]
    ]);
    this.numbers = [acceptance, gains];
    acceptance.classList.add('iw-acceptance');
    gains.classList.add('iw-gains');
    this.element.classList.add('iw-wide');
    this.frame.after(...this.numbers);
  }

  protected build(bokeh: Bokeh, shared: { tools: string; height: number }): Figure {
    const figure = this.stepFigure(bokeh, { ...shared, height: 170 }, this.context.trans.__('tokens'));
    const paints = LAYERS.map(layer => {
      const source = new bokeh.ColumnDataSource({ data: { left: [], right: [], bottom: [], top: [] } });
      this.sources.set(layer, source);
      const hatch =
        layer === 'rejected'
          ? { hatch_pattern: 'right_diagonal_line' as const, hatch_scale: 7, hatch_weight: 1, fill_alpha: 0.35 }
          : {};
      const { glyph } = figure.quad(
        { field: 'left' },
        { field: 'right' },
        { field: 'bottom' },
        { field: 'top' },
        { source, line_width: 0.5, ...hatch }
      );
      return () => {
        const colour = this.colour(layer);
        glyph.setv({ fill_color: colour, hatch_color: colour, line_color: this.context.theme.ground });
      };
    });
    this.means = new bokeh.ColumnDataSource({ data: { x0: [], x1: [], y: [], at: [], top: [], text: [], align: [] } });
    const line = figure.segment(
      { field: 'x0' },
      { field: 'y' },
      { field: 'x1' },
      { field: 'y' },
      { source: this.means, line_width: 2 }
    );
    const label = figure.text(
      { field: 'at' },
      { field: 'top' },
      { field: 'text' },
      { source: this.means, text_font_size: '11px', text_baseline: 'top', text_align: { field: 'align' } }
    );
    this.paintGlyphs = () => {
      const { theme } = this.context;
      paints.forEach(paint => paint());
      line.glyph.setv({ line_color: theme.ink });
      label.glyph.setv({ text_color: theme.ink, text_font: theme.font });
    };
    return figure;
  }

  protected recolour(): void {
    this.paintGlyphs();
  }

  protected override repaint(): void {
    // The numbers do not wait for the plot.
    this.known = speculation(this.context.store, this.context.windowNs);
    this.showNumbers();
    super.repaint();
  }

  protected fill(): string {
    const { trans } = this.context;
    const { known } = this;
    this.collect(() => 0);
    const columns = this.gather(known?.steps ?? []);
    const bottoms = columns.map(() => 0);
    for (const layer of LAYERS) {
      const data: Record<'left' | 'right' | 'bottom' | 'top', number[]> = { left: [], right: [], bottom: [], top: [] };
      columns.forEach(({ left, right, proposals, drafted, accepted }, at) => {
        const tokens = { own: proposals, accepted, rejected: drafted - accepted }[layer];
        if (tokens > 0) {
          data.left.push(left);
          data.right.push(right);
          data.bottom.push(bottoms[at]);
          bottoms[at] += tokens / proposals;
          data.top.push(bottoms[at]);
        }
      });
      this.sources.get(layer)!.data = data;
    }
    const highest = Math.max(2, ...bottoms);
    this.yRange!.end = highest * 1.3;
    const proposers = known?.proposers ?? [];
    // A label stands where there is room for it.
    const middle = (this.xRange!.start + this.xRange!.end) / 2;
    const late = (each: Proposer) => each.firstStep > middle;
    this.means!.data = {
      x0: proposers.map(each => each.firstStep - 0.5),
      x1: proposers.map(each => each.lastStep + 0.5),
      y: proposers.map(each => acceptanceLength(each)!),
      at: proposers.map(each => (late(each) ? each.lastStep + 0.5 : each.firstStep - 0.5)),
      align: proposers.map(each => (late(each) ? 'right' : 'left')),
      top: proposers.map((_, at) => highest * (1.27 - 0.12 * (at % 2))),
      text: proposers.map(each => `${proposerName(each)} ${significant(acceptanceLength(each)!)}`)
    };
    if (known === null) {
      return nothingProposed(this.context);
    }
    return [
      trans.__(
        '%1 of %2 proposed tokens accepted in %3 steps',
        count(known.accepted),
        count(known.drafted),
        count(known.steps.length)
      ),
      known.vainSteps > 0
        ? trans.__(
            'looking for something to propose in vain took %1 in %2 steps',
            duration(known.vainNs),
            count(known.vainSteps)
          )
        : ''
    ]
      .filter(Boolean)
      .join(' · ');
  }

  protected legend(): LegendEntry[] {
    const { theme, trans } = this.context;
    return [
      { colour: this.colour('own'), text: trans.__('the model’s own') },
      { colour: this.colour('accepted'), text: trans.__('accepted') },
      { colour: this.colour('rejected'), text: trans.__('rejected'), look: 'hatch' },
      { colour: theme.ink, text: trans.__('mean of the window'), look: 'line' }
    ];
  }

  protected table(): Table {
    const { trans } = this.context;
    return {
      columns: [
        trans.__('step'),
        trans.__('proposer'),
        trans.__('proposals'),
        trans.__('proposed'),
        trans.__('accepted'),
        trans.__('tokens a proposal'),
        trans.__('proposing'),
        trans.__('step time')
      ],
      rows: (this.known?.steps ?? [])
        .slice(-TABLE_ROWS)
        .reverse()
        .map(step => {
          const sums = proposalsOf(step)!;
          return [
            step.event.step,
            step.event.speculation!,
            sums.proposals,
            sums.drafted,
            sums.accepted,
            significant(acceptanceLength(sums)!),
            duration(step.event.draft_ns ?? 0),
            duration(timeOf(step))
          ];
        })
    };
  }

  protected override sentence(step: StepRecord): string {
    const { trans } = this.context;
    const sums = proposalsOf(step);
    if (sums === null) {
      return trans.__('step %1: nothing was proposed (%2)', step.event.step, duration(timeOf(step)));
    }
    const proposer = { ...sums, name: step.event.speculation! };
    return trans.__(
      'step %1: %2 proposed %3, accepted %4: %5 tokens a proposal; proposing took %6 of %7',
      step.event.step,
      proposerName(proposer),
      count(sums.drafted),
      count(sums.accepted),
      significant(acceptanceLength(sums)!),
      duration(step.event.draft_ns ?? 0),
      duration(timeOf(step))
    );
  }

  private colour(layer: Layer): string {
    const phase = this.context.theme.dark ? PHASE_ON_DARK : PHASE;
    return { own: phase.decode, accepted: phase.accepted, rejected: phase.rejected }[layer];
  }

  /** Bars: a step each, or several where there are more than columns. Means, because extremes would flatter. */
  private gather(steps: readonly StepRecord[]): Column[] {
    const half = this.columnHalf();
    const starts = this.shown.map(each => each.event.step);
    const result = new Map<number, Column>();
    let at = 0;
    for (const step of steps) {
      while (at + 1 < starts.length && starts[at + 1] <= step.event.step) {
        at += 1;
      }
      const sums = proposalsOf(step)!;
      const column = result.get(at);
      if (column) {
        column.proposals += sums.proposals;
        column.drafted += sums.drafted;
        column.accepted += sums.accepted;
      } else {
        result.set(at, { ...sums, left: starts[at] - half, right: starts[at] + half });
      }
    }
    return [...result.values()];
  }

  /** A table that is always there; a column may have a definition. */
  private numbersTable(
    name: string,
    label: string,
    body: HTMLElement,
    columns: readonly (readonly [string, string?])[]
  ): HTMLElement {
    const { trans } = this.context;
    return h(
      'div',
      { class: 'iw-numbers', attrs: { role: 'region', tabindex: 0, 'aria-label': label } },
      h(
        'table',
        { class: 'iw-table', attrs: { 'data-table': name, 'aria-label': label } },
        h(
          'thead',
          {},
          h(
            'tr',
            {},
            ...columns.map(([text, definition]) =>
              h(
                'th',
                { attrs: { scope: 'col' } },
                text,
                definition !== undefined && measuredBadge(trans, text, definition)
              )
            )
          )
        ),
        body
      )
    );
  }

  private showNumbers(): void {
    const { known } = this;
    this.numbers.forEach(each => (each.hidden = known === null));
    const proposals = known?.proposals ?? 0;
    fill(this.places, known?.places ?? [], ({ place, drafted, accepted, reached }, row) => {
      const share = accepted / proposals;
      row.cells[1].classList.add('iw-bar-cell');
      row.cells[1].style.setProperty('--iw-share', String(share));
      return [
        String(place),
        percent(share),
        reached > 0 ? percent(accepted / reached) : '–',
        count(drafted),
        count(accepted)
      ];
    });
    fill(this.proposers, known?.proposers ?? [], each => {
      const { speculatingNs, plainNs } = each.gain;
      return [
        proposerName(each),
        significant(acceptanceLength(each)!),
        percent(each.accepted / each.drafted),
        percent(each.draftNs / each.stepsNs),
        speculatingNs === null ? '–' : duration(speculatingNs),
        plainNs === null ? '–' : duration(plainNs),
        speculatingNs === null || plainNs === null ? '–' : `× ${significant(plainNs / speculatingNs)}`,
        this.basisOf(each.gain)
      ];
    });
  }

  /** How much stands behind the comparison, or why there is none. */
  private basisOf({ speculating, plain, plainOthers }: Gain): string {
    const { trans } = this.context;
    if (speculating === 0) {
      return trans.__('no step that did nothing but decode and whose tokens are known');
    }
    if (plain > 0) {
      return trans.__('%1 steps, against %2 plain ones', count(speculating), count(plain));
    }
    return plainOthers > 0
      ? trans.__(
          '%1 steps; the %2 plain ones in the window have other numbers of requests',
          count(speculating),
          count(plainOthers)
        )
      : trans.__('%1 steps; no plain steps in the window to compare with', count(speculating));
  }
}

/** Bring rows up to date, and leave alone what stays. */
function fill<T>(
  body: HTMLTableSectionElement,
  entries: readonly T[],
  cells: (entry: T, row: HTMLTableRowElement) => string[]
): void {
  const columns = body.parentElement!.querySelectorAll('thead th').length;
  while (body.rows.length > entries.length) {
    body.deleteRow(-1);
  }
  entries.forEach((entry, at) => {
    let row = body.rows[at];
    if (!row) {
      row = h('tr', {}, ...Array.from({ length: columns }, () => h('td')));
      body.append(row);
    }
    cells(entry, row).forEach((text, column) => setText(row.cells[column], text));
  });
}

function proposerName({ name }: Pick<Proposer, 'name'>): string {
  return name.replaceAll('+', ' + ');
}
