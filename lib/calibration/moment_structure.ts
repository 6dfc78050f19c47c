/**
 * What is kept of the second moment of a layer's inputs: as settings ask for it or, by default, as width,
 * memory and the number of different inputs allow.
 */
import { CalibrationError } from "../errors.ts";
import { FINE_BITS } from "../quant/solvers/effort.ts";
import { leastBlock } from "../quant/solvers/problem.ts";
import { type InputMoments, narrowMoments } from "../quant/solvers/moments.ts";
import type { MomentSettings } from "../quant/solvers/settings.ts";
import type { WeightFormat } from "../quant/packed/layout.ts";

/** Widest moment that is kept whole by default: products with a wider one take hours for 7 B weights. */
export const MAX_FULL_COLUMNS = 8192;
/**
 * Matrices of a whole moment at once, in float32: it and the sums of what its inputs lost, each in double and
 * with a chunk while they are gathered.
 */
const FULL_MATRICES = 6;
/** Most of the memory that those may take. */
const FULL_SHARE = 0.5;

/** Different inputs for a column of a block: with fewer the diagonal alone does better (docs/solvers.md). */
const BLOCK_POSITIONS = 2;

/**
 * Columns that are solved together of saved blocks where all layers have {@linkcode FINE_BITS} or more: error
 * feedback takes a third of the time that it takes with blocks of 1024, for an error 8 % higher
 * (docs/solvers.md).
 */
const FINE_BLOCK = 256;

/** What is known of a layer's inputs. */
export interface MomentInputs {
  readonly cols: number;
  /** Different inputs, each counted once. */
  readonly positions: number;
  /** Bytes that the process may take; any by default. */
  readonly memoryBytes?: number | undefined;
  /** Forms of the layers that read them: a block is of whole groups. */
  readonly formats?: readonly Pick<WeightFormat, "groupSize" | "scaleBits">[] | undefined;
}

/** The structure of a moment, and why it is not full. */
export interface MomentChoice {
  /** Columns of a block; all of them: one block, 1: the diagonal alone. */
  readonly block: number;
  /** As in `fewer positions than columns`; undefined where settings ask for it or it is full. */
  readonly reason?: string | undefined;
}

/** Chooses the structure of a moment. */
export function chooseMoment(
  { moment, momentBlock }: MomentSettings,
  { cols, positions, memoryBytes = Infinity, formats = [] }: MomentInputs,
): MomentChoice {
  if (moment === "full") return { block: cols };
  if (moment === "diagonal") return { block: 1 };
  const block = Math.min(cols, Math.max(momentBlock, ...formats.map(leastBlock)));
  if (moment === "block") return { block };
  const bytes = FULL_MATRICES * 4 * cols * cols;
  const reasons = [
    cols > MAX_FULL_COLUMNS ? `more than ${MAX_FULL_COLUMNS} columns` : "",
    bytes > FULL_SHARE * memoryBytes ? "memory for a whole one is short" : "",
    positions < cols ? `only ${positions} different positions` : "",
  ].filter((reason) => reason !== "");
  if (reasons.length === 0) return { block: cols };
  if (positions < BLOCK_POSITIONS * block) return { block: 1, reason: reasons.join(", ") };
  return block === cols ? { block } : { block, reason: reasons.join(", ") };
}

/**
 * The structure that is solved with: as it is chosen, or as far as it was saved.
 *
 * @param saved columns of a saved block
 */
export function chooseSaved(
  settings: MomentSettings,
  choice: MomentChoice,
  { cols, saved, formats }: {
    readonly cols: number;
    readonly saved: number;
    readonly formats: readonly WeightFormat[];
  },
): MomentChoice {
  const isFine = formats.every(({ bits }) => bits >= FINE_BITS) && saved % FINE_BLOCK === 0;
  if (settings.moment === "auto" && isFine && saved < cols && choice.block > FINE_BLOCK) {
    return { block: FINE_BLOCK, reason: `${FINE_BITS} bits or more, blocks saved` };
  }
  return saved < choice.block ? { block: saved, reason: "as saved" } : choice;
}

/** The structure in words: `full`, `blocks of 1024` or `diagonal`. */
export const momentText = (block: number, cols: number): string =>
  block >= cols ? "full" : block === 1 ? "diagonal" : `blocks of ${block}`;

/**
 * Saved moments in the structure that settings ask for; by default, as they were saved.
 *
 * @param wanted columns of a block; what was saved in smaller blocks stays as it is unless `isAsked`
 * @throws {CalibrationError} when less was saved than is asked for, or its blocks do not hold whole groups
 */
export function savedMoments(
  name: string,
  moments: InputMoments,
  { wanted, isAsked, formats = [] }: {
    readonly wanted: number;
    readonly isAsked: boolean;
    readonly formats?: MomentInputs["formats"];
  },
): InputMoments {
  const { cols } = moments, saved = moments.block ?? cols, doing = `Cannot solve ${JSON.stringify(name)}`;
  if (saved >= wanted && (saved === cols || saved % wanted === 0)) return narrowMoments(moments, wanted);
  if (isAsked) {
    throw new CalibrationError(
      `${doing}: its statistics must have a ${momentText(wanted, cols)} moment, got ${
        momentText(saved, cols)
      }: ` +
        "set solver_options.moment to auto, or calibrate anew",
      { tensor: name },
    );
  }
  const least = Math.max(1, ...formats.map(leastBlock));
  if (saved > 1 && saved < cols && saved % least !== 0) {
    throw new CalibrationError(
      `${doing}: its statistics must have blocks of a multiple of ${least} columns, got ${saved}: set ` +
        "solver_options.moment to diagonal, or calibrate anew",
      { tensor: name },
    );
  }
  return moments;
}

/** How a line on the structure of a model's moments begins. */
export const MOMENTS = "second moments: ";

/** A line on the structure of a model's moments, by width, the narrowest first. */
export function momentLine(choices: readonly (MomentChoice & { readonly cols: number })[]): string {
  const sorted = [...choices].sort((a, b) => a.cols - b.cols), texts = new Map<string, Set<number>>();
  for (const { cols, block, reason } of sorted) {
    const text = momentText(block, cols) + (reason === undefined ? "" : ` (${reason})`);
    texts.set(text, (texts.get(text) ?? new Set()).add(cols));
  }
  const parts = [...texts].map(([text, widths]) => `${[...widths].join(", ")} columns ${text}`);
  return MOMENTS + parts.join("; ");
}
