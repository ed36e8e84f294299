/** The project's colours: one per phase (Okabe–Ito based), and the latency heat of tokens. */

import { Kind, Origin } from '../telemetry/protocol';

export const PHASE = {
  queued: '#D9D9D9',
  prefill: '#0072B2',
  decode: '#E69F00',
  draft: '#56B4E9',
  accepted: '#009E73',
  rejected: '#D55E00',
  cacheHit: '#882255',
  recompute: '#CC79A7'
} as const;

/** Colours that must read on a dark ground: the blue of prefill is too deep there. */
export const PHASE_ON_DARK = { ...PHASE, prefill: '#3D9FDB', cacheHit: '#C0508A' } as const;

/** Hues of requests that are few enough to be told apart; beyond, identity is by label and hover. */
export const REQUEST_COLOURS: readonly string[] = [
  '#0072B2',
  '#E69F00',
  '#009E73',
  '#CC79A7',
  '#56B4E9',
  '#D55E00',
  '#B8A800',
  '#7A5AA6'
];

export function kindColour(kind: Kind | null, dark: boolean): string {
  const phase = dark ? PHASE_ON_DARK : PHASE;
  switch (kind) {
    case Kind.Prefill:
      return phase.prefill;
    case Kind.Recompute:
      return phase.recompute;
    case Kind.Draft:
      return phase.draft;
    case Kind.Verify:
      return phase.accepted;
    default:
      return phase.decode;
  }
}

/** Upper edges of the latency classes, ms; the last class is open. Absolute, so that two runs compare. */
export const LATENCY_EDGES_MS: readonly number[] = [10, 20, 40, 80, 160, 320];

/** The class of a latency, 0 (quickest) to 6. */
export function latencyClass(ms: number): number {
  let index = 0;
  while (index < LATENCY_EDGES_MS.length && ms > LATENCY_EDGES_MS[index]) {
    index += 1;
  }
  return index;
}

export interface Shade {
  fill: string;
  ink: string;
}

/** One hue from pale to deep on light ground, from dim to bright on dark; ink keeps a contrast of 4.5. */
export const HEAT_LIGHT: readonly Shade[] = [
  { fill: '#FFF8E1', ink: '#1F1A12' },
  { fill: '#FEE9A8', ink: '#1F1A12' },
  { fill: '#FDCB62', ink: '#1F1A12' },
  { fill: '#F7A13A', ink: '#1F1A12' },
  { fill: '#E67A1E', ink: '#1F1A12' },
  { fill: '#B84A0A', ink: '#FFFFFF' },
  { fill: '#7A2A06', ink: '#FFFFFF' }
];

export const HEAT_DARK: readonly Shade[] = [
  { fill: '#2A2620', ink: '#F2E9DA' },
  { fill: '#46371D', ink: '#F7EBD3' },
  { fill: '#66491A', ink: '#FFF3DC' },
  { fill: '#8A5A12', ink: '#FFFFFF' },
  { fill: '#D9871A', ink: '#17120A' },
  { fill: '#F6B040', ink: '#17120A' },
  { fill: '#FFE0A3', ink: '#17120A' }
];

/** How a token came about: {@link Origin}, in words that CSS uses. */
export type OriginLook = 'plain' | 'accepted' | 'corrected' | 'bonus';
export const ORIGIN_LOOKS: Record<Origin, OriginLook> = {
  [Origin.Plain]: 'plain',
  [Origin.Accepted]: 'accepted',
  [Origin.Corrected]: 'corrected',
  [Origin.Bonus]: 'bonus'
};

/** What was proposed and accepted in its phase's colour, a correction pale with a border; a plain token has the ground's. */
export const ORIGIN_LIGHT: Record<Exclude<OriginLook, 'plain'> | 'rejected', Shade> = {
  accepted: { fill: PHASE.accepted, ink: '#0B0F0D' },
  bonus: { fill: PHASE.accepted, ink: '#0B0F0D' },
  corrected: { fill: '#FBE3D3', ink: '#1F1A12' },
  rejected: { fill: PHASE.rejected, ink: '#17120A' }
};

export const ORIGIN_DARK: typeof ORIGIN_LIGHT = {
  ...ORIGIN_LIGHT,
  corrected: { fill: '#4A2410', ink: '#FFE9DC' }
};

/** WCAG contrast ratio of two `#RRGGBB` colours. */
export function contrast(first: string, second: string): number {
  const [bright, dim] = [luminance(first), luminance(second)].sort((a, b) => b - a);
  return (bright + 0.05) / (dim + 0.05);
}

function luminance(colour: string): number {
  const [r, g, b] = [1, 3, 5].map(at => {
    const channel = parseInt(colour.slice(at, at + 2), 16) / 255;
    return channel <= 0.04045 ? channel / 12.92 : ((channel + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
