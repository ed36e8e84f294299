/** The state of the workbench as Python: a notebook cell that brings the server back to it and asks the same again. */

import type { FeatureValue, GenerateBody } from '../telemetry/protocol';
import type { TelemetryStore } from '../telemetry/store';

/**
 * Code that sets the switches that differ from their defaults, starts the traffic that runs, and generates what the
 * prompt box says. The last line shows the views. `instance` names a server that `connect()` alone would not find.
 */
export function reproducingCell(
  store: TelemetryStore,
  body: GenerateBody | null,
  instance: string | null = null
): string {
  const lines = ['import inference_workbench as iw', ''];
  const model = store.model ? `  # served ${store.model.name}, ${store.model.dtype} on ${store.model.device_name}` : '';
  lines.push(`${connectLine(instance)}${model}`);
  const values = store.specs.flatMap(spec => {
    const value = store.features?.values[spec.name];
    return value !== undefined && value !== spec.default && spec.available ? [`${spec.name}=${python(value)}`] : [];
  });
  if (values.length > 0) {
    lines.push(...call('wb.features.update', values));
  }
  const { traffic } = store;
  if (traffic?.state === 'running') {
    const { workload } = traffic;
    const named = [python(workload.name)];
    if (workload.arrivals?.kind === 'closed') {
      named.push(`concurrency=${workload.arrivals.concurrency}`);
    } else if (workload.arrivals?.kind === 'trace') {
      named.push(`arrivals={"kind": "trace", "times_s": [${workload.arrivals.times_s.join(', ')}]}`);
    } else if (workload.arrivals) {
      named.push(`rate=${workload.arrivals.rate}`, `burstiness=${workload.arrivals.burstiness}`);
    }
    if (workload.output_tokens) {
      named.push(`output_tokens=(${workload.output_tokens.low}, ${workload.output_tokens.high})`);
    }
    if (workload.shared_prefix_tokens !== undefined) {
      named.push(`shared_prefix_tokens=${workload.shared_prefix_tokens}`);
    }
    lines.push(...call('wb.traffic.start', named));
  }
  if (body !== null) {
    const prompt = body.messages
      ? `[{"role": "user", "content": ${python(body.messages[0].content)}}]`
      : python(body.prompt ?? '');
    const options = [`max_tokens=${body.max_tokens}`, `temperature=${body.temperature}`];
    if (body.ignore_eos) {
      options.push('ignore_eos=True');
    }
    if (body.seed !== undefined) {
      options.push(`seed=${body.seed}`);
    }
    if (body.n > 1) {
      lines.push(...call('runs = wb.generate_many', [`[${prompt}] * ${body.n}`, ...options]));
    } else {
      lines.push(...call('run = wb.generate', [prompt, ...options]));
    }
  }
  lines.push('wb.panel()');
  return lines.join('\n');
}

/** The line that connects a notebook to the server of one instance, or to the one it finds by itself. */
export function connectLine(instance: string | null): string {
  return `wb = iw.connect(${instance === null ? '' : `instance=${python(instance)}`})`;
}

/** A value as Python writes it. JSON's strings are Python's, but for what lies outside of Unicode's first plane. */
export function python(value: FeatureValue): string {
  return typeof value === 'boolean' ? (value ? 'True' : 'False') : JSON.stringify(value);
}

/** One call, over several lines where it would be too long. */
function call(name: string, values: readonly string[]): string[] {
  const line = `${name}(${values.join(', ')})`;
  return line.length <= 100 ? [line] : [`${name}(`, ...values.map(value => `    ${value},`), ')'];
}
