/** The few statistics the views show, as plain functions of numbers. */

/** Linear-interpolated percentile (numpy's default), `q` in [0, 1]; `null` for no values. */
export function percentile(values: readonly number[], q: number): number | null {
  if (values.length === 0) {
    return null;
  }
  const sorted = Float64Array.from(values).sort();
  const rank = (sorted.length - 1) * Math.min(1, Math.max(0, q));
  const low = Math.floor(rank);
  const high = Math.ceil(rank);
  return sorted[low] + (sorted[high] - sorted[low]) * (rank - low);
}

/** Several percentiles of the same values, sorting once. */
export function percentiles(values: readonly number[], qs: readonly number[]): (number | null)[] {
  const sorted = Float64Array.from(values).sort();
  return qs.map(q => {
    if (sorted.length === 0) {
      return null;
    }
    const rank = (sorted.length - 1) * q;
    const low = Math.floor(rank);
    return sorted[low] + (sorted[Math.ceil(rank)] - sorted[low]) * (rank - low);
  });
}

export interface Line {
  slope: number;
  intercept: number;
}

/**
 * Theil–Sen line through points: the median of pairwise slopes, so that a few stalls do not tilt it.
 *
 * Above 120 points every n-th is taken: the pairs grow with the square.
 */
export function robustLine(xs: readonly number[], ys: readonly number[]): Line | null {
  const stride = Math.max(1, Math.ceil(xs.length / 120));
  const px: number[] = [];
  const py: number[] = [];
  for (let index = 0; index < xs.length; index += stride) {
    px.push(xs[index]);
    py.push(ys[index]);
  }
  const slopes: number[] = [];
  for (let i = 0; i < px.length; i++) {
    for (let j = i + 1; j < px.length; j++) {
      if (px[j] !== px[i]) {
        slopes.push((py[j] - py[i]) / (px[j] - px[i]));
      }
    }
  }
  const slope = percentile(slopes, 0.5);
  if (slope === null) {
    return null;
  }
  const intercept = percentile(
    px.map((x, index) => py[index] - slope * x),
    0.5
  )!;
  return { slope, intercept };
}

/**
 * Indices that draw `values` in about `buckets` columns while keeping each column's smallest and largest value, so that
 * a stall survives the thinning. All indices when there are few enough.
 */
export function minMaxIndices(values: readonly number[], buckets: number): number[] {
  if (values.length <= buckets * 2) {
    return values.map((_, index) => index);
  }
  const result: number[] = [];
  for (let bucket = 0; bucket < buckets; bucket++) {
    const from = Math.floor((bucket * values.length) / buckets);
    const to = Math.floor(((bucket + 1) * values.length) / buckets);
    let low = from;
    let high = from;
    for (let index = from + 1; index < to; index++) {
      if (values[index] < values[low]) {
        low = index;
      }
      if (values[index] > values[high]) {
        high = index;
      }
    }
    result.push(Math.min(low, high));
    if (low !== high) {
      result.push(Math.max(low, high));
    }
  }
  return result;
}
