/** Ids, tokens and types of the JupyterLab plugins. */

import { Token } from '@lumino/coreutils';

import type { SocketConnection } from '../telemetry/socket';

export const PLUGIN_NAMESPACE = 'inference-workbench';

export namespace PluginIds {
  export const server = `${PLUGIN_NAMESPACE}:server`;
  export const panel = `${PLUGIN_NAMESPACE}:plugin`;
  export const launcher = `${PLUGIN_NAMESPACE}:launcher`;
  export const status = `${PLUGIN_NAMESPACE}:status`;
  export const teaching = `${PLUGIN_NAMESPACE}:teaching`;
  export const notebook = `${PLUGIN_NAMESPACE}:notebook`;
}

export namespace CommandIds {
  export const open = 'inference-workbench:open';
  export const setFeature = 'inference-workbench:set-feature';
  export const restartEngine = 'inference-workbench:restart-engine';
  export const openTeaching = 'inference-workbench:open-teaching';
  export const insertConnect = 'inference-workbench:insert-connect';
}

/** The one connection of the page, made when first asked for. */
export interface IInferenceServer {
  /** Connect (which starts the server if none runs) and return the connection. */
  use(): SocketConnection;
  /** The connection, if anybody has asked for it. */
  readonly current: SocketConnection | null;
  /** Called when the connection is made. */
  onUse(listener: (connection: SocketConnection) => void): void;
}

export const IInferenceServer = new Token<IInferenceServer>(
  'inference-workbench:IInferenceServer',
  'The connection of this page to the inference server.'
);

/** The first lesson, relative to JupyterLab's root folder or below `notebooks/`. */
export const FIRST_LESSON = '01-first-tokens.ipynb';
