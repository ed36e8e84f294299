/** The buttons that say what the colours of a view mean: one of them is pressed. */

import { h, press } from './dom';

export interface Colourings<T extends string> {
  readonly element: HTMLElement;
  /** Press the button of a colouring. */
  show(name: T): void;
}

export function colourings<T extends string>(
  label: string,
  texts: Record<T, string>,
  choose: (name: T) => void
): Colourings<T> {
  const names = Object.keys(texts) as T[];
  const buttons = Object.fromEntries(
    names.map(name => [
      name,
      h('button', {
        class: 'iw-window',
        text: texts[name],
        attrs: { type: 'button', 'aria-pressed': 'false', 'data-colouring': name },
        on: { click: () => choose(name) }
      })
    ])
  );
  return {
    element: h(
      'span',
      { class: 'iw-windows', attrs: { role: 'group', 'aria-label': label } },
      ...Object.values(buttons)
    ),
    show: name => press(buttons, name)
  };
}
