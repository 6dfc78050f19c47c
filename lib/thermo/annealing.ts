/**
 * Deterministic annealing of a group's codes, scale and zero point: soft assignments `p = softmax(−d/τ)` with τ falling to 0, scale and zero point
 * refitted to each. The one reading in which entropy helps the error instead of fighting it.
 */
import { type AnnealedGroup, annealedLoss, checkTemperature, codeProbabilities } from "./losses.ts";

/** Temperatures from the first down; the last fit is at 0. */
const COOLING_STEPS = 12;
/** What a temperature is of the one before. */
const COOLING = 0.6;
/** Fits at 0: the ordinary alternation of nearest codes and least squares. */
const FINAL_FITS = 5;

/** What annealing found. */
export interface AnnealedCodes {
  /** `u8[n]` */
  readonly codes: Uint8Array<ArrayBuffer>;
  readonly scale: number;
  readonly zeroPoint: number;
  /** `Σ h (w − s (c − z))²` of these and of the group as it came, with nearest codes. */
  readonly error: number;
  readonly errorBefore: number;
}

/**
 * Better codes, scale and zero point for a group by deterministic annealing; never worse than what it came with.
 *
 * @param temperature τ at the start in squared steps of the grid: the configuration's `entropy_weight`
 * @param round makes of a scale and a zero point what can be stored; default: as they are
 * @throws {RangeError} when the temperature is outside [0, 100], or the scale is 0 or not finite
 *
 * @example
 * ```ts
 * import { annealCodes } from "./annealing.ts";
 * const found = annealCodes({ weights: [0, 0.1, 0.9, 1, 2.2, 2.9, 3], scale: 1.2, zeroPoint: 0, bits: 2 }, 0.05);
 * console.log(found.error < found.errorBefore); // true
 * ```
 */
export function annealCodes(
  group: AnnealedGroup,
  temperature: number,
  round: (scale: number, zeroPoint: number) => readonly [number, number] = (
    scale,
    zeroPoint,
  ) => [scale, zeroPoint],
): AnnealedCodes {
  checkTemperature(temperature);
  let best = group;
  const errorBefore = annealedLoss(group, 0).distortion;
  let error = errorBefore;
  let current = group;
  for (let step = 0; step < COOLING_STEPS + FINAL_FITS; step++) {
    const fitted = refit(current, step < COOLING_STEPS ? temperature * COOLING ** step : 0);
    if (fitted === undefined) break;
    current = { ...group, scale: fitted[0], zeroPoint: fitted[1] };
    const [scale, zeroPoint] = round(...fitted);
    if (!Number.isFinite(scale) || scale === 0 || !Number.isFinite(zeroPoint)) continue;
    const stored = { ...group, scale, zeroPoint };
    const now = annealedLoss(stored, 0).distortion;
    if (now < error) {
      error = now;
      best = stored;
    }
  }
  const p = new Float64Array(2 ** group.bits);
  const codes = Uint8Array.from(group.weights, (w) => {
    codeProbabilities(w / best.scale + best.zeroPoint, p.length, 0, p);
    return p.indexOf(1);
  });
  return { codes, scale: best.scale, zeroPoint: best.zeroPoint, error, errorBefore };
}

/** Weighted least squares of scale and zero point for the soft codes; undefined where they determine none. */
function refit(
  { weights, importance, scale, zeroPoint, bits }: AnnealedGroup,
  temperature: number,
): [number, number] | undefined {
  const codes = 2 ** bits, p = new Float64Array(codes);
  let mass = 0, first = 0, second = 0, value = 0, product = 0;
  for (let i = 0; i < weights.length; i++) {
    const w = weights[i]!, h = importance?.[i] ?? 1;
    codeProbabilities(w / scale + zeroPoint, codes, temperature, p);
    let mean = 0, squares = 0;
    for (let code = 1; code < codes; code++) {
      mean += p[code]! * code;
      squares += p[code]! * code * code;
    }
    mass += h;
    first += h * mean;
    second += h * squares;
    value += h * w;
    product += h * w * mean;
  }
  const determinant = mass * second - first * first;
  const slope = (mass * product - first * value) / determinant;
  if (!(determinant > 1e-12 * mass * second) || !Number.isFinite(slope) || slope === 0) return undefined;
  return [slope, -(value - slope * first) / mass / slope];
}
