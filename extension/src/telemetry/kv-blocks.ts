/**
 * The KV cache block by block, as its events tell it: who holds which block, what is cached, what was evicted. A mirror
 * of `server/inference_server/front/kv_state.py`; owns no drawing.
 */

import type { KvEvents } from './protocol';
import { KvOp, NOBODY } from './protocol';

export type BlockState = 'free' | 'cached' | 'used';

/** A block's place in the text of a request that holds it. */
export interface Holding {
  request: number;
  /** Which block of the request it is, from 0. */
  index: number;
}

export class KvBlocks {
  /** `null` until it is known: no block is logged, or the engine is not there. */
  numBlocks: number | null = null;
  /** Of the newest operation. */
  step = 0;
  /** How many requests hold each block. */
  references = new Uint16Array(0);
  /** A request that holds the block; {@link NOBODY} where none does. */
  owner = new Int32Array(0);
  /** 1 where the block can be found by its prefix. */
  hashed = new Uint8Array(0);
  /** The step in which the block's cached content was last given up; -1 for never. */
  evictedAt = new Int32Array(0);
  /** Each request's blocks, in the order of its text. */
  readonly tables = new Map<number, number[]>();
  /** Cached blocks given up for others since this is watched. */
  evictions = 0;
  private copied: number | null = null;

  apply(event: KvEvents): void {
    this.step = event.step;
    for (let at = 0; at < event.op.length; at++) {
      this.take(event.op[at], event.block[at], event.request?.[at] ?? NOBODY, event.step);
    }
  }

  /** One operation; without a reset before it nothing is known, and it says nothing. */
  take(op: KvOp, block: number, request: number, step: number): void {
    this.step = step;
    if (op === KvOp.Reset) {
      this.reset(block);
      return;
    }
    if (this.numBlocks === null || block >= this.numBlocks) {
      return;
    }
    switch (op) {
      case KvOp.Allocate:
      case KvOp.Share:
        if (request !== NOBODY) {
          this.references[block] += 1;
          this.owner[block] = request;
          const table = this.tables.get(request);
          if (table) {
            table.push(block);
          } else {
            this.tables.set(request, [block]);
          }
        }
        break;
      case KvOp.Copy:
        this.copied = block;
        break;
      case KvOp.Release:
      case KvOp.Free:
        this.release(block, request);
        this.references[block] = op === KvOp.Free ? 0 : Math.max(0, this.references[block] - 1);
        if (this.references[block] === 0) {
          this.owner[block] = NOBODY;
        } else if (this.owner[block] === request) {
          this.owner[block] = this.holdings(block)[0]?.request ?? NOBODY;
        }
        break;
      case KvOp.Hash:
        this.hashed[block] = 1;
        break;
      case KvOp.Evict:
        this.hashed[block] = 0;
        this.evictedAt[block] = step;
        this.evictions += 1;
        break;
    }
  }

  /** Nothing is known any more. */
  forget(): void {
    this.reset(0);
    this.numBlocks = null;
  }

  state(block: number): BlockState {
    return this.references[block] > 0 ? 'used' : this.hashed[block] === 1 ? 'cached' : 'free';
  }

  /** Every request that holds a block, and as which of its own. */
  holdings(block: number): Holding[] {
    const found: Holding[] = [];
    for (const [request, table] of this.tables) {
      const index = table.indexOf(block);
      if (index >= 0) {
        found.push({ request, index });
      }
    }
    return found;
  }

  clone(): KvBlocks {
    const copy = new KvBlocks();
    copy.numBlocks = this.numBlocks;
    copy.step = this.step;
    copy.references = this.references.slice();
    copy.owner = this.owner.slice();
    copy.hashed = this.hashed.slice();
    copy.evictedAt = this.evictedAt.slice();
    this.tables.forEach((table, request) => copy.tables.set(request, table.slice()));
    copy.evictions = this.evictions;
    copy.copied = this.copied;
    return copy;
  }

  private reset(blocks: number): void {
    this.numBlocks = blocks;
    this.references = new Uint16Array(blocks);
    this.owner = new Int32Array(blocks).fill(NOBODY);
    this.hashed = new Uint8Array(blocks);
    this.evictedAt = new Int32Array(blocks).fill(-1);
    this.tables.clear();
    this.copied = null;
  }

  private release(block: number, request: number): void {
    const table = this.tables.get(request);
    if (!table) {
      return;
    }
    if (this.copied !== null) {
      // The copy was allocated last; its place is that of the block it was copied from.
      table.splice(table.lastIndexOf(this.copied), 1);
      table[table.indexOf(block)] = this.copied;
      this.copied = null;
      return;
    }
    // Blocks are given back from the end.
    table.splice(table.lastIndexOf(block), 1);
    if (table.length === 0) {
      this.tables.delete(request);
    }
  }
}
