/** Which server a workbench shows, where there are several: a choice in its first line. Owns no connection. */

import { h } from './dom';
import type { Translation } from './translation';

export interface OfferedServer {
  id: string;
  name: string;
  /** What else there is to know. */
  facts: string;
}

/** What a page with several servers tells a workbench about them; a page with one leaves it out. */
export interface ServerHost {
  /** Id of the one that is shown here. */
  readonly chosen: string;
  /** Its instance, where `connect()` in a notebook would find another one. */
  readonly instance: string | null;
  /** All that can be chosen, with the one that is shown. */
  offered(): OfferedServer[];
  /** Whether there is anything to choose. */
  worthShowing(): boolean;
  choose(id: string): void;
  /** Look again who runs. */
  refresh(): void;
  /** Somebody came or went. */
  onChange(listener: () => void): () => void;
}

export class ServerChooser {
  readonly element: HTMLElement;
  private readonly select: HTMLSelectElement;
  private readonly stop: () => void;
  private shown = '';
  private asked = false;

  constructor(
    private readonly host: ServerHost,
    trans: Translation
  ) {
    this.select = h('select', {
      class: 'iw-select',
      attrs: { 'aria-label': trans.__('Inference server that is shown here'), 'data-action': 'choose-server' },
      on: { change: () => host.choose(this.select.value), focus: () => host.refresh() }
    });
    this.element = h('span', { class: 'iw-server-chooser' }, this.select);
    this.stop = host.onChange(() => this.draw());
    this.draw();
  }

  /** Show it even where there is nothing to choose, because somebody asked for it. */
  ask(): void {
    this.asked = true;
    this.draw();
    this.select.focus();
  }

  dispose(): void {
    this.stop();
  }

  private draw(): void {
    this.element.hidden = !this.asked && !this.host.worthShowing();
    const offered = this.host.offered();
    // An open list that is built anew closes, or loses what is pointed at.
    const looks = JSON.stringify([offered, this.host.chosen]);
    if (looks !== this.shown) {
      this.shown = looks;
      this.select.replaceChildren(
        ...offered.map(({ id, name, facts }) => h('option', { text: name, title: facts, attrs: { value: id } }))
      );
      this.select.value = this.host.chosen;
      this.select.title = offered.find(each => each.id === this.host.chosen)?.facts ?? '';
    }
  }
}
