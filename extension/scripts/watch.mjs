// Rebuilds everything as sources change: type-checked library, JupyterLab bundle, widget bundle.
import { spawn } from 'node:child_process';

const commands = [
  ['jlpm', ['tsc', '--project', 'tsconfig.build.json', '--watch', '--preserveWatchOutput']],
  ['jupyter-builder', ['watch', '.']],
  ['node', ['scripts/widget.mjs', '--watch']]
];
const children = commands.map(([command, args]) => spawn(command, args, { stdio: 'inherit' }));
const stop = () => children.forEach(child => child.kill());
process.on('SIGINT', stop);
process.on('SIGTERM', stop);
