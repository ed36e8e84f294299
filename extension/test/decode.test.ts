import assert from 'node:assert/strict';
import { test } from 'node:test';

import { decode, encode } from '@msgpack/msgpack';

import { mismatchReason } from '../src/telemetry/connection';
import { DecodeError, decodeServerMessage, encodeClientMessage } from '../src/telemetry/decode';
import { frame, tokens } from './events';

test('a frame survives the wire, whether it comes as a buffer or as a view into one', () => {
  const sent = frame(3, [tokens(1, [1], 0, 20, 2 ** 40)]);
  const bytes = encode(sent);
  assert.deepEqual(decodeServerMessage(bytes.slice().buffer), sent);
  const padded = new Uint8Array(bytes.length + 8);
  padded.set(bytes, 4);
  assert.deepEqual(decodeServerMessage(new DataView(padded.buffer, 4, bytes.length)), sent);
});

test('what is not a message of this protocol is refused by name', () => {
  assert.throws(
    () => decodeServerMessage(encode({ t: 'surprise' })),
    (error: Error) => error instanceof DecodeError && /surprise/.test(error.message)
  );
  assert.throws(() => decodeServerMessage(new Uint8Array([0xc1])), DecodeError);
});

test('client messages are MessagePack maps with their tag', () => {
  assert.deepEqual(decode(encodeClientMessage({ t: 'credit', frames: 2 })), { t: 'credit', frames: 2 });
});

test('a version mismatch names the old side and the cure', () => {
  assert.match(mismatchReason(0, '0.0.1'), /The server is too old.*Restart/);
  assert.match(mismatchReason(9, '3.0.0'), /The page is too old.*Reload/);
});
