/** Loads BokehJS when the first plot needs it: it is a megabyte. */

export type { ColumnDataSource, Figure, FigureView, Range1d, Span } from './bokeh-modules';

import type * as BokehModules from './bokeh-modules';

export type Bokeh = typeof BokehModules;

let loading: Promise<Bokeh> | null = null;

export function loadBokeh(): Promise<Bokeh> {
  if (loading === null) {
    loading = import('./bokeh-modules');
    // Offline for a moment: the next plot tries again.
    loading.catch(() => (loading = null));
  }
  return loading;
}
