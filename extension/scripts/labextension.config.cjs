// What the JupyterLab bundle needs beyond the builder's defaults.
//
// BokehJS ships native class fields. They run after the base constructor has called `initialize()` and overwrite what it
// set, so its ESM build breaks at run time unless the fields are compiled to plain assignments that TypeScript would drop.
module.exports = {
  // BokehJS names source maps that its package does not hold.
  ignoreWarnings: [/Failed to parse source map/],
  module: {
    rules: [
      {
        test: /\.js$/,
        include: /@bokeh[\\/]bokehjs[\\/]build[\\/]js[\\/]lib/,
        loader: 'builtin:swc-loader',
        options: {
          jsc: {
            parser: { syntax: 'typescript' },
            target: 'es2021',
            transform: { useDefineForClassFields: false }
          }
        },
        type: 'javascript/auto'
      }
    ]
  }
};
