/**
 * Moves through a recording: play and pause, speed, a track to scrub by time or by step, and keys for all of it. Draws
 * the batch size over the whole recording behind the track, with the switches marked.
 */

import type { Manifest } from '../replay/recording';
import type { ReplaySource, Speed } from '../replay/source';
import { MAX_SPEED_S, SPEEDS } from '../replay/source';
import { PHASE, PHASE_ON_DARK } from './colours';
import { h, setText, uniqueId } from './dom';
import { bytes, count } from './format';
import { clock } from './recorder';
import type { View, ViewContext } from './view';
import { changes } from './words';

const TRACK_HEIGHT = 44;
/** Positions of the track. */
const NOTCHES = 10_000;
const JUMP_NS = 1e9;
/** Where keys mean something else. */
const TYPING = 'input:not([type=range]), select, textarea, [contenteditable]';
const OWN_ARROWS = '.iw-plot, .iw-row-text, .iw-feed-list, .iw-table-holder';

export class Transport implements View {
  readonly element: HTMLElement;
  private readonly playButton: HTMLButtonElement;
  private readonly track: HTMLInputElement;
  private readonly canvas = h('canvas', { class: 'iw-track-picture', attrs: { 'aria-hidden': 'true' } });
  private readonly place = h('span', { class: 'iw-place' });
  private readonly speed: HTMLSelectElement;
  private readonly axisButtons: HTMLButtonElement[];
  private readonly resize: ResizeObserver;
  private byStep = false;
  private wanted: number | null = null;
  private frame: number | null = null;
  private drawn = '';

  constructor(
    private readonly context: ViewContext,
    private readonly source: ReplaySource,
    manifest: Manifest,
    fileBytes: number
  ) {
    const { trans } = context;
    const button = (text: string, title: string, action: string, act: () => void) =>
      h('button', {
        class: 'iw-button iw-button-quiet',
        text,
        title,
        attrs: { type: 'button', 'data-action': action, 'aria-label': title },
        on: { click: act }
      });
    this.playButton = button('▶', trans.__('Play (space)'), 'play', () => source.toggle());
    this.playButton.classList.add('iw-play');
    const speedId = uniqueId('speed');
    this.speed = h(
      'select',
      {
        class: 'iw-select',
        attrs: { id: speedId, 'data-action': 'speed' },
        on: { change: () => source.setSpeed(this.speed.value === 'max' ? 'max' : Number(this.speed.value)) }
      },
      ...SPEEDS.map(speed =>
        h('option', {
          text: speedName(speed),
          title: speed === 'max' ? trans.__('The whole recording in %1 s', MAX_SPEED_S) : '',
          attrs: { value: String(speed) }
        })
      )
    );
    const skip = h('input', {
      attrs: { type: 'checkbox', checked: source.skipsPauses },
      on: { change: () => source.setSkipsPauses(skip.checked) }
    });
    this.axisButtons = [false, true].map(byStep =>
      h('button', {
        class: 'iw-window',
        text: byStep ? trans.__('steps') : trans.__('time'),
        attrs: { type: 'button', 'data-axis': byStep ? 'step' : 'time' },
        on: { click: () => this.setAxis(byStep) }
      })
    );
    this.track = h('input', {
      class: 'iw-track',
      attrs: {
        type: 'range',
        min: 0,
        max: NOTCHES,
        step: 1,
        value: 0,
        'aria-label': trans.__('Position in the recording'),
        'aria-description': trans.__('Arrow keys go from step to step, with Shift by a second.')
      },
      on: { input: () => this.scrub(), keydown: event => this.onTrackKey(event) }
    });
    this.element = h(
      'section',
      { class: 'iw-transport', attrs: { 'aria-label': trans.__('Replay') } },
      h(
        'div',
        { class: 'iw-transport-line' },
        button('|◀', trans.__('To the beginning (Home)'), 'first', () => source.seek(source.timeline.beginNs)),
        button('◀', trans.__('One step back (comma)'), 'step-back', () => source.walk(-1)),
        this.playButton,
        button('▶|', trans.__('One step on (full stop)'), 'step-on', () => source.walk(1)),
        h('label', { class: 'iw-field', attrs: { for: speedId } }, trans.__('speed')),
        this.speed,
        h(
          'label',
          { class: 'iw-tick', title: trans.__('Jump over stretches in which nothing happened') },
          skip,
          trans.__('skip pauses')
        ),
        h('span', { class: 'iw-spring' }),
        this.place,
        h(
          'span',
          { class: 'iw-windows', attrs: { role: 'group', 'aria-label': trans.__('What the track measures') } },
          ...this.axisButtons
        )
      ),
      h('div', { class: 'iw-track-holder' }, this.canvas, this.track),
      h('p', { class: 'iw-recording-facts', text: this.facts(manifest, fileBytes) })
    );
    this.setAxis(false);
    this.resize = new ResizeObserver(() => this.drawTrack());
    this.resize.observe(this.canvas);
  }

  /** Keys that work anywhere in the replay; the host passes them on. */
  readonly onKey = (event: KeyboardEvent): void => {
    const target = event.target as HTMLElement;
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || target.closest(TYPING)) {
      return;
    }
    const onButton = target.closest('button') !== null;
    const keys: Record<string, (() => void) | undefined> = {
      ' ': onButton ? undefined : () => this.source.toggle(),
      k: () => this.source.toggle(),
      ',': () => this.source.walk(-1),
      '.': () => this.source.walk(1),
      '<': () => this.source.changeSpeed(-1),
      '>': () => this.source.changeSpeed(1),
      ArrowLeft: target.closest(OWN_ARROWS) ? undefined : () => this.move(-1, event.shiftKey),
      ArrowRight: target.closest(OWN_ARROWS) ? undefined : () => this.move(1, event.shiftKey),
      Home: target.closest(OWN_ARROWS) ? undefined : () => this.source.seek(this.source.timeline.beginNs),
      End: target.closest(OWN_ARROWS) ? undefined : () => this.source.seek(this.source.timeline.endNs)
    };
    const act = keys[event.key];
    if (act) {
      event.preventDefault();
      event.stopPropagation();
      act();
    }
  };

  update(): void {
    const { source } = this;
    const { timeline } = source;
    const { trans } = this.context;
    setText(this.playButton, source.playing ? '❚❚' : '▶');
    const title = source.playing ? trans.__('Pause (space)') : trans.__('Play (space)');
    this.playButton.title = title;
    this.playButton.setAttribute('aria-label', title);
    this.playButton.dataset.playing = String(source.playing);
    this.speed.value = String(source.speed);
    const row = source.stepRow;
    const step = row < 0 ? '–' : count(timeline.stepNumber(row));
    const text = trans.__(
      '%1 of %2 · step %3 (%4 of %5) · %6 tokens',
      position(source.elapsedNs),
      position(timeline.durationNs),
      step,
      count(row + 1),
      count(timeline.stepCount),
      count(timeline.tokensBy(source.nowNs))
    );
    setText(this.place, text);
    if (this.wanted === null) {
      this.track.value = String(Math.round(this.share() * NOTCHES));
    }
    this.track.style.setProperty('--iw-share', String(this.share()));
    this.track.setAttribute('aria-valuetext', text);
  }

  restyle(): void {
    this.drawn = '';
    this.drawTrack();
  }

  dispose(): void {
    this.resize.disconnect();
    if (this.frame !== null) {
      cancelAnimationFrame(this.frame);
    }
  }

  private setAxis(byStep: boolean): void {
    this.byStep = byStep;
    for (const button of this.axisButtons) {
      button.setAttribute('aria-pressed', String((button.dataset.axis === 'step') === byStep));
    }
    this.drawTrack();
    this.update();
  }

  /** How far along the track the moment shown is, 0 to 1. */
  private share(): number {
    const { source } = this;
    const { timeline } = source;
    return this.byStep
      ? Math.max(0, source.stepRow) / Math.max(1, timeline.stepCount - 1)
      : source.elapsedNs / timeline.durationNs;
  }

  /** The pointer may move more often than the screen is drawn: only the last place counts. */
  private scrub(): void {
    this.wanted = this.track.valueAsNumber / NOTCHES;
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      const share = this.wanted!;
      this.wanted = null;
      const { source } = this;
      const { timeline } = source;
      if (this.byStep) {
        source.seekStep(Math.round(share * (timeline.stepCount - 1)));
      } else {
        source.seek(timeline.beginNs + share * timeline.durationNs);
      }
    });
  }

  private onTrackKey(event: KeyboardEvent): void {
    // The browser would move by a ten-thousandth.
    if (event.key === 'PageUp' || event.key === 'PageDown') {
      event.preventDefault();
      this.source.seek(this.source.nowNs + (event.key === 'PageUp' ? 10 : -10) * JUMP_NS);
    }
  }

  private move(direction: -1 | 1, far: boolean): void {
    if (far) {
      this.source.seek(this.source.nowNs + direction * JUMP_NS);
    } else {
      this.source.walk(direction);
    }
  }

  private facts(manifest: Manifest, fileBytes: number): string {
    const { trans } = this.context;
    const made = new Date(manifest.created);
    const parts = [
      `“${manifest.name}”`,
      Number.isNaN(made.getTime()) ? '' : made.toLocaleString(),
      ...Object.entries(manifest.hardware)
        .filter(([name]) => /cpu|gpu|processor|device/i.test(name))
        .map(([, value]) => String(value))
        .slice(0, 2),
      bytes(fileBytes),
      manifest.note,
      manifest.recovered ? trans.__('recovered: the server was gone before the recording was stopped') : '',
      manifest.lost_events > 0 ? trans.__('%1 events are missing: the disk was too slow', manifest.lost_events) : ''
    ];
    return parts.filter(Boolean).join(' · ');
  }

  private drawTrack(): void {
    const { canvas, source } = this;
    const { theme, trans } = this.context;
    const width = canvas.clientWidth;
    const scale = window.devicePixelRatio || 1;
    const state = `${width} ${scale} ${this.byStep} ${theme.ground} ${theme.ink}`;
    const context = canvas.getContext('2d');
    if (width === 0 || state === this.drawn || !context) {
      return;
    }
    this.drawn = state;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(TRACK_HEIGHT * scale);
    context.scale(scale, scale);
    context.clearRect(0, 0, width, TRACK_HEIGHT);
    const phase = theme.dark ? PHASE_ON_DARK : PHASE;
    const columns = Math.max(1, Math.floor(width / 2));
    const activity = source.timeline.activity(columns, this.byStep);
    const highest = Math.max(1, ...activity);
    context.fillStyle = phase.decode;
    activity.forEach((value, at) => {
      const height = (value / highest) * (TRACK_HEIGHT - 12);
      context.fillRect(at * 2, TRACK_HEIGHT - height, 2, height);
    });
    context.fillStyle = theme.ink;
    context.strokeStyle = theme.ink;
    context.font = `10px ${theme.font}`;
    context.textBaseline = 'top';
    let free = 0;
    for (const { atNs, event } of source.timeline.switches) {
      const { timeline } = source;
      const share = this.byStep
        ? timeline.stepsBy(atNs) / Math.max(1, timeline.stepCount)
        : (atNs - timeline.beginNs) / timeline.durationNs;
      const x = Math.round(share * width) + 0.5;
      context.setLineDash([2, 2]);
      context.beginPath();
      context.moveTo(x, 0);
      context.lineTo(x, TRACK_HEIGHT);
      context.stroke();
      const text = changes(event, trans);
      const size = context.measureText(text).width + 6;
      if (x >= free && x + size < width) {
        context.fillText(text, x + 3, 0);
        free = x + size + 4;
      }
    }
  }
}

function speedName(speed: Speed): string {
  return speed === 'max' ? 'max' : `${speed}×`;
}

/** "1:02.345". */
function position(ns: number): string {
  const seconds = Math.max(0, ns / 1e9);
  return `${clock(seconds)}.${String(Math.floor((seconds % 1) * 1000)).padStart(3, '0')}`;
}
