/** MessagePack in, typed messages out. Owns the check that a message is one of ours before anything trusts its type. */

import { decode, encode } from '@msgpack/msgpack';

import type { ClientMessage, ServerMessage } from './protocol';

const TAGS: ReadonlySet<string> = new Set(['snapshot', 'frame', 'clock', 'error']);

/** A message that is not part of the protocol: the two sides are not of the same version, or it was damaged. */
export class DecodeError extends Error {}

/** Decode one binary message from the server. */
export function decodeServerMessage(data: ArrayBuffer | ArrayBufferView): ServerMessage {
  const bytes =
    data instanceof ArrayBuffer ? new Uint8Array(data) : new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  let value: unknown;
  try {
    value = decode(bytes);
  } catch (error) {
    throw new DecodeError(`a message of ${bytes.length} bytes is not MessagePack: ${String(error)}`, { cause: error });
  }
  const tag = typeof value === 'object' && value !== null ? (value as { t?: unknown }).t : undefined;
  if (typeof tag !== 'string' || !TAGS.has(tag)) {
    throw new DecodeError(`a message is tagged ${JSON.stringify(tag)}, which this version does not know`);
  }
  return value as ServerMessage;
}

/** Encode one message for the server. */
export function encodeClientMessage(message: ClientMessage): Uint8Array<ArrayBuffer> {
  return encode(message);
}
