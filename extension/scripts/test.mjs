// Bundles the tests and runs them with Node's own test runner.
import { spawnSync } from 'node:child_process';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

import * as esbuild from 'esbuild';

const extension = join(dirname(fileURLToPath(import.meta.url)), '..');
const outdir = await mkdtemp(join(tmpdir(), 'inference-workbench-tests-'));
const tests = (await readdir(join(extension, 'test'))).filter(name => name.endsWith('.test.ts'));
await esbuild.build({
  absWorkingDir: extension,
  entryPoints: tests.map(name => join('test', name)),
  bundle: true,
  format: 'esm',
  platform: 'node',
  outdir,
  outExtension: { '.js': '.mjs' },
  logLevel: 'warning'
});
const files = tests.map(name => join(outdir, name.replace(/\.ts$/, '.mjs')));
const env = { ...process.env, EXTENSION_ROOT: extension };
const { status } = spawnSync(process.execPath, ['--test', ...files], { stdio: 'inherit', env });
await rm(outdir, { recursive: true, force: true });
process.exit(status ?? 1);
