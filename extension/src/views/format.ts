/** Numbers as people read them. */

/** "0.42 ms", "17.3 ms", "1.24 s": three significant digits, in the unit that fits. */
export function duration(ns: number): string {
  const ms = ns / 1e6;
  if (ms < 0.1) {
    return `${(ns / 1e3).toFixed(ns < 1e4 ? 1 : 0)} µs`;
  }
  if (ms < 1000) {
    return `${significant(ms)} ms`;
  }
  return `${significant(ms / 1000)} s`;
}

/** Three significant digits, without exponents and with separators. */
export function significant(value: number): string {
  const size = Math.abs(value);
  if (size === 0) {
    return '0';
  }
  if (size >= 100) {
    return Math.round(value).toLocaleString('en');
  }
  return value.toFixed(size >= 10 ? 1 : size >= 0.01 ? 2 : 3);
}

export function count(value: number): string {
  return value.toLocaleString('en');
}

/** "134.5M". */
export function magnitude(value: number): string {
  for (const [size, unit] of [
    [1e12, 'T'],
    [1e9, 'B'],
    [1e6, 'M'],
    [1e3, 'k']
  ] as const) {
    if (value >= size) {
      return `${significant(value / size)}${unit}`;
    }
  }
  return String(value);
}

/** "512 MiB". */
export function bytes(value: number): string {
  let size = value;
  for (const unit of ['B', 'KiB', 'MiB', 'GiB']) {
    if (size < 1024) {
      return `${unit === 'B' ? size : significant(size)} ${unit}`;
    }
    size /= 1024;
  }
  return `${significant(size)} TiB`;
}

/** "0 %", "0.42 %", "37 %". */
export function percent(share: number): string {
  const value = share * 100;
  return `${value === 0 ? '0' : value < 0.1 ? '< 0.1' : value < 10 ? value.toFixed(1) : value.toFixed(0)} %`;
}

const ORDINALS = new Intl.PluralRules('en', { type: 'ordinal' });
const ENDINGS: Partial<Record<Intl.LDMLPluralRule, string>> = { one: 'st', two: 'nd', few: 'rd' };

/** "1st", "2nd", "13th". */
export function ordinal(value: number): string {
  return `${value}${ENDINGS[ORDINALS.select(value)] ?? 'th'}`;
}
