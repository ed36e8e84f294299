/** The narrow part of BokehJS that the plots use; a module of its own so that one dynamic import brings it all. */

export { figure } from '@bokeh/bokehjs/build/js/lib/api/figure';
export type { Figure } from '@bokeh/bokehjs/build/js/lib/api/figure';
export { MouseLeave, MouseMove } from '@bokeh/bokehjs/build/js/lib/core/bokeh_events';
export { Document } from '@bokeh/bokehjs/build/js/lib/document';
export { add_document_standalone as embed } from '@bokeh/bokehjs/build/js/lib/embed/standalone';
export { Span } from '@bokeh/bokehjs/build/js/lib/models/annotations/span';
export type { FigureView } from '@bokeh/bokehjs/build/js/lib/models/plots/figure';
export { Range1d } from '@bokeh/bokehjs/build/js/lib/models/ranges/range1d';
export { ColumnDataSource } from '@bokeh/bokehjs/build/js/lib/models/sources/column_data_source';
