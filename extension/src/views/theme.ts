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
  const ground = read('--iw-ground', '#ffffff');
  return {
    dark: brightness(ground) < 0.5,
    ink: read('--iw-ink', '#1f2328'),
    softInk: read('--iw-soft-ink', '#59636e'),
    line: read('--iw-line', '#d0d7de'),
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

/** 0 (black) to 1 (white) of any CSS colour. */
function brightness(colour: string): number {
  const context = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  if (!context) {
    return 1;
  }
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  const [r, g, b] = context.getImageData(0, 0, 1, 1).data;
  return (0.299 * r + 0.587 * g + 0.114 * b) / 255;
}
