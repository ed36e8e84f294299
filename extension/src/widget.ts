/** The notebook widget: the same workbench over an anywidget model. Built into one file for Python to carry. */

import type { AnyWidget, RenderProps } from '@anywidget/types';

import { publish } from './stats';
import { ModelConnection } from './telemetry/model';
import { TelemetryStore } from './telemetry/store';
import { Workbench } from './views/workbench';

/** Python passes telemetry on ten times a second (panel.py): each lot is painted when it comes, and not with the next. */
const REPAINT_RATE = 20;

function render({ model, el }: RenderProps): () => void {
  const connection = new ModelConnection(new TelemetryStore(), model);
  const workbench = new Workbench(connection, { repaintRate: REPAINT_RATE });
  el.classList.add('iw-widget');
  el.append(workbench.element);
  const withdraw = publish(workbench);
  connection.connect();
  return () => {
    withdraw();
    workbench.dispose();
    connection.dispose();
  };
}

export default { render } satisfies AnyWidget;
