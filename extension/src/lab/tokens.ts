/** Ids, tokens and types of the JupyterLab plugins. */

import { Token } from '@lumino/coreutils';

import type { SocketConnection } from '../telemetry/socket';
import type { CellHost } from '../views/prompt-box';
import type { RecordingHost } from '../views/recorder';
import type { ListedServer } from './server-names';

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
  openServer: 'inference-workbench:open-server',
  chooseServer: 'inference-workbench:choose-server',
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

/** A connection that stays open until everybody who holds it has let go. */
export interface HeldServer {
  readonly connection: SocketConnection;
  release(): void;
}

/**
 * The servers of this page and its connections to them, made when first asked for. A server's id is its instance, or
 * `OWN_SERVER` for the one that JupyterLab starts.
 */
export interface IInferenceServer {
  /** Id of the server in use: that of the panel used last, which the status bar and the commands speak of. */
  readonly inUse: string;
  /** Connect to the server in use (which starts JupyterLab's own if none runs) and return the connection. */
  use(): SocketConnection;
  /** The connection to the server in use, if anybody has asked for it. */
  readonly current: SocketConnection | null;
  /** Use another server from now on. */
  select(id: string): void;
  /** Connect to a server, and keep the connection. */
  hold(id: string): HeldServer;
  /** Called when the connection in use is made, and when it becomes another one. */
  onUse(listener: (connection: SocketConnection) => void): void;
  /** Those that run, as of the last look. */
  readonly listed: readonly ListedServer[];
  /** Whether names are needed to tell servers apart. */
  readonly several: boolean;
  /** Look again who runs. */
  refresh(): Promise<void>;
  /** Somebody came or went, or is called otherwise. */
  onChange(listener: () => void): () => void;
  nameOf(id: string): string;
  factsOf(id: string): string;
  /** It does not run any more. */
  hasEnded(id: string): boolean;
  /** Say what a server was called, in case it does not run any more. */
  remember(id: string, name: string): void;
  /** What the page does with a finished recording of a server; null where the plugin for it is disabled. */
  recordings: ((server: string) => RecordingHost) | null;
  /** Puts code into a notebook; null where the plugin for it is disabled. */
  cells: CellHost | null;
}

export const IInferenceServer = new Token<IInferenceServer>(
  'inference-workbench:IInferenceServer',
  'The connections of this page to inference servers.'
);

/** The first lesson, relative to JupyterLab's root folder or below `notebooks/`. */
export const FIRST_LESSON = '01-first-tokens.ipynb';

/** Schema of a command's argument that says where to put what it opens. */
export const MODE_ARGUMENT = {
  type: 'string',
  enum: ['tab-after', 'split-right', 'split-left', 'split-top', 'split-bottom'],
  description: 'Where to put it relative to the current tab.'
};
