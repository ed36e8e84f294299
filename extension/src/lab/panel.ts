/** The workbench as a JupyterLab main-area widget. */

import type { Message } from '@lumino/messaging';
import { Widget } from '@lumino/widgets';

import { publish } from '../stats';
import type { TelemetryConnection } from '../telemetry/connection';
import type { WorkbenchOptions } from '../views/workbench';
import { Workbench } from '../views/workbench';

export class WorkbenchPanel extends Widget {
  readonly workbench: Workbench;
  private readonly withdraw: () => void;

  constructor(connection: TelemetryConnection, options: WorkbenchOptions) {
    super();
    this.addClass('iw-panel');
    this.workbench = new Workbench(connection, options);
    this.node.append(this.workbench.element);
    this.withdraw = publish(this.workbench);
  }

  override dispose(): void {
    if (!this.isDisposed) {
      this.withdraw();
      this.workbench.dispose();
    }
    super.dispose();
  }

  protected override onAfterShow(message: Message): void {
    super.onAfterShow(message);
    this.workbench.refresh();
  }

  protected override onActivateRequest(message: Message): void {
    super.onActivateRequest(message);
    this.node.tabIndex = -1;
    this.node.focus();
  }
}
