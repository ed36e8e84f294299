/** The mark beside every number: how it was obtained, and on demand its definition. Works by mouse, touch and keyboard. */

import { h, placeAt, uniqueId } from './dom';
import type { Translation } from './translation';

export function measuredBadge(trans: Translation, what: string, definition: string): HTMLElement {
  const id = uniqueId('definition');
  const bubble = h('div', {
    class: 'iw-definition',
    text: definition,
    attrs: { id, role: 'tooltip', popover: 'manual' }
  });
  let pinned = false;
  const show = (visible: boolean) => {
    if (visible === bubble.matches(':popover-open')) {
      return;
    }
    if (visible) {
      // In the top layer, where no card or panel can clip it.
      bubble.showPopover();
      placeAt(button, bubble);
    } else {
      bubble.hidePopover();
    }
    button.setAttribute('aria-expanded', String(visible));
  };
  const button = h('button', {
    class: 'iw-badge',
    text: trans.__('measured'),
    attrs: {
      type: 'button',
      'aria-label': trans.__('%1 is measured. How it is defined', what),
      'aria-expanded': 'false',
      'aria-describedby': id
    },
    on: {
      click: () => {
        pinned = !pinned;
        show(pinned);
      },
      mouseenter: () => show(true),
      mouseleave: () => show(pinned),
      blur: () => {
        pinned = false;
        show(false);
      },
      keydown: event => {
        if (event.key === 'Escape') {
          pinned = false;
          show(false);
        }
      }
    }
  });
  return h('span', { class: 'iw-badge-holder' }, button, bubble);
}
