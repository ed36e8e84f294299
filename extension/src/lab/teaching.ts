/** The teaching layout: a lesson on the left, the workbench to its right. */

import type { JupyterFrontEnd } from '@jupyterlab/application';

import { CommandIds, FIRST_LESSON } from './tokens';

/** `/lab?inference-workbench=teach` opens the layout at start. */
export const TEACH_PARAMETER = 'inference-workbench';

export async function openTeachingLayout(app: JupyterFrontEnd, path?: string): Promise<void> {
  const lesson = path ?? (await findLesson(app));
  if (lesson !== null) {
    await app.commands.execute('docmanager:open', { path: lesson });
  }
  await app.commands.execute(CommandIds.open, { mode: 'split-right' });
}

/** The first lesson lies in `notebooks/` of a checkout, or at the root where JupyterLab was started inside it. */
async function findLesson(app: JupyterFrontEnd): Promise<string | null> {
  const { contents } = app.serviceManager;
  for (const folder of ['notebooks', '']) {
    const listing = await contents.get(folder, { type: 'directory', content: true }).catch(() => null);
    const found = (listing?.content as { name: string; path: string }[] | undefined)?.find(
      each => each.name === FIRST_LESSON
    );
    if (found) {
      return found.path;
    }
  }
  return null;
}
