/** Every switch the server has, drawn from its own description, with what flipping it costs and what it did cost. */

import type { Cost, FeatureSpec, FeatureValue } from '../telemetry/protocol';
import { currentValue } from '../telemetry/store';
import { h, setText, uniqueId } from './dom';
import type { Translation } from './translation';
import type { View, ViewContext } from './view';
import { describeSwitch, valueName } from './words';

interface Control {
  spec: FeatureSpec;
  element: HTMLElement;
  result: HTMLElement;
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
        explain
      ),
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
    for (const control of this.controls) {
      const { name } = control.spec;
      const pending = this.pending.has(name);
      if (!pending) {
        control.show(currentValue(store, control.spec));
      }
      control.setDisabled(!usable || pending || !control.spec.available);
      this.showResult(control, pending);
    }
  }

  /** Switch, and say how it went beside the control. */
  async set(spec: FeatureSpec, value: FeatureValue): Promise<void> {
    if (this.pending.has(spec.name) || value === currentValue(this.context.store, spec)) {
      this.update();
      return;
    }
    this.pending.add(spec.name);
    this.refusals.delete(spec.name);
    this.update();
    try {
      await this.context.connection.setFeatures({ [spec.name]: value });
    } catch (error) {
      this.refusals.set(spec.name, error instanceof Error ? error.message : String(error));
    }
    this.pending.delete(spec.name);
    this.update();
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
        h('span', { class: 'iw-switch-cost', text: costMeaning(spec.cost, trans) })
      ),
      spec.available
        ? null
        : h('div', { class: 'iw-unavailable', text: trans.__('Not here: %1', spec.unavailable_reason ?? '') }),
      result
    );
    return {
      spec,
      element,
      result,
      show: input.show,
      setDisabled: disabled => {
        input.disable(disabled);
        element.classList.toggle('iw-disabled', disabled);
      }
    };
  }

  private showResult(control: Control, pending: boolean): void {
    const { trans, store } = this.context;
    const { name } = control.spec;
    const refusal = this.refusals.get(name);
    let text = '';
    if (pending) {
      text = trans.__('applying…');
    } else if (refusal !== undefined) {
      text = trans.__('Refused: %1', refusal);
    } else {
      const last = [...store.epochs.values()].filter(each => each.changed.includes(name)).at(-1);
      if (last) {
        text = `${trans.__('epoch %1', last.epoch)} · ${describeSwitch(last, trans)}`;
      }
    }
    control.result.classList.toggle('iw-refusal', !pending && refusal !== undefined);
    control.result.hidden = text === '';
    setText(control.result, text);
  }
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
