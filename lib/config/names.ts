/** Names that a configuration gives: backends, solvers, bits, groups and zero points of weights. */

/**
 * How kernels are run. `cpu` prefers a native library and says so when it has to take WebAssembly; `native`
 * and `wasm` are one of them only. `cuda` is `cpu` with a GPU for most of the work, and an error without one;
 * `auto` is `cuda` where there is a GPU, else `cpu`.
 */
export type BackendChoice = (typeof BACKENDS)[number];
export const BACKENDS = ["auto", "cuda", "cpu", "native", "wasm"] as const;

/** Solvers, those that need calibration data last. */
export type Solver = (typeof SOLVERS)[number];
export const SOLVERS = ["clip", "round", "feedback", "best"] as const;
/** What a configuration may ask for: a solver, or `auto`, which chooses one for the model and its bits. */
export type SolverChoice = "auto" | Solver;
/** Solvers that need calibration data. */
export const CALIBRATED_SOLVERS: readonly Solver[] = ["feedback", "best"];

/**
 * What is kept of the second moment of a layer's inputs: all of it, blocks of columns on its diagonal, or the
 * diagonal alone.
 */
export type MomentStructure = (typeof MOMENT_STRUCTURES)[number];
export const MOMENT_STRUCTURES = ["full", "block", "diagonal"] as const;
/** Columns of a block of a moment. */
export type MomentBlockSize = (typeof MOMENT_BLOCKS)[number];
export const MOMENT_BLOCKS = [32, 64, 128, 256, 512, 1024, 2048] as const;

/** How much work `best` does. */
export type Effort = (typeof EFFORTS)[number];
export const EFFORTS = ["low", "medium", "high"] as const;

/** Bits of a quantized weight. */
export type BitWidth = 2 | 3 | 4 | 8;
/** Bits asked for one layer; 16 keeps it as it is in the checkpoint. */
export type LayerBits = BitWidth | 16;
/** Weights of one row that share a scale; 0 is the whole row. */
export type GroupSize = 0 | 16 | 32 | 64 | 128 | 256;
/** `real`: any half float; `integer`: whole, in [0, 2^bits − 1]; `symmetric`: fixed at 2^(bits − 1). */
export type ZeroPointKind = "real" | "integer" | "symmetric";

/** Zero points, or `offset`: `w = scale · code + offset`, both half floats. */
export type GridKind = ZeroPointKind | "offset";

export const BIT_WIDTHS: readonly BitWidth[] = [2, 3, 4, 8];
export const GROUP_SIZES: readonly GroupSize[] = [0, 16, 32, 64, 128, 256];
export const ZERO_POINT_KINDS: readonly ZeroPointKind[] = ["real", "integer", "symmetric"];

/** How a code gives a level: `uniform`, alone; `trellis`, together with the codes before it, by a table. */
export type Codes = (typeof CODES)[number];
export const CODES = ["uniform", "trellis"] as const;
/** Bits that trellis codes can have. */
export const TRELLIS_BITS: readonly BitWidth[] = [2, 3];

/**
 * Bits of the sub-codes of two-level scales; 16: half floats, a scale and an offset a group; 0: one scale for
 * the tensor.
 */
export type ScaleBits = 0 | 3 | 4 | 6 | 8 | 16;
export const SCALE_BITS: readonly ScaleBits[] = [4, 6, 8, 16];
/** The {@linkcode ScaleBits} of trellis codes whose scales are one of eight half floats, without offsets. */
export const CODED_SCALE_BITS = 3;
/** The {@linkcode ScaleBits} of trellis codes of rotated weights, with one scale for the whole tensor. */
export const ROTATED_SCALE_BITS = 0;
/** The {@linkcode ScaleBits} of grids `w = scale · code + offset` whose two numbers are half floats. */
export const OFFSET_BITS = 16;
/** The {@linkcode ScaleBits} that trellis codes can have. */
export const TRELLIS_SCALE_BITS: readonly ScaleBits[] = [OFFSET_BITS, CODED_SCALE_BITS, ROTATED_SCALE_BITS];
/** Group sizes that two-level scales can have. */
export const TWO_LEVEL_GROUP_SIZES: readonly GroupSize[] = [16, 32, 64, 128];
/** Group size of two-level scales where none is asked for: those of ggml's Q2_K and Q4_K. */
export function defaultTwoLevelGroupSize(bits: BitWidth): 16 | 32 {
  return bits < 4 ? 16 : 32;
}
