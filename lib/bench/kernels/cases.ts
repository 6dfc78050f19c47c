/**
 * The calls that the kernel suite times: each kernel of the header with its buffers made beforehand, and the
 * check that comes before any timing. Matrix products are in product_cases.ts, peers in peers.ts.
 */
import { DTYPE_NUMBERS, ZERO_POINT_NUMBERS } from "../../native/call.ts";
import * as native from "../../native/functions.ts";
import { INSTRUCTION_SETS } from "../../native/kernels.ts";
import type { InstructionSet, Kernels } from "../../native/mod.ts";
import {
  type BitWidth,
  groupCount,
  type GroupSize,
  packedWords,
  quantize,
  type ScaleBits,
  type TwoLevelTensor,
  type ZeroPointKind,
} from "../../quant/mod.ts";
import { BYTES_PER_ELEMENT } from "../../tensor/mod.ts";
import type { Contender } from "../timing.ts";

/** Purpose of every call, for messages. */
export const DOING = "time a kernel";

/** The same kernels with another of their instruction sets. */
export const withIsa = (kernels: Kernels, isa: InstructionSet): Kernels =>
  Object.create(kernels, { isa: { value: isa }, isaNumber: { value: INSTRUCTION_SETS[isa] } });

/** One thing that is timed, and where. */
export interface KernelCase {
  readonly name: string;
  readonly library: "arrowquant" | "ggml" | "memcpy" | "none";
  readonly backend: "native" | "wasm" | "runtime";
  readonly isa: string;
  /** As in `F32 to 4 bits`. */
  readonly dtype: string;
  readonly shape: readonly [rows: number, cols: number];
  readonly threads: number;
  /** Weights of one call; 0 where bytes are all there is to count. */
  readonly weights: number;
  /** Bytes read and written once each, as the arrays have them. */
  readonly bytes: number;
  readonly contender: Contender;
  /** Throws when the result is wrong. */
  check(): void;
}

export type TimedDtype = "F32" | "F16" | "BF16" | "F8_E4M3" | "F8_E5M2";

/** Rows that a check recomputes with the scalar kernels: rows are independent, so a few are enough. */
const CHECKED_ROWS = 16;

export type Elements = Float32Array<ArrayBuffer> | Uint16Array<ArrayBuffer> | Uint8Array<ArrayBuffer>;

export function elements(dtype: TimedDtype, count: number): Elements {
  if (dtype === "F32") return new Float32Array(count);
  return BYTES_PER_ELEMENT[dtype] === 2 ? new Uint16Array(count) : new Uint8Array(count);
}

export function expectEqual(
  what: string,
  found: ArrayBufferView<ArrayBuffer>,
  wanted: ArrayBufferView<ArrayBuffer>,
): void {
  const bytesOf = (view: ArrayBufferView) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
  const a = bytesOf(found), b = bytesOf(wanted);
  for (let i = 0; i < b.length; i++) {
    if (a[i] !== b[i]) {
      throw new Error(`Cannot time ${what}: byte ${i} must be ${b[i]} as the scalar kernel's, got ${a[i]}`);
    }
  }
}

/** Root of Σ(found − wanted)² / Σ wanted². */
export function relativeDifference(found: Float32Array, wanted: Float32Array): number {
  let squares = 0, error = 0;
  for (let i = 0; i < wanted.length; i++) {
    squares += wanted[i]! ** 2;
    error += (wanted[i]! - found[i]!) ** 2;
  }
  return Math.sqrt(error / squares);
}

/**
 * Input of the timed calls. In cache, every call is given data it has not seen: on a short run of numbers
 * that comes again and again a branch predictor learns the numbers, and code with branches looks twice as
 * fast as it is.
 */
export class Operands {
  readonly count: number;
  readonly #offsets = new Map<Elements, number>();

  /** `pool` holds at least `rows · cols` weights; of more, calls get one part after the other. */
  constructor(
    /** Kernels whose scalar results others are compared with. */
    readonly reference: Kernels,
    readonly rows: number,
    readonly cols: number,
    readonly pool: { readonly F32: Float32Array<ArrayBuffer>; readonly BF16: Uint16Array<ArrayBuffer> },
    readonly kernels: Kernels = reference,
  ) {
    this.count = rows * cols;
  }

  on(kernels: Kernels): Operands {
    return new Operands(this.reference, this.rows, this.cols, this.pool, kernels);
  }

  /** An input buffer, and a function that fills it with the next weights if the pool holds more. */
  input(dtype: "F32" | "BF16"): { buffer: Elements; refill: (() => void) | undefined } {
    const pool: Elements = this.pool[dtype];
    if (pool.length < 2 * this.count) return { buffer: pool.subarray(0, this.count), refill: undefined };
    const buffer = elements(dtype, this.count);
    const refill = () => {
      const offset = this.#offsets.get(buffer) ?? 0;
      buffer.set(pool.subarray(offset, offset + this.count));
      const next = offset + this.count;
      this.#offsets.set(buffer, next + this.count > pool.length ? 0 : next);
    };
    refill();
    return { buffer, refill };
  }

  /** The first input in float32. */
  weights(): Float32Array<ArrayBuffer> {
    return this.input("F32").buffer as Float32Array<ArrayBuffer>;
  }
}

/** Outputs of a kernel: `null` where an argument is absent. */
type Arrays = readonly (ArrayBufferView<ArrayBuffer> | null)[];

export const bytesOfArrays = (arrays: Arrays): number =>
  arrays.reduce((sum, array) => sum + (array?.byteLength ?? 0), 0);

/** A kernel with its buffers. */
interface OwnCall<Out extends Arrays> {
  readonly name: string;
  readonly dtype: string;
  readonly prepare?: (() => void) | undefined;
  /** Bytes of the arrays; default `bytesRead` and what is written. */
  readonly bytesRead: number;
  /** Default the operands'. */
  readonly weights?: number;
  /** Makes what the call writes for so many rows. */
  make(rows: number): Out;
  call(kernels: Kernels, rows: number, out: Out): void;
  /** Whether `out` is sums over all rows, and no rows. */
  readonly isSum?: boolean;
}

/** A call of ours as a case, whose first rows are compared with the scalar kernel's before it is timed. */
export function ownCase<Out extends Arrays>(
  { kernels, rows, cols, reference }: Pick<Operands, "kernels" | "rows" | "cols" | "reference">,
  { name, dtype, prepare, bytesRead, weights = rows * cols, make, call, isSum = false }: OwnCall<Out>,
): KernelCase {
  const out = make(rows);
  return {
    ...circumstancesOf(kernels, name, dtype, [rows, cols]),
    weights,
    bytes: bytesRead + (isSum ? 0 : bytesOfArrays(out)),
    contender: { prepare, run: () => call(kernels, rows, out) },
    check() {
      call(kernels, rows, out);
      const checked = Math.min(rows, CHECKED_ROWS), wanted = make(checked);
      let found = out;
      if (isSum) call(kernels, checked, found = make(checked));
      call(withIsa(reference, "scalar"), checked, wanted);
      for (const [i, array] of wanted.entries()) if (array !== null) expectEqual(name, found[i]!, array);
    },
  };
}

export function circumstancesOf(
  { backend, isa, threads }: Kernels,
  name: string,
  dtype: string,
  shape: readonly [rows: number, cols: number],
) {
  return { name, library: "arrowquant" as const, backend, isa, dtype, shape, threads };
}

export interface QuantizeSpec {
  readonly solver: "round" | "clip";
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
  readonly zeroPoint: ZeroPointKind;
  readonly dtype?: "F32" | "BF16";
}

/** As in `4 bits, g 32, symmetric`. */
export const specName = ({ bits, groupSize, zeroPoint }: Omit<QuantizeSpec, "solver">): string =>
  `${bits} bits, g ${groupSize}, ${zeroPoint}`;

/** Codes, scales and zero points of a packed matrix. */
export type PackedArrays = readonly [
  packed: Uint32Array<ArrayBuffer>,
  scale: Uint16Array<ArrayBuffer>,
  zeroPoint: Uint16Array<ArrayBuffer> | null,
];

export function packedArrays(
  rows: number,
  cols: number,
  { bits, groupSize, zeroPoint }: Omit<QuantizeSpec, "solver">,
): PackedArrays {
  const groups = rows * groupCount(cols, groupSize);
  return [
    new Uint32Array(rows * packedWords(cols, bits)),
    new Uint16Array(groups),
    zeroPoint === "symmetric" ? null : new Uint16Array(groups),
  ];
}

export function quantizeInto(
  kernels: Kernels,
  weights: ArrayBufferView<ArrayBuffer>,
  rows: number,
  cols: number,
  { solver, bits, groupSize, zeroPoint, dtype = "F32" }: QuantizeSpec,
  out: PackedArrays,
): void {
  const grid = [bits, groupSize, ZERO_POINT_NUMBERS[zeroPoint]] as const;
  const matrix = [weights, DTYPE_NUMBERS[dtype], rows, cols, ...grid] as const;
  if (solver === "round") native.quantizeRound(kernels, DOING, ...matrix, ...out);
  else native.quantizeClip(kernels, DOING, ...matrix, null, ...out);
}

export function quantizeCase(
  operands: Operands,
  spec: QuantizeSpec,
  name = `${spec.solver} ${specName(spec)}${spec.dtype === "BF16" ? ", from BF16" : ""}`,
): KernelCase {
  const { cols } = operands, { dtype = "F32", bits } = spec;
  const { buffer, refill: prepare } = operands.input(dtype);
  return ownCase(operands, {
    name,
    dtype: `${dtype} to ${bits} bits`,
    prepare,
    bytesRead: buffer.byteLength,
    make: (rows) => packedArrays(rows, cols, spec),
    call: (used, rows, out) => quantizeInto(used, buffer, rows, cols, spec, out),
  });
}

/** Weights quantized round to nearest, for the cases that read packed arrays. */
function packedInput(operands: Operands, spec: Omit<QuantizeSpec, "solver">): PackedArrays {
  const { kernels, rows, cols } = operands, out = packedArrays(rows, cols, spec);
  quantizeInto(kernels, operands.weights(), rows, cols, { ...spec, solver: "round" }, out);
  return out;
}

/** Dequantizing to float32, half or bfloat16. */
export function dequantizeCase(
  operands: Operands,
  spec: Omit<QuantizeSpec, "solver" | "dtype">,
  to: "F32" | "F16" | "BF16" = "F32",
  name = `dequantize ${specName(spec)}${to === "F32" ? "" : ` to ${to}`}`,
): KernelCase {
  const { cols } = operands, { bits, groupSize } = spec;
  const from = packedInput(operands, spec);
  return ownCase(operands, {
    name,
    dtype: `${bits} bits to ${to}`,
    bytesRead: bytesOfArrays(from),
    make: (rows) => [elements(to, rows * cols)] as const,
    call: (used, rows, [out]) =>
      native.dequantize(used, DOING, ...from, rows, cols, bits, groupSize, out, DTYPE_NUMBERS[to]),
  });
}

/** Trellis codes, their scales and offsets: uniform codes, their scales and zero points, taken as such. */
export const TRELLIS_DEQUANTIZE = (bits: BitWidth) => `dequantize ${bits} bits, g 64, trellis`;

/** Dequantizing trellis codes: any codes take the same time. */
export function trellisDequantizeCase(operands: Operands, bits: BitWidth): KernelCase {
  const { cols } = operands, spec = { bits, groupSize: 64, zeroPoint: "real" } as const;
  const [packed, scale, offset] = packedInput(operands, spec);
  return ownCase(operands, {
    name: TRELLIS_DEQUANTIZE(bits),
    dtype: `trellis of ${bits} bits to F32`,
    bytesRead: bytesOfArrays([packed, scale, offset]),
    make: (rows) => [new Float32Array(rows * cols)] as const,
    call: (used, rows, [out]) =>
      native.dequantizeTrellis(
        used,
        DOING,
        packed,
        scale,
        offset!,
        rows,
        cols,
        bits,
        64,
        out,
        DTYPE_NUMBERS.F32,
      ),
  });
}

export function codesCase(operands: Operands, direction: "pack" | "unpack", bits: BitWidth): KernelCase {
  const { kernels, rows, cols, count } = operands;
  const codes = Uint8Array.from({ length: count }, (_, i) => Math.imul(i, 0x9e3779b1) >>> (32 - bits));
  const packed = new Uint32Array(rows * packedWords(cols, bits));
  const unpacked = new Uint8Array(count);
  const pack = () => native.packCodes(kernels, DOING, codes, rows, cols, bits, packed);
  const unpack = () => native.unpackCodes(kernels, DOING, packed, rows, cols, bits, unpacked);
  pack();
  const name = `${direction} ${bits} bits`;
  const dtype = direction === "pack" ? `U8 to ${bits} bits` : `${bits} bits to U8`;
  return {
    ...circumstancesOf(kernels, name, dtype, [rows, cols]),
    weights: count,
    bytes: codes.byteLength + packed.byteLength,
    contender: { run: direction === "pack" ? pack : unpack },
    check() {
      unpacked.fill(0xff);
      unpack();
      expectEqual(name, unpacked, codes);
    },
  };
}

export function convertInto(
  kernels: Kernels,
  source: Elements,
  from: TimedDtype,
  target: Elements,
  to: TimedDtype,
): void {
  native.convert(kernels, DOING, source, DTYPE_NUMBERS[from], target, DTYPE_NUMBERS[to], target.length);
}

export function convertCase(
  operands: Operands,
  from: TimedDtype,
  to: TimedDtype,
  name = `convert ${from} to ${to}`,
): KernelCase {
  const input = elements(from, operands.count);
  convertInto(operands.kernels, operands.weights(), "F32", input, from);
  return ownCase(operands, {
    name,
    dtype: `${from} to ${to}`,
    bytesRead: input.byteLength,
    make: (rows) => [elements(to, rows * operands.cols)] as const,
    call: (used, _rows, [out]) => convertInto(used, input, from, out, to),
  });
}

/** Error statistics of float32 against float32, or of a packed matrix against its weights. */
export function statisticsCase(operands: Operands, bits: BitWidth | undefined, name?: string): KernelCase {
  const { cols } = operands, a = operands.weights();
  const b = Float32Array.from(a, (value) => value * 1.01);
  const spec = { bits: bits ?? 4, groupSize: 64, zeroPoint: "real" } as const;
  const from = packedInput(operands, spec);
  return ownCase(operands, {
    name: name ?? (bits === undefined ? "error statistics" : `packed error statistics ${specName(spec)}`),
    dtype: bits === undefined ? "F32 against F32" : `${bits} bits against F32`,
    bytesRead: a.byteLength + (bits === undefined ? b.byteLength : bytesOfArrays(from)),
    isSum: true,
    make: () => [new Float64Array(6)] as const,
    call(used, rows, [out]) {
      if (bits === undefined) native.errorStatistics(used, DOING, a, 0, b, 0, rows * cols, out);
      else native.packedErrorStatistics(used, DOING, a, 0, ...from, rows, cols, bits, spec.groupSize, out);
    },
  });
}

/** The search for NaN and infinity where there is none, which reads everything. */
export function findNonfiniteCase(operands: Operands, dtype: "F32" | "BF16"): KernelCase {
  const { kernels, rows, cols, count } = operands;
  const values = operands.input(dtype).buffer, index = new BigUint64Array(1);
  const call = (input: Elements) => {
    native.findNonfinite(kernels, DOING, input, DTYPE_NUMBERS[dtype], input.length, index);
    return Number(index[0]);
  };
  return {
    ...circumstancesOf(kernels, `find non-finite in ${dtype}`, dtype, [rows, cols]),
    weights: count,
    bytes: values.byteLength,
    contender: { run: () => void call(values) },
    check() {
      const planted = values.slice(0, Math.min(count, 4096)), place = planted.length - 3;
      planted[place] = dtype === "F32" ? NaN : 0x7fc0;
      const found = call(planted), none = call(values);
      if (found === place && none === count) return;
      throw new Error(
        `Cannot time find_nonfinite: it must find ${place} and ${count}, got ${found} and ${none}`,
      );
    },
  };
}

interface TwoLevelSpec {
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

/** The search for two-level scales, with importance of columns or without. */
export function twoLevelCase(
  operands: Operands,
  spec: TwoLevelSpec,
  importance?: Float32Array<ArrayBuffer>,
): KernelCase {
  const { cols } = operands, { bits, groupSize, scaleBits } = spec;
  const { buffer, refill: prepare } = operands.input("F32");
  return ownCase(operands, {
    name: twoLevelName(spec) + (importance ? ", weighted" : ""),
    dtype: `F32 to ${bits} bits`,
    prepare,
    bytesRead: buffer.byteLength,
    make(rows) {
      const zeros = { data: new Float32Array(rows * cols), dtype: "F32" } as const;
      const tensor = quantize(operands.reference, zeros, rows, cols, { ...spec, solver: "round" });
      const { packed, subScale, subMin, superScale, superMin } = tensor as TwoLevelTensor;
      return [packed, subScale, subMin, superScale, superMin] as const;
    },
    call(used, rows, out) {
      const matrix = [buffer, DTYPE_NUMBERS.F32, rows, cols, bits, groupSize, scaleBits] as const;
      native.quantizeTwoLevel(used, DOING, ...matrix, 1, importance, ...out);
    },
  });
}
