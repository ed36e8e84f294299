/**
 * What each request was doing when: waiting, computing its prompt, decoding, left out of steps, preempted. Made from the
 * steps, each looked at once; owns no drawing.
 */

import { Kind } from './protocol';
import type { RequestRecord, StepRecord, TelemetryStore } from './store';
import { isActive } from './store';

export type Phase = 'queued' | 'prefill' | 'decode' | 'recompute' | 'verify' | 'stalled' | 'preempted';

export const PHASES: readonly Phase[] = ['queued', 'prefill', 'decode', 'recompute', 'verify', 'stalled', 'preempted'];

/** A stretch of time in which a request did one thing. */
export interface Stretch {
  phase: Phase;
  fromNs: number;
  toNs: number;
  /** First and last step in it; those on either side of a stretch in which it was left out. */
  fromStep: number;
  toStep: number;
}

interface Track {
  stretches: Stretch[];
  lastStep: number;
  lastNs: number;
}

/** Tracks of requests that the store has forgotten are dropped when there are more than this. */
const MOST_TRACKS = 4096;

export class RequestPhases {
  private readonly tracks = new Map<number, Track>();
  private newest: StepRecord | null = null;

  constructor(private readonly store: TelemetryStore) {}

  /** Take in the steps that came since the last call. */
  advance(): void {
    const { steps } = this.store;
    if (this.newest !== null && this.store.step(this.newest.event.step) !== this.newest) {
      // Another moment of a recording, another connection, or another engine's steps.
      this.tracks.clear();
      this.newest = null;
    }
    let from = steps.length;
    while (from > 0 && (this.newest === null || steps.at(from - 1) !== this.newest)) {
      from -= 1;
    }
    for (let at = from; at < steps.length; at++) {
      this.take(steps.at(at)!);
    }
    this.newest = steps.at(-1) ?? null;
    if (this.tracks.size > MOST_TRACKS) {
      for (const handle of this.tracks.keys()) {
        if (!this.store.requests.has(handle)) {
          this.tracks.delete(handle);
        }
      }
    }
  }

  /** Of one request, in order of time, up to `nowNs` while it is active. */
  of(request: RequestRecord, nowNs: number): Stretch[] {
    const track = this.tracks.get(request.handle);
    const { event } = request;
    const result: Stretch[] = [];
    if (event !== null) {
      const started = event.started_ns ?? track?.stretches[0]?.fromNs ?? null;
      const untilNs = started ?? (isActive(request) ? nowNs : event.at_ns);
      const step = track?.stretches[0]?.fromStep ?? -1;
      if (untilNs > event.arrival_ns) {
        result.push({ phase: 'queued', fromNs: event.arrival_ns, toNs: untilNs, fromStep: step, toStep: step });
      }
    }
    if (track) {
      for (const stretch of track.stretches) {
        result.push(
          stretch.phase === 'stalled' && wasPreempted(request, stretch.fromNs, stretch.toNs)
            ? { ...stretch, phase: 'preempted' }
            : stretch
        );
      }
      const newestStep = this.newest?.event.step ?? -1;
      if (isActive(request) && newestStep > track.lastStep) {
        result.push({
          phase: wasPreempted(request, track.lastNs, nowNs) ? 'preempted' : 'stalled',
          fromNs: track.lastNs,
          toNs: nowNs,
          fromStep: track.lastStep,
          toStep: newestStep
        });
      }
    }
    return result;
  }

  private take({ event }: StepRecord): void {
    for (let at = 0; at < event.request.length; at++) {
      const handle = event.request[at];
      let track = this.tracks.get(handle);
      if (!track) {
        track = { stretches: [], lastStep: event.step - 1, lastNs: event.begin_ns };
        this.tracks.set(handle, track);
      }
      const { stretches } = track;
      if (track.lastStep < event.step - 1) {
        stretches.push({
          phase: 'stalled',
          fromNs: track.lastNs,
          toNs: event.begin_ns,
          fromStep: track.lastStep,
          toStep: event.step
        });
      }
      const phase = phaseOf(event.kind[at]);
      const last = stretches.at(-1);
      if (last?.phase === phase) {
        last.toNs = event.end_ns;
        last.toStep = event.step;
      } else {
        stretches.push({
          phase,
          // The host's time between two steps belongs to who goes on.
          fromNs: last && last.phase !== 'stalled' ? last.toNs : event.begin_ns,
          toNs: event.end_ns,
          fromStep: event.step,
          toStep: event.step
        });
      }
      track.lastStep = event.step;
      track.lastNs = event.end_ns;
    }
  }
}

/** Time per phase, ns, in the order of {@link PHASES}. */
export function timeByPhase(stretches: readonly Stretch[]): number[] {
  const sums = PHASES.map(() => 0);
  for (const { phase, fromNs, toNs } of stretches) {
    sums[PHASES.indexOf(phase)] += Math.max(0, toNs - fromNs);
  }
  return sums;
}

function wasPreempted(request: RequestRecord, fromNs: number, toNs: number): boolean {
  // It is told a moment after the step in which it happened.
  return request.preemptedNs.some(at => at >= fromNs && at <= toNs);
}

function phaseOf(kind: Kind): Phase {
  switch (kind) {
    case Kind.Prefill:
      return 'prefill';
    case Kind.Recompute:
      return 'recompute';
    case Kind.Draft:
    case Kind.Verify:
      return 'verify';
    case Kind.Decode:
      return 'decode';
  }
}
