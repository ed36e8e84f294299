/** Parquet tables as plain columns. Owns the decoding (by hyparquet) and what to say when a column is not there. */

import type { AsyncBuffer, DecodedArray, FileMetaData } from 'hyparquet';
import { parquetMetadata, parquetRead, parquetSchema } from 'hyparquet';

import { damaged } from './zip';

/** One table. Numbers are float64 with NaN for null: nanosecond counts below 2^53 (104 days) stay exact. */
export class Columns {
  constructor(
    readonly name: string,
    readonly rows: number,
    private readonly numeric: ReadonlyMap<string, Float64Array>,
    private readonly text: ReadonlyMap<string, readonly (string | null)[]>,
    private readonly lists: ReadonlyMap<string, readonly (readonly unknown[])[]>
  ) {}

  /** A column that must be there. */
  numbers(column: string): Float64Array {
    const found = this.numeric.get(column);
    if (!found) {
      throw damaged(`the table ${this.name} has no column ${column} of numbers`);
    }
    return found;
  }

  /** A column that older recordings may lack: then all null. */
  numbersOrNull(column: string): Float64Array {
    return this.numeric.get(column) ?? new Float64Array(this.rows).fill(NaN);
  }

  texts(column: string): readonly (string | null)[] {
    const found = this.text.get(column);
    if (!found) {
      throw damaged(`the table ${this.name} has no column ${column} of text`);
    }
    return found;
  }

  /** A column of text that older recordings lack. */
  textsOrNull(column: string): readonly (string | null)[] | null {
    return this.text.get(column) ?? null;
  }

  /** A column of lists of numbers; no lists where older recordings lack it. */
  numberLists(column: string): readonly (readonly number[])[] {
    return ((this.lists.get(column) ?? []) as readonly (readonly (number | bigint)[])[]).map(list => list.map(Number));
  }

  /** A column of lists; a null list is an empty one. */
  textLists(column: string): readonly (readonly string[])[] {
    const found = this.lists.get(column);
    if (!found) {
      throw damaged(`the table ${this.name} has no column ${column} of lists`);
    }
    return found as readonly (readonly string[])[];
  }
}

/** Decode a Parquet file. */
export async function readColumns(name: string, bytes: Uint8Array<ArrayBuffer>): Promise<Columns> {
  // hyparquet slices: offsets have to start at the table's own first byte.
  const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
  const file: AsyncBuffer = { byteLength: buffer.byteLength, slice: (start, end) => buffer.slice(start, end) };
  let metadata: FileMetaData;
  try {
    metadata = parquetMetadata(buffer);
  } catch (error) {
    throw damaged(`the table ${name} is not Parquet (${reason(error)})`);
  }
  const rows = Number(metadata.num_rows);
  const numeric = new Map<string, Float64Array>();
  const text = new Map<string, (string | null)[]>();
  const lists = new Map<string, (readonly unknown[])[]>();
  for (const { element, children } of parquetSchema(metadata).children) {
    if (children.length > 0) {
      lists.set(element.name, new Array<readonly unknown[]>(rows).fill([]));
    } else if (element.type === 'BYTE_ARRAY') {
      text.set(element.name, new Array<string | null>(rows).fill(null));
    } else {
      numeric.set(element.name, new Float64Array(rows).fill(NaN));
    }
  }
  const columns = new Columns(name, rows, numeric, text, lists);
  if (rows === 0) {
    return columns;
  }
  try {
    await parquetRead({
      file,
      metadata,
      onChunk: ({ columnName, columnData, rowStart }) => {
        const numbers = numeric.get(columnName);
        if (numbers) {
          fill(numbers, columnData, rowStart);
          return;
        }
        const target: unknown[] = text.get(columnName) ?? lists.get(columnName)!;
        for (let at = 0; at < columnData.length; at++) {
          const value = columnData[at] as unknown;
          if (value !== null && value !== undefined) {
            target[rowStart + at] = value;
          }
        }
      }
    });
  } catch (error) {
    throw damaged(`the table ${name} cannot be decoded (${reason(error)})`);
  }
  return columns;
}

function fill(target: Float64Array, source: DecodedArray, from: number): void {
  for (let at = 0; at < source.length; at++) {
    const value = source[at] as number | bigint | boolean | null | undefined;
    if (value !== null && value !== undefined) {
      target[from + at] = Number(value);
    }
  }
}

function reason(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
