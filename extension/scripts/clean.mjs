// Removes every build output, so that a production build can never ship a stale file.
import { rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const extension = join(dirname(fileURLToPath(import.meta.url)), '..');
const outputs = [
  'lib',
  'tsconfig.tsbuildinfo',
  '../workbench/inference_workbench/labextension',
  '../workbench/inference_workbench/static'
];
await Promise.all(outputs.map(each => rm(join(extension, each), { recursive: true, force: true })));
