/** Commands about which server a panel shows: one more panel for another server, and another server in this panel. */

import type { JupyterFrontEnd } from '@jupyterlab/application';
import type { ICommandPalette, MainAreaWidget, WidgetTracker } from '@jupyterlab/apputils';
import { InputDialog, showErrorMessage } from '@jupyterlab/apputils';

import type { Translation } from '../views/translation';
import { workbenchIcon } from './icon';
import type { WorkbenchPanel } from './panel';
import { idsOf, OWN_SERVER } from './server-names';
import type { IInferenceServer } from './tokens';
import { CATEGORY, CommandIds, MODE_ARGUMENT } from './tokens';

/** Schema of a command's argument that names a server. */
export const SERVER_ARGUMENT = {
  type: 'string',
  description: `Instance of the server, as "inference-workbench-servers" lists it; "${OWN_SERVER}" is JupyterLab's own.`
};

export interface ServerCommandOptions {
  tracker: WidgetTracker<MainAreaWidget<WorkbenchPanel>>;
  palette: ICommandPalette | null;
  trans: Translation;
}

export function addServerCommands(
  app: JupyterFrontEnd,
  servers: IInferenceServer,
  { tracker, palette, trans }: ServerCommandOptions
): void {
  /** The id that was asked for, if such a server can be shown. */
  const known = async (asked: unknown): Promise<string> => {
    const id = String(asked);
    await servers.refresh();
    const running = [OWN_SERVER, ...servers.listed.map(each => each.instance)];
    if (!running.includes(id)) {
      throw new Error(trans.__('There is no inference server “%1”. There are: %2.', id, running.join(', ')));
    }
    return servers.listed.some(each => each.own && each.instance === id) ? OWN_SERVER : id;
  };
  app.commands.addCommand(CommandIds.openServer, {
    label: trans.__('Open a Panel for Another Server'),
    caption: trans.__('Shows one more inference server, beside the one that is shown'),
    icon: workbenchIcon,
    describedBy: {
      args: { type: 'object', properties: { server: SERVER_ARGUMENT, mode: MODE_ARGUMENT } }
    },
    execute: async args => {
      const mode = args['mode'] ?? 'split-right';
      if (args['server'] !== undefined) {
        return app.commands.execute(CommandIds.open, { server: await known(args['server']), mode });
      }
      await servers.refresh();
      const others = idsOf(servers.listed).filter(id => tracker.find(each => each.content.server === id) === undefined);
      if (others.length === 0) {
        await showErrorMessage(
          trans.__('No other server'),
          trans.__(
            'Every inference server that runs is shown already. Start one more, for example with “inference-workbench serve” in a terminal.'
          )
        );
        return null;
      }
      let [server] = others;
      if (others.length > 1) {
        const names = others.map(id => servers.nameOf(id));
        const { button, value } = await InputDialog.getItem({
          title: trans.__('Open a panel for another server'),
          label: trans.__('Inference servers that are not shown yet'),
          items: names
        });
        if (!button.accept || value === null) {
          return null;
        }
        server = others[names.indexOf(value)];
      }
      return app.commands.execute(CommandIds.open, { server, mode });
    }
  });
  app.commands.addCommand(CommandIds.chooseServer, {
    label: trans.__('Choose the Server of This Panel'),
    caption: trans.__('Shows another inference server in the panel that was used last'),
    describedBy: { args: { type: 'object', properties: { server: SERVER_ARGUMENT } } },
    isEnabled: () => tracker.currentWidget !== null,
    execute: async args => {
      const panel = tracker.currentWidget;
      if (panel === null) {
        return;
      }
      if (args['server'] !== undefined) {
        panel.content.showServer(await known(args['server']));
      } else {
        app.shell.activateById(panel.id);
        panel.content.askServer();
      }
    }
  });
  for (const command of [CommandIds.openServer, CommandIds.chooseServer]) {
    palette?.addItem({ command, category: CATEGORY });
  }
}
