/** `window.inferenceWorkbench`: what the page measured of itself, for tests and for the curious. */

import type { Workbench, WorkbenchStats } from './views/workbench';

export interface PageHandle {
  /** Figures of the workbench opened last. */
  stats(): WorkbenchStats | null;
  resetStats(): void;
}

declare global {
  interface Window {
    inferenceWorkbench?: PageHandle;
  }
}

const open: Workbench[] = [];

/** Make a workbench the one that `window.inferenceWorkbench` speaks of. Returns the way to withdraw it. */
export function publish(workbench: Workbench): () => void {
  open.push(workbench);
  window.inferenceWorkbench = {
    stats: () => open.at(-1)?.stats() ?? null,
    resetStats: () => open.at(-1)?.resetStats()
  };
  return () => {
    open.splice(open.indexOf(workbench), 1);
  };
}
