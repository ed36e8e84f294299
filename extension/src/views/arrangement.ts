/**
 * Which views are shown, and how large: layouts by one click, a choice view by view, pause, the window of time, and the
 * projector's mode. Owns the toolbar over the figures and the state behind it, no view.
 */

import { h, placeAt, press, setText, uniqueId } from './dom';
import { count } from './format';
import type { Translation } from './translation';

export type LayoutName = 'all' | 'teach' | 'profile' | 'memory' | 'money';
export const LAYOUTS: readonly LayoutName[] = ['all', 'teach', 'profile', 'memory', 'money'];

const FIGURES: Record<Exclude<LayoutName, 'all'>, readonly string[]> = {
  teach: ['latency', 'batch', 'kv-map', 'events'],
  profile: ['timeline', 'attribution', 'roofline', 'histogram', 'batch', 'speculation', 'events'],
  memory: ['kv-map', 'kv', 'memory', 'timeline', 'events'],
  money: ['economy', 'histogram', 'batch', 'roofline']
};

/** The figures that a layout shows, of all there are. */
export function figuresOf(layout: LayoutName, all: readonly string[]): string[] {
  return layout === 'all' ? [...all] : all.filter(name => FIGURES[layout].includes(name));
}

export interface Shown {
  name: string;
  title: string;
  element: HTMLElement;
}

/** What the toolbar asks of the workbench. */
export interface ArrangementHost {
  readonly trans: Translation;
  readonly figures: readonly Shown[];
  setWindow(seconds: number): void;
  setPaused(paused: boolean): void;
  /** Figures came, went or changed their size. */
  arranged(): void;
}

const WINDOWS: readonly number[] = [5, 30, 0];

export class Arrangement {
  readonly element: HTMLElement;
  private readonly windowButtons: HTMLButtonElement[];
  private readonly layoutButtons: Record<LayoutName, HTMLButtonElement>;
  private readonly ticks = new Map<string, HTMLInputElement>();
  private readonly pauseButton: HTMLButtonElement;
  private readonly projectorButton: HTMLButtonElement;
  private readonly figureSelect: HTMLSelectElement;
  private readonly missed = h('span', { class: 'iw-missed', attrs: { role: 'status' } });
  private shown: ReadonlySet<string>;
  private pausing = false;
  private projecting = false;

  constructor(
    private readonly host: ArrangementHost,
    private readonly workbench: HTMLElement
  ) {
    const { trans, figures } = host;
    this.shown = new Set(figures.map(each => each.name));
    this.windowButtons = WINDOWS.map(seconds =>
      h('button', {
        class: 'iw-window',
        text: seconds === 0 ? trans.__('all') : trans.__('%1 s', seconds),
        attrs: { type: 'button', 'aria-pressed': 'false', 'data-window': seconds },
        on: { click: () => host.setWindow(seconds) }
      })
    );
    const names: Record<LayoutName, string> = {
      all: trans.__('All'),
      teach: trans.__('Teach'),
      profile: trans.__('Profile'),
      memory: trans.__('Memory'),
      money: trans.__('Money')
    };
    this.layoutButtons = Object.fromEntries(
      LAYOUTS.map(layout => [
        layout,
        h('button', {
          class: 'iw-window',
          text: names[layout],
          attrs: { type: 'button', 'aria-pressed': 'false', 'data-layout': layout },
          on: { click: () => this.setLayout(layout) }
        })
      ])
    ) as Record<LayoutName, HTMLButtonElement>;
    const menuId = uniqueId('views');
    const menu = h(
      'div',
      {
        class: 'iw-views-menu',
        attrs: { id: menuId, popover: 'auto', role: 'group', 'aria-label': trans.__('Views') }
      },
      ...figures.map(({ name, title }) => {
        const tick = h('input', {
          attrs: { type: 'checkbox', 'data-view': name },
          on: { change: () => this.show(name, tick.checked) }
        });
        this.ticks.set(name, tick);
        return h('label', { class: 'iw-tick' }, tick, h('span', { text: title }));
      })
    );
    const menuButton = h('button', {
      class: 'iw-window',
      text: trans.__('Views…'),
      title: trans.__('Choose view by view what is shown'),
      attrs: { type: 'button', popovertarget: menuId, 'data-action': 'views' }
    });
    menu.addEventListener('toggle', event => {
      if (event.newState === 'open') {
        placeAt(menuButton, menu);
      }
    });
    this.pauseButton = h('button', {
      class: 'iw-window',
      text: trans.__('Pause'),
      title: trans.__('Freeze the figures, to look at them; the engine goes on'),
      attrs: { type: 'button', 'aria-pressed': 'false', 'data-action': 'pause-views' },
      on: { click: () => this.setPaused(!this.pausing) }
    });
    this.projectorButton = h('button', {
      class: 'iw-window',
      text: trans.__('Projector'),
      title: trans.__('Large print for a room: one number, the tokens and one figure'),
      attrs: { type: 'button', 'aria-pressed': 'false', 'data-action': 'projector' },
      on: { click: () => this.setProjector(!this.projecting) }
    });
    this.figureSelect = h(
      'select',
      {
        class: 'iw-select',
        attrs: { 'aria-label': trans.__('The figure on the projector'), hidden: true, 'data-action': 'projected' },
        on: { change: () => this.arrange() }
      },
      ...figures
        .filter(each => each.name !== 'events')
        .map(({ name, title }) => h('option', { text: title, attrs: { value: name } }))
    );
    this.element = h(
      'div',
      { class: 'iw-plots-head' },
      h('h2', { text: trans.__('Figures') }),
      h(
        'div',
        { class: 'iw-windows iw-layouts', attrs: { role: 'group', 'aria-label': trans.__('Layout') } },
        ...LAYOUTS.map(layout => this.layoutButtons[layout]),
        menuButton,
        menu
      ),
      this.figureSelect,
      h('span', { class: 'iw-spring' }),
      this.missed,
      this.pauseButton,
      this.projectorButton,
      h(
        'div',
        {
          class: 'iw-windows',
          attrs: { role: 'group', 'aria-label': trans.__('How far back figures and plots reach') }
        },
        h('span', { text: trans.__('window'), attrs: { 'aria-hidden': 'true' } }),
        ...this.windowButtons
      )
    );
    this.arrange();
  }

  get paused(): boolean {
    return this.pausing;
  }

  get projector(): boolean {
    return this.projecting;
  }

  /** Names of the figures that are shown. */
  get visible(): string[] {
    return this.host.figures.filter(each => !each.element.hidden).map(each => each.name);
  }

  /** The layout that is shown, if it is one. */
  get layout(): LayoutName | null {
    const all = this.host.figures.map(each => each.name);
    return (
      LAYOUTS.find(layout => {
        const names = figuresOf(layout, all);
        return names.length === this.shown.size && names.every(name => this.shown.has(name));
      }) ?? null
    );
  }

  markWindow(seconds: number): void {
    for (const button of this.windowButtons) {
      button.setAttribute('aria-pressed', String(Number(button.dataset.window) === seconds));
    }
  }

  setLayout(layout: LayoutName): void {
    this.showOnly(
      figuresOf(
        layout,
        this.host.figures.map(each => each.name)
      )
    );
  }

  showOnly(names: readonly string[]): void {
    this.shown = new Set(names);
    this.arrange();
  }

  /** Show the same as another one. */
  resemble(other: Arrangement): void {
    this.figureSelect.value = other.figureSelect.value;
    this.shown = other.shown;
    this.setProjector(other.projecting);
  }

  setPaused(paused: boolean): void {
    this.pausing = paused;
    this.pauseButton.setAttribute('aria-pressed', String(paused));
    setText(this.pauseButton, paused ? this.host.trans.__('Go on') : this.host.trans.__('Pause'));
    this.workbench.dataset.paused = String(paused);
    this.sayMissed(0);
    this.host.setPaused(paused);
  }

  /** How much has happened since the figures were frozen. */
  sayMissed(events: number): void {
    setText(this.missed, this.pausing ? this.host.trans.__('paused · +%1 events', count(events)) : '');
  }

  setProjector(projector: boolean): void {
    this.projecting = projector;
    this.projectorButton.setAttribute('aria-pressed', String(projector));
    this.figureSelect.hidden = !projector;
    this.workbench.dataset.projector = String(projector);
    this.arrange();
  }

  private show(name: string, visible: boolean): void {
    const names = new Set(this.shown);
    names[visible ? 'add' : 'delete'](name);
    this.shown = names;
    this.arrange();
  }

  private arrange(): void {
    const { layout } = this;
    press(this.layoutButtons, layout);
    for (const { name, element } of this.host.figures) {
      element.hidden = this.projecting ? name !== this.figureSelect.value : !this.shown.has(name);
      const tick = this.ticks.get(name);
      if (tick) {
        tick.checked = this.shown.has(name);
      }
    }
    this.host.arranged();
  }
}
