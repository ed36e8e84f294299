/** Puts code into the notebook at hand: what connects it to the server, or what reproduces a state of the workbench. */

import type { INotebookTracker } from '@jupyterlab/notebook';
import { NotebookActions } from '@jupyterlab/notebook';

import { connectLine } from '../views/reproduce';

/** `instance` names a server other than JupyterLab's own. */
export function insertConnectCell(notebooks: INotebookTracker, instance: string | null): boolean {
  return insertCell(notebooks, `import inference_workbench as iw\n\n${connectLine(instance)}`);
}

/** Put `code` into a new cell below the active one of the notebook that was used last; false where none is open. */
export function insertCell(notebooks: INotebookTracker, code: string): boolean {
  const notebook = notebooks.currentWidget?.content;
  if (!notebook) {
    return false;
  }
  NotebookActions.insertBelow(notebook);
  notebook.activeCell?.model.sharedModel.setSource(code);
  return true;
}
