/** `window.inferenceWorkbench`: what the page measured of itself, for tests and for the curious. */

import type { TelemetryStore } from './telemetry/store';
import type { Replay } from './views/replay';
import type { Workbench, WorkbenchStats } from './views/workbench';

export interface PageHandle {
  /** Figures of the workbench opened last. */
  stats(): WorkbenchStats | null;
  resetStats(): void;
  /** The recording opened last, if the page shows one. */
  replay(): Replay | null;
  /** What the workbench opened last knows. */
  store(): TelemetryStore | null;
}

declare global {
  interface Window {
    inferenceWorkbench?: PageHandle;
  }
}

const open: { workbench: Workbench; replay: Replay | null }[] = [];

/** Make a workbench the one that `window.inferenceWorkbench` speaks of. Returns the way to withdraw it. */
export function publish(workbench: Workbench, replay: Replay | null = null): () => void {
  const entry = { workbench, replay };
  open.push(entry);
  window.inferenceWorkbench = {
    stats: () => open.at(-1)?.workbench.stats() ?? null,
    resetStats: () => open.at(-1)?.workbench.resetStats(),
    replay: () => open.at(-1)?.replay ?? null,
    store: () => open.at(-1)?.workbench.store ?? null
  };
  return () => {
    open.splice(open.indexOf(entry), 1);
  };
}
