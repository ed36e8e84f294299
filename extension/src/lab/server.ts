/** Where the inference server is for this page: behind JupyterLab's proxy, at `<base_url>/inference-workbench/`. */

import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';

import type { ServerAddress } from '../telemetry/socket';
import { SocketConnection } from '../telemetry/socket';
import { TelemetryStore } from '../telemetry/store';
import type { CellHost } from '../views/prompt-box';
import type { RecordingHost } from '../views/recorder';
import type { IInferenceServer } from './tokens';
import { PLUGIN_NAMESPACE } from './tokens';

class ProxiedServer implements ServerAddress {
  constructor(private readonly settings: ServerConnection.ISettings) {}

  telemetryUrl(): string {
    const url = URLExt.join(this.settings.wsUrl, PLUGIN_NAMESPACE, 'telemetry');
    const { token, appendToken } = this.settings;
    return appendToken && token ? `${url}?token=${encodeURIComponent(token)}` : url;
  }

  fetch(path: string, init: RequestInit): Promise<Response> {
    const url = URLExt.join(this.settings.baseUrl, PLUGIN_NAMESPACE, path);
    // Unlike the kernel API, an event stream comes only to who asks for it by name: see the callers' Accept header.
    return ServerConnection.makeRequest(url, init, this.settings);
  }

  async hostAnswers(): Promise<boolean> {
    try {
      await ServerConnection.makeRequest(URLExt.join(this.settings.baseUrl, 'api'), { method: 'GET' }, this.settings);
      return true;
    } catch {
      return false;
    }
  }
}

export class InferenceServer implements IInferenceServer {
  current: SocketConnection | null = null;
  recordings: RecordingHost | null = null;
  cells: CellHost | null = null;
  private readonly listeners: ((connection: SocketConnection) => void)[] = [];

  constructor(private readonly settings: ServerConnection.ISettings) {}

  use(): SocketConnection {
    if (this.current === null) {
      const connection = new SocketConnection(new TelemetryStore(), new ProxiedServer(this.settings));
      this.current = connection;
      connection.connect();
      this.listeners.forEach(listener => listener(connection));
    }
    return this.current;
  }

  onUse(listener: (connection: SocketConnection) => void): void {
    this.listeners.push(listener);
    if (this.current) {
      listener(this.current);
    }
  }
}
