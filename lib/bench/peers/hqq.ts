/**
 * Half-quadratic quantization, re-implemented: Badri and Shaji, https://mobiusml.github.io/hqq_blog/, with
 * the iterations and the constants of the reference code (github.com/mobiusml/hqq, hqq/core/optimize.py). A
 * peer for the bench, slow and plain; nothing else uses it.
 */
import { checkRestored, gridName, type GridSetting, type Method, reimplementation } from "./method.ts";

/** Constants of the reference code: norm, weight of the quadratic term, its factor after each iteration. */
const NORM = 0.7, FIRST_BETA = 10, KAPPA = 1.01;
/** Most iterations; they end when the mean absolute error no longer falls. */
const ITERATIONS = 20;
/** The largest reciprocal scale: the reference code's guard of the half-precision scale. */
const MAX_RECIPROCAL_SCALE = 2e4;
/** Ranges up to this count as none, as there. */
const MIN_RANGE = 1e-4;

/** Half-open column ranges of a row's groups; the last is shorter when the size does not divide `cols`. */
function groupRanges(cols: number, groupSize: number): (readonly [number, number])[] {
  const size = groupSize === 0 ? Math.max(1, cols) : groupSize;
  return Array.from({ length: Math.ceil(cols / size) }, (_, i) => [i * size, Math.min(cols, (i + 1) * size)]);
}

/** A matrix in HQQ's terms: `w ≈ (code − zero) / reciprocal`, a pair for each group of each row. */
interface HqqFit {
  readonly codes: Uint8Array;
  /** `f64[rows, groups]` */
  readonly reciprocal: Float64Array;
  /** `f64[rows, groups]` */
  readonly zero: Float64Array;
  readonly iterations: number;
}

function roundHalfEven(x: number): number {
  const below = Math.floor(x), rest = x - below;
  if (rest !== 0.5) return Math.round(x);
  return below % 2 === 0 ? below : below + 1;
}

/** The generalized soft threshold: `sign(x) · max(0, |x| − |x|^(p − 1) / β)`. */
function shrink(x: number, beta: number): number {
  const size = Math.abs(x);
  return Math.sign(x) * Math.max(0, size - Math.pow(size, NORM - 1) / beta);
}

/**
 * Alternates between the error W_e by the generalized soft threshold and each group's zero point as the mean
 * that fits W − W_e; the scale stays that of minimum and maximum. As in the reference code the end is decided
 * for the whole matrix, and the zero points behind the last iteration are taken, not the best ones met.
 *
 * **Shapes** `weights: f32[rows, cols]`. In float64, where the reference code uses float32 or half precision.
 * Groups do not cross rows; the last is shorter where the size does not divide `cols`, which the reference
 * code refuses.
 */
export function fitHqq(
  weights: Float32Array,
  rows: number,
  cols: number,
  { bits, groupSize }: GridSetting,
  { iterations = ITERATIONS }: { readonly iterations?: number } = {},
): HqqFit {
  const ranges = groupRanges(cols, groupSize), groups = ranges.length, top = 2 ** bits - 1;
  const reciprocal = new Float64Array(rows * groups), zero = new Float64Array(rows * groups);
  const codes = new Uint8Array(rows * cols);
  const eachGroup = (visit: (group: number, begin: number, end: number) => void) => {
    for (let row = 0; row < rows; row++) {
      for (const [g, [begin, end]] of ranges.entries()) {
        visit(row * groups + g, row * cols + begin, row * cols + end);
      }
    }
  };
  const codeOf = (i: number, group: number) =>
    Math.min(top, Math.max(0, roundHalfEven(weights[i]! * reciprocal[group]! + zero[group]!)));
  eachGroup((group, begin, end) => {
    let low = Infinity, high = -Infinity;
    for (let i = begin; i < end; i++) {
      low = Math.min(low, weights[i]!);
      high = Math.max(high, weights[i]!);
    }
    const range = high - low;
    reciprocal[group] = range <= MIN_RANGE ? 1 : Math.min(MAX_RECIPROCAL_SCALE, top / range);
    zero[group] = -low * reciprocal[group]!;
  });
  let best = Infinity, beta = FIRST_BETA, done = 0;
  while (done < iterations) {
    let error = 0;
    eachGroup((group, begin, end) => {
      const scale = reciprocal[group]!, oldZero = zero[group]!;
      let sum = 0;
      for (let i = begin; i < end; i++) {
        const code = codeOf(i, group), difference = weights[i]! - (code - oldZero) / scale;
        sum += code - (weights[i]! - shrink(difference, beta)) * scale;
        error += Math.abs(difference);
      }
      zero[group] = sum / (end - begin);
    });
    beta *= KAPPA;
    done++;
    if (!(error < best)) break;
    best = error;
  }
  eachGroup((group, begin, end) => {
    for (let i = begin; i < end; i++) codes[i] = codeOf(i, group);
  });
  return { codes, reciprocal, zero, iterations: done };
}

/**
 * HQQ as a method: codes from {@linkcode fitHqq}; scale and zero point rounded to halves afterwards, as the
 * reference code does when it stores them. Needs no inputs.
 */
export function hqq(setting: GridSetting): Method {
  return reimplementation("HQQ", setting, false, (weights, rows, cols) => {
    const { codes, reciprocal, zero } = fitHqq(weights, rows, cols, setting);
    const ranges = groupRanges(cols, setting.groupSize);
    const restored = new Float32Array(weights.length);
    for (let row = 0; row < rows; row++) {
      for (const [g, [begin, end]] of ranges.entries()) {
        const group = row * ranges.length + g;
        const scale = Math.f16round(1 / reciprocal[group]!), zeroPoint = Math.f16round(zero[group]!);
        for (let i = row * cols + begin; i < row * cols + end; i++) {
          restored[i] = scale * (codes[i]! - zeroPoint);
        }
      }
    }
    checkRestored(gridName("HQQ", setting), restored, cols);
    return { weights: restored };
  });
}
