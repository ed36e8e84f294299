/** Builds DOM elements in one expression. */

export type Child = Node | string | null | undefined | false;

export interface Props {
  class?: string;
  text?: string;
  title?: string;
  /** Attributes, as written in HTML; `false` leaves one out, `true` writes it empty. */
  attrs?: Record<string, string | number | boolean>;
  on?: Partial<{ [K in keyof HTMLElementEventMap]: (event: HTMLElementEventMap[K]) => void }>;
}

export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  props: Props = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  if (props.class) {
    element.className = props.class;
  }
  if (props.text !== undefined) {
    element.textContent = props.text;
  }
  if (props.title) {
    element.title = props.title;
  }
  for (const [name, value] of Object.entries(props.attrs ?? {})) {
    if (value !== false) {
      element.setAttribute(name, value === true ? '' : String(value));
    }
  }
  for (const [name, listener] of Object.entries(props.on ?? {})) {
    element.addEventListener(name, listener as EventListener);
  }
  for (const child of children) {
    if (child !== null && child !== undefined && child !== false) {
      element.append(child);
    }
  }
  return element;
}

let serial = 0;

/** An id that no other element of the page has. */
export function uniqueId(stem: string): string {
  serial += 1;
  return `iw-${stem}-${serial}`;
}

/** Set text only where it differs, so that screen readers and the layout are left alone. */
export function setText(element: HTMLElement, text: string): void {
  if (element.textContent !== text) {
    element.textContent = text;
  }
}

/** Of buttons that exclude each other, show the one called `name` as pressed, or none. */
export function press(buttons: Record<string, HTMLElement>, name: string | null): void {
  for (const [each, button] of Object.entries(buttons)) {
    button.setAttribute('aria-pressed', String(each === name));
  }
}

/** Put what was opened in the top layer below the element it belongs to, or above where there is no room, on the page. */
export function placeAt(mark: HTMLElement, opened: HTMLElement): void {
  const at = mark.getBoundingClientRect();
  const { width, height } = opened.getBoundingClientRect();
  const below = at.bottom + 6 + height < window.innerHeight;
  opened.style.left = `${Math.max(8, Math.min(at.left, window.innerWidth - width - 8))}px`;
  opened.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - height - 6)}px`;
}
