// Bundles the anywidget module, the standalone replay and the style sheet: one file each, because a widget's code is
// loaded from a string and the replay's is written into an HTML file.
import { mkdir, readFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

import * as esbuild from 'esbuild';

const here = dirname(fileURLToPath(import.meta.url));
const extension = join(here, '..');
const outdir = join(extension, '..', 'workbench', 'inference_workbench', 'static');

/** Compiles BokehJS's class fields to assignments; see labextension.config.cjs for why. */
const bokehFields = {
  name: 'bokeh-class-fields',
  setup(build) {
    build.onLoad({ filter: /@bokeh[\\/]bokehjs[\\/]build[\\/]js[\\/]lib[\\/].*\.js$/ }, async ({ path }) => ({
      contents: await readFile(path, 'utf8'),
      loader: 'ts'
    }));
    // Typesetting for TeX labels and drawing by WebGL are loaded on demand and the plots never demand them: two of the
    // three megabytes.
    build.onResolve({ filter: /(text\/mathjax|glyphs\/webgl|\.\/webgl\/index|\.\/mathjax\/?(index)?)/ }, ({ kind }) =>
      kind === 'dynamic-import' ? { path: 'left-out', namespace: 'left-out' } : undefined
    );
    build.onLoad({ filter: /.*/, namespace: 'left-out' }, () => ({
      contents: 'throw new Error("This part of BokehJS is not in the widget.");'
    }));
  }
};

const options = {
  absWorkingDir: extension,
  entryPoints: { widget: 'src/widget.ts' },
  bundle: true,
  format: 'esm',
  target: 'es2022',
  minify: true,
  legalComments: 'none',
  outdir,
  logLevel: 'warning',
  tsconfigRaw: { compilerOptions: { useDefineForClassFields: false } },
  plugins: [bokehFields]
};
// One classic script with BokehJS in it: a page that was opened from a file may not import modules.
const replay = { ...options, entryPoints: { replay: 'src/replay.ts' }, format: 'iife' };
const styles = {
  absWorkingDir: extension,
  entryPoints: { widget: 'style/workbench.css' },
  bundle: true,
  minify: true,
  outdir,
  logLevel: 'warning'
};

await mkdir(outdir, { recursive: true });
if (process.argv.includes('--watch')) {
  for (const each of [options, replay, styles]) {
    await (await esbuild.context(each)).watch();
  }
} else {
  await Promise.all([options, replay, styles].map(each => esbuild.build(each)));
}
