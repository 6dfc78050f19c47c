/**
 * Sums of products over many inputs that do not depend on how these are divided among tasks: chunks of the
 * same samples everywhere, float32 within a chunk and float64 from chunk to chunk. Chunks are float32
 * numbers, so that a sum in double is exact unless they differ by a factor of 2²⁹, and what is left of it is
 * rounded away.
 */
import type { Kernels } from "../../native/mod.ts";
import { momentElements } from "../../native/call_checks.ts";
import { giveBack, narrowed } from "../array_memory.ts";
import { accumulateMoment, momentBlocks } from "./moments.ts";

/** Inputs of a layer, and what is multiplied with them: themselves by default. */
export interface SummedInputs {
  /** `f32[tokens, cols]` */
  readonly x: Float32Array;
  /** `f32[tokens, rows]` */
  readonly y?: Float32Array | undefined;
  /** `f32[tokens]`; 1 by default. */
  readonly weights?: Float32Array | undefined;
  readonly tokens: number;
}

/** A run of a part's samples within one chunk: `[begin, end)`. */
export interface ChunkPiece {
  readonly begin: number;
  readonly end: number;
  /** Whether the chunk is whole then. */
  readonly isEnd: boolean;
}

/** Rows of inputs of whole samples, those of a piece. @param samples that the inputs are of */
export function pieceOf(
  { x, y, weights, tokens }: SummedInputs,
  samples: number,
  { begin, end }: Omit<ChunkPiece, "isEnd">,
): SummedInputs {
  const of = <Floats extends Float32Array | undefined>(values: Floats): Floats =>
    values?.subarray(begin * values.length / samples, end * values.length / samples) as Floats;
  return { x: of(x), y: of(y), weights: of(weights), tokens: (end - begin) * tokens / samples };
}

/** A part of a pass cut where chunks end. @param before samples before it @param chunk samples of one */
export function* chunkPieces(before: number, samples: number, chunk = Infinity): Generator<ChunkPiece> {
  for (let begin = 0; begin < samples;) {
    const end = Math.min(samples, begin + chunk - (before + begin) % chunk);
    yield { begin, end, isEnd: (before + end) % chunk === 0 };
    begin = end;
  }
}

/** Arrays of chunks that are free, by form: 0 where the next one of this form is summed up. */
export type SpareChunks = Map<string, Float32Array<ArrayBuffer>>;

/** Where a part of a pass lies in it. */
export interface PartPlace {
  /** Samples in front of the part, and of it. */
  readonly before: number;
  readonly samples: number;
  /** Samples of a chunk; all by default. */
  readonly chunk?: number | undefined;
}

/** Form of the sums: those of a moment are symmetric, and in blocks where `block` is less than `cols`. */
export interface SumsShape {
  readonly rows: number;
  readonly cols: number;
  readonly block?: number | undefined;
  readonly isSymmetric: boolean;
}

/**
 * `totals += chunk`, `chunk = 0` of a matrix; of a symmetric one on and above the diagonal, from where
 * kernels mirror it. A separate function, so that the engine compiles it.
 */
function addRows(
  totals: Float64Array,
  chunk: Float32Array,
  { at, rows, cols, isUpper }: {
    readonly at: number;
    readonly rows: number;
    readonly cols: number;
    readonly isUpper: boolean;
  },
): void {
  for (let i = 0; i < rows; i++) {
    const end = at + (i + 1) * cols;
    for (let k = isUpper ? at + i * (cols + 1) : at + i * cols; k < end; k++) {
      totals[k] = totals[k]! + chunk[k]!;
      chunk[k] = 0;
    }
  }
}

/** `Σ w y xᵀ` of a pass. */
export class MomentSums {
  #open: Float32Array<ArrayBuffer> | undefined;
  /** What two forms with as many numbers differ in. */
  readonly #form: string;

  /**
   * @param totals `f64[momentElements(rows, cols, block)]`: what is known already; below the diagonals of
   * symmetric sums it need not be
   */
  constructor(
    readonly shape: SumsShape,
    readonly totals: Float64Array<ArrayBuffer> = new Float64Array(
      momentElements(shape.rows, shape.cols, shape.block ?? shape.cols),
    ),
    readonly spare: SpareChunks = new Map(),
  ) {
    const { cols, block = cols, isSymmetric } = shape;
    this.#form = `${totals.length} ${isSymmetric ? `${cols} ${block}` : "all"}`;
  }

  /** Whether a chunk has begun that is not whole. */
  get isOpen(): boolean {
    return this.#open !== undefined;
  }

  /** Adds inputs to the chunk. @throws {TypeError} as {@linkcode accumulateMoment} */
  add(kernels: Kernels, { x, y, weights, tokens }: SummedInputs): void {
    this.#open ??= this.#chunk();
    accumulateMoment(kernels, x, y, weights, tokens, this.#open, this.shape.block);
  }

  #chunk(): Float32Array<ArrayBuffer> {
    const chunk = this.spare.get(this.#form);
    this.spare.delete(this.#form);
    return chunk ?? new Float32Array(this.totals.length);
  }

  /** Adds a part of a pass, cut where chunks end. */
  addPart(kernels: Kernels, inputs: SummedInputs, { before, samples, chunk }: PartPlace): void {
    for (const piece of chunkPieces(before, samples, chunk)) {
      this.add(kernels, pieceOf(inputs, samples, piece));
      if (piece.isEnd) this.endChunk();
    }
  }

  /** The chunk is whole: it is added to the others. */
  endChunk(): void {
    const chunk = this.#open, { totals } = this;
    if (chunk === undefined) return;
    const { cols, block = cols, isSymmetric } = this.shape;
    if (!isSymmetric) addRows(totals, chunk, { at: 0, rows: 1, cols: totals.length, isUpper: false });
    else {
      for (const { cols: own, at } of momentBlocks(cols, block)) {
        addRows(totals, chunk, { at, rows: own, cols: own, isUpper: true });
      }
    }
    this.spare.set(this.#form, chunk);
    this.#open = undefined;
  }

  /** All sums in double, the open chunk's included: it ends here. Aliases {@linkcode totals}. */
  exact(): Float64Array<ArrayBuffer> {
    this.endChunk();
    giveBack(this.spare.get(this.#form));
    this.spare.delete(this.#form);
    const { totals, shape: { cols, block = cols, isSymmetric } } = this;
    if (!isSymmetric) return totals;
    for (const { cols: own, at } of momentBlocks(cols, block)) {
      for (let i = 1; i < own; i++) {
        for (let j = 0; j < i; j++) totals[at + i * own + j] = totals[at + j * own + i]!;
      }
    }
    return totals;
  }

  /** All sums, rounded; {@linkcode totals} are empty then. */
  rounded(): Float32Array<ArrayBuffer> {
    return narrowed(this.exact());
  }
}
