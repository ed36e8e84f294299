/**
 * The JupyterLab plugins. Each can be disabled alone: the panel needs only the server plugin; launcher, status bar,
 * teaching layout and notebook cell are extras. Nothing here waits for the network: opening the panel connects.
 */

import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ILayoutRestorer, IRouter } from '@jupyterlab/application';
import type { MainAreaWidget } from '@jupyterlab/apputils';
import { ICommandPalette, WidgetTracker } from '@jupyterlab/apputils';
import { ILauncher } from '@jupyterlab/launcher';
import { INotebookTracker } from '@jupyterlab/notebook';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { IStatusBar } from '@jupyterlab/statusbar';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { workbenchIcon } from './lab/icon';
import { insertCell, insertConnectCell } from './lab/notebook-cell';
import { freePanelId, tabOf, WorkbenchPanel } from './lab/panel';
import { recordingsPlugin } from './lab/recordings-plugin';
import { InferenceServers } from './lab/server';
import { OWN_SERVER } from './lab/server-names';
import { addServerCommands, SERVER_ARGUMENT } from './lab/server-commands';
import { StatusItem } from './lab/status-item';
import { openTeachingLayout, TEACH_PARAMETER } from './lab/teaching';
import { CATEGORY, CommandIds, IInferenceServer, MODE_ARGUMENT, PLUGIN_NAMESPACE, PluginIds } from './lab/tokens';
import { addViewCommands } from './lab/view-commands';
import type { FeatureValue } from './telemetry/protocol';
import type { LayoutName } from './views/arrangement';
import type { WorkbenchOptions } from './views/workbench';

const serverPlugin: JupyterFrontEndPlugin<IInferenceServer> = {
  id: PluginIds.server,
  description: 'Provides the connections to inference servers.',
  autoStart: true,
  provides: IInferenceServer,
  optional: [ITranslator],
  activate: (app: JupyterFrontEnd, translator: ITranslator | null) =>
    new InferenceServers(app.serviceManager.serverSettings, (translator ?? nullTranslator).load(PLUGIN_NAMESPACE))
};

const panelPlugin: JupyterFrontEndPlugin<void> = {
  id: PluginIds.panel,
  description: 'Adds the workbench panel and the commands to open it, to switch features and to restart the engine.',
  autoStart: true,
  requires: [IInferenceServer],
  optional: [ISettingRegistry, ILayoutRestorer, ICommandPalette, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    server: IInferenceServer,
    settings: ISettingRegistry | null,
    restorer: ILayoutRestorer | null,
    palette: ICommandPalette | null,
    translator: ITranslator | null
  ) => {
    const trans = (translator ?? nullTranslator).load(PLUGIN_NAMESPACE);
    const tracker = new WidgetTracker<MainAreaWidget<WorkbenchPanel>>({ namespace: PLUGIN_NAMESPACE });
    const options: WorkbenchOptions = { trans, cells: () => server.cells };

    app.commands.addCommand(CommandIds.open, {
      label: trans.__('Open Inference Workbench'),
      caption: trans.__('Watch and switch language-model inference; starts the inference server if none runs'),
      icon: workbenchIcon,
      describedBy: {
        args: {
          type: 'object',
          properties: {
            mode: MODE_ARGUMENT,
            server: SERVER_ARGUMENT,
            panel: { type: 'string', description: 'Id of the panel: what a reload restores.' },
            name: { type: 'string', description: 'What the server was called, should it not run any more.' }
          }
        }
      },
      execute: args => {
        const { panel: id, server: chosen, name } = args as { panel?: string; server?: string; name?: string };
        let widget =
          id !== undefined
            ? tracker.find(each => each.id === id)
            : chosen !== undefined
              ? tracker.find(each => each.content.server === chosen)
              : (tracker.currentWidget ?? tracker.find(() => true));
        if (!widget || widget.isDisposed) {
          if (chosen !== undefined && name !== undefined) {
            server.remember(chosen, name);
          }
          const content = new WorkbenchPanel(server, {
            ...options,
            server: chosen ?? OWN_SERVER,
            heading: trans.__('Inference Workbench')
          });
          const made = tabOf(
            content,
            id ?? freePanelId(each => tracker.find(other => other.id === each) !== undefined),
            tracker
          );
          content.onServer(shown => {
            if (tracker.currentWidget === made) {
              server.select(shown);
            }
          });
          widget = made;
        }
        if (!widget.isAttached) {
          const mode = args['mode'] as 'tab-after' | 'split-right' | undefined;
          app.shell.add(widget, 'main', mode ? { mode } : {});
        }
        app.shell.activateById(widget.id);
        return widget;
      }
    });
    app.commands.addCommand(CommandIds.setFeature, {
      label: args => (args['name'] ? trans.__('Switch %1', String(args['name'])) : trans.__('Toggle the KV Cache')),
      describedBy: {
        args: {
          type: 'object',
          properties: {
            name: { type: 'string', description: 'Feature name, e.g. "kv_cache" (the default).' },
            value: {
              type: ['boolean', 'integer', 'string'],
              description: 'The value to set; leave it out to flip a feature that is on or off.'
            }
          }
        }
      },
      execute: async args => {
        const name = String(args['name'] ?? 'kv_cache');
        const connection = server.use();
        const value = (args['value'] ?? !connection.store.features?.values[name]) as FeatureValue;
        await connection.setFeatures({ [name]: value });
      }
    });
    app.commands.addCommand(CommandIds.restartEngine, {
      label: trans.__('Restart the Inference Engine'),
      caption: trans.__('Running requests fail; the model is loaded again'),
      describedBy: { args: { type: 'object', properties: {} } },
      execute: () => server.use().engine('restart')
    });
    app.commands.addCommand(CommandIds.sleepEngine, {
      label: trans.__('Put the Inference Engine to Sleep'),
      caption: trans.__('Gives the device’s memory back; running requests wait'),
      describedBy: { args: { type: 'object', properties: {} } },
      execute: () => server.use().engine('sleep')
    });
    app.commands.addCommand(CommandIds.wakeEngine, {
      label: trans.__('Wake the Inference Engine'),
      caption: trans.__('Takes the device’s memory again and goes on with the requests that wait'),
      describedBy: { args: { type: 'object', properties: {} } },
      execute: () => server.use().engine('wake')
    });
    tracker.currentChanged.connect((_, widget) => {
      if (widget) {
        server.select(widget.content.server);
      }
    });
    addServerCommands(app, server, { tracker, palette, trans });
    addViewCommands(app, server, { tracker, options, restorer, palette, trans });
    const inPalette = [
      CommandIds.open,
      CommandIds.setFeature,
      CommandIds.restartEngine,
      CommandIds.sleepEngine,
      CommandIds.wakeEngine
    ];
    for (const command of inPalette) {
      palette?.addItem({ command, category: CATEGORY });
    }

    if (restorer) {
      void restorer.restore(tracker, {
        command: CommandIds.open,
        args: ({ id, content: { server: shown } }) => ({ panel: id, server: shown, name: server.nameOf(shown) }),
        name: widget => widget.id
      });
    }
    settings
      ?.load(PluginIds.panel)
      .then(loaded => {
        const apply = () => {
          options.repaintRate = loaded.get('repaintRate').composite as number;
          options.windowSeconds = loaded.get('windowSeconds').composite as number;
          options.layout = loaded.get('layout').composite as LayoutName;
          tracker.forEach(widget => {
            widget.content.workbench.setRepaintRate(options.repaintRate!);
            widget.content.workbench.setWindow(options.windowSeconds!);
          });
        };
        apply();
        loaded.changed.connect(apply);
        if (loaded.get('startServer').composite === true) {
          server.use();
        }
      })
      .catch((error: unknown) => {
        server.current?.store.note('error', `The settings could not be read: ${String(error)}`);
      });
  }
};

const launcherPlugin: JupyterFrontEndPlugin<void> = {
  id: PluginIds.launcher,
  description: 'Adds the workbench to the launcher.',
  autoStart: true,
  requires: [ILauncher],
  activate: (_app: JupyterFrontEnd, launcher: ILauncher) => {
    launcher.add({ command: CommandIds.open, category: 'Other', rank: 1 });
    launcher.add({ command: CommandIds.openTeaching, category: 'Other', rank: 2 });
  }
};

const statusPlugin: JupyterFrontEndPlugin<void> = {
  id: PluginIds.status,
  description: 'Shows engine state, output rate and KV cache occupancy in the status bar.',
  autoStart: true,
  requires: [IInferenceServer, IStatusBar],
  optional: [ITranslator],
  activate: (app: JupyterFrontEnd, server: IInferenceServer, statusBar: IStatusBar, translator: ITranslator | null) => {
    const trans = (translator ?? nullTranslator).load(PLUGIN_NAMESPACE);
    const item = new StatusItem(
      trans,
      () => void app.commands.execute(CommandIds.open),
      () => (server.several ? server.nameOf(server.inUse) : null)
    );
    server.onUse(connection => item.watch(connection));
    statusBar.registerStatusItem(PluginIds.status, { item, align: 'left', rank: 20 });
  }
};

const teachingPlugin: JupyterFrontEndPlugin<void> = {
  id: PluginIds.teaching,
  description: 'Opens the first lesson beside the workbench: by command, by setting, or by the address of the page.',
  autoStart: true,
  optional: [ICommandPalette, IRouter, ISettingRegistry, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    palette: ICommandPalette | null,
    router: IRouter | null,
    settings: ISettingRegistry | null,
    translator: ITranslator | null
  ) => {
    const trans = (translator ?? nullTranslator).load(PLUGIN_NAMESPACE);
    app.commands.addCommand(CommandIds.openTeaching, {
      label: trans.__('Open the Teaching Layout'),
      caption: trans.__('The first lesson on the left, the workbench on the right'),
      icon: workbenchIcon,
      describedBy: {
        args: {
          type: 'object',
          properties: { path: { type: 'string', description: 'The notebook to open on the left.' } }
        }
      },
      execute: args => openTeachingLayout(app, args['path'] as string | undefined)
    });
    palette?.addItem({ command: CommandIds.openTeaching, category: CATEGORY });

    const asked = router ? new URLSearchParams(router.current.search).get(TEACH_PARAMETER) === 'teach' : false;
    void Promise.all([
      settings?.load(PluginIds.panel).then(
        loaded => loaded.get('openTeachingLayout').composite === true,
        () => false
      ),
      app.restored
    ]).then(([always]) => {
      if (asked || always) {
        void openTeachingLayout(app);
      }
    });
  }
};

const notebookPlugin: JupyterFrontEndPlugin<void> = {
  id: PluginIds.notebook,
  description: 'Adds a command that inserts the cell which connects a notebook to the workbench.',
  autoStart: true,
  requires: [INotebookTracker],
  optional: [IInferenceServer, ICommandPalette, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    notebooks: INotebookTracker,
    server: IInferenceServer | null,
    palette: ICommandPalette | null,
    translator: ITranslator | null
  ) => {
    const trans = (translator ?? nullTranslator).load(PLUGIN_NAMESPACE);
    if (server) {
      server.cells = code => Promise.resolve(insertCell(notebooks, code));
    }
    app.commands.addCommand(CommandIds.insertConnect, {
      label: trans.__('Insert a Cell That Connects to the Inference Server'),
      describedBy: { args: { type: 'object', properties: {} } },
      isEnabled: () => notebooks.currentWidget !== null,
      execute: () => {
        const instance = server && server.inUse !== OWN_SERVER ? server.inUse : null;
        return insertConnectCell(notebooks, instance);
      }
    });
    palette?.addItem({ command: CommandIds.insertConnect, category: CATEGORY });
  }
};

const plugins: JupyterFrontEndPlugin<unknown>[] = [
  serverPlugin,
  panelPlugin,
  launcherPlugin,
  statusPlugin,
  teachingPlugin,
  notebookPlugin,
  recordingsPlugin
];

export default plugins;
