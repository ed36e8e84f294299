/** What each KV block is at this moment, for whoever draws or lists them. Pure functions of the store's records. */

import type { KvBlocks } from './kv-blocks';
import { NOBODY } from './protocol';
import type { TelemetryStore } from './store';

export enum BlockLook {
  Free = 0,
  /** Held by nobody, kept for reuse. */
  Cached = 1,
  /** Holds positions of its request's prompt. */
  Prompt = 2,
  /** Holds positions that its request has generated. */
  Output = 3,
  /** Held by several requests. */
  Shared = 4
}

export interface BlockLooks {
  blockSize: number;
  look: Uint8Array<ArrayBuffer>;
  /** Positions of used blocks that hold keys and values. */
  filled: Uint16Array<ArrayBuffer>;
}

export interface KvSummary {
  total: number;
  used: number;
  shared: number;
  cached: number;
  free: number;
  /** Positions of used blocks. */
  slots: number;
  filled: number;
}

/** How far back the newest step of a request is looked for; one that was preempted holds no block. */
const STEPS_BACK = 64;

/** Positions that hold keys and values, of each request that holds blocks. */
export function computedPositions(store: TelemetryStore): Map<number, number> {
  const { kv, steps, requests } = store;
  const result = new Map<number, number>();
  for (let back = 1; back <= Math.min(STEPS_BACK, steps.length) && result.size < kv.tables.size; back++) {
    const { event } = steps.at(-back)!;
    for (let at = 0; at < event.request.length; at++) {
      const handle = event.request[at];
      if (kv.tables.has(handle) && !result.has(handle)) {
        result.set(handle, event.start[at] + event.scheduled[at]);
      }
    }
  }
  for (const handle of kv.tables.keys()) {
    if (!result.has(handle)) {
      const record = requests.get(handle);
      result.set(handle, (record?.event?.prompt_tokens ?? 0) + (record?.event?.output_tokens ?? 0));
    }
  }
  return result;
}

export function blockSizeOf(store: TelemetryStore): number {
  return store.steps.at(-1)?.event.kv.block_size ?? store.capacity?.block_size ?? 1;
}

/** What every block is now. */
export function blockLooks(store: TelemetryStore): BlockLooks {
  const { kv, requests } = store;
  const blockSize = blockSizeOf(store);
  const total = kv.numBlocks ?? 0;
  const look = new Uint8Array(total);
  const filled = new Uint16Array(total);
  for (let block = 0; block < total; block++) {
    if (kv.references[block] === 0 && kv.hashed[block] === 1) {
      look[block] = BlockLook.Cached;
    }
  }
  const computed = computedPositions(store);
  for (const [request, table] of kv.tables) {
    const prompt = requests.get(request)?.event?.prompt_tokens ?? Infinity;
    const positions = computed.get(request) ?? 0;
    table.forEach((block, index) => {
      const first = index * blockSize;
      filled[block] = Math.max(filled[block], Math.min(blockSize, Math.max(0, positions - first)));
      look[block] = kv.references[block] > 1 ? BlockLook.Shared : first < prompt ? BlockLook.Prompt : BlockLook.Output;
    });
  }
  return { blockSize, look, filled };
}

export function summarize(kv: KvBlocks, looks: BlockLooks): KvSummary {
  const sums: KvSummary = { total: looks.look.length, used: 0, shared: 0, cached: 0, free: 0, slots: 0, filled: 0 };
  for (let block = 0; block < looks.look.length; block++) {
    const look = looks.look[block] as BlockLook;
    if (look === BlockLook.Free && kv.owner[block] === NOBODY) {
      sums.free += 1;
    } else if (look === BlockLook.Cached) {
      sums.cached += 1;
    } else {
      sums.used += 1;
      sums.shared += look === BlockLook.Shared ? 1 : 0;
      sums.filled += looks.filled[block];
    }
  }
  sums.slots = sums.used * looks.blockSize;
  return sums;
}
