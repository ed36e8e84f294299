/** The parts of a token's latency: what each is called, what it means, and its colour and hatch. */

import type { Part } from '../telemetry/protocol';
import { PARTS } from '../telemetry/protocol';
import { PHASE, PHASE_ON_DARK } from './colours';
import type { Theme } from './theme';
import type { Translation } from './translation';

/** Never colour alone: parts that share a hue differ in their hatch. */
export type Hatch = 'none' | 'diagonal' | 'dots' | 'vertical' | 'horizontal' | 'cross';

export interface PartLook {
  fill: string;
  hatch: Hatch;
  /** Of the hatch and the border. */
  line: string;
}

export function partName(part: Part, trans: Translation): string {
  const names: Record<Part, string> = {
    tokenize: trans.__('tokenize'),
    queue: trans.__('queue'),
    prefill: trans.__('own prefill'),
    recompute: trans.__('recompute'),
    others_prefill: trans.__('others’ prefill'),
    stall: trans.__('stall'),
    draft: trans.__('draft'),
    forward: trans.__('forward'),
    attention: trans.__('attention'),
    sampling: trans.__('sampling'),
    host: trans.__('host'),
    transport: trans.__('transport'),
    detokenize: trans.__('detokenize'),
    send: trans.__('send'),
    unexplained: trans.__('unexplained')
  };
  return names[part];
}

export function partMeaning(part: Part, trans: Translation): string {
  const meanings: Record<Part, string> = {
    tokenize: trans.__('The front turned the text into tokens and handed them to the engine.'),
    queue: trans.__('Waiting until the first step that worked on it.'),
    prefill: trans.__('Computing its own prompt.'),
    recompute: trans.__('Computing its earlier positions again, after a switch or a preemption.'),
    others_prefill: trans.__('Prompts of other requests that were computed in the same step.'),
    stall: trans.__('Steps that ran without it: preempted, or waiting behind others.'),
    draft: trans.__('Proposing tokens ahead.'),
    forward: trans.__('The model’s forward pass, for this step’s tokens.'),
    attention: trans.__('Attention and reading the KV cache.'),
    sampling: trans.__('Choosing the token from the model’s output.'),
    host: trans.__('Scheduling, preparing inputs and bookkeeping in the engine.'),
    transport: trans.__('On the way from the engine to the front.'),
    detokenize: trans.__('Turning the token into text.'),
    send: trans.__('Handing it to the client’s connection.'),
    unexplained: trans.__('What the measured parts leave over. It is never spread over the others.')
  };
  return meanings[part];
}

export function partLook(part: Part, theme: Theme): PartLook {
  const phase = theme.dark ? PHASE_ON_DARK : PHASE;
  const line = theme.ink;
  const text = theme.dark ? '#F0E442' : '#E9DC2A';
  const looks: Record<Part, [string, Hatch]> = {
    tokenize: [text, 'diagonal'],
    queue: [phase.queued, 'none'],
    prefill: [phase.prefill, 'none'],
    recompute: [phase.recompute, 'diagonal'],
    others_prefill: [phase.prefill, 'diagonal'],
    stall: [theme.dark ? '#FFFFFF' : '#000000', 'diagonal'],
    draft: [phase.draft, 'none'],
    forward: [phase.decode, 'none'],
    attention: [phase.decode, 'vertical'],
    sampling: [phase.accepted, 'none'],
    host: ['#8E8E8E', 'horizontal'],
    transport: [phase.cacheHit, 'dots'],
    detokenize: [text, 'none'],
    send: [text, 'dots'],
    unexplained: [theme.ground, 'cross']
  };
  const [fill, hatch] = looks[part];
  return { fill, hatch, line: part === 'stall' ? theme.ground : line };
}

/** The part that took most. */
export function largestPart(parts: readonly number[]): Part {
  let best = 0;
  parts.forEach((value, at) => {
    if (value > parts[best]) {
      best = at;
    }
  });
  return PARTS[best];
}
