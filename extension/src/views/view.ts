/** What every view is, and what every view is given. */

import type { TelemetryConnection } from '../telemetry/connection';
import type { TelemetryStore } from '../telemetry/store';
import type { Selection } from './selection';
import type { Theme } from './theme';
import type { Translation } from './translation';

export interface ViewContext {
  readonly store: TelemetryStore;
  readonly connection: TelemetryConnection;
  readonly selection: Selection;
  readonly trans: Translation;
  /** The look of the page now. */
  readonly theme: Theme;
  /** How far back the figures and plots reach, ns; Infinity for all there is. */
  readonly windowNs: number;
  /** Somebody moves fast through a recording: a view may leave out what takes long, until the next update. */
  readonly hurried: boolean;
  /** Large print, thick lines: for a room. */
  readonly projector: boolean;
}

export interface View {
  readonly element: HTMLElement;
  /** Draw what the store knows now. Called only while visible, at the loop's rate. */
  update(): void;
  /** The theme changed. */
  restyle?(): void;
  dispose?(): void;
}
