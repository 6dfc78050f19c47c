/**
 * The kernel suite on a GPU: quantizing and dequantizing by the device's own clock, beside a copy within the
 * device's memory in the same run. Each kernel's result is compared with the CPU's before it is timed.
 */
import { environmentOf } from "../../eval/environment.ts";
import { summarize } from "../../eval/statistics.ts";
import { type CudaKernels, describeCudaStatus } from "../../native/cuda/mod.ts";
import { DeviceMemory } from "../../native/cuda/memory.ts";
import type { Kernels } from "../../native/mod.ts";
import { convertFloats, dequantize, quantize, type QuantizeOptions } from "../../quant/mod.ts";
import { gaussianWeights } from "../random.ts";
import type { Goal, SuiteReport } from "../suite.ts";
import type { KernelRow } from "./bench.ts";
import { DTYPE_NUMBERS } from "../../native/call.ts";
import { expectEqual } from "./cases.ts";

/** Sizes and samples of a run: enough to fill the device, or a look. */
interface CudaScale {
  readonly rows: number;
  readonly cols: number;
  readonly samples: number;
  readonly sampleMilliseconds: number;
}
const FULL: CudaScale = { rows: 16384, cols: 16384, samples: 30, sampleMilliseconds: 5 };
const QUICK: CudaScale = { rows: 64, cols: 512, samples: 3, sampleMilliseconds: 0 };

/** Rows that are made on the host and repeated over a matrix; also those that are checked. */
const HOST_ROWS = 16;

/** What is timed: how weights are quantized, and what a goal asks of it. */
const SETTINGS: readonly { readonly name: string; readonly options: QuantizeOptions }[] = [
  { name: "round, 4 bits, g 64", options: { bits: 4, groupSize: 64, solver: "round" } },
  { name: "clip, 4 bits, g 64", options: { bits: 4, groupSize: 64, solver: "clip" } },
  { name: "clip, 2 bits, g 64", options: { bits: 2, groupSize: 64, solver: "clip" } },
  {
    name: "two levels, round, 4 bits, g 32",
    options: { bits: 4, groupSize: 32, scaleBits: 6, solver: "round" },
  },
  {
    name: "two levels, search, 2 bits, g 16",
    options: { bits: 2, groupSize: 16, scaleBits: 4, solver: "clip" },
  },
];

interface CudaCase {
  readonly kernel: string;
  /** Bytes read and written, each once. */
  readonly bytes: number;
  readonly weights?: number;
  /** One call; a status. */
  call(): number;
  /** Throws when the result of a call is wrong. */
  check?(): void;
}

interface CudaRow {
  readonly kernel: string;
  readonly size: string;
  readonly milliseconds: number;
  /** Median deviation from the median, over the median. */
  readonly spread: number;
  readonly callsPerSample: number;
  readonly bytes: number;
  readonly gigabytesPerSecond: number;
  readonly gigaweightsPerSecond?: number;
}

/** Times calls by the device's clock; what is timed checks its result first. */
function measure(memory: DeviceMemory, scale: CudaScale, of: CudaCase): CudaRow {
  const { calls: own } = memory.cuda, elapsed = new Float64Array(1);
  /** Milliseconds of `calls` calls. */
  const time = (calls: number) => {
    memory.expect(own.aq_cuda_begin_timing(memory.stream));
    for (let i = 0; i < calls; i++) memory.expect(of.call());
    memory.expect(own.aq_cuda_end_timing(memory.stream, elapsed));
    return elapsed[0]!;
  };
  memory.expect(of.call());
  of.check?.();
  let calls = 1, took = time(calls);
  while (took < scale.sampleMilliseconds && calls < 1e6) {
    calls = Math.ceil(calls * Math.min(10, 1.2 * scale.sampleMilliseconds / Math.max(took, 1e-3)) + 1);
    took = time(calls);
  }
  const each = Array.from({ length: scale.samples }, () => time(calls) / calls);
  const { median, medianDeviation } = summarize(each);
  return {
    kernel: of.kernel,
    size: `${scale.rows} x ${scale.cols}`,
    milliseconds: median,
    spread: medianDeviation / median,
    callsPerSample: calls,
    bytes: of.bytes,
    gigabytesPerSecond: of.bytes / median / 1e6,
    ...(of.weights === undefined ? {} : { gigaweightsPerSecond: of.weights / median / 1e6 }),
  };
}

/** What is dequantized, to bfloat16 as checkpoints have it. */
const DEQUANTIZED = [
  { name: "4 bits, g 64", options: { bits: 4, groupSize: 64, solver: "round" } },
  { name: "2 bits, g 64", options: { bits: 2, groupSize: 64, solver: "round" } },
  { name: "two levels, 2 bits, g 16", options: { bits: 2, groupSize: 16, scaleBits: 4, solver: "round" } },
] as const satisfies typeof SETTINGS;

/** The parts of a quantized matrix in the order of the kernels' parameters. */
function partsOf(tensor: ReturnType<typeof quantize>): ArrayBufferView<ArrayBuffer>[] {
  return tensor.scaleBits !== undefined
    ? [tensor.packed, tensor.subScale, tensor.subMin, tensor.superScale, tensor.superMin]
    : [tensor.packed, tensor.scale, tensor.zeroPoint!];
}

/** Quantizing the matrix `weights`, whose first and last rows are `host`. */
function quantizeCase(
  memory: DeviceMemory,
  cpu: Kernels,
  scale: CudaScale,
  { name, options }: (typeof SETTINGS)[number],
  weights: bigint,
  host: Uint16Array<ArrayBuffer>,
): CudaCase {
  const { cuda: { calls, size }, stream } = memory, { rows, cols } = scale;
  const { bits, groupSize = 64, scaleBits, solver } = options, bf16 = DTYPE_NUMBERS.BF16;
  const expected = partsOf(quantize(cpu, { data: host, dtype: "BF16" }, HOST_ROWS, cols, options));
  const sizes = expected.map((part) => part.byteLength / HOST_ROWS * rows);
  const out = sizes.map((bytes) => memory.allocate(bytes));
  const shape = [size(rows), size(cols), bits, size(groupSize)] as const;
  const [packed, first, second, third, fourth] = out as [bigint, bigint, bigint, bigint, bigint];
  const call = () =>
    scaleBits !== undefined
      ? calls.aq_cuda_quantize_two_level(
        ...[weights, bf16, ...shape, scaleBits, solver === "round" ? 0 : 1, 0n] as const,
        ...[packed, first, second, third, fourth, stream] as const,
      )
      : solver === "round"
      ? calls.aq_cuda_quantize_round(weights, bf16, ...shape, 0, packed, first, second, stream)
      : calls.aq_cuda_quantize_clip(weights, bf16, ...shape, 0, 0n, packed, first, second, stream);
  return {
    kernel: `quantize, ${name}`,
    bytes: rows * cols * 2 + sizes.reduce((a, b) => a + b),
    weights: rows * cols,
    call,
    check: () =>
      expected.forEach((part, i) => {
        for (const offset of [0, sizes[i]! - part.byteLength]) { // first rows and last
          const found = new Uint8Array(part.byteLength);
          memory.download(out[i]!, found, offset);
          expectEqual(`quantize, ${name}`, found, part);
        }
      }),
  };
}

/** Dequantizing a matrix whose rows repeat those of `host`, quantized. */
function dequantizeCase(
  memory: DeviceMemory,
  cpu: Kernels,
  scale: CudaScale,
  { name, options }: (typeof DEQUANTIZED)[number],
  out: bigint,
  host: Uint16Array<ArrayBuffer>,
): CudaCase {
  const { cuda: { calls, size }, stream } = memory, { rows, cols } = scale, kernel = `dequantize, ${name}`;
  const tensor = quantize(cpu, { data: host, dtype: "BF16" }, HOST_ROWS, cols, options);
  const expected = dequantize(cpu, tensor, "BF16"), bf16 = DTYPE_NUMBERS.BF16;
  const parts = partsOf(tensor), sizes = parts.map((part) => part.byteLength / HOST_ROWS * rows);
  const handles = parts.map((part, i) => {
    const handle = memory.allocate(sizes[i]!);
    for (let at = 0; at < sizes[i]!; at += part.byteLength) memory.upload(part, handle, at);
    return handle;
  });
  const shape = [size(rows), size(cols), options.bits, size(options.groupSize)] as const;
  const [packed, first, second, third, fourth] = handles as [bigint, bigint, bigint, bigint, bigint];
  return {
    kernel,
    bytes: rows * cols * 2 + sizes.reduce((a, b) => a + b),
    weights: rows * cols,
    call: () =>
      "scaleBits" in options
        ? calls.aq_cuda_dequantize_two_level(
          ...[packed, first, second, third, fourth, ...shape, options.scaleBits, out, bf16, stream] as const,
        )
        : calls.aq_cuda_dequantize(packed, first, second, ...shape, out, bf16, stream),
    check: () => {
      for (const offset of [0, rows * cols * 2 - expected.byteLength]) { // first rows and last
        const found = new Uint8Array(expected.byteLength);
        memory.download(out, found, offset);
        expectEqual(kernel, found, expected);
      }
    },
  };
}

function goalOf(goal: string, measured: number, least: number): Goal {
  return { goal, wanted: `≥ ${least}`, measured: measured.toFixed(3), met: measured >= least };
}

/**
 * Measures the CUDA kernels that quantize and dequantize.
 *
 * @throws {Error} when one fails, or gives other than `cpu`
 */
export function measureCuda(
  cuda: CudaKernels,
  cpu: Kernels,
  quick: boolean,
  progress: (line: string) => void,
): SuiteReport<KernelRow> {
  const scale = quick ? QUICK : FULL, { rows, cols } = scale, bytes = rows * cols * 2;
  const failure = (status: number) =>
    new Error(`Cannot measure on the GPU: ${describeCudaStatus(cuda, status)}`);
  using memory = new DeviceMemory(cuda, failure);
  const values = { data: gaussianWeights(HOST_ROWS * cols, 2, 1), dtype: "F32" } as const;
  const host = new Uint16Array(convertFloats(cpu, values, HOST_ROWS * cols, "BF16").buffer);
  const weights = memory.allocate(bytes), copied = memory.allocate(bytes);
  for (let at = 0; at < bytes; at += host.byteLength) memory.upload(host, weights, at);
  const copy: CudaCase = {
    kernel: "copy",
    bytes: 2 * bytes,
    call: () => cuda.calls.aq_cuda_copy(weights, copied, cuda.size(bytes), memory.stream),
  };
  const cases = [
    ...SETTINGS.map((setting) => quantizeCase(memory, cpu, scale, setting, weights, host)),
    ...DEQUANTIZED.map((setting) => dequantizeCase(memory, cpu, scale, setting, copied, host)),
  ];
  const measured = [copy, ...cases].map((of) => {
    progress(`${of.kernel}, ${rows} x ${cols}`);
    return measure(memory, scale, of);
  });
  const copyRate = measured[0]!.gigabytesPerSecond;
  const table = measured.map((row) => ({ ...row, ofCopy: row.gigabytesPerSecond / copyRate }));
  const { runtime, processor } = environmentOf(cpu), device = cuda.describe();
  const circumstances = { suite: "kernels", group: "CUDA", library: "arrowquant", backend: "cuda" } as const;
  return {
    sections: [{
      title: `CUDA kernels: ${device}`,
      notes: [
        "Medians by the device's own clock. Quantizing waits for its result: the way to the host and back is included.",
        "of copy: bytes a second over those of a copy within the device's memory.",
      ],
      columns: [
        { key: "kernel", title: "kernel" },
        { key: "size", title: "shape" },
        { key: "milliseconds", title: "ms", digits: 4 },
        { key: "spread", title: "spread", digits: 3 },
        { key: "gigabytesPerSecond", title: "GB/s", digits: 0 },
        { key: "ofCopy", title: "of copy", digits: 3 },
        { key: "gigaweightsPerSecond", title: "10⁹ weights/s", digits: 2 },
      ],
      rows: table,
    }],
    rows: table.map((row) => ({ ...circumstances, device, shape: [rows, cols], ...row, runtime, processor })),
    goals: table.flatMap((row) => {
      if (row.kernel.startsWith("quantize, round") || row.kernel.startsWith("dequantize")) {
        return [goalOf(`${row.kernel}: of the copy's bandwidth`, row.ofCopy, 0.8)];
      }
      return row.kernel.startsWith("quantize, clip")
        ? [goalOf(`${row.kernel}: 10⁹ weights a second`, row.gigaweightsPerSecond!, 20)]
        : [];
    }),
    skipped: [],
  };
}
