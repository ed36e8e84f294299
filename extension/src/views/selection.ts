/**
 * What the reader points at, shared by all views: an engine step, and perhaps one token of it. A token that was clicked
 * stays pinned until another is, so that it can be read at leisure; a request can be highlighted wherever it is drawn.
 */

import { pageNow } from '../telemetry/clock';

/** A pointer moves once a frame; the views follow it half as often, which looks the same and costs half. */
const TELL_MS = 30;

export interface Pointed {
  step: number;
  request: number | null;
  index: number | null;
}

export class Selection {
  private current: Pointed | null = null;
  private kept: Pointed | null = null;
  private lit: number | null = null;
  private toldAt = -Infinity;
  private timer: ReturnType<typeof setTimeout> | null = null;
  private readonly listeners = new Set<() => void>();

  get value(): Pointed | null {
    return this.current;
  }

  set(value: Pointed | null): void {
    if (this.take(value)) {
      this.tell();
    }
  }

  /** The same for a moving pointer: what it passes in {@link TELL_MS} is told together. */
  follow(value: Pointed | null): void {
    if (this.take(value)) {
      const wait = this.toldAt + TELL_MS - pageNow();
      if (wait <= 0) {
        this.tell();
      } else {
        this.timer ??= setTimeout(() => this.tell(), wait);
      }
    }
  }

  get pinned(): Pointed | null {
    return this.kept;
  }

  pin(value: Pointed | null): void {
    this.kept = value;
    this.lit = value?.request ?? null;
    this.tell();
  }

  /** The request that stands out in every view; the others are dimmed. */
  get highlighted(): number | null {
    return this.lit;
  }

  highlight(request: number | null): void {
    if (this.lit !== request) {
      this.lit = request;
      this.tell();
    }
  }

  onChange(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  /** Whether `value` is another one than before. */
  private take(value: Pointed | null): boolean {
    const before = this.current;
    this.current = value;
    return before?.step !== value?.step || before?.request !== value?.request || before?.index !== value?.index;
  }

  private tell(): void {
    if (this.timer !== null) {
      clearTimeout(this.timer);
      this.timer = null;
    }
    this.toldAt = pageNow();
    this.listeners.forEach(listener => listener());
  }
}
