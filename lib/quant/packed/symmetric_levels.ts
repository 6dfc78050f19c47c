/**
 * Two-level scales of symmetric grids, as ggml's Q3_K and Q6_K have them: `w = d · v · (q − z)` with one half float `d`
 * a superblock and a whole number `v` a group. Stored as two-level scales of 8 bits, whose minimum is `z` times the
 * scale: with 3 bits `z` is 4, or 3 where the group's scale is negative there (its codes are then turned round); with 8
 * bits the codes are those of 6, from 0 to 63, and `z` is 32.
 */
import { WeightsError } from "../../errors.ts";
import {
  emptyLevels,
  groupCount,
  type GroupSize,
  halfBits,
  SUPERBLOCK_SIZE,
  superblockCount,
  type TwoLevelScales,
} from "./layout.ts";

type Floats = Float32Array<ArrayBuffer>;

/** A symmetric grid by its stored bits. */
interface SymmetricForm {
  /** Largest code. */
  readonly most: number;
  /** Zero point of a group with a positive scale. */
  readonly zero: number;
  /** Largest `v`. */
  readonly mostSub: number;
  /** A group may have a negative scale. */
  readonly hasSigns: boolean;
}

const FORMS: Readonly<Record<3 | 8, SymmetricForm>> = {
  3: { most: 7, zero: 4, mostSub: 31, hasSigns: true },
  8: { most: 63, zero: 32, mostSub: 127, hasSigns: false },
};

/** Bits that symmetric two-level grids have. */
export type SymmetricBits = keyof typeof FORMS;
export const symmetricForm = (bits: number): SymmetricForm => FORMS[bits as SymmetricBits];

/** Sizes of a matrix with such scales. */
export interface SymmetricShape {
  readonly rows: number;
  readonly cols: number;
  readonly bits: SymmetricBits;
  readonly groupSize: GroupSize;
}

/** Levels with what they come to: `w = scale · (q − zeroPoint)`. */
export interface SymmetricLevels {
  readonly levels: TwoLevelScales;
  /** f32[rows, groups] */
  readonly scale: Floats;
  /** f32[rows, groups] */
  readonly zeroPoint: Floats;
}

/** Super scales tried: (largest `v` + k / 4) / largest scale, |k| at most this. */
const STEPS = 6;

/** The half float nearest to a step, and the least squares of the steps' multiples. */
function fitStep(values: Float64Array, weights: Float64Array, most: number): number {
  const largest = values.reduce((a, b) => Math.max(a, b), 0);
  let best = 0, least = Infinity;
  for (let k = -STEPS; k <= STEPS; k++) {
    let step = largest / (most + k / 4);
    for (let round = 0; round < 2; round++) {
      let hv = 0, hvv = 0;
      for (let i = 0; i < values.length; i++) {
        const v = Math.min(most, Math.round(values[i]! / step));
        hv += weights[i]! * v * values[i]!;
        hvv += weights[i]! * v * v;
      }
      if (hvv > 0) step = hv / hvv;
    }
    step = Math.f16round(step);
    if (!(step > 0)) continue;
    let error = 0;
    for (let i = 0; i < values.length; i++) {
      error += weights[i]! * (values[i]! - step * Math.min(most, Math.round(values[i]! / step))) ** 2;
    }
    if (error < least) [best, least] = [step, error];
  }
  return best;
}

/**
 * Levels nearest to given scales, which may be negative.
 *
 * **Shapes** `scale` and `groupWeights: f32[rows, groups]`
 *
 * @param groupWeights how much each group counts; default all ones
 * @throws {WeightsError} when a scale is too large
 */
export function fitSymmetric(
  shape: SymmetricShape,
  scale: Float32Array,
  groupWeights?: Float32Array,
): SymmetricLevels {
  const { rows, cols, bits, groupSize } = shape, form = FORMS[bits];
  const groups = groupCount(cols, groupSize),
    supers = superblockCount(cols),
    each = SUPERBLOCK_SIZE / groupSize;
  const levels = emptyLevels({ rows, cols, groupSize, scaleBits: 8 });
  const found = {
    levels,
    scale: new Float32Array(rows * groups),
    zeroPoint: new Float32Array(rows * groups),
  };
  for (let row = 0; row < rows; row++) {
    for (let sup = 0; sup < supers; sup++) {
      const begin = row * groups + sup * each, end = Math.min((row + 1) * groups, begin + each);
      const values = Float64Array.from(scale.subarray(begin, end), Math.abs);
      const weights = Float64Array.from(values, (_, i) => groupWeights?.[begin + i] ?? 1);
      const step = fitStep(values, weights, form.mostSub);
      for (let at = begin; at < end; at++) {
        const v = step > 0 ? Math.min(form.mostSub, Math.round(values[at - begin]! / step)) : 0;
        setGroup(found, form, { at, at16: row * supers + sup, v, step, isNegative: scale[at]! < 0 });
      }
    }
  }
  return found;
}

/** A group's level: `v` steps. */
interface Level {
  readonly at: number;
  /** Its superblock. */
  readonly at16: number;
  readonly v: number;
  readonly step: number;
  readonly isNegative: boolean;
}

/** Stores a group's level. @throws {WeightsError} when its superblock's half floats would be infinite */
export function setGroup(
  { levels, scale, zeroPoint }: SymmetricLevels,
  { zero, hasSigns }: SymmetricForm,
  { at, at16, v, step, isNegative }: Level,
): void {
  const own = hasSigns && isNegative ? zero - 1 : zero, factor = hasSigns ? 1 : zero;
  const superMin = Math.f16round(step * factor);
  if (!Number.isFinite(superMin)) {
    throw new WeightsError(
      "Cannot quantize a matrix: weights are too large for half-precision scales of two levels",
    );
  }
  levels.superScale.set(halfBits(Float32Array.of(step)), at16);
  levels.superMin.set(halfBits(Float32Array.of(superMin)), at16);
  levels.subScale[at] = v;
  levels.subMin[at] = hasSigns ? v * own : v;
  scale[at] = step * v;
  zeroPoint[at] = own;
}
