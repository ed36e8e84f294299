/** The workbench as a JupyterLab main-area widget, over a server that can be exchanged. */

import type { WidgetTracker } from '@jupyterlab/apputils';
import { MainAreaWidget } from '@jupyterlab/apputils';
import type { Message } from '@lumino/messaging';
import { Widget } from '@lumino/widgets';

import { publish } from '../stats';
import type { OfferedServer, ServerHost } from '../views/server-chooser';
import { untranslated } from '../views/translation';
import type { WorkbenchOptions } from '../views/workbench';
import { Workbench } from '../views/workbench';
import { workbenchIcon } from './icon';
import { idsOf, OWN_SERVER } from './server-names';
import type { HeldServer, IInferenceServer } from './tokens';

/** Id of the panel that is opened first. */
export const PANEL_ID = 'inference-workbench-panel';

/** An id for one more panel. */
export function freePanelId(isTaken: (id: string) => boolean): string {
  let id = PANEL_ID;
  for (let number = 2; isTaken(id); number += 1) {
    id = `${PANEL_ID}-${number}`;
  }
  return id;
}

/** Make the tab of a panel, and let `tracker` bring it back after a reload, with the server that it shows by then. */
export function tabOf(
  content: WorkbenchPanel,
  id: string,
  tracker: WidgetTracker<MainAreaWidget<WorkbenchPanel>>
): MainAreaWidget<WorkbenchPanel> {
  const tab = new MainAreaWidget({ content });
  tab.id = id;
  tab.title.icon = workbenchIcon;
  tab.title.closable = true;
  tab.toolbar.hide();
  void tracker.add(tab);
  tab.title.changed.connect(() => void tracker.save(tab));
  content.onServer(() => void tracker.save(tab));
  return tab;
}

export interface PanelOptions extends Omit<WorkbenchOptions, 'servers' | 'recordings'> {
  /** Which server to show. */
  server: string;
  /** What the tab is called while there is one server only. */
  heading: string;
}

export class WorkbenchPanel extends Widget {
  private shown: { server: string; held: HeldServer; workbench: Workbench; withdraw: () => void };
  private readonly listeners: ((server: string) => void)[] = [];
  private readonly stop: () => void;
  private asking = false;

  constructor(
    private readonly servers: IInferenceServer,
    private readonly options: PanelOptions
  ) {
    super();
    this.addClass('iw-panel');
    this.shown = this.make(options.server);
    this.stop = servers.onChange(() => this.nameTab());
    this.nameTab();
  }

  get workbench(): Workbench {
    return this.shown.workbench;
  }

  /** Id of the server that is shown. */
  get server(): string {
    return this.shown.server;
  }

  /** The figure that is shown alone, if it is one. */
  get only(): string | undefined {
    return this.options.only;
  }

  /** Called when another server is shown from now on. */
  onServer(listener: (server: string) => void): void {
    this.listeners.push(listener);
  }

  /** Show another server, in the same arrangement. */
  showServer(server: string): void {
    if (server === this.shown.server || this.isDisposed) {
      return;
    }
    const before = this.shown;
    this.shown = this.make(server);
    this.shown.workbench.resemble(before.workbench);
    before.withdraw();
    before.workbench.dispose();
    before.held.release();
    this.nameTab();
    this.listeners.forEach(listener => listener(server));
  }

  /** Let a person choose the server: the choice has the focus as soon as this panel is the active one. */
  askServer(): void {
    this.asking = true;
    this.activate();
  }

  override dispose(): void {
    if (!this.isDisposed) {
      this.stop();
      this.shown.withdraw();
      this.shown.workbench.dispose();
      this.shown.held.release();
    }
    super.dispose();
  }

  protected override onAfterShow(message: Message): void {
    super.onAfterShow(message);
    this.workbench.refresh();
  }

  protected override onActivateRequest(message: Message): void {
    super.onActivateRequest(message);
    if (this.asking) {
      this.asking = false;
      this.workbench.askServer();
    }
    this.node.tabIndex = -1;
    if (!this.node.contains(document.activeElement)) {
      this.node.focus();
    }
  }

  private make(server: string): typeof this.shown {
    const held = this.servers.hold(server);
    const workbench = new Workbench(held.connection, {
      ...this.options,
      servers: this.host(server),
      recordings: () => this.servers.recordings?.(server) ?? null
    });
    this.node.append(workbench.element);
    return { server, held, workbench, withdraw: publish(workbench) };
  }

  private host(server: string): ServerHost {
    const { servers } = this;
    const { trans = untranslated } = this.options;
    const offer = (id: string): OfferedServer => ({
      id,
      name: servers.hasEnded(id) ? trans.__('ended: %1', servers.nameOf(id)) : servers.nameOf(id),
      facts: servers.factsOf(id)
    });
    return {
      chosen: server,
      instance: server === OWN_SERVER ? null : server,
      // The one that is shown is offered too if it does not run any more.
      offered: () => [...new Set([...idsOf(servers.listed), server])].map(offer),
      worthShowing: () => server !== OWN_SERVER || servers.listed.some(each => !each.own),
      choose: id => this.showServer(id),
      refresh: () => void servers.refresh(),
      onChange: listener => servers.onChange(listener)
    };
  }

  /** The tab says which server this is, where there is more than one. */
  private nameTab(): void {
    const { servers, options } = this;
    const name = servers.nameOf(this.server);
    const alone = !servers.several;
    this.title.label = alone ? options.heading : options.only === undefined ? name : `${options.heading} – ${name}`;
    this.title.caption = [options.heading, name, servers.factsOf(this.server)].filter(Boolean).join('\n');
  }
}
