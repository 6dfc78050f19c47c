/**
 * The calls that the kernel suite times: each kernel of the header with its buffers made beforehand, and the check
 * that comes before any timing. Peers are kernel_peers.ts's.
 */
import type { Kernels } from "../../native/mod.ts";
import {
  type BitWidth,
  groupCount,
  type GroupSize,
  packedWords,
  type ZeroPointKind,
} from "../../quant/mod.ts";
import type { Contender } from "../timing.ts";

/** Kernels with one instruction set of theirs. */
export interface KernelHandle {
  readonly kernels: Kernels;
  /** Name and the header's number. */
  readonly isa: string;
  readonly isaNumber: number;
}

/** One thing that is timed, and what it is. */
export interface KernelCase {
  /** Unique in its group. */
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
/** The header's `AQ_F32`, …, with the bytes of an element. */
export const DTYPES: Record<TimedDtype, { number: number; bytes: 1 | 2 | 4 }> = {
  F32: { number: 0, bytes: 4 },
  F16: { number: 1, bytes: 2 },
  BF16: { number: 2, bytes: 2 },
  F8_E4M3: { number: 3, bytes: 1 },
  F8_E5M2: { number: 4, bytes: 1 },
};
const ZERO_POINTS: Record<ZeroPointKind, number> = { real: 0, integer: 1, symmetric: 2 };
export const SCALAR = 1;

/** Rows that a check recomputes with the scalar kernels: rows are independent, so few are enough of a large matrix. */
const CHECKED_ROWS = 16;

export type Elements = Float32Array<ArrayBuffer> | Uint16Array<ArrayBuffer> | Uint8Array<ArrayBuffer>;

export function elements(dtype: TimedDtype, count: number): Elements {
  if (dtype === "F32") return new Float32Array(count);
  return DTYPES[dtype].bytes === 2 ? new Uint16Array(count) : new Uint8Array(count);
}

function bytesOf(view: ArrayBufferView<ArrayBuffer>): Uint8Array {
  return new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
}

export function expectEqual(
  what: string,
  found: ArrayBufferView<ArrayBuffer>,
  wanted: ArrayBufferView<ArrayBuffer>,
): void {
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

export function expectOk(status: number): void {
  if (status !== 0) throw new Error(`Cannot time a kernel: it returned ${status}`);
}

/**
 * Input of the timed calls. In cache, every call is given data it has not seen: on a short run of numbers that comes
 * again and again a branch predictor learns the numbers, and code with branches looks twice as fast as it is.
 */
export class Operands {
  readonly count: number;
  readonly #pool: Readonly<Record<"F32" | "BF16", Elements>>;
  readonly #offsets = new Map<Elements, number>();

  /** `pool` holds at least `rows · cols` weights; when it holds more, calls are given one part after the other. */
  constructor(
    readonly rows: number,
    readonly cols: number,
    pool: { readonly F32: Float32Array<ArrayBuffer>; readonly BF16: Uint16Array<ArrayBuffer> },
  ) {
    this.count = rows * cols;
    this.#pool = pool;
  }

  /** An input buffer, and what fills it with the next weights (nothing when the pool is one buffer's size). */
  input(dtype: "F32" | "BF16"): { buffer: Elements; refill: (() => void) | undefined } {
    const pool = this.#pool[dtype];
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
}

export interface QuantizeSpec {
  readonly solver: "round" | "clip";
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
  readonly zeroPoint: ZeroPointKind;
  readonly dtype?: "F32" | "BF16";
  readonly threads?: number;
}

/** As in `round 4 bits, g 32, symmetric`. */
export function specName(spec: Pick<QuantizeSpec, "bits" | "groupSize" | "zeroPoint">): string {
  return `${spec.bits} bits, g ${spec.groupSize}, ${spec.zeroPoint}`;
}

/** Arrays of a packed matrix. */
export interface PackedArrays {
  readonly packed: Uint32Array<ArrayBuffer>;
  readonly scale: Uint16Array<ArrayBuffer>;
  readonly zeroPoint: Uint16Array<ArrayBuffer> | null;
}

export function packedArrays(rows: number, cols: number, spec: QuantizeSpec): PackedArrays {
  const groups = rows * groupCount(cols, spec.groupSize);
  return {
    packed: new Uint32Array(rows * packedWords(cols, spec.bits)),
    scale: new Uint16Array(groups),
    zeroPoint: spec.zeroPoint === "symmetric" ? null : new Uint16Array(groups),
  };
}

export function packedArrayBytes({ packed, scale, zeroPoint }: PackedArrays): number {
  return packed.byteLength + scale.byteLength + (zeroPoint?.byteLength ?? 0);
}

/** Calls the raw kernel. */
export function quantizeInto(
  { kernels, isaNumber }: KernelHandle,
  weights: ArrayBufferView<ArrayBuffer>,
  rows: number,
  cols: number,
  spec: QuantizeSpec,
  out: PackedArrays,
): void {
  const { calls, size } = kernels;
  const dtype = DTYPES[spec.dtype ?? "F32"].number,
    kind = ZERO_POINTS[spec.zeroPoint],
    threads = spec.threads ?? 1;
  const n = size(rows), k = size(cols), g = size(spec.groupSize);
  const { packed, scale, zeroPoint } = out;
  expectOk(
    spec.solver === "round"
      ? calls.aq_quantize_round(
        weights,
        dtype,
        n,
        k,
        spec.bits,
        g,
        kind,
        packed,
        scale,
        zeroPoint,
        isaNumber,
        threads,
      )
      : calls.aq_quantize_clip(
        weights,
        dtype,
        n,
        k,
        spec.bits,
        g,
        kind,
        null,
        packed,
        scale,
        zeroPoint,
        isaNumber,
        threads,
      ),
  );
}

/** Round to nearest or clip search. `reference` makes the scalar result for the check. */
export function quantizeCase(
  handle: KernelHandle,
  reference: Kernels,
  operands: Operands,
  spec: QuantizeSpec,
  name = `${spec.solver} ${specName(spec)}${spec.dtype === "BF16" ? ", from BF16" : ""}`,
): KernelCase {
  const { rows, cols, count } = operands;
  const dtype = spec.dtype ?? "F32";
  const { buffer, refill } = operands.input(dtype);
  const out = packedArrays(rows, cols, spec);
  return {
    ...ours(handle, name, `${dtype} to ${spec.bits} bits`, rows, cols, spec.threads),
    weights: count,
    bytes: buffer.byteLength + packedArrayBytes(out),
    contender: { prepare: refill, run: () => quantizeInto(handle, buffer, rows, cols, spec, out) },
    check() {
      quantizeInto(handle, buffer, rows, cols, spec, out);
      const checked = Math.min(rows, CHECKED_ROWS);
      const wanted = packedArrays(checked, cols, spec);
      quantizeInto(scalarOf(reference), buffer.subarray(0, checked * cols), checked, cols, spec, wanted);
      expectEqual(name, out.packed, wanted.packed);
      expectEqual(name, out.scale, wanted.scale);
      if (wanted.zeroPoint !== null) expectEqual(name, out.zeroPoint!, wanted.zeroPoint);
    },
  };
}

export const scalarOf = (kernels: Kernels): KernelHandle => ({ kernels, isa: "scalar", isaNumber: SCALAR });

/** The circumstances that all our cases share. */
export function ours(
  handle: KernelHandle,
  name: string,
  dtype: string,
  rows: number,
  cols: number,
  threads = 1,
) {
  return {
    name,
    library: "arrowquant" as const,
    backend: handle.kernels.backend,
    isa: handle.isa,
    dtype,
    shape: [rows, cols] as const,
    threads,
  };
}

/** Dequantizing to float32, half or bfloat16. */
export function dequantizeCase(
  handle: KernelHandle,
  reference: Kernels,
  operands: Operands,
  spec: Omit<QuantizeSpec, "solver" | "dtype">,
  to: "F32" | "F16" | "BF16" = "F32",
  name = `dequantize ${specName(spec)}${to === "F32" ? "" : ` to ${to}`}`,
): KernelCase {
  const { rows, cols, count } = operands;
  const full = { ...spec, solver: "round" as const };
  const from = packedArrays(rows, cols, full);
  quantizeInto(handle, operands.input("F32").buffer, rows, cols, full, from);
  const out = elements(to, count);
  const call = ({ kernels, isaNumber }: KernelHandle, height: number, target: Elements) => {
    const { calls, size } = kernels;
    const n = size(height), k = size(cols), g = size(spec.groupSize), number = DTYPES[to].number;
    const { packed, scale, zeroPoint } = from, threads = spec.threads ?? 1;
    expectOk(
      calls.aq_dequantize(packed, scale, zeroPoint, n, k, spec.bits, g, target, number, isaNumber, threads),
    );
  };
  return {
    ...ours(handle, name, `${spec.bits} bits to ${to}`, rows, cols, spec.threads),
    weights: count,
    bytes: packedArrayBytes(from) + out.byteLength,
    contender: { run: () => call(handle, rows, out) },
    check() {
      call(handle, rows, out);
      const checked = Math.min(rows, CHECKED_ROWS);
      const wanted = elements(to, checked * cols);
      call(scalarOf(reference), checked, wanted);
      expectEqual(name, out, wanted);
    },
  };
}

/** Packing codes, or unpacking them. */
export function codesCase(
  handle: KernelHandle,
  operands: Operands,
  direction: "pack" | "unpack",
  bits: BitWidth,
): KernelCase {
  const { rows, cols, count } = operands;
  const codes = Uint8Array.from({ length: count }, (_, i) => Math.imul(i, 0x9e3779b1) >>> (32 - bits));
  const packed = new Uint32Array(rows * packedWords(cols, bits));
  const unpacked = new Uint8Array(count);
  const { calls, size } = handle.kernels;
  const n = size(rows), k = size(cols), isa = handle.isaNumber;
  const pack = () => expectOk(calls.aq_pack_codes(codes, n, k, bits, packed, isa, 1));
  const unpack = () => expectOk(calls.aq_unpack_codes(packed, n, k, bits, unpacked, isa, 1));
  pack();
  return {
    ...ours(
      handle,
      `${direction} ${bits} bits`,
      direction === "pack" ? `U8 to ${bits} bits` : `${bits} bits to U8`,
      rows,
      cols,
    ),
    weights: count,
    bytes: codes.byteLength + packed.byteLength,
    contender: { run: direction === "pack" ? pack : unpack },
    check() {
      unpacked.fill(0xff);
      unpack();
      expectEqual(`${direction} ${bits} bits`, unpacked, codes);
    },
  };
}

/** Conversion from one floating type to another. */
export function convertCase(
  handle: KernelHandle,
  reference: Kernels,
  operands: Operands,
  from: TimedDtype,
  to: TimedDtype,
): KernelCase {
  const { rows, cols, count } = operands;
  const name = `convert ${from} to ${to}`;
  const call = (
    { kernels, isaNumber }: KernelHandle,
    source: Elements,
    source_: TimedDtype,
    target: Elements,
    target_: TimedDtype,
  ) =>
    expectOk(
      kernels.calls.aq_convert(
        source,
        DTYPES[source_].number,
        target,
        DTYPES[target_].number,
        kernels.size(target.length),
        isaNumber,
        1,
      ),
    );
  const input = elements(from, count), out = elements(to, count);
  call(handle, operands.input("F32").buffer, "F32", input, from);
  return {
    ...ours(handle, name, `${from} to ${to}`, rows, cols),
    weights: count,
    bytes: input.byteLength + out.byteLength,
    contender: { run: () => call(handle, input, from, out, to) },
    check() {
      call(handle, input, from, out, to);
      const checked = Math.min(rows, CHECKED_ROWS) * cols;
      const wanted = elements(to, checked);
      call(scalarOf(reference), input.subarray(0, checked), from, wanted, to);
      expectEqual(name, out, wanted);
    },
  };
}

/** Error statistics of float32 against float32, or of a packed matrix against its weights. */
export function statisticsCase(
  handle: KernelHandle,
  reference: Kernels,
  operands: Operands,
  bits: BitWidth | undefined,
): KernelCase {
  const { rows, cols, count } = operands;
  const a = operands.input("F32").buffer;
  const b = Float32Array.from(a, (value) => value * 1.01);
  const spec: QuantizeSpec = { solver: "round", bits: bits ?? 4, groupSize: 64, zeroPoint: "real" };
  const from = packedArrays(rows, cols, spec);
  quantizeInto(handle, a, rows, cols, spec, from);
  const statistics = new Float64Array(6);
  const call = ({ kernels, isaNumber }: KernelHandle, height: number, out: Float64Array<ArrayBuffer>) => {
    const { calls, size } = kernels;
    if (bits === undefined) {
      return expectOk(calls.aq_error_statistics(a, 0, b, 0, size(height * cols), out, isaNumber, 1));
    }
    const { packed, scale, zeroPoint } = from;
    const n = size(height), k = size(cols), g = size(spec.groupSize);
    expectOk(
      calls.aq_packed_error_statistics(a, 0, packed, scale, zeroPoint, n, k, bits, g, out, isaNumber, 1),
    );
  };
  const name = bits === undefined ? "error statistics" : `packed error statistics ${specName(spec)}`;
  return {
    ...ours(handle, name, bits === undefined ? "F32 against F32" : `${bits} bits against F32`, rows, cols),
    weights: count,
    bytes: a.byteLength + (bits === undefined ? b.byteLength : packedArrayBytes(from)),
    contender: { run: () => call(handle, rows, statistics) },
    check() {
      const checked = Math.min(rows, CHECKED_ROWS);
      const found = new Float64Array(6), wanted = new Float64Array(6);
      call(handle, checked, found);
      call(scalarOf(reference), checked, wanted);
      expectEqual(name, found, wanted);
      call(handle, rows, statistics);
    },
  };
}

/** The search for NaN and infinity where there is none, which reads everything. */
export function findNonfiniteCase(
  handle: KernelHandle,
  operands: Operands,
  dtype: "F32" | "BF16",
): KernelCase {
  const { rows, cols, count } = operands;
  const values = operands.input(dtype).buffer;
  const index = new BigUint64Array(1);
  const { calls, size } = handle.kernels;
  const call = (input: Elements) => {
    expectOk(
      calls.aq_find_nonfinite(input, DTYPES[dtype].number, size(input.length), index, handle.isaNumber, 1),
    );
    return Number(index[0]);
  };
  return {
    ...ours(handle, `find non-finite in ${dtype}`, dtype, rows, cols),
    weights: count,
    bytes: values.byteLength,
    contender: { run: () => void call(values) },
    check() {
      const planted = values.slice(0, Math.min(count, 4096));
      planted[planted.length - 3] = dtype === "F32" ? NaN : 0x7fc0;
      const found = call(planted), none = call(values);
      if (found !== planted.length - 3 || none !== count) {
        throw new Error(
          `Cannot time find_nonfinite: it must find ${
            planted.length - 3
          } and ${count}, got ${found} and ${none}`,
        );
      }
    },
  };
}
