/** Ids, tokens and types of the JupyterLab plugins. */

import { Token } from '@lumino/coreutils';

import type { SocketConnection } from '../telemetry/socket';
import type { CellHost } from '../views/prompt-box';
import type { RecordingHost } from '../views/recorder';

export const PLUGIN_NAMESPACE = 'inference-workbench';
/** Of the commands, in the palette. */
export const CATEGORY = 'Inference Workbench';

export const PluginIds = {
  server: `${PLUGIN_NAMESPACE}:server`,
  panel: `${PLUGIN_NAMESPACE}:plugin`,
  launcher: `${PLUGIN_NAMESPACE}:launcher`,
  status: `${PLUGIN_NAMESPACE}:status`,
  teaching: `${PLUGIN_NAMESPACE}:teaching`,
  notebook: `${PLUGIN_NAMESPACE}:notebook`,
  recordings: `${PLUGIN_NAMESPACE}:recordings`
} as const;

export const CommandIds = {
  open: 'inference-workbench:open',
  setFeature: 'inference-workbench:set-feature',
  restartEngine: 'inference-workbench:restart-engine',
  sleepEngine: 'inference-workbench:sleep-engine',
  wakeEngine: 'inference-workbench:wake-engine',
  openTeaching: 'inference-workbench:open-teaching',
  insertConnect: 'inference-workbench:insert-connect',
  startRecording: 'inference-workbench:start-recording',
  stopRecording: 'inference-workbench:stop-recording',
  openRecordings: 'inference-workbench:open-recordings',
  openView: 'inference-workbench:open-view',
  openLayout: 'inference-workbench:open-layout',
  projector: 'inference-workbench:toggle-projector',
  pause: 'inference-workbench:toggle-pause'
} as const;

/** The one connection of the page, made when first asked for. */
export interface IInferenceServer {
  /** Connect (which starts the server if none runs) and return the connection. */
  use(): SocketConnection;
  /** The connection, if anybody has asked for it. */
  readonly current: SocketConnection | null;
  /** What the page does with a finished recording; null where the plugin for it is disabled. */
  recordings: RecordingHost | null;
  /** Puts code into a notebook; null where the plugin for it is disabled. */
  cells: CellHost | null;
  /** Called when the connection is made. */
  onUse(listener: (connection: SocketConnection) => void): void;
}

export const IInferenceServer = new Token<IInferenceServer>(
  'inference-workbench:IInferenceServer',
  'The connection of this page to the inference server.'
);

/** The first lesson, relative to JupyterLab's root folder or below `notebooks/`. */
export const FIRST_LESSON = '01-first-tokens.ipynb';

/** Schema of a command's argument that says where to put what it opens. */
export const MODE_ARGUMENT = {
  type: 'string',
  enum: ['tab-after', 'split-right', 'split-left', 'split-top', 'split-bottom'],
  description: 'Where to put it relative to the current tab.'
};
