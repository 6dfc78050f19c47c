/**
 * Programs to quantize for, and the grids that their files store exactly: a program is a line of
 * {@linkcode TARGETS}, a grid a line of {@linkcode GRIDS}.
 */
import { type BitWidth, type GroupSize, OFFSET_BITS, type ScaleBits, type ZeroPointKind } from "./names.ts";

/** A grid that a type of another program's file stores exactly. */
export interface Grid {
  readonly bits: BitWidth;
  /** Its own group; wider ones repeat their scale. */
  readonly groupSize: GroupSize;
  /** The group size where none is asked for, if not its own. */
  readonly usual?: GroupSize;
  readonly zeroPoint: ZeroPointKind;
  readonly scaleBits?: ScaleBits | undefined;
  /** A row's columns must be a multiple of this. */
  readonly block: number;
  /** The type for rows that are none; undefined: such a matrix is kept. */
  readonly next?: string | undefined;
}

/** Symmetric grids of codes in 32-bit words, which compressed-tensors' and GPTQ's readers have in common. */
const WORDS = { groupSize: 32, usual: 128, zeroPoint: "symmetric", block: 32 } as const;
/** MLX's grids. */
const AFFINE = { groupSize: 32, usual: 64, zeroPoint: "real", scaleBits: OFFSET_BITS, block: 32 } as const;

/**
 * Grids by the type's name in the program. What follows a type is llama.cpp's own table of fallbacks, with
 * Q4_1 for its Q5_0: codes here have no 5 bits.
 */
export const GRIDS: Readonly<Record<string, Grid>> = {
  Q2_K: { bits: 2, groupSize: 16, zeroPoint: "real", scaleBits: 4, block: 256, next: "Q4_0" },
  Q3_K: { bits: 3, groupSize: 16, zeroPoint: "symmetric", scaleBits: 8, block: 256, next: "Q4_0" },
  Q4_K: { bits: 4, groupSize: 32, zeroPoint: "real", scaleBits: 6, block: 256, next: "Q4_1" },
  Q6_K: { bits: 8, groupSize: 16, zeroPoint: "symmetric", scaleBits: 8, block: 256, next: "Q8_0" },
  Q2_0: { bits: 2, groupSize: 64, zeroPoint: "symmetric", block: 64, next: "Q4_0" },
  Q4_0: { bits: 4, groupSize: 32, zeroPoint: "symmetric", block: 32 },
  Q4_1: { bits: 4, groupSize: 32, zeroPoint: "real", scaleBits: OFFSET_BITS, block: 32 },
  Q8_0: { bits: 8, groupSize: 32, zeroPoint: "symmetric", block: 32 },
  ...{ W2A16: { bits: 2, ...WORDS }, W3A16: { bits: 3, ...WORDS } },
  ...{ W4A16: { bits: 4, ...WORDS }, W8A16: { bits: 8, ...WORDS } },
  ...{ AFFINE2: { bits: 2, ...AFFINE }, AFFINE3: { bits: 3, ...AFFINE } },
  ...{ AFFINE4: { bits: 4, ...AFFINE }, AFFINE8: { bits: 8, ...AFFINE } },
  AWQ_W4A16: { bits: 4, groupSize: 64, zeroPoint: "real", scaleBits: OFFSET_BITS, block: 64 },
  INT8_TENSORWISE: { bits: 8, groupSize: 0, zeroPoint: "symmetric", block: 1 },
};

/** A program to quantize for. */
export interface Target {
  /** Format that it opens, as behind `--to` of export.ts. */
  readonly format: string;
  /** Models that it runs, where the format has others as well. */
  readonly models?: "language" | "image";
  /** The type for each number of bits; other types by name. */
  readonly types: Readonly<Partial<Record<BitWidth, string>>>;
  /** More types that may be asked for. */
  readonly more: readonly string[];
  /** It has linear layers alone: token tables and heads are kept, unless a type is asked for them. */
  readonly keepsTables?: boolean;
}

/** Programs that run image models out of GGUF files. */
const IMAGES: Target = {
  format: "gguf",
  models: "image",
  types: { 2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 8: "Q8_0" },
  more: ["Q4_0", "Q4_1", "Q6_K"],
};

/** Programs that have linear layers of symmetric codes. */
const LINEAR = {
  types: { 2: "W2A16", 3: "W3A16", 4: "W4A16", 8: "W8A16" },
  more: [],
  keepsTables: true,
} as const;

export const TARGETS: Readonly<Record<string, Target>> = {
  "llama.cpp": {
    format: "gguf",
    models: "language",
    types: { 2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 8: "Q8_0" },
    more: ["Q2_0", "Q4_0", "Q4_1", "Q6_K"],
  },
  comfyui: IMAGES,
  "stable-diffusion.cpp": IMAGES,
  diffusers: IMAGES,
  transformers: { format: "compressed-tensors", ...LINEAR },
  vllm: { format: "compressed-tensors", ...LINEAR },
  mlx: { format: "mlx", types: { 2: "AFFINE2", 3: "AFFINE3", 4: "AFFINE4", 8: "AFFINE8" }, more: [] },
  gptq: { format: "gptq", ...LINEAR },
  "auto-round": { format: "auto-round", ...LINEAR },
  comfy_quant: {
    ...{ format: "comfy", models: "image", keepsTables: true },
    types: { 4: "AWQ_W4A16", 8: "INT8_TENSORWISE" },
    more: [],
  },
};

/** Types that a target may be asked for. */
export const targetTypes = (
  { types, more }: Target,
): string[] => [...new Set([...Object.values(types), ...more])];

/** A type and its grid, with groups as wide as asked for where it can repeat its scale. */
export interface TargetGrid extends Grid {
  readonly type: string;
}

/**
 * The first type from `asked` on whose blocks divide a row; undefined where none does.
 *
 * @param groupSize wider groups than the type's own; 0 a whole row
 */
export function gridFor(asked: string, cols: number, groupSize: GroupSize): TargetGrid | undefined {
  for (let type: string | undefined = asked; type !== undefined; type = GRIDS[type]?.next) {
    const grid: Grid = GRIDS[type]!;
    if (cols % grid.block !== 0) continue;
    const most = grid.scaleBits === undefined ? Infinity : 128;
    const isWider = groupSize === 0
      ? grid.scaleBits === undefined
      : groupSize % grid.groupSize === 0 && groupSize <= most && cols % groupSize === 0;
    return { ...grid, type, groupSize: isWider ? groupSize : grid.groupSize };
  }
  return undefined;
}
