/** A recording on the screen: opens its bytes, and shows the workbench over it, or says why it cannot be shown. */

import type { Recording } from '../replay/recording';
import { openRecording, RecordingError } from '../replay/recording';
import { ReplaySource } from '../replay/source';
import { Timeline } from '../replay/timeline';
import { h } from './dom';
import type { Translation } from './translation';
import { untranslated } from './translation';
import { Workbench } from './workbench';

export interface ReplayOptions {
  trans?: Translation;
  windowSeconds?: number;
}

export class Replay {
  readonly element: HTMLElement;
  workbench: Workbench | null = null;
  source: ReplaySource | null = null;
  recording: Recording | null = null;
  /** How long opening took, ms: reading, checking and laying out in time. */
  openedInMs: number | null = null;
  private readonly trans: Translation;
  private disposed = false;

  constructor(private readonly options: ReplayOptions = {}) {
    this.trans = options.trans ?? untranslated;
    this.element = h('div', { class: 'iw-replay' });
  }

  /** Say what is going on before there is anything to show. */
  say(text: string): void {
    this.show('iw-replay-note', text, 'status');
  }

  /** Say why nothing can be shown. */
  fail(text: string): void {
    this.show('iw-replay-note iw-replay-failed', text, 'alert');
  }

  /** Open the bytes of a recording; what is wrong with them is said, not thrown. Resolves to whether it is open. */
  async open(bytes: Uint8Array<ArrayBuffer>): Promise<boolean> {
    const began = performance.now();
    try {
      const recording = await openRecording(bytes);
      if (this.disposed) {
        return false;
      }
      const source = new ReplaySource(new Timeline(recording.recorded));
      this.recording = recording;
      this.source = source;
      this.workbench = new Workbench(source, {
        trans: this.trans,
        windowSeconds: this.options.windowSeconds ?? 30,
        replay: { source, manifest: recording.manifest, bytes: recording.bytes }
      });
      this.element.replaceChildren(this.workbench.element);
      // Begin where there is something to see: nobody looks for an empty screen.
      source.seek(source.timeline.endNs);
      this.openedInMs = performance.now() - began;
      return true;
    } catch (error) {
      this.fail(
        error instanceof RecordingError
          ? error.message
          : this.trans.__('The recording cannot be shown: %1', error instanceof Error ? error.message : String(error))
      );
      return false;
    }
  }

  refresh(): void {
    this.workbench?.refresh();
  }

  dispose(): void {
    this.disposed = true;
    this.workbench?.dispose();
    this.source?.dispose();
    this.element.remove();
  }

  private show(css: string, text: string, role: string): void {
    this.element.replaceChildren(
      h('div', { class: 'iw-workbench iw-replay-page' }, h('p', { class: css, text, attrs: { role } }))
    );
  }
}
