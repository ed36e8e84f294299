/**
 * Reads a recording's container: a ZIP archive whose entries are stored, not compressed. Owns the check that the file is
 * whole and ours before anything else looks at it.
 */

/** A recording cannot be opened. The message says what is wrong with the file and what to do. */
export class RecordingError extends Error {}

const END = 0x06054b50;
const END_64_LOCATOR = 0x07064b50;
const END_64 = 0x06064b50;
const CENTRAL = 0x02014b50;
const LOCAL = 0x04034b50;
const END_SIZE = 22;
const COMMENT_MAX = 0xffff;
const STORED = 0;
const MAX_32 = 0xffffffff;

export interface ZipEntry {
  name: string;
  size: number;
  /** Of the entry's bytes, as the archive states it. */
  crc: number;
  bytes: Uint8Array<ArrayBuffer>;
}

/** List the entries of an archive. Bytes are views into `data`; nothing is copied. */
export function readZip(data: Uint8Array<ArrayBuffer>): Map<string, ZipEntry> {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  if (data.length === 0) {
    throw new RecordingError('The file is empty. A recording that was being written may still exist as a journal.');
  }
  if (data.length < 4 || view.getUint32(0, true) !== LOCAL) {
    throw new RecordingError(
      'This is not a recording: it does not begin as a ZIP archive. Recordings end in .iwrec and are made by Record.'
    );
  }
  const end = findEnd(view);
  if (end < 0) {
    throw new RecordingError(
      'The recording is cut off: the directory at its end is missing. Copy it again, or take its journal if you still have it.'
    );
  }
  let count = view.getUint16(end + 10, true);
  let at = view.getUint32(end + 16, true);
  if (at === MAX_32 || count === 0xffff) {
    [count, at] = readEnd64(view, end);
  }
  const entries = new Map<string, ZipEntry>();
  for (let index = 0; index < count; index++) {
    if (at + 46 > data.length || view.getUint32(at, true) !== CENTRAL) {
      throw damaged('its directory is not readable');
    }
    const method = view.getUint16(at + 10, true);
    const crc = view.getUint32(at + 16, true);
    let size = view.getUint32(at + 24, true);
    const nameLength = view.getUint16(at + 28, true);
    const extraLength = view.getUint16(at + 30, true);
    const commentLength = view.getUint16(at + 32, true);
    let local = view.getUint32(at + 42, true);
    const name = new TextDecoder().decode(data.subarray(at + 46, at + 46 + nameLength));
    if (size === MAX_32 || local === MAX_32) {
      [size, local] = readSizes64(view, at + 46 + nameLength, extraLength, size, local);
    }
    if (method !== STORED) {
      throw new RecordingError(
        `The entry ${name} is compressed; a recording stores its entries as they are. The file was repacked by another program.`
      );
    }
    if (local + 30 > data.length || view.getUint32(local, true) !== LOCAL) {
      throw damaged(`the entry ${name} is not where the directory says`);
    }
    const begin = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    if (begin + size > data.length) {
      throw damaged(`the entry ${name} is cut off`);
    }
    entries.set(name, { name, size, crc, bytes: data.subarray(begin, begin + size) });
    at += 46 + nameLength + extraLength + commentLength;
  }
  return entries;
}

/** Compare an entry's bytes with the checksum that was written with them. */
export function verify(entry: ZipEntry): void {
  if (crc32(entry.bytes) !== entry.crc) {
    throw damaged(`the checksum of ${entry.name} does not fit its content`);
  }
}

export function damaged(what: string): RecordingError {
  return new RecordingError(`The recording is damaged: ${what}. Copy it again from where it was made.`);
}

function findEnd(view: DataView): number {
  const lowest = Math.max(0, view.byteLength - END_SIZE - COMMENT_MAX);
  for (let at = view.byteLength - END_SIZE; at >= lowest; at--) {
    if (view.getUint32(at, true) === END && at + END_SIZE + view.getUint16(at + 20, true) === view.byteLength) {
      return at;
    }
  }
  return -1;
}

function readEnd64(view: DataView, end: number): [number, number] {
  const locator = end - 20;
  if (locator < 0 || view.getUint32(locator, true) !== END_64_LOCATOR) {
    throw damaged('its directory is not readable');
  }
  const at = Number(view.getBigUint64(locator + 8, true));
  if (at + 56 > view.byteLength || view.getUint32(at, true) !== END_64) {
    throw damaged('its directory is not readable');
  }
  return [Number(view.getBigUint64(at + 32, true)), Number(view.getBigUint64(at + 48, true))];
}

/** The 64-bit sizes of an entry, from its ZIP64 extra field: only the fields that did not fit are in it. */
function readSizes64(view: DataView, from: number, length: number, size: number, local: number): [number, number] {
  for (let at = from; at + 4 <= from + length; at += 4 + view.getUint16(at + 2, true)) {
    if (view.getUint16(at, true) === 1) {
      let field = at + 4;
      if (size === MAX_32) {
        size = Number(view.getBigUint64(field, true));
        field += 8;
      }
      // The compressed size, which equals the size of a stored entry, follows where it did not fit either.
      const remaining = at + 4 + view.getUint16(at + 2, true) - field;
      if (local === MAX_32) {
        local = Number(view.getBigUint64(remaining >= 16 ? field + 8 : field, true));
      }
      break;
    }
  }
  return [size, local];
}

let table: Uint32Array | null = null;

/** CRC-32 as ZIP has it. */
export function crc32(bytes: Uint8Array): number {
  if (table === null) {
    table = new Uint32Array(256);
    for (let value = 0; value < 256; value++) {
      let crc = value;
      for (let bit = 0; bit < 8; bit++) {
        crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
      }
      table[value] = crc;
    }
  }
  let crc = 0xffffffff;
  for (let at = 0; at < bytes.length; at++) {
    crc = table[(crc ^ bytes[at]) & 0xff] ^ (crc >>> 8);
  }
  return (crc ^ 0xffffffff) >>> 0;
}
