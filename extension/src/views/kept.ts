/** What a page remembers of how somebody looks at the views, from one visit to the next. */

const PREFIX = 'inference-workbench:';

/** What was kept under `name`; empty where nothing was, or where a page keeps nothing. */
export function kept(name: string): string {
  try {
    return localStorage.getItem(PREFIX + name) ?? '';
  } catch {
    return ''; // a page without storage: a file, a sandbox
  }
}

export function keep(name: string, value: string): void {
  try {
    localStorage.setItem(PREFIX + name, value);
  } catch {
    // It is chosen again next time.
  }
}
