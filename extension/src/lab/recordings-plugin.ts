/** The JupyterLab plugin of recordings: their file type, the commands to make and open them, and what Open does. */

import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ILayoutRestorer } from '@jupyterlab/application';
import { ICommandPalette, InputDialog, MainAreaWidget, showErrorMessage, WidgetTracker } from '@jupyterlab/apputils';
import type { IDocumentWidget } from '@jupyterlab/docregistry';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import type { RecordingEvent } from '../telemetry/protocol';
import type { SocketConnection } from '../telemetry/socket';
import { bytes, count } from '../views/format';
import { clock } from '../views/recorder';
import { workbenchIcon } from './icon';
import {
  RECORDING_FACTORY,
  RECORDING_FILE_TYPE,
  recordingFileType,
  RecordingFactory,
  RecordingModelFactory,
  RecordingView
} from './recording-document';
import { OWN_SERVER } from './server-names';
import { CATEGORY, CommandIds, IInferenceServer, MODE_ARGUMENT, PLUGIN_NAMESPACE, PluginIds } from './tokens';

/** Where a server that JupyterLab started puts its recordings, relative to JupyterLab's root folder. */
const FOLDER = 'recordings';

export const recordingsPlugin: JupyterFrontEndPlugin<void> = {
  id: PluginIds.recordings,
  description: 'Opens recordings from the file browser, and adds the commands to make and to open them.',
  autoStart: true,
  requires: [IInferenceServer],
  optional: [ILayoutRestorer, ICommandPalette, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    server: IInferenceServer,
    restorer: ILayoutRestorer | null,
    palette: ICommandPalette | null,
    translator: ITranslator | null
  ) => {
    const trans = (translator ?? nullTranslator).load(PLUGIN_NAMESPACE);
    const { contents } = app.serviceManager;
    const tracker = new WidgetTracker<IDocumentWidget<RecordingView>>({ namespace: `${PLUGIN_NAMESPACE}-recordings` });
    const factory = new RecordingFactory(contents, { trans }, trans);
    app.docRegistry.addFileType(recordingFileType(trans));
    app.docRegistry.addModelFactory(new RecordingModelFactory());
    app.docRegistry.addWidgetFactory(factory);
    factory.widgetCreated.connect((_, widget) => {
      widget.context.pathChanged.connect(() => void tracker.save(widget));
      void tracker.add(widget);
    });
    if (restorer) {
      void restorer.restore(tracker, {
        command: 'docmanager:open',
        args: widget => ({ path: widget.context.path, factory: RECORDING_FACTORY }),
        name: widget => widget.context.path
      });
    }

    const open = async (id: string, event: RecordingEvent, mode?: string): Promise<void> => {
      const path = `${FOLDER}/${event.file ?? ''}`;
      // Another server has a folder of its own, in which a file of the same name is another recording.
      const beside = id === OWN_SERVER ? await contents.get(path, { content: false }).catch(() => null) : null;
      if (beside !== null) {
        const options = mode ? { options: { mode } } : {};
        await app.commands.execute('docmanager:open', { path, factory: RECORDING_FACTORY, ...options });
      } else {
        const held = server.hold(id);
        await openDownloaded(app, held.connection, id, event).finally(held.release);
      }
    };
    server.recordings = id => ({ open: event => open(id, event), openLabel: trans.__('Open') });

    app.commands.addCommand(CommandIds.startRecording, {
      label: trans.__('Start Recording'),
      caption: trans.__('Record everything that happens on the inference server into one file'),
      icon: workbenchIcon,
      describedBy: {
        args: {
          type: 'object',
          properties: { name: { type: 'string' }, note: { type: 'string' } }
        }
      },
      execute: args =>
        server.use().record({
          action: 'start',
          name: args['name'] as string | undefined,
          note: args['note'] as string | undefined
        })
    });
    app.commands.addCommand(CommandIds.stopRecording, {
      label: trans.__('Stop Recording'),
      icon: workbenchIcon,
      describedBy: { args: { type: 'object', properties: {} } },
      execute: () => server.use().record({ action: 'stop' })
    });
    app.commands.addCommand(CommandIds.openRecordings, {
      label: trans.__('Open Recordings…'),
      caption: trans.__('Choose one of the inference server’s recordings'),
      icon: workbenchIcon,
      describedBy: {
        args: {
          type: 'object',
          properties: {
            mode: MODE_ARGUMENT
          }
        }
      },
      execute: async args => {
        try {
          const id = server.inUse;
          const { recordings, folder } = await server.use().recordings();
          const finished = recordings.filter(each => each.state === 'finished');
          if (finished.length === 0) {
            await showErrorMessage(
              trans.__('No recordings'),
              trans.__('There is no finished recording in %1 yet. Press Record in the Inference Workbench.', folder)
            );
            return;
          }
          const labels = finished.map(each => describe(each));
          const { button, value } = await InputDialog.getItem({
            title: trans.__('Open a recording'),
            label: trans.__('Recordings in %1', folder),
            items: labels
          });
          const chosen = finished[labels.indexOf(value ?? '')];
          if (button.accept && chosen) {
            await open(id, chosen, args['mode'] as string | undefined);
          }
        } catch (error) {
          await showErrorMessage(trans.__('The recordings could not be opened'), errorText(error));
        }
      }
    });
    for (const command of [CommandIds.startRecording, CommandIds.stopRecording, CommandIds.openRecordings]) {
      palette?.addItem({ command, category: CATEGORY });
    }
  }
};

/** A recording that lies where JupyterLab cannot see it comes over the server's own connection. */
async function openDownloaded(
  app: JupyterFrontEnd,
  connection: SocketConnection,
  server: string,
  event: RecordingEvent
): Promise<void> {
  const view = new RecordingView({});
  const widget = new MainAreaWidget({ content: view });
  widget.id = `${RECORDING_FILE_TYPE}-${server}-${event.id}`;
  widget.title.label = event.file ?? event.name;
  widget.title.icon = workbenchIcon;
  widget.title.closable = true;
  widget.toolbar.hide();
  app.shell.add(widget, 'main');
  app.shell.activateById(widget.id);
  view.replay.say(`${event.file ?? event.name}, ${bytes(event.bytes)}…`);
  try {
    await view.open(await connection.download(event.id));
  } catch (error) {
    view.replay.fail(errorText(error));
  }
}

function describe(event: RecordingEvent): string {
  const facts = [clock(event.seconds), `${count(event.tokens)} tokens`, bytes(event.bytes)].join(', ');
  return `${event.name} (${facts}) ${event.file ?? ''}`;
}

function errorText(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
