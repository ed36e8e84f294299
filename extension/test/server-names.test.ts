import assert from 'node:assert/strict';
import { test } from 'node:test';

import type { ListedServer } from '../src/lab/server-names';
import { idOf, OWN_SERVER, ownName, serverFacts, serverName } from '../src/lab/server-names';
import { untranslated } from '../src/views/translation';

function server(values: Partial<ListedServer>): ListedServer {
  return {
    instance: 'a',
    origin: 'cli',
    own: false,
    kind: 'url',
    pid: 1,
    version: '0.1.0',
    started: 0,
    model: 'SmolLM2',
    engine: 'ready',
    ...values
  };
}

test('a name says origin and model, and the process only where two would be called the same', () => {
  const own = server({ instance: 'own', origin: 'jupyter', own: true });
  const elsewhere = server({ instance: 'b', origin: 'jupyter' });
  const one = server({ instance: 'c', pid: 11 });
  const two = server({ instance: 'd', pid: 12 });
  const kernel = server({ instance: 'e', origin: 'kernel', model: null });
  const all = [own, elsewhere, one, two, kernel];
  assert.deepEqual(
    all.map(each => serverName(each, all, untranslated)),
    [
      'JupyterLab · SmolLM2',
      'another JupyterLab · SmolLM2',
      'command line (pid 11) · SmolLM2',
      'command line (pid 12) · SmolLM2',
      'notebook'
    ]
  );
  assert.equal(serverName(one, [one, own], untranslated), 'command line · SmolLM2');
});

test('the own server keeps its id and its name through all its starts', () => {
  const own = server({ instance: 'first', origin: 'jupyter', own: true });
  assert.equal(idOf(own), OWN_SERVER);
  assert.equal(idOf({ ...own, instance: 'second' }), OWN_SERVER);
  assert.equal(ownName('SmolLM2', untranslated), serverName(own, [own], untranslated));
  assert.equal(ownName(null, untranslated), 'JupyterLab');
  assert.equal(idOf(server({ instance: 'c' })), 'c');
});

test('the facts tell a server that does not answer from one whose engine is down', () => {
  assert.match(serverFacts(server({ engine: null }), untranslated), /engine does not answer/);
  assert.match(serverFacts(server({ engine: 'failed' }), untranslated), /process 1, version 0\.1\.0, engine failed/);
});
