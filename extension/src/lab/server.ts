/**
 * The inference servers of this page: the one behind JupyterLab's proxy at `<base_url>/inference-workbench/`, which is
 * started when it is first asked for, and those that others started, at `<base_url>/inference-workbench-servers/…`. Owns
 * one connection to each that is shown, and which of them is in use.
 */

import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';

import type { ServerAddress } from '../telemetry/socket';
import { SocketConnection } from '../telemetry/socket';
import { TelemetryStore } from '../telemetry/store';
import type { CellHost } from '../views/prompt-box';
import type { RecordingHost } from '../views/recorder';
import type { Translation } from '../views/translation';
import type { ListedServer } from './server-names';
import { idOf, OWN_SERVER, ownName, serverFacts, serverName } from './server-names';
import type { HeldServer, IInferenceServer } from './tokens';
import { PLUGIN_NAMESPACE } from './tokens';

const LIST = `${PLUGIN_NAMESPACE}-servers`;
/** How soon a server that was started elsewhere is offered. Nobody asks while nothing is shown. */
const REFRESH_MS = 10_000;

class ProxiedServer implements ServerAddress {
  constructor(
    private readonly settings: ServerConnection.ISettings,
    private readonly prefix: string
  ) {}

  telemetryUrl(): string {
    const url = URLExt.join(this.settings.wsUrl, this.prefix, 'telemetry');
    const { token, appendToken } = this.settings;
    return appendToken && token ? `${url}?token=${encodeURIComponent(token)}` : url;
  }

  fetch(path: string, init: RequestInit): Promise<Response> {
    const url = URLExt.join(this.settings.baseUrl, this.prefix, path);
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

interface Open {
  connection: SocketConnection;
  holders: number;
}

export class InferenceServers implements IInferenceServer {
  recordings: ((server: string) => RecordingHost) | null = null;
  cells: CellHost | null = null;
  inUse = OWN_SERVER;
  private list: readonly ListedServer[] | null = null;
  private readonly open = new Map<string, Open>();
  /** Also of those that have ended. */
  private readonly names = new Map<string, string>();
  private readonly useListeners: ((connection: SocketConnection) => void)[] = [];
  private readonly changeListeners = new Set<() => void>();
  private timer: ReturnType<typeof setInterval> | null = null;

  constructor(
    private readonly settings: ServerConnection.ISettings,
    private readonly trans: Translation
  ) {}

  get current(): SocketConnection | null {
    return this.open.get(this.inUse)?.connection ?? null;
  }

  get listed(): readonly ListedServer[] {
    return this.list ?? [];
  }

  get several(): boolean {
    return this.listed.length > 1 || [...this.open].some(([id, { holders }]) => id !== OWN_SERVER && holders > 0);
  }

  use(): SocketConnection {
    return this.opened(this.inUse).connection;
  }

  select(id: string): void {
    if (id !== this.inUse) {
      this.inUse = id;
      if (this.current) {
        this.tellUse(this.current);
      } else {
        this.opened(id);
      }
      this.closeUnused();
      this.tell();
    }
  }

  hold(id: string): HeldServer {
    const held = this.opened(id);
    held.holders += 1;
    this.timer ??= setInterval(() => {
      if (!document.hidden) {
        void this.refresh();
      }
    }, REFRESH_MS);
    void this.refresh();
    let released = false;
    return {
      connection: held.connection,
      release: () => {
        if (!released) {
          released = true;
          held.holders -= 1;
          this.closeUnused();
          this.tell();
        }
      }
    };
  }

  onUse(listener: (connection: SocketConnection) => void): void {
    this.useListeners.push(listener);
    if (this.current) {
      listener(this.current);
    }
  }

  onChange(listener: () => void): () => void {
    this.changeListeners.add(listener);
    return () => this.changeListeners.delete(listener);
  }

  async refresh(): Promise<void> {
    try {
      const url = URLExt.join(this.settings.baseUrl, LIST);
      const response = await ServerConnection.makeRequest(url, {}, this.settings);
      if (!response.ok) {
        return;
      }
      this.list = ((await response.json()) as { servers: ListedServer[] }).servers;
    } catch {
      return; // JupyterLab itself is gone: the connections say so
    }
    for (const server of this.list) {
      this.names.set(idOf(server), serverName(server, this.list, this.trans));
    }
    this.closeUnused();
    this.tell();
  }

  nameOf(id: string): string {
    if (id === OWN_SERVER && !this.find(id)) {
      return ownName(this.open.get(id)?.connection.store.model?.name ?? null, this.trans);
    }
    return this.names.get(id) ?? this.trans.__('Inference server %1', id);
  }

  factsOf(id: string): string {
    const server = this.find(id);
    if (server) {
      return serverFacts(server, this.trans);
    }
    return this.hasEnded(id)
      ? this.trans.__('It has ended.')
      : id === OWN_SERVER
        ? this.trans.__('JupyterLab starts it when it is chosen.')
        : '';
  }

  hasEnded(id: string): boolean {
    return id !== OWN_SERVER && this.list !== null && !this.find(id);
  }

  remember(id: string, name: string): void {
    if (!this.names.has(id)) {
      this.names.set(id, name);
    }
  }

  private find(id: string): ListedServer | undefined {
    return this.listed.find(each => idOf(each) === id);
  }

  private opened(id: string): Open {
    let found = this.open.get(id);
    if (!found) {
      const prefix = id === OWN_SERVER ? PLUGIN_NAMESPACE : `${LIST}/${id}`;
      const connection = new SocketConnection(new TelemetryStore(), new ProxiedServer(this.settings, prefix));
      found = { connection, holders: 0 };
      this.open.set(id, found);
      let { state } = connection.status;
      connection.onStatus(() => {
        // Who came or went is told by the list; so is which model it serves.
        if (state !== connection.status.state) {
          state = connection.status.state;
          if (state === 'connected' || state === 'failed' || state === 'ended') {
            void this.refresh();
          }
        }
      });
      connection.connect();
      if (id === this.inUse) {
        this.tellUse(connection);
      }
    }
    return found;
  }

  private tellUse(connection: SocketConnection): void {
    this.useListeners.forEach(listener => listener(connection));
  }

  /** Nobody looks at a connection that no panel shows, but at the one of the status bar. */
  private closeUnused(): void {
    for (const [id, { connection, holders }] of this.open) {
      // An answer on its way is not cut off: the server would take that for a client that has left.
      if (holders === 0 && id !== this.inUse && !connection.generating) {
        this.open.delete(id);
        connection.dispose();
      }
    }
    if (this.timer !== null && [...this.open.values()].every(each => each.holders === 0)) {
      clearInterval(this.timer);
      this.timer = null;
    }
  }

  private tell(): void {
    this.changeListeners.forEach(listener => listener());
  }
}
