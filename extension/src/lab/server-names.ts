/** What a person calls an inference server: who started it, first because a tab cuts the end off, and the model. */

import type { Translation } from '../views/translation';

/** The server that JupyterLab itself starts, which keeps this name through all its starts. */
export const OWN_SERVER = 'jupyterlab';

/** One line of `GET <base_url>/inference-workbench-servers`; `workbench/inference_workbench/jupyter/listing.py` makes it. */
export interface ListedServer {
  instance: string;
  origin: 'jupyter' | 'cli' | 'kernel';
  /** Whether it is the one that this JupyterLab started. */
  own: boolean;
  kind: 'url' | 'uds';
  pid: number;
  version: string;
  started: number;
  model: string | null;
  engine: string | null;
}

/** What a server is chosen by: its instance, or {@link OWN_SERVER}. */
export function idOf(server: ListedServer): string {
  return server.own ? OWN_SERVER : server.instance;
}

/** What can be chosen: JupyterLab's own server, also while it does not run, and then the others. */
export function idsOf(listed: readonly ListedServer[]): string[] {
  return [...new Set([OWN_SERVER, ...listed.map(idOf)])];
}

function originName(server: Pick<ListedServer, 'origin' | 'own'>, trans: Translation): string {
  switch (server.origin) {
    case 'jupyter':
      return server.own ? trans.__('JupyterLab') : trans.__('another JupyterLab');
    case 'cli':
      return trans.__('command line');
    case 'kernel':
      return trans.__('notebook');
  }
}

/** "command line · SmolLM2-135M-Instruct"; of two that would be called the same, each with its process id. */
export function serverName(server: ListedServer, all: readonly ListedServer[], trans: Translation): string {
  const origin = originName(server, trans);
  const twin = all.some(
    each => each.instance !== server.instance && each.model === server.model && originName(each, trans) === origin
  );
  return joined(twin ? trans.__('%1 (pid %2)', origin, server.pid) : origin, server.model);
}

/** What there is to know about a server, for a tooltip. */
export function serverFacts(server: ListedServer, trans: Translation): string {
  return trans.__(
    '%1, instance %2, process %3, version %4, engine %5',
    originName(server, trans),
    server.instance,
    server.pid,
    server.version,
    server.engine ?? trans.__('does not answer')
  );
}

/** The name of JupyterLab's own server while it is not in the list: nobody has asked for it, or the list is on its way. */
export function ownName(model: string | null, trans: Translation): string {
  return joined(trans.__('JupyterLab'), model);
}

function joined(origin: string, model: string | null): string {
  return model === null ? origin : `${origin} · ${model}`;
}
