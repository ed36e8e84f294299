/** What the page looks like around us: read from CSS, so that every JupyterLab theme works, and watched for changes. */

export interface Theme {
  dark: boolean;
  ink: string;
  softInk: string;
  line: string;
  ground: string;
  font: string;
}

export function readTheme(element: HTMLElement): Theme {
  const style = getComputedStyle(element);
  const read = (name: string, fallback: string) => style.getPropertyValue(name).trim() || fallback;
  const ground = plain(read('--iw-ground', '#ffffff'), '#ffffff');
  const colour = (name: string, fallback: string) => plain(read(name, fallback), ground);
  return {
    dark: brightness(ground) < 0.5,
    ink: colour('--iw-ink', '#1f2328'),
    softInk: colour('--iw-soft-ink', '#59636e'),
    line: colour('--iw-line', '#d0d7de'),
    ground,
    font: read('--iw-font', 'sans-serif')
  };
}

/** Call `listener` whenever the theme may have changed. Returns the way to stop it. */
export function watchTheme(listener: () => void): () => void {
  const observer = new MutationObserver(() => requestAnimationFrame(listener));
  observer.observe(document.body, {
    attributes: true,
    attributeFilter: ['class', 'style', 'data-jp-theme-light', 'data-jp-theme-name', 'data-theme']
  });
  const media = window.matchMedia('(prefers-color-scheme: dark)');
  media.addEventListener('change', listener);
  // A theme's style sheet arrives after its name.
  const onLoad = (event: Event) => {
    if (event.target instanceof HTMLLinkElement) {
      requestAnimationFrame(listener);
    }
  };
  document.addEventListener('load', onLoad, true);
  return () => {
    observer.disconnect();
    media.removeEventListener('change', listener);
    document.removeEventListener('load', onLoad, true);
  };
}

/** Any CSS colour, over `ground` where it is translucent, as `#rrggbb`: BokehJS does not know `color-mix()`. */
function plain(colour: string, ground: string): string {
  const context = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  if (!context) {
    return ground;
  }
  for (const layer of [ground, colour]) {
    context.fillStyle = layer;
    context.fillRect(0, 0, 1, 1);
  }
  const channels = [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  return '#' + channels.map(channel => channel.toString(16).padStart(2, '0')).join('');
}

/** 0 (black) to 1 (white) of `#rrggbb`. */
function brightness(colour: string): number {
  const [r, g, b] = [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16));
  return (0.299 * r + 0.587 * g + 0.114 * b) / 255;
}
