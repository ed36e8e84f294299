/**
 * Commands about views: one figure in a pane of its own, which can be dragged and tiled like any other; whole layouts by
 * one command; projector and pause. Owns the panes of single figures and their restoration.
 */

import type { ILayoutRestorer, JupyterFrontEnd } from '@jupyterlab/application';
import type { ICommandPalette, MainAreaWidget } from '@jupyterlab/apputils';
import { WidgetTracker } from '@jupyterlab/apputils';

import { figuresOf, LAYOUTS } from '../views/arrangement';
import type { LayoutName } from '../views/arrangement';
import type { Translation } from '../views/translation';
import type { WorkbenchOptions } from '../views/workbench';
import { workbenchIcon } from './icon';
import { PANEL_ID, tabOf, WorkbenchPanel } from './panel';
import { SERVER_ARGUMENT } from './server-commands';
import type { IInferenceServer } from './tokens';
import { CATEGORY, CommandIds, MODE_ARGUMENT, PLUGIN_NAMESPACE } from './tokens';

type Pane = MainAreaWidget<WorkbenchPanel>;

/** Figures that can stand alone, by their names in the views. */
const VIEWS = [
  'timeline',
  'latency',
  'attribution',
  'batch',
  'speculation',
  'kv',
  'kv-map',
  'memory',
  'histogram',
  'roofline',
  'economy',
  'events'
] as const;

export interface ViewCommandOptions {
  tracker: WidgetTracker<Pane>;
  options: WorkbenchOptions;
  restorer: ILayoutRestorer | null;
  palette: ICommandPalette | null;
  trans: Translation;
}

export function addViewCommands(
  app: JupyterFrontEnd,
  server: IInferenceServer,
  { tracker, options, restorer, palette, trans }: ViewCommandOptions
): void {
  const panes = new WidgetTracker<Pane>({ namespace: `${PLUGIN_NAMESPACE}-views` });
  const titles: Record<(typeof VIEWS)[number], string> = {
    timeline: trans.__('Requests over time'),
    latency: trans.__('Latency against position'),
    attribution: trans.__('Where the tokens’ time went'),
    batch: trans.__('Batch composition per step'),
    speculation: trans.__('Speculation'),
    kv: trans.__('KV cache occupancy'),
    'kv-map': trans.__('KV cache, block by block'),
    memory: trans.__('Memory of the device'),
    histogram: trans.__('Latency distribution'),
    roofline: trans.__('Roofline'),
    economy: trans.__('Throughput and cost'),
    events: trans.__('Events')
  };
  const isView = (name: unknown): name is (typeof VIEWS)[number] => VIEWS.some(each => each === name);
  // A figure belongs to the panel that was used last when it was opened, and shows the server that the panel shows.
  const owners = new WeakMap<Pane, string>();
  let lastPanel = PANEL_ID;
  tracker.currentChanged.connect((_, panel) => {
    lastPanel = panel?.id ?? lastPanel;
  });
  panes.currentChanged.connect((_, pane) => {
    if (pane) {
      lastPanel = owners.get(pane) ?? lastPanel;
      server.select(pane.content.server);
    }
  });
  tracker.widgetAdded.connect((_, panel) => {
    panel.content.onServer(id =>
      panes.filter(pane => owners.get(pane) === panel.id).forEach(pane => pane.content.showServer(id))
    );
  });
  const serverOf = (panel: string) => tracker.find(each => each.id === panel)?.content.server;
  const open = (view: (typeof VIEWS)[number], { mode, ref, panel = lastPanel, shown, name }: Place): Pane => {
    const id = PANE_ID + view + panel.slice(PANEL_ID.length);
    let pane = panes.find(each => each.id === id);
    if (!pane || pane.isDisposed) {
      if (shown !== undefined && name !== undefined) {
        server.remember(shown, name);
      }
      const content = new WorkbenchPanel(server, {
        ...options,
        only: view,
        server: shown ?? serverOf(panel) ?? server.inUse,
        heading: titles[view]
      });
      pane = tabOf(content, id, panes);
      owners.set(pane, panel);
    }
    if (!pane.isAttached) {
      app.shell.add(pane, 'main', { ...(mode && { mode: mode as 'split-right' }), ...(ref && { ref }) });
    }
    app.shell.activateById(pane.id);
    return pane;
  };

  app.commands.addCommand(CommandIds.openView, {
    label: args =>
      isView(args['view'])
        ? trans.__('Open “%1” in a Pane of Its Own', titles[args['view']])
        : trans.__('Open a View in a Pane of Its Own'),
    icon: workbenchIcon,
    describedBy: {
      args: {
        type: 'object',
        required: ['view'],
        properties: {
          view: { type: 'string', enum: [...VIEWS], description: 'Which figure.' },
          mode: MODE_ARGUMENT,
          server: { ...SERVER_ARGUMENT, description: `${SERVER_ARGUMENT.description} Left out: the panel’s.` },
          panel: { type: 'string', description: 'Id of the panel that it belongs to; left out: the one used last.' },
          name: { type: 'string', description: 'What the server was called, should it not run any more.' }
        }
      }
    },
    execute: args => {
      const { view, mode, server: shown, panel, name } = args as Place & { view?: unknown; server?: string };
      if (!isView(view)) {
        throw new Error(trans.__('There is no view “%1”. The views are: %2.', String(view), VIEWS.join(', ')));
      }
      return open(view, { mode: mode ?? 'split-right', shown, panel, name });
    }
  });
  for (const view of VIEWS) {
    palette?.addItem({ command: CommandIds.openView, category: CATEGORY, args: { view } });
  }

  const names: Record<LayoutName | 'compare', string> = {
    all: trans.__('Show All Views'),
    teach: trans.__('Show the Views for Teaching'),
    profile: trans.__('Open the Profiling Layout'),
    memory: trans.__('Show the Views of Memory'),
    money: trans.__('Show the Views of Cost'),
    compare: trans.__('Compare a Recording with What Happens Now')
  };
  app.commands.addCommand(CommandIds.openLayout, {
    label: args => names[(args['layout'] as LayoutName | 'compare' | undefined) ?? 'profile'],
    icon: workbenchIcon,
    describedBy: {
      args: {
        type: 'object',
        properties: {
          layout: { type: 'string', enum: [...LAYOUTS, 'compare'], description: 'Which layout.' }
        }
      }
    },
    execute: async args => {
      const layout = (args['layout'] as LayoutName | 'compare' | undefined) ?? 'profile';
      const panel = (await app.commands.execute(CommandIds.open)) as Pane;
      if (layout === 'compare') {
        // The recording opens beside the panel; both have the same views over the same axes of steps.
        panel.content.workbench.arrangement.setLayout('profile');
        await app.commands.execute(CommandIds.openRecordings, { mode: 'split-right' });
        return;
      }
      panel.content.workbench.arrangement.setLayout(layout === 'profile' ? 'teach' : layout);
      if (layout === 'profile') {
        // Panes of their own, two by two to the right of the panel: each can be dragged elsewhere.
        const [first, second, third] = figuresOf('profile', VIEWS).filter(isView);
        const top = open(first, { mode: 'split-right', ref: panel.id, panel: panel.id });
        const middle = open(second, { mode: 'split-bottom', ref: top.id, panel: panel.id });
        open(third, { mode: 'split-bottom', ref: middle.id, panel: panel.id });
        app.shell.activateById(panel.id);
      }
    }
  });
  for (const layout of [...LAYOUTS, 'compare']) {
    palette?.addItem({ command: CommandIds.openLayout, category: CATEGORY, args: { layout } });
  }

  const current = () => tracker.currentWidget?.content.workbench.arrangement ?? null;
  app.commands.addCommand(CommandIds.projector, {
    label: trans.__('Projector Mode'),
    caption: trans.__('Large print for a room: one number, the tokens and one figure'),
    describedBy: { args: { type: 'object', properties: {} } },
    isEnabled: () => current() !== null,
    isToggled: () => current()?.projector ?? false,
    execute: () => current()?.setProjector(!current()!.projector)
  });
  app.commands.addCommand(CommandIds.pause, {
    label: trans.__('Pause the Views'),
    caption: trans.__('The engine goes on'),
    describedBy: { args: { type: 'object', properties: {} } },
    isEnabled: () => current() !== null,
    isToggled: () => current()?.paused ?? false,
    execute: () => current()?.setPaused(!current()!.paused)
  });
  for (const command of [CommandIds.projector, CommandIds.pause]) {
    palette?.addItem({ command, category: CATEGORY });
  }

  if (restorer) {
    void restorer.restore(panes, {
      command: CommandIds.openView,
      args: pane => ({
        view: pane.content.only ?? '',
        mode: 'tab-after',
        panel: owners.get(pane) ?? PANEL_ID,
        server: pane.content.server,
        name: server.nameOf(pane.content.server)
      }),
      name: pane => pane.id.slice(PANE_ID.length)
    });
  }
}

const PANE_ID = 'inference-workbench-view-';

/** Where to put a figure, and of which panel and server it is one. */
interface Place {
  mode?: string;
  ref?: string;
  panel?: string;
  shown?: string;
  name?: string;
}
