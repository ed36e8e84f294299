/** Sentences that several views say: about switches, requests and the engine. */

import type { EngineEvent, FeaturesEvent, FeatureValue, RecordingEvent, RequestEvent } from '../telemetry/protocol';
import { Kind, Origin } from '../telemetry/protocol';
import { proposalBehind } from '../telemetry/speculation';
import type { TelemetryStore, TokenRecord } from '../telemetry/store';
import { bytes, count, duration, ordinal } from './format';
import type { Translation } from './translation';
import type { ViewContext } from './view';

/** "on", "off", or the value itself. */
export function valueName(value: FeatureValue | undefined, trans: Translation): string {
  return value === true ? trans.__('on') : value === false ? trans.__('off') : String(value);
}

/** "kv_cache off, max_num_seqs 8". */
export function changes(
  event: FeaturesEvent,
  trans: Translation,
  title: (name: string) => string = name => name
): string {
  return event.changed.map(name => `${title(name)} ${valueName(event.values[name], trans)}`).join(', ');
}

/** What a switch cost, as measured: "applied in 0.42 ms · caught up after 85.0 ms, 3 requests recomputed 412 tokens". */
export function describeSwitch(event: FeaturesEvent, trans: Translation): string {
  const parts = [trans.__('applied in %1', duration(event.apply_ns))];
  if (event.preempted > 0) {
    const requests = event.preempted === 1 ? trans.__('1 request') : trans.__('%1 requests', event.preempted);
    const work = count(event.recompute_tokens);
    parts.push(
      event.settled_ns === null
        ? event.recompute_tokens > 0
          ? trans.__('%1 catching up on %2 tokens', requests, work)
          : trans.__('%1 catching up', requests)
        : event.recompute_tokens > 0
          ? trans.__(
              'caught up after %1, %2 recomputed %3 tokens',
              duration(event.settled_ns - event.applied_ns),
              requests,
              work
            )
          : trans.__('caught up after %1, %2', duration(event.settled_ns - event.applied_ns), requests)
    );
  }
  return parts.join(' · ');
}

export function describeRequest(event: RequestEvent, trans: Translation): string {
  const { request, output_tokens: tokens } = event;
  switch (event.state) {
    case 'failed':
      return trans.__('Request #%1 failed: %2', request, event.error ?? trans.__('no reason was given'));
    case 'preempted':
      return trans.__('Request #%1 was preempted after %2 tokens', request, tokens);
    case 'cancelled':
      return trans.__('Request #%1 was cancelled after %2 tokens', request, tokens);
    case 'finished':
      return event.finish_reason === 'length'
        ? trans.__('Request #%1 reached its limit of %2 tokens', request, tokens)
        : trans.__('Request #%1 finished after %2 tokens', request, tokens);
    case 'queued':
      return trans.__('Request #%1 is queued', request);
    case 'running':
      return trans.__('Request #%1 is running', request);
  }
}

export function describeEngine(event: EngineEvent, trans: Translation): string {
  const states = {
    starting: trans.__('Engine starting'),
    loading: trans.__('Engine loading'),
    ready: trans.__('Engine ready'),
    asleep: trans.__('Engine asleep'),
    failed: trans.__('Engine failed'),
    restarting: trans.__('Engine restarting'),
    stopped: trans.__('Engine stopped')
  };
  return event.message ? `${states[event.state]}: ${event.message}` : states[event.state];
}

export function describeRecording(event: RecordingEvent, trans: Translation): string {
  const { name, state } = event;
  switch (state) {
    case 'recording':
      return trans.__('Recording “%1” began', name);
    case 'finishing':
      return trans.__('Recording “%1” is being turned into a file', name);
    case 'finished':
      return trans.__('Recording “%1” is finished: %2, %3 tokens', name, bytes(event.bytes), count(event.tokens));
    case 'failed':
      return trans.__('Recording “%1” failed: %2', name, event.message || trans.__('no reason was given'));
  }
}

export function kindName(kind: Kind, trans: Translation): string {
  switch (kind) {
    case Kind.Prefill:
      return trans.__('prefill');
    case Kind.Decode:
      return trans.__('decode');
    case Kind.Recompute:
      return trans.__('recompute');
    case Kind.Draft:
      return trans.__('draft');
    case Kind.Verify:
      return trans.__('verify');
  }
}

/** What a long message says first: the rest (a log's last lines, a path) is for the event feed. */
export function firstSentence(text: string): string {
  const end = /\.(\s|$)/.exec(text);
  return end ? text.slice(0, end.index + 1) : text;
}

/** "accepted, 2nd of 4 proposed in step 118": how a token came about. */
export function provenance(store: TelemetryStore, token: TokenRecord, trans: Translation): string {
  const proposal = proposalBehind(store, token);
  const { step } = token;
  if (proposal === null || token.origin === Origin.Plain) {
    const alone: Record<Origin, string> = {
      [Origin.Plain]: trans.__('plain: nothing was proposed in its place'),
      [Origin.Accepted]: trans.__('accepted'),
      [Origin.Corrected]: trans.__('corrected'),
      [Origin.Bonus]: trans.__('bonus')
    };
    return alone[token.origin];
  }
  const { drafted, accepted, place } = proposal;
  switch (token.origin) {
    case Origin.Accepted:
      return trans.__('accepted, %1 of %2 proposed in step %3', ordinal(place), drafted, step);
    case Origin.Bonus:
      return trans.__('bonus: the model’s own after all %1 proposed in step %2 were accepted', drafted, step);
    default:
      return trans.__(
        'corrected: the model’s own in place of the %1 of %2 proposed in step %3; %4 rejected',
        ordinal(accepted + 1),
        drafted,
        step,
        drafted - accepted
      );
  }
}

/** Why there is no proposed token to be seen. */
export function nothingProposed({ store, connection, trans }: ViewContext): string {
  const method = store.features?.values['speculation'];
  if (connection.readOnly) {
    return trans.__('No token was proposed here: nothing of this recording that is in view was speculation.');
  }
  if (method === undefined || method === 'off') {
    return trans.__(
      'No token was proposed here: speculation is off. Choose who proposes at the switch “%1”.',
      speculationTitle(store)
    );
  }
  return trans.__(
    'No token was proposed here, though speculation (%1) is on: nothing fitting was found, it came too late, or it was not expected to pay.',
    String(method)
  );
}

function speculationTitle(store: TelemetryStore): string {
  return store.specs.find(each => each.name === 'speculation')?.title ?? 'speculation';
}
