/** A layer to solve, as every solver and every step of one takes it. */
import { checkArray, checkCounts } from "../../native/call.ts";
import type { Kernels } from "../../native/mod.ts";
import { checkFormat, ROTATED_SCALE_BITS, SUPERBLOCK_SIZE, type WeightFormat } from "../packed/layout.ts";
import { checkMoment, type FactoredMoment } from "./factored_moment.ts";
import { isUnitMoment } from "./moments.ts";

/** A layer to solve. */
export interface LayerProblem extends WeightFormat {
  /** The target, `f32[rows, cols]`: the layer's own weights or those of {@linkcode correctedTarget}. */
  readonly weights: Float32Array;
  readonly rows: number;
  readonly cols: number;
  /** Undefined for `round` and `clip` alone. */
  readonly moment?: FactoredMoment | undefined;
  /** Called with the done part of the work, 0 to 1, where that takes long. */
  readonly onShare?: ((share: number) => void) | undefined;
}

/** A problem with the kernels that solve it. */
export interface Problem extends LayerProblem {
  readonly kernels: Kernels;
}

/** A problem whose inputs are known. */
export interface MomentProblem extends Problem {
  readonly moment: FactoredMoment;
}

/** Columns whose codes fill whole words at any number of bits. */
const WORD_COLUMNS = 32;

/** Columns of which a format's blocks of a moment are multiples: whole words and groups. */
export const leastBlock = (
  { groupSize, scaleBits, codes }: Pick<WeightFormat, "groupSize" | "scaleBits" | "codes">,
): number =>
  scaleBits === undefined || codes === "trellis" ? Math.max(WORD_COLUMNS, groupSize) : SUPERBLOCK_SIZE;

/** Most columns whose moment is rotated, which takes all of it: 256 MiB. */
const MAX_ROTATED_COLS = 8192;

/** Throws unless every argument has the right type, shape and value. */
export function checkProblem(doing: string, problem: LayerProblem): void {
  const { weights, rows, cols, moment } = problem;
  checkCounts(doing, { rows, cols });
  checkArray(doing, "weights", weights, rows * cols);
  checkFormat(doing, problem);
  if (moment === undefined) return;
  checkMoment(doing, moment, cols);
  if (problem.scaleBits === ROTATED_SCALE_BITS && cols > MAX_ROTATED_COLS && !isUnitMoment(moment)) {
    throw new RangeError(
      `Cannot ${doing}: rotated weights must have at most ${MAX_ROTATED_COLS} columns, got ${cols}; ` +
        "take scaleBits 16",
    );
  }
  const least = leastBlock(problem);
  if (moment.block < cols && moment.block % least !== 0) {
    throw new RangeError(
      `Cannot ${doing}: blocks of the moment must be of a multiple of ${least} columns, got ${moment.block}`,
    );
  }
}
