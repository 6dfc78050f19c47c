/** Second moments of an input while they are gathered, and read: over all times, or one a time group. */
import type { Kernels } from "../../native/mod.ts";
import { momentElements } from "../../native/call_checks.ts";
import { accumulateMoment } from "../../quant/solvers/moments.ts";
import { MomentSums, type SpareChunks, type SummedInputs } from "../../quant/solvers/moment_sums.ts";

type Floats = Float32Array<ArrayBuffer>;
type Doubles = Float64Array<ArrayBuffer>;

/** Form of moments: `count` of so many columns, in blocks. */
export interface MomentsShape {
  readonly cols: number;
  readonly block: number;
  readonly count: number;
}

/** Moments in float32, or in sums that do not depend on how a pass is divided. */
export class KeptMoments {
  #floats: Floats | undefined;
  #sums: readonly MomentSums[] | undefined;
  #totals: Doubles | undefined;

  constructor(readonly shape: MomentsShape, readonly spare: SpareChunks) {}

  get #length(): number {
    const { cols, block } = this.shape;
    return momentElements(cols, cols, block);
  }

  /** Rounded sums, one array until more is added; what is written into it counts. An open chunk ends. */
  get floats(): Floats {
    if (this.#floats !== undefined) return this.#floats;
    const length = this.#length, floats = new Float32Array(length * this.shape.count);
    for (const [i, sums] of this.#sums?.entries() ?? []) floats.set(sums.exact(), i * length);
    return this.#floats = floats;
  }

  /** Sums in double, where chunks are added up. An open chunk ends here. */
  get exact(): Doubles | undefined {
    for (const sums of this.#sums ?? []) sums.exact();
    return this.#totals;
  }

  set exact(totals: Doubles | undefined) {
    const { cols, block, count } = this.shape, length = this.#length;
    this.#floats = undefined;
    this.#totals = totals;
    this.#sums = totals && Array.from({ length: count }, (_, i) =>
      new MomentSums(
        { rows: cols, cols, block, isSymmetric: true },
        totals.subarray(i * length, (i + 1) * length),
        this.spare,
      ));
  }

  /** Whether a chunk has begun that is not whole. */
  get isOpen(): boolean {
    return this.#sums?.some((sums) => sums.isOpen) === true;
  }

  /** Adds inputs to one of the moments, in float32 without end where there are no chunks. */
  add(kernels: Kernels, index: number, inputs: SummedInputs, isChunked: boolean): void {
    const { x, weights, tokens } = inputs, { block } = this.shape, length = this.#length;
    if (isChunked) {
      const known = this.#floats, all = length * this.shape.count;
      if (this.#sums === undefined) this.exact = known ? new Float64Array(known) : new Float64Array(all);
      this.#floats = undefined;
      this.#sums![index]!.add(kernels, inputs);
    } else {
      const own = this.floats.subarray(index * length, (index + 1) * length);
      accumulateMoment(kernels, x, undefined, weights, tokens, own, block);
    }
  }

  /** A chunk of the pass is whole. */
  endChunk(): void {
    for (const sums of this.#sums ?? []) sums.endChunk();
  }

  /** Rounds the sums and lets those in double go. */
  settle(): void {
    if (this.#sums === undefined) return;
    void this.floats;
    this.#sums = this.#totals = undefined;
  }
}
