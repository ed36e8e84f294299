/** The device's memory: weights, the KV cache in its parts, everything else, and what is left. */

import type { TelemetryStore } from '../telemetry/store';
import type { LegendEntry, Table } from './card';
import { Card } from './card';
import { PHASE, PHASE_ON_DARK } from './colours';
import { h } from './dom';
import { bytes, percent } from './format';
import type { Translation } from './translation';
import type { ViewContext } from './view';

type Part = 'weights' | 'used' | 'cached' | 'reserved' | 'other' | 'free';
const PARTS: readonly Part[] = ['weights', 'used', 'cached', 'reserved', 'other', 'free'];

export interface MemoryParts {
  total: number;
  parts: Record<Part, number>;
}

/**
 * Bytes of the device the model is on. A GPU's KV cache is allocated as a whole; a CPU's unused part is only promised,
 * and other programs may have it until it is touched.
 */
export function memoryParts(store: TelemetryStore): MemoryParts | null {
  const { model, capacity, device } = store;
  if (!model || !capacity || !device) {
    return null;
  }
  const gpu = device.gpu_memory_total !== null && device.gpu_memory_used !== null && model.device.startsWith('cuda');
  const total = gpu ? device.gpu_memory_total! : device.system_memory_total;
  const inUse = gpu ? device.gpu_memory_used! : device.system_memory_used;
  const kv = store.steps.at(-1)?.event.kv;
  const share = (blocks: number) => (kv ? (capacity.kv_bytes * blocks) / Math.max(1, kv.total_blocks) : 0);
  const idle = store.activeRequests.length === 0;
  const used = idle ? 0 : share(kv?.used_blocks ?? 0);
  const cached = share((kv?.cached_blocks ?? 0) + (idle ? (kv?.used_blocks ?? 0) : 0));
  const reserved = Math.max(0, capacity.kv_bytes - used - cached);
  const known = model.weight_bytes + used + cached + (gpu ? reserved : 0);
  const other = Math.max(0, inUse - known);
  const free = Math.max(0, total - other - model.weight_bytes - used - cached - reserved);
  return { total, parts: { weights: model.weight_bytes, used, cached, reserved, other, free } };
}

export class MemoryBar extends Card {
  private readonly bar = h('div', { class: 'iw-share-bar', attrs: { role: 'img' } });
  private readonly segments: Record<Part, HTMLElement>;
  private found: MemoryParts | null = null;

  constructor(context: ViewContext) {
    const { trans } = context;
    super(context, {
      name: 'memory',
      title: trans.__('Memory of the device'),
      definition: trans.__(
        'Weights: bytes of the model’s tensors. KV cache: its bytes, divided as its blocks are. Everything else: what the device reports as in use, less those. Sampled about once a second while there is work. On a CPU the unused part of the KV cache is only promised.'
      ),
      keys: '',
      readable: true
    });
    this.segments = Object.fromEntries(
      PARTS.map(part => [part, h('span', { class: 'iw-why-segment iw-part', attrs: { 'data-part': part } })])
    ) as Record<Part, HTMLElement>;
    this.bar.append(...PARTS.map(part => this.segments[part]));
    this.element.classList.add('iw-wide');
    this.frame.append(this.bar);
  }

  protected draw(): string {
    const { store, trans } = this.context;
    this.found = memoryParts(store);
    this.bar.hidden = this.found === null;
    if (!this.found) {
      return trans.__('The memory is sampled once the engine is up.');
    }
    const { total, parts } = this.found;
    const words: string[] = [];
    for (const part of PARTS) {
      const look = this.entry(part);
      const segment = this.segments[part];
      segment.style.flexGrow = String(parts[part] / total);
      segment.hidden = parts[part] === 0;
      segment.style.setProperty('--iw-part-fill', look.colour);
      segment.style.setProperty('--iw-part-line', look.line ?? 'transparent');
      segment.classList.toggle('iw-part-diagonal', look.hatch === 'diagonal');
      segment.title = `${look.text} ${bytes(Math.round(parts[part]))}`;
      if (parts[part] > 0) {
        words.push(segment.title);
      }
    }
    this.bar.setAttribute('aria-label', words.join(', '));
    const kv = parts.used + parts.cached + parts.reserved;
    const device = store.model?.device.startsWith('cuda')
      ? (store.device?.gpu_name ?? 'GPU')
      : trans.__('system memory');
    return trans.__(
      '%1 of %2 (%3) · weights %4 · KV cache %5, %6 of it in use',
      bytes(Math.round(total - parts.free - parts.reserved)),
      bytes(total),
      device,
      bytes(parts.weights),
      bytes(Math.round(kv)),
      percent(parts.used / Math.max(1, kv))
    );
  }

  protected legend(): LegendEntry[] {
    const { softInk } = this.context.theme;
    return PARTS.map(part =>
      part === 'free' ? { ...this.entry(part), colour: softInk, look: 'outline' } : this.entry(part)
    );
  }

  protected table(): Table {
    const { trans } = this.context;
    const { found } = this;
    return {
      columns: [trans.__('what for'), trans.__('bytes'), trans.__('share')],
      rows: found
        ? PARTS.map(part => [
            partName(part, trans),
            bytes(Math.round(found.parts[part])),
            percent(found.parts[part] / found.total)
          ])
        : []
    };
  }

  protected describe(): null {
    return null;
  }

  protected onArrow(): boolean {
    return false;
  }

  private entry(part: Part): LegendEntry {
    const { theme, trans } = this.context;
    const phase = theme.dark ? PHASE_ON_DARK : PHASE;
    const text = partName(part, trans);
    const looks: Record<Part, LegendEntry> = {
      weights: { colour: phase.accepted, text },
      used: { colour: phase.prefill, text },
      cached: { colour: phase.cacheHit, text },
      reserved: { colour: theme.ground, text, hatch: 'diagonal', line: theme.softInk },
      other: { colour: '#8E8E8E', text },
      free: { colour: theme.ground, text }
    };
    return looks[part];
  }
}

function partName(part: Part, trans: Translation): string {
  const names: Record<Part, string> = {
    weights: trans.__('weights'),
    used: trans.__('KV used'),
    cached: trans.__('KV cached'),
    reserved: trans.__('KV unused'),
    other: trans.__('everything else'),
    free: trans.__('free')
  };
  return names[part];
}
