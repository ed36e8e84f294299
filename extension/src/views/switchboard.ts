/**
 * Every switch the server has, drawn from its own description: what flipping it costs, what it excludes, what it did cost
 * and what it did to the main figures. Presets throw many together, and every switch can be undone.
 */

import type { BeforeAfter, Side } from '../telemetry/before-after';
import { beforeAfter, LEAST_STEPS } from '../telemetry/before-after';
import type { Cost, FeaturePreset, FeatureRelation, FeatureSpec, FeatureValue } from '../telemetry/protocol';
import { pageNow } from '../telemetry/clock';
import { currentValue } from '../telemetry/store';
import { h, setText, uniqueId } from './dom';
import { significant } from './format';
import type { Translation } from './translation';
import type { View, ViewContext } from './view';
import { describeSwitch, valueName } from './words';

/** How often the effect of the newest switch is measured anew while steps come. */
const EFFECT_EVERY_MS = 500;
/** The times to first token of fewer requests say little. */
const LEAST_FIRST_TOKENS = 3;
/** As many switches can be undone. */
const MOST_UNDONE = 50;

interface Control {
  spec: FeatureSpec;
  element: HTMLElement;
  result: HTMLElement;
  /** What it did to the main figures. */
  effect: HTMLElement;
  /** Why it makes no difference now. */
  idle: HTMLElement;
  /** Offers to throw what stands in the way as well. */
  remedy: HTMLButtonElement;
  show(value: FeatureValue): void;
  setDisabled(disabled: boolean): void;
}

export class Switchboard implements View {
  readonly element: HTMLElement;
  private readonly list = h('div', { class: 'iw-switches' });
  private readonly epoch = h('span', { class: 'iw-epoch' });
  private readonly wait: HTMLElement;
  private controls: Control[] = [];
  private drawn: readonly FeatureSpec[] = [];
  private readonly pending = new Set<string>();
  private readonly refusals = new Map<string, string>();
  /** Values that would make a refused switch possible. */
  private readonly remedies = new Map<string, Record<string, FeatureValue>>();
  private readonly presetRow: HTMLElement;
  private readonly undoButton: HTMLButtonElement;
  private readonly boardRefusal = h('p', { class: 'iw-refusal', attrs: { role: 'alert', hidden: true } });
  private presetsDrawn: readonly FeaturePreset[] = [];
  /** What each switch since the page opened replaced, the newest last. */
  private readonly replaced: Record<string, FeatureValue>[] = [];
  private seen: { instance: string; epoch: number; values: Record<string, FeatureValue> } | null = null;
  /** What is being put back, until it has taken effect. */
  private undoing: Record<string, FeatureValue> | null = null;
  private readonly effects = new Map<number, BeforeAfter>();
  private measuredAt = -Infinity;

  constructor(private readonly context: ViewContext) {
    const { trans } = context;
    this.wait = h('p', { class: 'iw-empty', text: trans.__('The switches appear when the engine is ready.') });
    const explain = h('button', {
      class: 'iw-button iw-button-quiet',
      text: trans.__('Explain'),
      title: trans.__('Show or hide what each switch does'),
      attrs: { type: 'button', 'aria-pressed': 'false', 'data-action': 'explain' },
      on: {
        click: () => {
          // Wide views explain by themselves; the button turns around whatever is shown now.
          const text = this.list.querySelector<HTMLElement>('.iw-switch-text');
          const shown = text !== null && text.checkVisibility();
          this.element.dataset.explain = shown ? 'no' : 'yes';
          explain.setAttribute('aria-pressed', String(!shown));
        }
      }
    });
    this.presetRow = h('div', {
      class: 'iw-presets iw-feature-presets',
      attrs: { role: 'group', 'aria-label': trans.__('Presets of switches'), hidden: true }
    });
    this.undoButton = h('button', {
      class: 'iw-button iw-button-quiet',
      text: trans.__('Undo'),
      attrs: { type: 'button', 'data-action': 'undo-switch', disabled: true },
      on: { click: () => this.undo() }
    });
    this.element = h(
      'section',
      { class: 'iw-card iw-switchboard', attrs: { 'aria-label': trans.__('Switchboard') } },
      h(
        'div',
        { class: 'iw-card-head' },
        h('h3', { text: trans.__('Switches') }),
        this.epoch,
        context.connection.readOnly && h('span', { class: 'iw-epoch', text: trans.__('as they were, read-only') }),
        h('span', { class: 'iw-spring' }),
        !context.connection.readOnly && this.undoButton,
        explain
      ),
      this.presetRow,
      this.boardRefusal,
      this.wait,
      this.list
    );
  }

  update(): void {
    const { store, connection, trans } = this.context;
    if (store.specs !== this.drawn && JSON.stringify(store.specs) !== JSON.stringify(this.drawn)) {
      this.build(store.specs);
    }
    this.drawn = store.specs;
    this.wait.hidden = this.controls.length > 0;
    setText(this.epoch, store.features ? trans.__('epoch %1', store.features.epoch) : '');
    const usable = !connection.readOnly && connection.status.state === 'connected' && store.engine?.state === 'ready';
    this.drawPresets(usable);
    this.follow();
    const last = this.replaced.at(-1);
    this.undoButton.disabled = !usable || this.undoing !== null || last === undefined;
    this.undoButton.title = last ? trans.__('Back to %1', this.spell(last)) : trans.__('Nothing was switched yet');
    for (const control of this.controls) {
      const { name } = control.spec;
      const pending = this.pending.has(name);
      if (!pending) {
        control.show(currentValue(store, control.spec));
      }
      control.setDisabled(!usable || pending || !control.spec.available);
      this.showResult(control, pending);
      this.showNeeds(control);
    }
  }

  /** Switch, and say how it went beside the control. */
  async set(spec: FeatureSpec, value: FeatureValue): Promise<void> {
    if (this.pending.has(spec.name) || value === currentValue(this.context.store, spec)) {
      this.update();
      return;
    }
    await this.throw(spec.name, { [spec.name]: value });
  }

  /** Throw switches together; a refusal is said beside the one called `name`, with a remedy where there is one. */
  private async throw(name: string, values: Record<string, FeatureValue>): Promise<void> {
    this.pending.add(name);
    this.refusals.delete(name);
    this.remedies.delete(name);
    this.update();
    try {
      await this.context.connection.setFeatures(values);
    } catch (error) {
      this.refusals.set(name, error instanceof Error ? error.message : String(error));
      const remedy = this.remedyFor(name, values);
      if (remedy !== null) {
        this.remedies.set(name, remedy);
      }
    }
    this.pending.delete(name);
    this.update();
  }

  /** The same values and others, so that no conflict is left. */
  private remedyFor(name: string, values: Record<string, FeatureValue>): Record<string, FeatureValue> | null {
    const { store } = this.context;
    const spec = store.specs.find(each => each.name === name);
    const remedy = { ...values };
    for (const conflict of spec?.conflicts ?? []) {
      const other = store.specs.find(each => each.name === conflict.other);
      if (!other || conflict.value !== values[name] || !conflict.values.includes(currentValue(store, other))) {
        continue;
      }
      const free = possibleValues(other).find(value => !conflict.values.includes(value));
      if (free === undefined) {
        return null;
      }
      remedy[other.name] = free;
    }
    return Object.keys(remedy).length > Object.keys(values).length ? remedy : null;
  }

  /** Remember what each new epoch replaced. */
  private follow(): void {
    const { store } = this.context;
    const { features, server } = store;
    if (!features || !server) {
      return;
    }
    const { epoch, values } = features;
    if (this.seen?.instance !== server.instance || epoch < this.seen.epoch) {
      this.replaced.length = 0;
      this.effects.clear();
    } else if (epoch > this.seen.epoch) {
      const before = this.seen.values;
      const changed = Object.keys(values).filter(name => name in before && before[name] !== values[name]);
      const undone = this.undoing;
      this.undoing = null;
      if (changed.length > 0 && !(undone && changed.every(name => undone[name] === values[name]))) {
        this.replaced.push(Object.fromEntries(changed.map(name => [name, before[name]])));
        this.replaced.splice(0, this.replaced.length - MOST_UNDONE);
      }
    }
    if (this.seen?.epoch !== epoch || this.seen.instance !== server.instance) {
      this.seen = { instance: server.instance, epoch, values };
    }
  }

  private undo(): void {
    const values = this.replaced.pop();
    if (values === undefined) {
      return;
    }
    this.undoing = values;
    this.tellRefusal('');
    this.update();
    this.context.connection
      .setFeatures(values)
      .catch((error: unknown) => {
        this.undoing = null;
        this.tellRefusal(error instanceof Error ? error.message : String(error));
      })
      .finally(() => this.update());
  }

  private drawPresets(usable: boolean): void {
    const { store, connection } = this.context;
    if (store.presets !== this.presetsDrawn) {
      this.presetsDrawn = store.presets;
      this.presetRow.replaceChildren(
        ...store.presets.map(preset =>
          h('button', {
            class: 'iw-preset',
            text: preset.title,
            title: preset.description,
            attrs: { type: 'button', 'data-feature-preset': preset.name },
            on: { click: () => this.applyPreset(preset) }
          })
        )
      );
    }
    this.presetRow.hidden = store.presets.length === 0 || connection.readOnly;
    for (const [at, preset] of store.presets.entries()) {
      const button = this.presetRow.children[at] as HTMLButtonElement;
      button.disabled = !usable;
      const inForce = Object.entries(preset.values).every(([name, value]) => store.features?.values[name] === value);
      button.setAttribute('aria-pressed', String(inForce));
    }
  }

  private applyPreset(preset: FeaturePreset): void {
    this.tellRefusal('');
    this.context.connection
      .setFeatures(preset.values)
      .catch((error: unknown) => this.tellRefusal(error instanceof Error ? error.message : String(error)))
      .finally(() => this.update());
  }

  private tellRefusal(text: string): void {
    setText(this.boardRefusal, text && this.context.trans.__('Refused: %1', text));
    this.boardRefusal.hidden = text === '';
  }

  /** "KV cache on, Batching single". */
  private spell(values: Record<string, FeatureValue>): string {
    const { store, trans } = this.context;
    const title = (name: string) => store.specs.find(spec => spec.name === name)?.title ?? name;
    return Object.entries(values)
      .map(([name, value]) => `${title(name)} ${valueName(value, trans)}`)
      .join(', ');
  }

  private showNeeds(control: Control): void {
    const { store, trans } = this.context;
    const lacking = (control.spec.needs ?? []).find(need => !this.holds(need));
    const title = store.specs.find(spec => spec.name === lacking?.other)?.title ?? lacking?.other ?? '';
    const text = lacking
      ? trans.__(
          'Makes no difference unless %1 is %2: %3.',
          title,
          lacking.values.map(value => valueName(value, trans)).join(trans.__(' or ')),
          lacking.reason
        )
      : '';
    setText(control.idle, text);
    control.idle.hidden = text === '';
    control.element.classList.toggle('iw-ineffective', lacking !== undefined);
  }

  private holds(relation: FeatureRelation): boolean {
    const other = this.context.store.specs.find(spec => spec.name === relation.other);
    return !other || relation.values.includes(currentValue(this.context.store, other));
  }

  private build(specs: readonly FeatureSpec[]): void {
    this.controls = specs.map(spec => this.control(spec));
    const groups = new Map<string, HTMLElement[]>();
    for (const control of this.controls) {
      const list = groups.get(control.spec.group) ?? [];
      list.push(control.element);
      groups.set(control.spec.group, list);
    }
    this.list.replaceChildren(
      ...[...groups].map(([group, elements]) =>
        h('fieldset', { class: 'iw-switch-group' }, h('legend', { text: group }), ...elements)
      )
    );
  }

  private control(spec: FeatureSpec): Control {
    const { trans } = this.context;
    const id = uniqueId(`feature-${spec.name}`);
    const descriptionId = `${id}-description`;
    const set = (value: FeatureValue) => void this.set(spec, value);
    const input =
      spec.kind === 'bool'
        ? boolInput(id, trans, set)
        : spec.kind === 'int'
          ? intInput(id, spec, trans, set)
          : choiceInput(id, spec, set);
    input.focusable.setAttribute('aria-describedby', descriptionId);
    const result = h('div', { class: 'iw-switch-result', attrs: { 'aria-live': 'polite', hidden: true } });
    const effect = h('div', { class: 'iw-switch-effect', attrs: { hidden: true } });
    const idle = h('div', { class: 'iw-unavailable iw-switch-idle', attrs: { hidden: true } });
    const remedy = h('button', {
      class: 'iw-button iw-button-quiet iw-switch-remedy',
      attrs: { type: 'button', hidden: true, 'data-action': 'switch-both' },
      on: {
        click: () => {
          const values = this.remedies.get(spec.name);
          if (values) {
            void this.throw(spec.name, values);
          }
        }
      }
    });
    const excludes = [...new Set((spec.conflicts ?? []).map(each => each.other))].map(
      name => this.context.store.specs.find(each => each.name === name)?.title ?? name
    );
    const element = h(
      'div',
      { class: 'iw-switch', attrs: { 'data-feature': spec.name } },
      h(
        'div',
        { class: 'iw-switch-line' },
        h('label', { class: 'iw-switch-title', text: spec.title, attrs: { for: id } }),
        h('span', {
          class: `iw-cost iw-cost-${spec.cost}`,
          text: costName(spec.cost, trans),
          title: costMeaning(spec.cost, trans)
        }),
        h('span', { class: 'iw-spring' }),
        input.element
      ),
      h(
        'div',
        { class: 'iw-switch-text', attrs: { id: descriptionId } },
        spec.description,
        ' ',
        h('span', { class: 'iw-switch-cost', text: costMeaning(spec.cost, trans) }),
        excludes.length > 0 &&
          h('span', { class: 'iw-switch-conflicts', text: ` ${conflictText(spec, excludes, trans)}` })
      ),
      idle,
      spec.available
        ? null
        : h('div', { class: 'iw-unavailable', text: trans.__('Not here: %1', spec.unavailable_reason ?? '') }),
      result,
      remedy,
      effect
    );
    return {
      spec,
      element,
      result,
      effect,
      idle,
      remedy,
      show: input.show,
      setDisabled: disabled => {
        input.disable(disabled);
        element.classList.toggle('iw-disabled', disabled);
      }
    };
  }

  /** What the switch that began an epoch did to the main figures. */
  private effectOf(epoch: number): string {
    const { store, trans } = this.context;
    const current = store.features?.epoch === epoch;
    const now = pageNow();
    if (current && now - this.measuredAt >= EFFECT_EVERY_MS) {
      this.measuredAt = now;
      const found = beforeAfter(store, epoch);
      if (found && found.steps >= (this.effects.get(epoch)?.steps ?? 0)) {
        this.effects.set(epoch, found);
      }
    }
    const effect = this.effects.get(epoch);
    if (!effect) {
      return current ? trans.__('Its effect is shown after %1 steps with work on either side.', LEAST_STEPS) : '';
    }
    const { before, after, steps } = effect;
    const rate = `${significant(before.rate)} → ${significant(after.rate)} tok/s (${times(before.rate, after.rate)})`;
    const itl =
      before.itlMs !== null && after.itlMs !== null
        ? ` · ITL p50 ${significant(before.itlMs)} → ${significant(after.itlMs)} ms`
        : '';
    const few = Math.min(before.firstTokens, after.firstTokens) < LEAST_FIRST_TOKENS;
    const ttft =
      few || before.ttftMs === null || after.ttftMs === null
        ? ''
        : ` · TTFT p50 ${significant(before.ttftMs)} → ${significant(after.ttftMs)} ms` +
          trans.__(' (of %1 and %2 requests)', before.firstTokens, after.firstTokens);
    return rate + ttft + itl + trans.__(' · %1 steps on either side', steps) + batches(before, after, trans);
  }

  private showResult(control: Control, pending: boolean): void {
    const { trans, store } = this.context;
    const { name } = control.spec;
    const refusal = this.refusals.get(name);
    let text = '';
    let effect = '';
    if (pending) {
      text = trans.__('applying…');
    } else if (refusal !== undefined) {
      text = trans.__('Refused: %1', refusal);
    } else {
      const last = [...store.epochs.values()].filter(each => each.changed.includes(name)).at(-1);
      if (last) {
        text = `${trans.__('epoch %1', last.epoch)} · ${describeSwitch(last, trans)}`;
        effect = this.effectOf(last.epoch);
      }
    }
    const remedy = pending ? undefined : this.remedies.get(name);
    control.remedy.hidden = remedy === undefined;
    setText(control.remedy, remedy ? trans.__('Switch together: %1', this.spell(remedy)) : '');
    control.effect.hidden = effect === '';
    setText(control.effect, effect);
    control.result.classList.toggle('iw-refusal', !pending && refusal !== undefined);
    control.result.hidden = text === '';
    setText(control.result, text);
  }
}

function possibleValues(spec: FeatureSpec): FeatureValue[] {
  switch (spec.kind) {
    case 'bool':
      return [true, false];
    case 'choice':
      return [spec.default, ...spec.choices];
    case 'int':
      return [spec.default, spec.minimum ?? 1];
  }
}

/** "contiguous excludes Prefix cache: read (a shared prefix …)." */
function conflictText(spec: FeatureSpec, titles: readonly string[], trans: Translation): string {
  const first = spec.conflicts![0];
  const value = first.value === null ? spec.title : valueName(first.value, trans);
  return trans.__('%1 excludes %2: %3.', value, titles.join(', '), first.reason);
}

interface Input {
  element: HTMLElement;
  focusable: HTMLElement;
  show(value: FeatureValue): void;
  disable(disabled: boolean): void;
}

function boolInput(id: string, trans: Translation, set: (value: boolean) => void): Input {
  const state = h('span', { class: 'iw-toggle-state', attrs: { 'aria-hidden': 'true' } });
  const input = h('input', {
    class: 'iw-toggle',
    attrs: { id, type: 'checkbox', role: 'switch' },
    on: { change: () => set(input.checked) }
  });
  return {
    element: h('span', { class: 'iw-toggle-holder' }, state, input),
    focusable: input,
    show: value => {
      input.checked = value === true;
      setText(state, valueName(value, trans));
    },
    disable: disabled => {
      input.disabled = disabled;
    }
  };
}

/** A number to type and a slider on a logarithmic scale, because limits span orders of magnitude. */
function intInput(id: string, spec: FeatureSpec, trans: Translation, set: (value: number) => void): Input {
  const low = spec.minimum ?? 0;
  const high = spec.maximum ?? Math.max(1000, Number(spec.default) * 8);
  const toSlider = (value: number) => (1000 * Math.log((value - low + 1) / 1)) / Math.log(high - low + 1);
  const fromSlider = (at: number) => Math.round(low - 1 + Math.exp((at / 1000) * Math.log(high - low + 1)));
  const commit = () => {
    if (input.checkValidity()) {
      set(input.valueAsNumber);
    } else {
      input.reportValidity();
    }
  };
  const input = h('input', {
    class: 'iw-number',
    attrs: { id, type: 'number', min: low, max: high, step: 1, required: true },
    on: { change: commit }
  });
  const slider = h('input', {
    class: 'iw-slider',
    attrs: { type: 'range', min: 0, max: 1000, step: 1, 'aria-label': trans.__('%1, slider', spec.title) },
    on: {
      input: () => {
        input.value = String(fromSlider(slider.valueAsNumber));
        slider.setAttribute('aria-valuetext', input.value);
      },
      change: commit
    }
  });
  return {
    element: h('span', { class: 'iw-int' }, slider, input),
    focusable: input,
    show: value => {
      const active = document.activeElement;
      if (active !== input && !slider.matches(':active')) {
        input.value = String(value);
        slider.value = String(toSlider(Number(value)));
        slider.setAttribute('aria-valuetext', input.value);
      }
    },
    disable: disabled => {
      input.disabled = disabled;
      slider.disabled = disabled;
    }
  };
}

function choiceInput(id: string, spec: FeatureSpec, set: (value: string) => void): Input {
  const select = h(
    'select',
    { class: 'iw-select', attrs: { id }, on: { change: () => set(select.value) } },
    ...spec.choices.map(text => {
      const reason = spec.unavailable_choices?.[text];
      return h('option', {
        text,
        attrs: reason === undefined ? { value: text } : { value: text, disabled: '', title: reason }
      });
    })
  );
  return {
    element: select,
    focusable: select,
    show: value => {
      select.value = String(value);
    },
    disable: disabled => {
      select.disabled = disabled;
    }
  };
}

function times(before: number, after: number): string {
  return before > 0 ? `× ${significant(after / before)}` : '–';
}

/** The load is part of what is compared: where it changed, that is said. */
function batches(before: Side, after: Side, trans: Translation): string {
  const alike = Math.abs(before.batch - after.batch) < 0.05 * Math.max(before.batch, after.batch);
  return alike
    ? trans.__(' · batch %1', significant(after.batch))
    : trans.__(' · batch %1 → %2', significant(before.batch), significant(after.batch));
}

function costName(cost: Cost, trans: Translation): string {
  const names: Record<Cost, string> = {
    free: trans.__('free'),
    prebuilt: trans.__('prebuilt'),
    'catch-up': trans.__('catch-up'),
    recompute: trans.__('recompute'),
    rebuild: trans.__('rebuild')
  };
  return names[cost];
}

function costMeaning(cost: Cost, trans: Translation): string {
  const meanings: Record<Cost, string> = {
    free: trans.__('Switching is free: the next step reads it.'),
    prebuilt: trans.__('Switching uses state that was built before.'),
    'catch-up': trans.__('After switching, some state has to catch up.'),
    recompute: trans.__('Switching makes running requests compute their past tokens again.'),
    rebuild: trans.__('Switching starts another replica and moves the traffic.')
  };
  return meanings[cost];
}
