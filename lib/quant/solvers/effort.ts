/** How much work solvers do: what each step gains and costs is a table in docs/solvers.md. */
import { type Effort, OFFSET_BITS, ROTATED_SCALE_BITS, type ScaleBits } from "../../config/names.ts";
import type { SolverSettings } from "./settings.ts";

/** What a layer's solution depends on, beside its target. */
export interface Steps extends Pick<SolverSettings, "ratios" | "refit" | "annealing"> {
  /** Ranges that are tried on all rows, of those that do best on a sample of them; Infinity: all of them. */
  readonly starts: number;
  /** Whether every start is refined, or for each row the best one by error feedback. */
  readonly refinesEach: boolean;
  /** Times that scales and zero points are refitted and codes descend. */
  readonly rounds: number;
  /** Times that a few groups do so in a round: next to nothing beside a pass over the moment. */
  readonly sweeps: number;
}

/** Rows on which ranges are compared. */
export const SAMPLE_ROWS = 256;

const STEPS: Readonly<Record<Effort, Pick<Steps, "starts" | "refinesEach" | "rounds" | "sweeps">>> = {
  low: { starts: 1, refinesEach: false, rounds: 1, sweeps: 2 },
  medium: { starts: 1, refinesEach: false, rounds: 2, sweeps: 2 },
  high: { starts: Infinity, refinesEach: true, rounds: 4, sweeps: 1 },
};

/** Multiply-adds of a pass over the moment up to which a layer gets all steps: a second of work. */
const SMALL_LAYER = 2 ** 31;

/** Shape of a layer and its moment. */
export interface LayerShape {
  readonly rows: number;
  readonly cols: number;
  /** Columns of a block of the moment. */
  readonly block: number;
}

/** Settings for a layer: with `medium` it gets all steps where they take next to no time. */
export function settingsFor(settings: SolverSettings, { rows, cols, block }: LayerShape): SolverSettings {
  const isSmall = rows * cols * block <= SMALL_LAYER;
  return settings.effort === "medium" && isSmall ? { ...settings, effort: "high" } : settings;
}

/**
 * Bits from which error feedback on the range that `clip` finds leaves little to refine: three rounds take 5
 * % off a layer's error, other ranges nothing, at four to ten times the time (docs/solvers.md).
 */
export const FINE_BITS = 4;

/** Steps of `best` for a number of bits. */
export function stepsOf({ effort, ratios, refit, annealing, rounds }: SolverSettings, bits: number): Steps {
  if (bits >= FINE_BITS && effort !== "high" && rounds === null) {
    return { ...STEPS.low, rounds: 0, ratios: [], refit, annealing };
  }
  const own = STEPS[effort];
  return { ...own, ratios, refit, annealing, rounds: rounds ?? own.rounds };
}

/** Error feedback alone, from one range. */
export const NO_STEPS: Steps = {
  ratios: [1],
  starts: Infinity,
  refinesEach: false,
  rounds: 0,
  sweeps: 1,
  refit: false,
  annealing: 0,
};

/** Multiply-adds in the time of a weight's search for trellis codes, beside half a pass. */
export const searchMultiplyAdds = (bits: number): number => bits === 2 ? 16384 : 61440;

/** Passes over a moment in which codes of a trellis descend and their scales are fitted. */
const SETTLING_PASSES = 5;

/** Passes that fit one scale: two more objectives. */
const ONE_SCALE_PASSES = 2;

/** Passes behind a search: codes descend once more where scales are coded or one. */
const settlingPasses = (scaleBits: ScaleBits | undefined): number =>
  scaleBits === OFFSET_BITS
    ? SETTLING_PASSES
    : 2 * SETTLING_PASSES + (scaleBits === ROTATED_SCALE_BITS ? ONE_SCALE_PASSES : 0);

/** Passes over a moment of blocks of so many columns, for each row, of solving for trellis codes. */
export const trellisPasses = (
  { rounds, refinesEach }: Steps,
  { bits, block, scaleBits }: {
    readonly bits: number;
    readonly block: number;
    readonly scaleBits: ScaleBits | undefined;
  },
): number =>
  (refinesEach ? trellisRatios(bits).length : 1) * Math.max(1, rounds) *
  (searchMultiplyAdds(bits) / block + FEEDBACK_PASSES + settlingPasses(scaleBits));

/** Parts of the weights' deviation that scales of trellis codes start from, the best for most first. */
export const trellisRatios = (bits: number): readonly number[] =>
  bits === 2 ? [1.2, 1.05, 1.4] : [1.1, 1.0, 1.25];

/** Passes over the moment for a row: error feedback, and a round's gradient and refit of whole rows. */
export const FEEDBACK_PASSES = 0.5, GRADIENT_PASSES = 1, ROUND_PASSES = 1;
