/**
 * Rows of the phases suite. Each is a set of configuration keys, as in YAML, on top of the run's bits and
 * group size; what a row does not name has the product's default. `phase3_full` is `quantize.ts --phases
 * all`.
 */
import type { PhaseName } from "../options.ts";

type Keys = Readonly<Record<string, unknown>>;

const PHASE1: Keys = { "thermodynamic.validation.enabled": true };
const PHASE2: Keys = { ...PHASE1, "thermodynamic.boundary_smoothing.enabled": true };
const OPTIMIZATION = "thermodynamic.transition_optimization";
const PHASE3: Keys = { ...PHASE2, [`${OPTIMIZATION}.enabled`]: true };
/** Iterations of the refinement in a quick run. */
const QUICK_ITERATIONS = 6;

const ROUND = { solver: "round" }, BEST = { solver: "best" };
/** Phase 3's codes and refinement without activations, time weights and the choice between candidates. */
const REFINED: Keys = {
  ...BEST,
  [`${OPTIMIZATION}.enabled`]: true,
  [`${OPTIMIZATION}.time_weights`]: "none",
  enable_time_aware: false,
};
const ONE_CANDIDATE = { "solver_options.candidates": 1 };
/** Codes of one candidate; a step of this size changes nothing and is rejected. */
const CODES_ALONE: Keys = {
  ...REFINED,
  ...ONE_CANDIDATE,
  [`${OPTIMIZATION}.max_iterations`]: 1,
  [`${OPTIMIZATION}.learning_rate`]: 1e-9,
};
/** Temperature at which annealing begins, in squared quantization steps. */
const ANNEALING = 0.05;
/** Bits per weight of the budget's rows. */
const BUDGET = 2.25;
const STATIC = { per_token_limit: null }, FOUR_BITS = { ...STATIC, activation_bits: 4 };
/** Codes of `best` with static ranges for all layers. */
const FIXED = { ...BEST, ...PHASE1, ...STATIC };

/** Rows that goals and further tables are about. */
export const BEST_ROW = "best alone";
export const UNREFINED_ROW = "best + phases 1, 2";
export const STATIC_ROW = "best, 8 bits, all static", MIXED_ROW = "best, 8 bits, mostly static";
export const DYNAMIC_ROW = "best, dynamic 8 bits";
export const REFINED_ROW = "best + refinement";
export const STATIC4_ROW = "best, static 4 bits, G 10", STATIC4_ONE_ROW = "best, static 4 bits, G 1";
export const SAMPLER_ROW = "best + sampler correction";
const ONE_ROW = "best, one candidate";

export interface RowSetting {
  readonly name: string;
  readonly phase: PhaseName;
  readonly overrides: Keys;
  /** Name of an earlier row that its step KL is divided by. */
  readonly over?: string | undefined;
  /**
   * Per-token dynamic quantization of all activations to so many bits, on the codes of {@linkcode BEST_ROW}:
   * what others do, for comparison. No configuration makes it.
   */
  readonly dynamicBits?: 4 | 8 | undefined;
}

/** Rows that run on one kind of model alone, and why. */
export function rowsLeftOut(
  kind: "sequences" | "images",
): readonly { readonly what: string; readonly reason: string }[] {
  return kind === "images"
    ? [{
      what: `${BUDGET} bits by budget`,
      reason: "measuring the sensitivity of each layer takes minutes on images",
    }]
    : [{
      what: "time weights, cosine",
      reason: "masked diffusion weighs its steps alike under any schedule",
    }];
}

/** The rows of a run; ablations and comparisons come with `all`. @param groups of the 4-bit rows' names */
export function rowSettings(
  groups: number,
  kind: "sequences" | "images",
  phase: PhaseName,
  quick: boolean,
): RowSetting[] {
  const few = quick ? { [`${OPTIMIZATION}.max_iterations`]: QUICK_ITERATIONS } : undefined;
  const row = (name: string, overrides: Keys, over?: string): RowSetting => ({
    name,
    phase: "all",
    overrides: overrides[`${OPTIMIZATION}.enabled`] === true ? { ...few, ...overrides } : overrides,
    over,
  });
  const main: RowSetting[] = [
    { ...row("baseline", ROUND), phase: "baseline" },
    { ...row("phase1", { ...ROUND, ...PHASE1 }, "baseline"), phase: "phase1" },
    { ...row("phase2", { ...ROUND, ...PHASE2 }, "phase1"), phase: "phase2" },
    { ...row("phase3_full", PHASE3, "baseline"), phase: "phase3_full" },
  ];
  if (phase !== "all") return main.filter((row) => row.phase === phase || row.phase === "baseline");
  return [
    ...main,
    ...solvingRows(row, kind),
    ...activationRows(row, groups),
    ...timeRows(row, kind),
    ...sizeRows(row, kind),
  ];
}

type MakeRow = (name: string, overrides: Keys, over?: string) => RowSetting;

/** Codes and refinement, term by term. */
function solvingRows(row: MakeRow, kind: "sequences" | "images"): RowSetting[] {
  const weights = { ...CODES_ALONE, [`${OPTIMIZATION}.time_weights`]: "ddpm" };
  return [
    row(BEST_ROW, BEST, "baseline"),
    row(UNREFINED_ROW, { ...BEST, ...PHASE2 }, BEST_ROW),
    row(REFINED_ROW, REFINED, BEST_ROW),
    row(ONE_ROW, CODES_ALONE, BEST_ROW),
    row("time weights", weights, ONE_ROW),
    ...(kind === "images"
      ? [row("time weights, cosine", { ...weights, [`${OPTIMIZATION}.beta_schedule`]: "cosine" }, ONE_ROW)]
      : []),
    row("annealing", { ...CODES_ALONE, [`${OPTIMIZATION}.entropy_weight`]: ANNEALING }, ONE_ROW),
  ];
}

/** Quantized activations. */
function activationRows(row: MakeRow, groups: number): RowSetting[] {
  const ten = { ...FIXED, ...FOUR_BITS, num_time_groups: 10 }, phase1 = `phase 1, static 4 bits, G ${groups}`;
  const dynamic = (name: string, dynamicBits: 4 | 8): RowSetting => ({
    ...row(name, BEST, BEST_ROW),
    dynamicBits,
  });
  return [
    row("best, 8 bits, all static, G 1", { ...FIXED, num_time_groups: 1 }, BEST_ROW),
    row(STATIC_ROW, FIXED, BEST_ROW),
    row(MIXED_ROW, { ...BEST, ...PHASE1 }, BEST_ROW),
    dynamic(DYNAMIC_ROW, 8),
    row(STATIC4_ONE_ROW, { ...ten, num_time_groups: 1 }, BEST_ROW),
    row(STATIC4_ROW, ten, BEST_ROW),
    row("best, 4 bits, adaptive G 10", { ...ten, time_groups: "adaptive" }, STATIC4_ROW),
    dynamic("best, dynamic 4 bits", 4),
    row(phase1, { ...ROUND, ...PHASE1, ...FOUR_BITS }, "baseline"),
    row(`phase 3, static 4 bits, G ${groups}`, { ...PHASE3, ...FOUR_BITS }, phase1),
  ];
}

/** Corrections by time. */
function timeRows(row: MakeRow, kind: "sequences" | "images"): RowSetting[] {
  const corrected = { ...FIXED, output_correction: true };
  return [
    row("best + gain, bias", { ...corrected, [`${OPTIMIZATION}.markov_weight`]: 0 }, STATIC_ROW),
    row("best + gain, bias, prior", corrected, STATIC_ROW),
    row("round + gain, bias", { ...corrected, ...ROUND }, "baseline"),
    row("best + scales by time", { ...FIXED, time_scales: "per_group" }, STATIC_ROW),
    ...(kind === "images" ? [row(SAMPLER_ROW, { ...FIXED, sampler_correction: true }, STATIC_ROW)] : []),
  ];
}

/** More bits, in groups and by budget. */
function sizeRows(row: MakeRow, kind: "sequences" | "images"): RowSetting[] {
  const isImage = kind === "images", round = `round, ${BUDGET} bits by budget`;
  const budget = { target_bits_per_weight: BUDGET };
  return [
    ...([128, 64, 32] as const).map((groupSize) =>
      row(`baseline, groups of ${groupSize}`, { ...ROUND, group_size: groupSize }, "baseline")
    ),
    // A second candidate takes an image model ten seconds, and is rejected.
    row("best, groups of 32", { ...BEST, ...(isImage ? ONE_CANDIDATE : {}), group_size: 32 }, BEST_ROW),
    ...(isImage ? [] : [
      row(round, { ...ROUND, ...budget }, "baseline"),
      row(`best, ${BUDGET} bits by budget`, { ...BEST, ...budget }, round),
    ]),
  ];
}
