/** The few statistics the views show, as plain functions of numbers. */

/** Linear-interpolated percentile (numpy's default), `q` in [0, 1]; `null` for no values. */
export function percentile(values: readonly number[], q: number): number | null {
  return percentiles(values, [q])[0];
}

/** Several percentiles of the same values. They are selected, not sorted: pages do this ten times a second. */
export function percentiles(values: readonly number[], qs: readonly number[]): (number | null)[] {
  if (values.length === 0) {
    return qs.map(() => null);
  }
  const pool = new Float64Array(values);
  return qs.map(q => {
    const rank = (pool.length - 1) * Math.min(1, Math.max(0, q));
    const low = Math.floor(rank);
    const below = select(pool, low);
    if (rank === low) {
      return below;
    }
    // Selecting leaves everything that is larger on the right.
    let above = Infinity;
    for (let index = low + 1; index < pool.length; index++) {
      above = Math.min(above, pool[index]);
    }
    return below + (above - below) * (rank - low);
  });
}

/** The value that sorting would put at index `rank`, by Hoare's quickselect; reorders `values` around it. */
function select(values: Float64Array, rank: number): number {
  let low = 0;
  let high = values.length - 1;
  while (low < high) {
    const middle = (low + high) >>> 1;
    const [a, b, c] = [values[low], values[middle], values[high]];
    const pivot = Math.max(Math.min(a, b), Math.min(Math.max(a, b), c));
    let left = low;
    let right = high;
    while (left <= right) {
      while (values[left] < pivot) {
        left += 1;
      }
      while (values[right] > pivot) {
        right -= 1;
      }
      if (left <= right) {
        const swapped = values[left];
        values[left] = values[right];
        values[right] = swapped;
        left += 1;
        right -= 1;
      }
    }
    if (rank <= right) {
      high = right;
    } else if (rank >= left) {
      low = left;
    } else {
      break;
    }
  }
  return values[rank];
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
