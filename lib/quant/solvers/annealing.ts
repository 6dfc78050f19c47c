/**
 * Deterministic annealing of a layer's codes against the moment of its inputs: every code is the mean of `p =
 * softmax(−d/τ)` given the means of the others, and τ falls to 0 (mean-field annealing; Rose 1998). The one
 * reading in which entropy helps the error.
 */

import { checkRange } from "../../native/call.ts";
import { throwIfStopped } from "../../progress.ts";
import { diagonalOf } from "./moments.ts";

/** Temperatures from the first down; behind them each code is the nearest. */
const COOLING_STEPS = 12;
/** Ratio of a temperature to the one before. */
const COOLING = 0.6;
/** Exponents beyond which a probability is 0: e⁻⁴⁰ is below what a sum of numbers near 1 can show. */
const FAR = 40;

/** A layer to anneal. */
export interface AnnealedLayer {
  /** `f32[rows, cols]`: the target. */
  readonly target: Float32Array;
  readonly rows: number;
  readonly cols: number;
  readonly bits: number;
  /** 0 is a whole row. */
  readonly groupSize: number;
  /** Symmetric: `f32[block, block]` for each block of columns. */
  readonly moment: Float32Array;
  /** Columns of a block; default all. */
  readonly block?: number | undefined;
  /** `f32[rows, groups]` */
  readonly scale: Float32Array;
  readonly zeroPoint: Float32Array;
  /** Called with the done part of the rows. */
  readonly onShare?: ((share: number) => void) | undefined;
}

/** τ as in the configuration's `entropy_weight`. @throws {RangeError} when it is outside [0, 100] */
export function checkTemperature(temperature: number): void {
  checkRange("anneal codes", "the temperature", temperature, 0, 100);
}

/** ln 2 as a sum, the first of so few bits that small multiples of it are exact. */
const LN2_HIGH = 0.69314718036912381649, LN2_LOW = 1.90821492927058770002e-10;

/** eˣ for x in [−{@linkcode FAR}, 0], the same in every runtime: `Math.exp` differs in the last bit. */
function exponential(x: number): number {
  const halvings = Math.floor(-x / Math.LN2);
  const rest = (x + halvings * LN2_HIGH) + halvings * LN2_LOW; // in (−ln 2, 0]
  let value = 1;
  for (let k = 16; k > 0; k--) value = 1 + value * rest / k;
  for (let i = 0; i < halvings; i++) value /= 2;
  return value;
}

/**
 * Probabilities `p = softmax(−d/τ)` of the codes of a weight at `position`, d the squared distance in steps
 * between codes; at τ = 0 the nearest code alone (the lower of two). Those below e⁻⁴⁰ of the nearest's are 0.
 *
 * @param out `f64[codes]`
 */
export function codeProbabilities(
  position: number,
  codes: number,
  temperature: number,
  out: Float64Array,
): void {
  const nearest = Math.min(codes - 1, Math.max(0, Math.ceil(position - 0.5)));
  out.fill(0, 0, codes);
  out[nearest] = 1;
  if (temperature === 0) return;
  const least = (position - nearest) ** 2;
  let sum = 0;
  for (let code = 0; code < codes; code++) {
    const distance = ((position - code) ** 2 - least) / temperature;
    if (distance <= FAR) sum += out[code] = exponential(-Math.max(0, distance));
  }
  for (let code = 0; code < codes; code++) out[code]! /= sum;
}

/** Mean of the codes' probabilities. @param p `f64[codes]` of scratch */
function meanCode(position: number, temperature: number, p: Float64Array): number {
  codeProbabilities(position, p.length, temperature, p);
  let sum = 0;
  for (let code = 1; code < p.length; code++) sum += p[code]! * code;
  return sum;
}

/**
 * Anneals codes in place. Scales and zero points stay; rows are independent.
 *
 * @param codes `u8[rows, cols]`: where it begins, and what it found
 * @param temperature τ at the start, in squared steps between codes: the distance of a code is that from its
 * best real value
 * @throws {RangeError} when the temperature is outside [0, 100]
 */
export function annealLayer(
  { target, rows, cols, bits, groupSize, moment, block = cols, scale, zeroPoint, onShare }: AnnealedLayer,
  codes: Uint8Array,
  temperature: number,
): void {
  checkTemperature(temperature);
  const p = new Float64Array(2 ** bits),
    width = groupSize === 0 ? cols : groupSize,
    groups = scale.length / rows;
  const soft = new Float64Array(cols), products = new Float64Array(cols);
  const diagonals = diagonalOf(moment, cols, block);
  /** Adds a multiple of a column's row of the moment to the products of its block. */
  const addRow = (k: number, factor: number) => {
    const first = k - k % block,
      size = Math.min(block, cols - first),
      from = first * block + (k - first) * size;
    for (let j = 0; j < size; j++) products[first + j]! += moment[from + j]! * factor;
  };
  for (let row = 0; row < rows; row++) {
    products.fill(0);
    for (let k = 0; k < cols; k++) {
      const at = row * cols + k, group = row * groups + Math.floor(k / width);
      soft[k] = codes[at]!;
      const delta = target[at]! - scale[group]! * (codes[at]! - zeroPoint[group]!);
      addRow(k, delta);
    }
    for (let sweep = 0; sweep <= COOLING_STEPS; sweep++) {
      throwIfStopped();
      const own = sweep === COOLING_STEPS ? 0 : temperature * COOLING ** sweep;
      for (let k = 0; k < cols; k++) {
        const diagonal = diagonals[k]!, step = scale[row * groups + Math.floor(k / width)]!;
        if (!(diagonal > 0) || step === 0) continue;
        const old = soft[k]!, code = meanCode(old + products[k]! / (diagonal * step), own, p);
        if (code === old) continue;
        soft[k] = code;
        const change = step * (code - old);
        addRow(k, -change);
      }
    }
    for (let k = 0; k < cols; k++) codes[row * cols + k] = soft[k]!;
    onShare?.((row + 1) / rows);
  }
}
