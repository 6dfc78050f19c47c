/** The timed calls of two-level scales, for the kernel suite. */
import type { Kernels } from "../../native/mod.ts";
import {
  type BitWidth,
  type GroupSize,
  packedBytes,
  quantize,
  type ScaleBits,
  type TwoLevelTensor,
} from "../../quant/mod.ts";
import {
  DTYPES,
  expectEqual,
  expectOk,
  type KernelCase,
  type KernelHandle,
  type Operands,
  SCALAR,
} from "./cases.ts";

export interface TwoLevelSpec {
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
  readonly scaleBits: ScaleBits;
}

/** The layouts of ggml's Q2_K and Q4_K. */
export const TWO_LEVEL_SPECS = [
  { bits: 2, groupSize: 16, scaleBits: 4, peer: "q2_K" },
  { bits: 4, groupSize: 32, scaleBits: 6, peer: "q4_K" },
] as const satisfies readonly (TwoLevelSpec & { readonly peer: string })[];

/** As in `two-level 2 bits, g 16`. */
export const twoLevelName = ({ bits, groupSize }: TwoLevelSpec): string =>
  `two-level ${bits} bits, g ${groupSize}`;

/** Rows that the check recomputes with the scalar kernels. */
const CHECKED_ROWS = 16;

/** The search for two-level scales, with importance of columns or without. */
export function twoLevelCase(
  { kernels, isa, isaNumber }: KernelHandle,
  operands: Operands,
  spec: TwoLevelSpec,
  importance?: Float32Array<ArrayBuffer>,
): KernelCase {
  const { rows, cols, count } = operands;
  const { bits, groupSize, scaleBits } = spec;
  const { buffer, refill } = operands.input("F32");
  const out = emptyTensor(kernels, rows, cols, spec);
  const run = (target: TwoLevelTensor, number: number) => {
    const { size, calls } = kernels;
    const { packed, subScale, subMin, superScale, superMin } = target;
    expectOk(
      calls.aq_quantize_two_level(
        buffer,
        DTYPES.F32.number,
        size(target.rows),
        size(cols),
        bits,
        size(groupSize),
        scaleBits,
        1,
        importance ?? null,
        packed,
        subScale,
        subMin,
        superScale,
        superMin,
        number,
        1,
      ),
    );
  };
  const name = twoLevelName(spec) + (importance ? ", weighted" : "");
  return {
    name,
    library: "arrowquant",
    backend: kernels.backend,
    isa,
    dtype: `F32 to ${bits} bits`,
    shape: [rows, cols],
    threads: 1,
    weights: count,
    bytes: buffer.byteLength + packedBytes(rows, cols, bits, groupSize, "real", scaleBits) - 16,
    contender: { prepare: refill, run: () => run(out, isaNumber) },
    check() {
      run(out, isaNumber);
      const wanted = emptyTensor(kernels, Math.min(rows, CHECKED_ROWS), cols, spec);
      run(wanted, SCALAR);
      for (const part of ["packed", "subScale", "subMin", "superScale", "superMin"] as const) {
        expectEqual(name, out[part], wanted[part]);
      }
    },
  };
}

/** Arrays of the right sizes: those of zeros. */
function emptyTensor(kernels: Kernels, rows: number, cols: number, spec: TwoLevelSpec): TwoLevelTensor {
  const zeros = { data: new Float32Array(rows * cols), dtype: "F32" } as const;
  return quantize(kernels, zeros, rows, cols, { ...spec, solver: "round" }) as TwoLevelTensor;
}
