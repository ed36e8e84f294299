/** Puts the code that connects a notebook to the server into the notebook at hand. */

import type { INotebookTracker } from '@jupyterlab/notebook';
import { NotebookActions } from '@jupyterlab/notebook';

const CONNECT = `import inference_workbench as iw

wb = iw.connect()`;

export function insertConnectCell(notebooks: INotebookTracker): void {
  const notebook = notebooks.currentWidget?.content;
  if (!notebook) {
    return;
  }
  NotebookActions.insertBelow(notebook);
  notebook.activeCell?.model.sharedModel.setSource(CONNECT);
}
