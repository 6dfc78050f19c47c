/**
 * Phase 1: a score of how smoothly a layer's parameters pass from one time group to the next. Equal
 * parameters score 1 however bad they are, so that the score is a diagnostic and never an objective; reports
 * give the step KL of every time group beside it.
 */
import { checkWhole } from "../native/call.ts";

/** Size of a jump above the threshold: less than 1.5 times, less than 2 times, more. */
export type Severity = "low" | "medium" | "high";

/** Multiples of the threshold from which a violation is medium and high. */
const MEDIUM_SEVERITY = 1.5, HIGH_SEVERITY = 2;

/** One scale and zero point for each time group of a layer. */
export interface ParameterSeries {
  /** `[G]`, each above 0. */
  readonly scale: ArrayLike<number>;
  /** `[G]`, in codes. */
  readonly zeroPoint: ArrayLike<number>;
  /** Width of the codes: a zero point's jump is counted in shares of `2^bits − 1`. */
  readonly bits: number;
}

/** A jump above the threshold. */
export interface Violation {
  /** Between groups `boundary` and `boundary + 1`. */
  readonly boundary: number;
  readonly kind: "scale" | "zero_point";
  readonly jump: number;
  readonly severity: Severity;
}

/** Phase 1 of a layer. */
export interface MarkovReport {
  /** 1 for no jump, or less than two groups. */
  readonly markovScore: number;
  /** `[G − 1]` */
  readonly boundaryScores: readonly number[];
  /** `[G − 1]`: `|s₂ − s₁|/s₁` */
  readonly scaleJumps: readonly number[];
  /** `[G − 1]`: `|z₂ − z₁|/(2^bits − 1)` */
  readonly zeroPointJumps: readonly number[];
  readonly violations: readonly Violation[];
}

/** Severity of a jump, undefined when it is not above the threshold. */
export function severityOf(jump: number, threshold: number): Severity | undefined {
  if (!(jump > threshold)) return undefined;
  if (jump < MEDIUM_SEVERITY * threshold) return "low";
  return jump < HIGH_SEVERITY * threshold ? "medium" : "high";
}

function checkSeries({ scale, zeroPoint, bits }: ParameterSeries): void {
  const fail = (reason: string) => `Cannot validate time parameters: ${reason}`;
  if (scale.length === 0 || scale.length !== zeroPoint.length) {
    throw new TypeError(
      fail(
        `every group must have a scale and a zero point, got ${scale.length} scales and ${zeroPoint.length} zero points`,
      ),
    );
  }
  checkWhole("validate time parameters", "bits", bits, 1, 16);
  for (let g = 0; g < scale.length; g++) {
    if (!(scale[g]! > 0 && scale[g]! < Infinity)) {
      throw new RangeError(fail(`scales must be finite and above 0, got ${scale[g]} for group ${g}`));
    }
    if (!Number.isFinite(zeroPoint[g]!)) {
      throw new RangeError(fail(`zero points must be finite, got ${zeroPoint[g]} for group ${g}`));
    }
  }
}

/**
 * The Markov score of a layer, `1 − min(1, Σ (js + jz)/(2 (G − 1)))`, the score `1 − min(1, (js + jz)/2)` of
 * each boundary, and the jumps above the threshold.
 *
 * @throws {TypeError} when there is not one scale and one zero point for each group
 * @throws {RangeError} when the threshold is outside [0, 1], a scale is not above 0 or a value is not finite
 *
 * @example
 * ```ts
 * import { validateMarkov } from "./validator.ts";
 * const report = validateMarkov({ scale: [1, 1.5], zeroPoint: [100, 100], bits: 8 }, 0.3);
 * console.log(report.markovScore, report.violations[0]?.severity); // 0.75 "medium"
 * ```
 */
export function validateMarkov(series: ParameterSeries, smoothnessThreshold: number): MarkovReport {
  checkSeries(series);
  const { scale, zeroPoint, bits } = series;
  const boundaries = scale.length - 1, codes = 2 ** bits - 1;
  const perBoundary = (jump: (g: number) => number) => Array.from({ length: boundaries }, (_, g) => jump(g));
  return markovReport(
    perBoundary((g) => Math.abs(scale[g + 1]! - scale[g]!) / scale[g]!),
    perBoundary((g) => Math.abs(zeroPoint[g + 1]! - zeroPoint[g]!) / codes),
    smoothnessThreshold,
  );
}

/** The report of given jumps; {@linkcode validateMarkov} takes those between groups. */
export function markovReport(
  scaleJumps: readonly number[],
  zeroPointJumps: readonly number[],
  smoothnessThreshold: number,
): MarkovReport {
  if (!(smoothnessThreshold >= 0 && smoothnessThreshold <= 1)) {
    throw new RangeError(
      `Cannot validate time parameters: smoothnessThreshold must lie in [0, 1], got ${smoothnessThreshold}`,
    );
  }
  const violations: Violation[] = [];
  let sum = 0;
  for (const [boundary, scaleJump] of scaleJumps.entries()) {
    const zeroPointJump = zeroPointJumps[boundary]!;
    sum += scaleJump + zeroPointJump;
    for (const [kind, jump] of [["scale", scaleJump], ["zero_point", zeroPointJump]] as const) {
      const severity = severityOf(jump, smoothnessThreshold);
      if (severity !== undefined) violations.push({ boundary, kind, jump, severity });
    }
  }
  const boundaries = scaleJumps.length;
  return {
    markovScore: boundaries === 0 ? 1 : 1 - Math.min(1, sum / (2 * boundaries)),
    boundaryScores: scaleJumps.map((jump, i) => 1 - Math.min(1, (jump + zeroPointJumps[i]!) / 2)),
    scaleJumps,
    zeroPointJumps,
    violations,
  };
}
