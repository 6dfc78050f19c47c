/**
 * The suite kernels on a GPU: every kernel with device events, beside a copy within the device's memory and, where there is one,
 * cuBLAS, in the same run. What a kernel gives is held against the CPU's before it is timed.
 */
import { type CudaKernels, describeCudaStatus } from "../../native/cuda.ts";
import type { Kernels } from "../../native/mod.ts";
import { dequantize, quantize, type QuantizeOptions } from "../../quant/mod.ts";
import { environmentOf } from "../../eval/environment.ts";
import { expectEqual, relativeDifference } from "./cases.ts";
import type { Goal, Section, Skipped, SuiteReport } from "../suite.ts";
import { summarize } from "../../eval/statistics.ts";

/** What a run measures; sizes that fill the device, or a look. */
interface CudaScale {
  /** Rows and columns of a matrix that is quantized. */
  readonly matrix: readonly [rows: number, cols: number];
  /** Of one that is multiplied with. */
  readonly product: readonly [rows: number, cols: number];
  /** Tokens beside 1, 8 and 64. */
  readonly manyTokens: number;
  /** Columns of a moment, of error feedback and of a norm. */
  readonly square: number;
  readonly attention: readonly [tokens: number, heads: number, kvHeads: number, headSize: number];
  /** Bytes that matrices of one product fill by turns: more than the device's cache, or the cache is measured. */
  readonly rotatedBytes: number;
  readonly samples: number;
  readonly sampleMilliseconds: number;
}

const FULL: CudaScale = {
  matrix: [16384, 16384],
  product: [8192, 8192],
  manyTokens: 512,
  square: 4096,
  attention: [2048, 28, 4, 128],
  rotatedBytes: 512e6,
  samples: 30,
  sampleMilliseconds: 5,
};
const QUICK: CudaScale = {
  matrix: [64, 512],
  product: [64, 512],
  manyTokens: 130,
  square: 96,
  attention: [40, 2, 1, 64],
  rotatedBytes: 0,
  samples: 3,
  sampleMilliseconds: 0,
};

/** Rows that are made on the host and repeated over a matrix; also those that are checked. */
const HOST_ROWS = 16;
/** Most matrices that take turns. */
const MOST_TURNS = 64;
/** The header's `AQ_E_LIBRARY` and `AQ_BF16`. */
const NO_CUBLAS = -102;
const BF16 = 2;

/** Numbers as weights have them, not zeros: those would be faster than anything that is stored. */
function gaussians(count: number, seed: number): Float32Array<ArrayBuffer> {
  let state = seed >>> 0;
  const uniform = () => (state = Math.imul(state, 1664525) + 1013904223 >>> 0) / 2 ** 32;
  return Float32Array.from(
    { length: count },
    () => Math.sqrt(-2 * Math.log(uniform() + 2 ** -33)) * Math.cos(2 * Math.PI * uniform()),
  );
}

/** Nearest bfloat16 numbers. */
function toBfloat(values: Float32Array): Uint16Array<ArrayBuffer> {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  return Uint16Array.from(bits, (b) => b + 0x7fff + (b >>> 16 & 1) >>> 16);
}

/** Buffers of one stream, freed together. */
class DeviceMemory {
  readonly #cuda: CudaKernels;
  readonly #buffers: bigint[] = [];
  readonly stream: bigint;

  constructor(cuda: CudaKernels) {
    this.#cuda = cuda;
    const handle = new BigUint64Array(1);
    this.expect(cuda.calls.aq_cuda_create_stream(0, handle));
    this.stream = handle[0]!;
  }

  expect(status: number): void {
    if (status !== 0) throw new Error(`Cannot measure on the GPU: ${describeCudaStatus(this.#cuda, status)}`);
  }

  allocate(bytes: number): bigint {
    const handle = new BigUint64Array(1);
    this.expect(this.#cuda.calls.aq_cuda_allocate(this.#cuda.size(bytes), handle, this.stream));
    this.#buffers.push(handle[0]!);
    return handle[0]!;
  }

  /** A new buffer filled with `data`, again and again. */
  filled(data: ArrayBufferView, bytes = data.byteLength): bigint {
    const { calls, size } = this.#cuda, buffer = this.allocate(bytes);
    for (let at = 0; at < bytes; at += data.byteLength) {
      this.expect(
        calls.aq_cuda_upload(
          data,
          size(Math.min(data.byteLength, bytes - at)),
          buffer,
          size(at),
          this.stream,
        ),
      );
    }
    return buffer;
  }

  download<Data extends ArrayBufferView>(buffer: bigint, into: Data, offset = 0): Data {
    const { calls, size } = this.#cuda;
    this.expect(calls.aq_cuda_download(buffer, size(offset), into, size(into.byteLength), this.stream));
    return into;
  }

  /** Frees the buffers made since there were `count`. */
  free(count = 0): void {
    for (const buffer of this.#buffers.splice(count)) this.expect(this.#cuda.calls.aq_cuda_free(buffer));
  }

  get count(): number {
    return this.#buffers.length;
  }

  [Symbol.dispose](): void {
    this.free();
    this.expect(this.#cuda.calls.aq_cuda_free_stream(this.stream));
  }
}

/** One kernel at one size. */
interface CudaCase {
  readonly kernel: string;
  readonly shape: readonly number[];
  /** Bytes read and written, each once. */
  readonly bytes: number;
  /** Weights quantized, where the rate of those is wanted. */
  readonly weights?: number;
  /** Multiplications and additions. */
  readonly operations?: number;
  /** The call number `turn`; a status. */
  call(turn: number): number;
  /** Throws when the result is wrong; after a call with turn 0. */
  check?(): void;
}

/** Median, and the median deviation from it over it. */
interface Measured {
  readonly milliseconds: number;
  readonly spread: number;
}

class CudaBench {
  readonly memory: DeviceMemory;
  readonly rows: Record<string, unknown>[] = [];
  readonly skipped: Skipped[] = [];
  #copyBytesPerMillisecond = NaN;

  constructor(
    readonly cuda: CudaKernels,
    readonly cpu: Kernels,
    readonly scale: CudaScale,
    readonly progress: (line: string) => void,
  ) {
    this.memory = new DeviceMemory(cuda);
  }

  /** Milliseconds of `calls` calls by the device's clock. */
  #time(of: CudaCase, calls: number): number {
    const { calls: own } = this.cuda, { stream } = this.memory, elapsed = new Float64Array(1);
    this.memory.expect(own.aq_cuda_begin_timing(stream));
    for (let turn = 0; turn < calls; turn++) this.memory.expect(of.call(turn));
    this.memory.expect(own.aq_cuda_end_timing(stream, elapsed));
    return elapsed[0]!;
  }

  /** Checks, warms up, then takes samples; buffers that `make` allocated are freed. Undefined where cuBLAS is wanted and absent. */
  measure(make: () => CudaCase): Measured | undefined {
    const before = this.memory.count, of = make();
    this.progress(`${of.kernel}, ${of.shape.join(" x ")}`);
    const status = of.call(0);
    if (status === NO_CUBLAS) {
      this.memory.free(before);
      return undefined;
    }
    this.memory.expect(status);
    this.memory.expect(this.cuda.calls.aq_cuda_synchronize(this.memory.stream));
    of.check?.();
    const { sampleMilliseconds, samples } = this.scale;
    let calls = 1, took = this.#time(of, calls);
    while (took < sampleMilliseconds && calls < 1e6) {
      calls = Math.ceil(calls * Math.min(10, 1.2 * sampleMilliseconds / Math.max(took, 1e-3)) + 1);
      took = this.#time(of, calls);
    }
    const each = Array.from({ length: samples }, () => this.#time(of, calls) / calls);
    const { median, medianDeviation } = summarize(each), spread = medianDeviation / median;
    this.memory.free(before);
    if (of.kernel === "copy") this.#copyBytesPerMillisecond = of.bytes / median;
    this.rows.push({
      suite: "kernels",
      group: "CUDA",
      kernel: of.kernel,
      library: of.kernel.startsWith("cuBLAS") ? "cublas" : "arrowquant",
      backend: "cuda",
      device: this.cuda.describe(),
      shape: of.shape,
      size: of.shape.join(" x "),
      milliseconds: median,
      spread,
      callsPerSample: calls,
      bytes: of.bytes,
      gigabytesPerSecond: of.bytes / median / 1e6,
      ofCopy: of.bytes / median / this.#copyBytesPerMillisecond,
      gigaweightsPerSecond: of.weights === undefined ? undefined : of.weights / median / 1e6,
      teraoperationsPerSecond: of.operations === undefined ? undefined : of.operations / median / 1e9,
    });
    return { milliseconds: median, spread };
  }
}

/** Device to device, the bandwidth that others are held against. */
function measureCopy(bench: CudaBench): void {
  const [rows, cols] = bench.scale.matrix, bytes = rows * cols * 2;
  bench.measure(() => {
    const data = gaussians(HOST_ROWS * cols, 1),
      from = bench.memory.filled(data, bytes),
      to = bench.memory.allocate(bytes);
    return {
      kernel: "copy",
      shape: [rows, cols],
      bytes: 2 * bytes,
      call: () => bench.cuda.calls.aq_cuda_copy(from, to, bench.cuda.size(bytes), bench.memory.stream),
    };
  });
}

/** Bytes of a packed matrix's parts for all rows. */
function packedSizes(cpu: Kernels, rows: number, cols: number, options: QuantizeOptions) {
  const of = (count: number) =>
    quantize(cpu, { data: new Float32Array(count * cols), dtype: "F32" }, count, cols, options);
  const one = of(1);
  const parts = "scaleBits" in one && one.scaleBits !== undefined
    ? [one.packed, one.subScale, one.subMin, one.superScale, one.superMin]
    : [one.packed, one.scale!, one.zeroPoint!];
  return parts.map((part) => rows * part.byteLength);
}

function partsOf(tensor: ReturnType<typeof quantize>): (Uint8Array | Uint16Array | Uint32Array)[] {
  return tensor.scaleBits !== undefined
    ? [tensor.packed, tensor.subScale, tensor.subMin, tensor.superScale, tensor.superMin]
    : [tensor.packed, tensor.scale, tensor.zeroPoint!];
}

const total = (values: readonly number[]) => values.reduce((a, b) => a + b, 0);

/** Quantizing BF16 weights, and back. */
function measureQuantize(bench: CudaBench, options: QuantizeOptions, name: string): void {
  const { cuda, cpu, memory } = bench, { calls, size } = cuda;
  const [rows, cols] = bench.scale.matrix, { bits, groupSize = 64, scaleBits, solver = "clip" } = options;
  const host = toBfloat(gaussians(HOST_ROWS * cols, 2));
  const expected = quantize(cpu, { data: host, dtype: "BF16" }, HOST_ROWS, cols, options);
  const sizes = packedSizes(cpu, rows, cols, options);
  const shape = [size(rows), size(cols), bits, size(groupSize)] as const;
  bench.measure(() => {
    const w = memory.filled(host, rows * cols * 2),
      out = sizes.map((bytes) => memory.allocate(bytes)),
      none = 0n;
    const call = () => {
      if (scaleBits !== undefined) {
        const [p, s, m, ds, dm] = out;
        return calls.aq_cuda_quantize_two_level(
          w,
          BF16,
          ...shape,
          scaleBits,
          solver === "round" ? 0 : 1,
          none,
          p!,
          s!,
          m!,
          ds!,
          dm!,
          memory.stream,
        );
      }
      const [p, s, z] = out;
      return solver === "round"
        ? calls.aq_cuda_quantize_round(w, BF16, ...shape, 0, p!, s!, z!, memory.stream)
        : calls.aq_cuda_quantize_clip(w, BF16, ...shape, 0, none, p!, s!, z!, memory.stream);
    };
    return {
      kernel: `quantize, ${name}`,
      shape: [rows, cols],
      bytes: rows * cols * 2 + total(sizes),
      weights: rows * cols,
      call,
      check: () =>
        partsOf(expected).forEach((part, i) => {
          for (const offset of [0, sizes[i]! - part.byteLength]) { // first rows and last
            const found = memory.download(out[i]!, new Uint8Array(part.byteLength), offset);
            expectEqual(`quantize, ${name}`, found, part as ArrayBufferView<ArrayBuffer>);
          }
        }),
    };
  });
  if (solver !== "round") return;
  const wanted = toBfloat(dequantize(cpu, expected));
  bench.measure(() => {
    const parts = partsOf(expected).map((part, i) => memory.filled(part, sizes[i]!));
    const out = memory.allocate(rows * cols * 2);
    return {
      kernel: `dequantize, ${name}`,
      shape: [rows, cols],
      bytes: rows * cols * 2 + total(sizes),
      weights: rows * cols,
      call: () =>
        scaleBits !== undefined
          ? calls.aq_cuda_dequantize_two_level(
            parts[0]!,
            parts[1]!,
            parts[2]!,
            parts[3]!,
            parts[4]!,
            ...shape,
            scaleBits,
            out,
            BF16,
            memory.stream,
          )
          : calls.aq_cuda_dequantize(parts[0]!, parts[1]!, parts[2]!, ...shape, out, BF16, memory.stream),
      check: () =>
        expectEqual(`dequantize, ${name}`, memory.download(out, new Uint16Array(HOST_ROWS * cols)), wanted),
    };
  });
}

/** How a product with packed weights is made. */
type ProductKind = "float32" | "bfloat16" | "8-bit activations";

/** Products with packed weights beside cuBLAS's with bfloat16 ones; matrices take turns. */
function measureProducts(bench: CudaBench, goals: Goal[]): void {
  const { cuda, cpu, memory, scale } = bench,
    { calls, size } = cuda,
    [rows, cols] = scale.product,
    groupSize = 128;
  const host = gaussians(HOST_ROWS * cols, 3);
  for (const tokens of [1, 8, 64, scale.manyTokens]) {
    const x = gaussians(tokens * cols, 4), operations = 2 * tokens * rows * cols;
    const turnsOf = (bytes: number) =>
      Math.min(MOST_TURNS, Math.max(1, Math.ceil(scale.rotatedBytes / bytes)));
    const dense = bench.measure(() => {
      const turns = turnsOf(rows * cols * 2), w = toBfloat(host);
      const weights = Array.from({ length: turns }, () => memory.filled(w, rows * cols * 2));
      const from = memory.filled(toBfloat(x)), out = memory.allocate(tokens * rows * 2);
      return {
        kernel: "cuBLAS, bfloat16",
        shape: [tokens, rows, cols],
        bytes: rows * cols * 2 + tokens * (cols + rows) * 2,
        operations,
        call: (turn) =>
          calls.aq_cuda_linear_cublas(
            from,
            size(tokens),
            weights[turn % turns]!,
            size(rows),
            size(cols),
            out,
            memory.stream,
          ),
      };
    });
    if (dense === undefined) {
      const reason = describeCudaStatus(cuda, NO_CUBLAS);
      bench.skipped.push({ what: `cuBLAS at ${tokens} tokens`, reason });
    }
    for (const bits of [8, 4, 2] as const) {
      const tensor = quantize(cpu, { data: host, dtype: "F32" }, HOST_ROWS, cols, {
        bits,
        groupSize,
        solver: "round",
      });
      const plain = dequantize(cpu, tensor),
        parts = partsOf(tensor),
        sizes = parts.map((part) => part.byteLength * rows / HOST_ROWS);
      const shape = [size(rows), size(cols), bits, size(groupSize)] as const, none = 0n;
      // the columns of the first rows for the last token
      const wanted = Float32Array.from({ length: HOST_ROWS }, (_, row) => {
        let sum = 0;
        for (let k = 0; k < cols; k++) sum += x[(tokens - 1) * cols + k]! * plain[row * cols + k]!;
        return sum;
      });
      const kinds: readonly (readonly [ProductKind, number])[] = [
        ["float32", 1e-5],
        ["bfloat16", 1e-2],
        ["8-bit activations", 3e-2],
      ];
      for (const [kind, tolerance] of kinds) {
        if (kind === "float32" && tokens === scale.manyTokens) continue; // not what it is for
        const measured = bench.measure(() => {
          const turns = turnsOf(total(sizes));
          const weights = Array.from(
            { length: turns },
            () => parts.map((part, i) => memory.filled(part, sizes[i]!)),
          );
          const from = memory.filled(x), out = memory.allocate(tokens * rows * 4);
          const codes = memory.allocate(tokens * cols),
            xScale = memory.allocate(tokens * 4),
            xZero = memory.allocate(tokens * 4);
          if (kind === "8-bit activations") {
            memory.expect(
              calls.aq_cuda_quantize_activations(
                from,
                size(tokens),
                size(cols),
                8,
                1,
                codes,
                xScale,
                xZero,
                memory.stream,
              ),
            );
          }
          const kernel = kind === "float32" ? calls.aq_cuda_linear_packed : calls.aq_cuda_linear_packed_bf16;
          return {
            kernel: `product, ${bits} bits, ${kind}`,
            shape: [tokens, rows, cols],
            bytes: total(sizes) + tokens * (cols * (kind === "8-bit activations" ? 1 : 4) + rows * 4),
            operations,
            call: (turn) => {
              const [p, s, z] = weights[turn % turns]!;
              return kind === "8-bit activations"
                ? calls.aq_cuda_linear_packed_int8(
                  codes,
                  xScale,
                  xZero,
                  size(tokens),
                  p!,
                  s!,
                  z!,
                  none,
                  ...shape,
                  out,
                  memory.stream,
                )
                : kernel(from, size(tokens), p!, s!, z!, none, ...shape, out, memory.stream);
            },
            check: () => {
              const found = memory.download(out, new Float32Array(HOST_ROWS), (tokens - 1) * rows * 4);
              const off = relativeDifference(found, wanted);
              if (!(off <= tolerance)) {
                throw new Error(
                  `Cannot time a product of ${bits} bits, ${kind}: it is off by ${off}, wanted ≤ ${tolerance}`,
                );
              }
            },
          };
        });
        const row = bench.rows.at(-1)!,
          gain = dense && measured && dense.milliseconds / measured.milliseconds;
        row["ofCublas"] = gain;
        if (tokens === 1 && kind === "bfloat16" && bits !== 8) {
          const ratio = row["ofCopy"] as number, wantedGain = bits === 4 ? 3 : 5;
          goals.push(goalOf(`product, ${bits} bits, one token: of the copy's bandwidth`, ratio, 0.7));
          goals.push(goalOf(`product, ${bits} bits, one token: times cuBLAS bfloat16`, gain, wantedGain));
        }
        if (tokens === scale.manyTokens && kind === "bfloat16") {
          goals.push(goalOf(`product, ${bits} bits, ${tokens} tokens: times cuBLAS bfloat16`, gain, 0.6));
        }
      }
    }
  }
}

function goalOf(goal: string, measured: number | undefined, least: number): Goal {
  const wanted = `≥ ${least}`;
  if (measured === undefined) return { goal, wanted, measured: null, met: null, reason: "no cuBLAS" };
  return { goal, wanted, measured: measured.toFixed(3), met: measured >= least };
}

/** The solvers' kernels and a forward pass's, by their bytes or operations; the driver of kernels/tests checks them. */
function measureOthers(bench: CudaBench): void {
  const { cuda, memory, scale } = bench, { calls, size } = cuda, n = scale.square, { stream } = memory;
  const x = gaussians(HOST_ROWS * n, 5), none = 0n;
  const filled = (bytes: number) => memory.filled(x, bytes), square = n * n * 4;
  bench.measure(() => {
    const from = filled(square), out = filled(square);
    return {
      kernel: "second moment",
      shape: [n, n],
      bytes: 3 * square,
      operations: 2 * n * n * n,
      call: () => calls.aq_cuda_accumulate_moment(from, none, size(n), size(n), out, stream),
    };
  });
  bench.measure(() => {
    const w = filled(square), groups = n * Math.ceil(n / 128);
    const scales = memory.filled(Float32Array.of(0.25), groups * 4),
      zeros = memory.filled(Float32Array.of(8), groups * 4);
    const factor = memory.filled(x.map((value) => value * 0.01), square);
    const order = memory.filled(Int32Array.from({ length: n }, (_, i) => n - 1 - i)),
      codes = memory.allocate(n * n);
    return {
      kernel: "error feedback, 4 bits",
      shape: [n, n],
      bytes: 2 * square + n * n,
      weights: n * n,
      operations: n * n * n,
      call: () =>
        calls.aq_cuda_quantize_feedback(
          w,
          size(n),
          size(n),
          4,
          size(128),
          scales,
          zeros,
          factor,
          order,
          codes,
          stream,
        ),
    };
  });
  bench.measure(() => {
    const from = filled(square), weight = filled(n * 4), out = memory.allocate(square);
    return {
      kernel: "RMS norm",
      shape: [n, n],
      bytes: 2 * square,
      call: () => calls.aq_cuda_rms_norm(from, size(n), size(n), weight, 1e-6, out, stream),
    };
  });
  bench.measure(() => {
    const gate = filled(square), up = filled(square), out = memory.allocate(square);
    return {
      kernel: "SwiGLU",
      shape: [n, n],
      bytes: 3 * square,
      call: () => calls.aq_cuda_silu_multiply(gate, up, size(n * n), out, stream),
    };
  });
  bench.measure(() => {
    const [p, g, m, v] = [
      filled(square),
      filled(square),
      memory.filled(x.map(Math.abs), square),
      memory.filled(x.map(Math.abs), square),
    ];
    return {
      kernel: "Adam",
      shape: [n, n],
      bytes: 7 * square,
      call: () => calls.aq_cuda_adam_step(p!, g!, m!, v!, size(n * n), 1e-6, 0.9, 0.999, 1e-8, 1, stream),
    };
  });
  bench.measure(() => {
    const [tokens, heads, kvHeads, headSize] = scale.attention;
    const width = tokens * heads * headSize * 4, narrow = tokens * kvHeads * headSize * 4;
    const q = filled(width), k = filled(narrow), v = filled(narrow), out = memory.allocate(width);
    return {
      kernel: "attention",
      shape: scale.attention,
      bytes: 2 * (width + narrow),
      operations: 4 * tokens * tokens * heads * headSize,
      call: () =>
        calls.aq_cuda_attention(
          q,
          k,
          v,
          none,
          size(1),
          size(tokens),
          size(heads),
          size(kvHeads),
          size(headSize),
          headSize ** -0.5,
          out,
          stream,
        ),
    };
  });
}

/**
 * Measures the CUDA kernels. `cpu` is what they are held against.
 *
 * @throws {Error} when a kernel fails or gives something else than the CPU
 */
export function measureCuda(
  cuda: CudaKernels,
  cpu: Kernels,
  quick: boolean,
  progress: (line: string) => void,
): SuiteReport {
  const bench = new CudaBench(cuda, cpu, quick ? QUICK : FULL, progress), goals: Goal[] = [];
  using _memory = bench.memory;
  measureCopy(bench);
  measureQuantize(bench, { bits: 4, groupSize: 64, solver: "round" }, "round, 4 bits, g 64");
  measureQuantize(bench, { bits: 4, groupSize: 64, solver: "clip" }, "clip, 4 bits, g 64");
  measureQuantize(bench, { bits: 2, groupSize: 64, solver: "clip" }, "clip, 2 bits, g 64");
  measureQuantize(
    bench,
    { bits: 4, groupSize: 32, scaleBits: 6, solver: "round" },
    "two levels, round, 4 bits, g 32",
  );
  measureQuantize(
    bench,
    { bits: 2, groupSize: 16, scaleBits: 4, solver: "clip" },
    "two levels, search, 2 bits, g 16",
  );
  for (const row of bench.rows) {
    const kernel = row["kernel"] as string;
    if (/^(quantize|dequantize), round/.test(kernel)) {
      goals.push(goalOf(`${kernel}: of the copy's bandwidth`, row["ofCopy"] as number, 0.8));
    }
    if (kernel.startsWith("quantize, clip")) {
      goals.push(goalOf(`${kernel}: 10⁹ weights a second`, row["gigaweightsPerSecond"] as number, 20));
    }
  }
  measureProducts(bench, goals);
  measureOthers(bench);
  const { runtime, processor } = environmentOf(cpu);
  const section: Section = {
    title: `CUDA kernels: ${cuda.describe()}`,
    notes: [
      "Times by the device's own clock, medians; functions that wait for a result have the way to the host and back in them.",
      "of copy: bytes a second over those of a copy within the device's memory; of cuBLAS: how many times as fast as its bfloat16 product.",
    ],
    columns: [
      { key: "kernel", title: "kernel" },
      { key: "size", title: "shape" },
      { key: "milliseconds", title: "ms", digits: 4 },
      { key: "spread", title: "spread", digits: 3 },
      { key: "gigabytesPerSecond", title: "GB/s", digits: 0 },
      { key: "ofCopy", title: "of copy", digits: 3 },
      { key: "gigaweightsPerSecond", title: "10⁹ weights/s", digits: 2 },
      { key: "teraoperationsPerSecond", title: "10¹² operations/s", digits: 1 },
      { key: "ofCublas", title: "of cuBLAS", digits: 2 },
    ],
    rows: bench.rows as Section["rows"][number][],
  };
  return {
    sections: [section],
    rows: bench.rows.map((row) => ({ ...row, runtime, processor })),
    goals,
    skipped: bench.skipped,
  };
}
