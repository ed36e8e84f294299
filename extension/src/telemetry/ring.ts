/** A list of bounded length that forgets its oldest entries: constant-time append, oldest-first reading. */
export class Ring<T> {
  private readonly slots: (T | undefined)[];
  private begin = 0;
  private count = 0;

  constructor(readonly capacity: number) {
    if (!Number.isInteger(capacity) || capacity < 1) {
      throw new RangeError(`A ring holds at least one entry, not ${capacity}.`);
    }
    this.slots = new Array<T | undefined>(capacity);
  }

  get length(): number {
    return this.count;
  }

  /** Append, and return the entry that had to be forgotten for it, if any. */
  push(value: T): T | undefined {
    const at = (this.begin + this.count) % this.capacity;
    if (this.count < this.capacity) {
      this.slots[at] = value;
      this.count += 1;
      return undefined;
    }
    const forgotten = this.slots[at];
    this.slots[at] = value;
    this.begin = (this.begin + 1) % this.capacity;
    return forgotten;
  }

  /** The entry at `index`, 0 being the oldest and -1 the newest. */
  at(index: number): T | undefined {
    const from = index < 0 ? this.count + index : index;
    return from < 0 || from >= this.count ? undefined : this.slots[(this.begin + from) % this.capacity];
  }

  /** The newest `count` entries, oldest first. */
  last(count: number): T[] {
    const result: T[] = [];
    for (let index = Math.max(0, this.count - count); index < this.count; index++) {
      result.push(this.at(index) as T);
    }
    return result;
  }

  /** Forget everything and take in the newest of `values`, oldest first. */
  replace(values: readonly T[]): void {
    this.clear();
    this.count = Math.min(values.length, this.capacity);
    for (let index = 0; index < this.count; index++) {
      this.slots[index] = values[values.length - this.count + index];
    }
  }

  clear(): void {
    this.slots.fill(undefined);
    this.begin = 0;
    this.count = 0;
  }
}
