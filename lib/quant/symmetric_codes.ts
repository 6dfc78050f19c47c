/** Codes of symmetric two-level grids by the weights alone: alternating between codes, sub-scales and super scales. */
import { halves, SUPERBLOCK_SIZE, superblockCount, type TwoLevelTensor } from "./packed/layout.ts";
import {
  fitSymmetric,
  setGroup,
  symmetricForm,
  type SymmetricLevels,
  type SymmetricShape,
} from "./packed/symmetric_levels.ts";

/** Times that codes and scales are chosen for each other. */
const ROUNDS = 3;

/** Sums of a group over its weights, with t = q − z. */
interface Sums {
  readonly wt: Float64Array;
  readonly tt: Float64Array;
}

/** Codes for given levels, and the sums that tell better levels. */
function encode(
  { rows, cols, bits, groupSize }: SymmetricShape,
  weights: Float32Array,
  importance: Float32Array | undefined,
  { scale, zeroPoint }: SymmetricLevels,
  codes: Uint8Array,
): Sums {
  const { most } = symmetricForm(bits), groups = scale.length / rows;
  const sums = { wt: new Float64Array(scale.length), tt: new Float64Array(scale.length) };
  for (let row = 0, i = 0; row < rows; row++) {
    for (let col = 0; col < cols; col++, i++) {
      const group = row * groups + Math.floor(col / groupSize),
        step = scale[group]!,
        zero = zeroPoint[group]!;
      const code = step === 0 ? zero : Math.min(most, Math.max(0, Math.round(weights[i]! / step + zero)));
      codes[i] = code;
      const t = code - zero, u = importance?.[col] ?? 1;
      sums.wt[group]! += u * weights[i]! * t;
      sums.tt[group]! += u * t * t;
    }
  }
  return sums;
}

/** Better super scales and sub-scales for the codes that gave the sums, in place. */
function refit(
  { rows, cols, bits, groupSize }: SymmetricShape,
  found: SymmetricLevels,
  { wt, tt }: Sums,
): void {
  const form = symmetricForm(bits), { levels, scale, zeroPoint } = found, supers = superblockCount(cols);
  const groups = scale.length / rows, each = SUPERBLOCK_SIZE / groupSize, steps = halves(levels.superScale);
  for (let row = 0; row < rows; row++) {
    for (let sup = 0; sup < supers; sup++) {
      const begin = row * groups + sup * each, end = Math.min((row + 1) * groups, begin + each);
      const at16 = row * supers + sup, old = steps[at16]!;
      let top = 0, bottom = 0;
      for (let at = begin; at < end; at++) {
        const v = levels.subScale[at]!;
        top += v * wt[at]!;
        bottom += v * v * tt[at]!;
      }
      const step = bottom > 0 && top > 0 ? Math.f16round(top / bottom) || old : old;
      for (let at = begin; at < end; at++) {
        const v = tt[at]! > 0 && step > 0 ? Math.round(wt[at]! / (step * tt[at]!)) : levels.subScale[at]!;
        const isNegative = zeroPoint[at] !== form.zero, kept = Math.max(0, Math.min(form.mostSub, v));
        setGroup(found, form, { at, at16, v: kept, step, isNegative });
      }
    }
  }
}

/**
 * A matrix on a symmetric two-level grid.
 *
 * @param start scales to begin with, `f32[rows, groups]`, negative ones as well; default those of each group's range
 */
export function symmetricTwoLevel(
  shape: SymmetricShape,
  weights: Float32Array,
  importance: Float32Array | undefined,
  start: Float32Array = rangeScales(shape, weights),
): { readonly codes: Uint8Array<ArrayBuffer>; readonly tensor: Omit<TwoLevelTensor, "packed"> } {
  const codes = new Uint8Array(weights.length), { rows, cols, bits, groupSize } = shape;
  const found = fitSymmetric(shape, start);
  for (let round = 0; round < ROUNDS; round++) {
    refit(shape, found, encode(shape, weights, importance, found, codes));
  }
  encode(shape, weights, importance, found, codes);
  return { codes, tensor: { ...found.levels, rows, cols, bits, groupSize } };
}

/** Scales whose codes cover each group. */
function rangeScales({ rows, cols, bits, groupSize }: SymmetricShape, weights: Float32Array): Float32Array {
  const { zero } = symmetricForm(bits),
    groups = Math.ceil(cols / groupSize),
    scale = new Float32Array(rows * groups);
  for (let row = 0, i = 0; row < rows; row++) {
    for (let col = 0; col < cols; col++, i++) {
      const group = row * groups + Math.floor(col / groupSize);
      scale[group] = Math.max(scale[group]!, Math.abs(weights[i]!) / zero);
    }
  }
  return scale;
}
