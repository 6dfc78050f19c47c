import { afterAll, describe, expect, test } from "bun:test";
import { cpSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { resolveConfig } from "../../lib/config/mod.ts";
import { quantizeFor } from "../../lib/interop/mod.ts";
import { loadCalibration } from "../../lib/calibration/mod.ts";
import {
  linearPackedInt8,
  quantizeActivations,
  roundActivations,
  takesIntegers,
} from "../../lib/models/layers/int8.ts";
import { equalTimeGroups, type LayerParameters, maskRatioAxis, TimeParameters } from "../../lib/time/mod.ts";
import { HeldWeights } from "../../lib/models/layers/held_weights.ts";
import { trellisGradient } from "../../lib/models/backward/kernels.ts";
import { refineDit } from "../../lib/models/backward/refine.ts";
import { loadDit, loadDream, loadLladaMoe, loadModel, modelFrom } from "../../lib/models/mod.ts";
import { DeviceMemory } from "../../lib/native/cuda/memory.ts";
import { DeviceArrays } from "../../lib/native/cuda/arrays.ts";
import { type CudaKernels, describeCudaStatus, openCuda } from "../../lib/native/cuda/mod.ts";
import type { SuiteReport } from "../../lib/bench/suite.ts";
import { measureCuda } from "../../lib/bench/kernels/cuda_suite.ts";
import { attention } from "../../lib/native/functions.ts";
import { type Kernels, openKernels } from "../../lib/native/mod.ts";
import { unchecked } from "../../lib/native/kernels.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { dequantize, quantize, quantizeByWeights } from "../../lib/quant/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { isRotated, type TwoLevelTensor, type WeightFormat } from "../../lib/quant/packed/layout.ts";
import { correctedTarget, factorMoments } from "../../lib/quant/solvers/factored_moment.ts";
import { accumulateMoment, emptyMoments } from "../../lib/quant/solvers/moments.ts";
import { solveLayer } from "../../lib/quant/solvers/solve_layer.ts";
import { DEFAULT_SOLVER_SETTINGS } from "../../lib/quant/solvers/settings.ts";
import { denseWeights } from "../../lib/solve/dense_weights.ts";
import { solveModel } from "../../lib/solve/solve_model.ts";
import { differences, MODELS, run, workplace } from "../_checkpoints.ts";
import { readersPython, runReader } from "../_readers.ts";
import { ditCheckpoint, dreamCheckpoint, SMALL_IMAGE, SMALL_LANGUAGE, store } from "../_models.ts";

const read = (path: string) => readFileSync(new URL(`../../${path}`, import.meta.url), "utf8");
const header = read("kernels/include/arrowquant_cuda.h");

/** The header's codes. */
const CODES = Object.fromEntries(
  [...header.matchAll(/#define (AQ_E_\w+) \((-\d+)\)/g)].map(([, name, value]) => [name!, Number(value)]),
);

/** The library, or why it cannot be tried here. */
async function opened(): Promise<CudaKernels | undefined> {
  try {
    return await openCuda();
  } catch (error) {
    const reason = (error as Error).message;
    // a library that is there and does not open is a failure
    if (!reason.includes("scripts/build.ts --cuda") && !reason.includes("on Linux only")) throw error;
    console.log(`skipped: ${reason}`);
    return undefined;
  }
}

/** What is computed, Bun alone computes; that Deno calls the library as Bun does, the other tests see. */
const COMPUTES = "Bun" in globalThis;

/** The line of the device, undefined and a line where there is none. */
async function deviceLine(): Promise<string | undefined> {
  using cuda = await opened();
  if (cuda !== undefined && cuda.devices > 0) return cuda.describe();
  console.log(`skipped: ${cuda?.describe() ?? "no CUDA library"}`);
  return undefined;
}

describe("openCuda", () => {
  test("a library that was named and is not there is an error that names it", async () => {
    await expect(openCuda({ library: join(tmpdir(), "no-such-cuda.so") })).rejects.toThrow(
      /no-such-cuda\.so.*no such file/,
    );
  });

  test("a file that is no library is an error that names it", async () => {
    const path = fileURLToPath(new URL("../../kernels/include/arrowquant_cuda.h", import.meta.url));
    await expect(openCuda({ library: path })).rejects.toThrow(
      /Cannot open the kernel library.*arrowquant_cuda\.h/,
    );
  });

  test("without a device says so in one line, and its functions return it", async () => {
    using cuda = await opened();
    if (cuda === undefined) return;
    expect(cuda.describe().split("\n").length).toBe(1);
    const handle = new BigUint64Array([7n]);
    const status = cuda.calls.aq_cuda_create_stream(cuda.devices, handle); // one more than there are
    expect([status, handle[0]]).toEqual([CODES["AQ_E_DEVICE"]!, 0n]);
    expect(describeCudaStatus(cuda, status)).toBe("no device");
    if (cuda.devices > 0) {
      return console.log(`skipped: the line without a device, this is ${cuda.describe()}`);
    }
    expect(cuda.describe()).toMatch(/^cuda: no device: \S.* \(CUDA error \d+\)/);
  });

  test("wrong calls get a status, with or without a device", async () => {
    using cuda = await opened();
    if (cuda === undefined) return;
    const none = 0n, eight = cuda.size(8);
    // no stream and no buffers: an argument error; nothing to do: none is looked at
    const quantized = (rows: number) =>
      cuda.calls.aq_cuda_quantize_round(none, 0, cuda.size(rows), eight, 4, eight, 0, none, none, none, none);
    expect([quantized(8), quantized(0)]).toEqual([-1, 0]);
    expect(cuda.calls.aq_cuda_free(none)).toBe(0);
    expect(cuda.calls.aq_cuda_device_count(null)).toBe(-1);
    const short = new Uint8Array(8).fill(255);
    cuda.calls.aq_cuda_describe_status(CODES["AQ_E_NONFINITE"] ?? -4, short, cuda.size(5));
    expect([...short]).toEqual([78, 97, 78, 32, 0, 255, 255, 255]); // "NaN " and its end, nothing behind it
    cuda.close();
    expect(() => cuda.calls).toThrow(/was closed/);
  });

  test("a call on buffers of the device gives the CPU's bytes", async () => {
    using cuda = await opened();
    if (cuda === undefined) return;
    if (cuda.devices === 0) return console.log(`skipped: ${cuda.describe()}`);
    using kernels = await openKernels({ backend: "cpu" });
    const [rows, cols, bits, groupSize] = [37, 300, 4, 64];
    const words = Math.ceil(cols * bits / 32), groups = Math.ceil(cols / groupSize);
    const weights = Float32Array.from({ length: rows * cols }, (_, i) => Math.sin(i * i));
    const outputs = () =>
      [
        new Uint32Array(rows * words),
        new Uint16Array(rows * groups),
        new Uint16Array(rows * groups),
      ] as const;
    const expected = outputs(), actual = outputs();
    const { calls, size, isaNumber } = unchecked(kernels);
    const shape = [size(rows), size(cols), bits, size(groupSize)] as const;
    expect(calls.aq_quantize_clip(weights, 0, ...shape, 0, null, ...expected, isaNumber, 1)).toBe(0);

    const ok = (status: number) => {
      if (status !== 0) throw new Error(describeCudaStatus(cuda, status));
    };
    const handle = new BigUint64Array(1);
    ok(cuda.calls.aq_cuda_create_stream(0, handle));
    const stream = handle[0]!;
    const upload = (data: ArrayBufferView) => {
      ok(cuda.calls.aq_cuda_allocate(cuda.size(data.byteLength), handle, stream));
      const buffer = handle[0]!;
      ok(cuda.calls.aq_cuda_upload(data, cuda.size(data.byteLength), buffer, cuda.size(0), stream));
      return buffer;
    };
    const download = (buffer: bigint, data: ArrayBufferView) =>
      ok(cuda.calls.aq_cuda_download(buffer, cuda.size(0), data, cuda.size(data.byteLength), stream));
    const [w, packed, scale, zero] = [weights, ...actual].map(upload);
    const own = [cuda.size(rows), cuda.size(cols), bits, cuda.size(groupSize)] as const;
    ok(cuda.calls.aq_cuda_quantize_clip(w!, 0, ...own, 0, 0n, packed!, scale!, zero!, stream));
    [packed, scale, zero].forEach((buffer, i) => download(buffer!, actual[i]!));
    expect(actual).toEqual(expected);
    for (const buffer of [w, packed, scale, zero]) ok(cuda.calls.aq_cuda_free(buffer!));
    ok(cuda.calls.aq_cuda_free_stream(stream));
  });
});

describe("backend", () => {
  const weights = {
    data: Float32Array.from({ length: 37 * 300 }, (_, i) => Math.sin(i * i)),
    dtype: "F32",
  } as const;

  test("a CUDA library that does not open is an error, for auto too", async () => {
    const before = process.env["ARROWQUANT_CUDA_LIBRARY"];
    process.env["ARROWQUANT_CUDA_LIBRARY"] = join(tmpdir(), "no-such-cuda.so");
    try {
      for (const backend of ["auto", "cuda"] as const) {
        await expect(openKernels({ backend })).rejects.toThrow(/no-such-cuda\.so.*no such file/);
      }
      const cpu = await openKernels({ backend: "cpu" });
      expect(cpu.device).toBe(undefined);
      cpu.close();
    } finally {
      if (before === undefined) delete process.env["ARROWQUANT_CUDA_LIBRARY"];
      else process.env["ARROWQUANT_CUDA_LIBRARY"] = before;
    }
  });

  test("without a GPU auto takes the CPU and cuda is an error with the way out", async () => {
    const cuda = await opened();
    const found = cuda?.devices ?? 0, line = cuda?.describe();
    cuda?.close();
    if (found > 0) return console.log(`skipped: this has a GPU: ${line}`);
    const lines: string[] = [];
    using auto = await openKernels({ onMessage: (line) => lines.push(line) });
    expect(auto.device).toBe(undefined);
    expect(lines.filter((line) => /cuda/.test(line))).toEqual(
      line === undefined ? [] : [`${line}; the CPU does the work`],
    );
    await expect(openKernels({ backend: "cuda" })).rejects.toThrow(
      /^Cannot use the backend "cuda": .*(no device|build\.ts --cuda|on Linux only).*; use the backend "cpu", or "auto"$/,
    );
  });

  test("a GPU without room is as good as none: auto takes the CPU and says why, cuda names the way out", async () => {
    const line = COMPUTES ? await deviceLine() : undefined;
    if (line === undefined) return;
    if (!line.includes("emulator")) {
      return console.log(`skipped: the memory of this is not to be had: ${line}`);
    }
    const place = workplace(), full = { AQ_EMULATED_BYTES: "0" };
    try {
      const [auto, cuda] = [[], ["--backend", "cuda"]].map((options) =>
        run("quantize.ts", [join(MODELS, "dream-mini"), place.fresh(), "--solver", "round", ...options], full)
      );
      expect([auto!.code, cuda!.code]).toEqual([0, 5]);
      expect(auto!.stdout + auto!.stderr).toContain(`${line}: out of memory; the CPU does the work\n`);
      expect(cuda!.stderr).toContain(
        `error: Cannot use the backend "cuda": ${line}: out of memory; use the backend "cpu", or "auto"\n`,
      );
    } finally {
      place.remove();
    }
  });

  test("a GPU's packed tensors are the CPU's, byte for byte, and so are its complaints", async () => {
    const found = await opened();
    const devices = found?.devices ?? 0, line = found?.describe();
    found?.close();
    if (devices === 0) return console.log(`skipped: ${line ?? "no CUDA library"}`);
    using gpu = await openKernels({ backend: "cuda" });
    using cpu = await openKernels({ backend: "cpu" });
    expect(gpu.device).toBe(line!);
    expect(gpu.describe()).toBe(`${line}; ${cpu.describe()}`);
    const columnWeights = Float32Array.from({ length: 300 }, (_, i) => i % 7);
    for (const bits of [2, 3, 4, 8] as const) {
      for (
        const options of [
          { solver: "round" },
          { solver: "round", zeroPoint: "symmetric", groupSize: 0 },
          { solver: "clip", zeroPoint: "integer" },
          { solver: "clip", groupSize: 32, columnWeights },
          { solver: "clip", scaleBits: 4 },
          { solver: "round", scaleBits: 6, groupSize: 128 },
        ] as const
      ) {
        const packed = quantize(gpu, weights, 37, 300, { bits, ...options });
        expect(packed).toEqual(quantize(cpu, weights, 37, 300, { bits, ...options }));
        for (const dtype of ["F32", "F16", "BF16"] as const) {
          expect(dequantize(gpu, packed, dtype)).toEqual(dequantize(cpu, packed, dtype));
        }
      }
    }
    for (const bits of [3, 8] as const) {
      const symmetric = { bits, groupSize: 16, zeroPoint: "symmetric", scaleBits: 8 } as const;
      for (const options of [{ solver: "round" }, { solver: "clip", columnWeights }] as const) {
        const [own, wanted] = [gpu, cpu].map((kernels) =>
          quantize(kernels, weights, 37, 300, { ...symmetric, ...options })
        );
        expect(own).toEqual(wanted!);
      }
    }
    const wrong = { data: weights.data.slice(), dtype: "F32" } as const;
    wrong.data[1234] = NaN;
    expect(() => quantize(gpu, wrong, 37, 300, { bits: 4 })).toThrow(/row 4, column 34 is NaN/);
    wrong.data[1234] = 3e38;
    expect(() => quantize(gpu, wrong, 37, 300, { bits: 4 })).toThrow(/too large for a half-precision scale/);
    expect(quantize(gpu, { data: new Float32Array(0), dtype: "F32" }, 0, 8, { bits: 4 }).packed.length).toBe(
      0,
    );
    gpu.close();
    expect(() => unchecked(gpu).calls).toThrow(/was closed/);
  });
});

describe("solvers on a GPU", () => {
  test("from equal moments codes, scales and corrected targets are the CPU's, byte for byte", async () => {
    if (!COMPUTES || await deviceLine() === undefined) return;
    using gpu = await openKernels({ backend: "cuda" });
    using cpu = await openKernels({ backend: "cpu" });
    const [rows, cols, tokens] = [9, 256, 40];
    const values = (count: number, step: number) =>
      Float32Array.from({ length: count }, (_, i) => Math.sin(step * i * i) * 0.1);
    const solved = (kernels: Kernels, format: WeightFormat, block: number) => {
      const moments = emptyMoments(cols, block), cross = new Float32Array(moments.second.length);
      const x = values(tokens * cols, 1), lost = values(tokens * cols, 2);
      accumulateMoment(cpu, x, undefined, undefined, tokens, moments.second, block);
      accumulateMoment(cpu, x, lost, undefined, tokens, cross, block);
      moments.tokens = moments.weight = tokens;
      const moment = factorMoments(kernels, moments),
        loss = { weights: values(rows * cols, 3), rows, moment, cross };
      const target = correctedTarget(kernels, loss, { correction: 0.5, residualCorrection: 0 });
      const problem = { ...format, weights: target, rows, cols, moment };
      return [target, solveLayer(kernels, "best", problem), solveLayer(kernels, "feedback", problem)];
    };
    for (
      const [format, block] of [
        [{ bits: 2, groupSize: 16, zeroPoint: "real", scaleBits: 4 }, 256],
        [{ bits: 3, groupSize: 64, zeroPoint: "real", scaleBits: 6 }, 256],
        [{ bits: 3, groupSize: 16, zeroPoint: "symmetric", scaleBits: 8 }, 256],
        [{ bits: 8, groupSize: 16, zeroPoint: "symmetric", scaleBits: 8 }, 256],
        [{ bits: 4, groupSize: 32, zeroPoint: "symmetric" }, 64],
        [{ bits: 2, groupSize: 0, zeroPoint: "integer" }, 256],
        [{ bits: 2, groupSize: 0, zeroPoint: "real", scaleBits: 16, codes: "trellis" }, 256],
        [{ bits: 3, groupSize: 64, zeroPoint: "real", scaleBits: 16, codes: "trellis" }, 64],
        [{ bits: 2, groupSize: 0, zeroPoint: "real", scaleBits: 0, codes: "trellis" }, 256],
      ] as const
    ) expect(solved(gpu, format, block)).toEqual(solved(cpu, format, block));
  });
});

describe("models on a GPU", () => {
  /** Largest difference over the largest value. */
  const apart = (a: Float32Array, b: Float32Array) => {
    let difference = 0, largest = 0;
    for (let i = 0; i < a.length; i++) {
      difference = Math.max(difference, Math.abs(a[i]! - b[i]!) || 0, Number.isFinite(a[i]!) ? 0 : Infinity);
      largest = Math.max(largest, Math.abs(b[i]!));
    }
    return difference / largest;
  };

  test("predictions are the CPU's within 1e-4, and no array is read that only the device has", async () => {
    if (!COMPUTES || await deviceLine() === undefined) return;
    using gpu = await openKernels({ backend: "cuda" });
    using cpu = await openKernels({ backend: "cpu" });
    const { wrote } = DeviceArrays.prototype;
    // What a kernel leaves on the device is NaN on the host until it is asked for.
    DeviceArrays.prototype.wrote = function (array, handle) {
      if (array instanceof Float32Array) array.fill(NaN);
      wrote.call(this, array, handle);
    };
    try {
      const inputIds = Int32Array.from({ length: 24 }, (_, i) => i % 16), rows = Int32Array.of(3, 17);
      const images = Float32Array.from({ length: 2 * 1 * 16 * 16 }, (_, i) => Math.sin(i));
      const answers = [gpu, cpu].map((kernels) => {
        const dream = loadDream(join(MODELS, "dream-mini"), kernels);
        const dit = loadDit(join(MODELS, "glyph-dit"), kernels), seen: Float32Array[] = [];
        const observe = (_: unknown, x: Float32Array) => void seen.push(x.slice());
        const batch = { inputIds, batch: 2 }, hidden = dream.start(batch), stops: Float32Array[] = [];
        for (const { x, residual } of dream.stagesOf(0, batch, hidden, {})) {
          stops.push(x.slice(), ...residual === undefined ? [] : [residual.slice()]);
          x.fill(1); // what a stop shows is the host's: a run may put back other values
        }
        return [
          dream.forward(inputIds, 2).slice(),
          dream.forward(inputIds, 2, { rows }).slice(),
          dream.forward(inputIds, 2, { observe }).slice(),
          dit.forward(images.subarray(0, 2 * dit.imageElements), [3, 400], [1, 2], { observe }).slice(),
          hidden,
          ...stops,
          ...seen,
        ];
      });
      expect(answers[0]!.length).toBe(answers[1]!.length);
      const worst = Math.max(...answers[0]!.map((own, i) => apart(own, answers[1]![i]!)));
      expect(worst).toBeLessThan(1e-4);
    } finally {
      DeviceArrays.prototype.wrote = wrote;
    }
  });

  test("heads that no kernel has room for are the CPU's; constants keep their copies, and a line says so", async () => {
    if (!COMPUTES || await deviceLine() === undefined) return;
    const lines: string[] = [], tokens = 3, size = 300;
    using gpu = await openKernels({ backend: "cuda", onMessage: (line) => lines.push(line) });
    using cpu = await openKernels({ backend: "cpu" });
    const [q, k, v] = [1, 2, 3].map((step) =>
      Float32Array.from({ length: tokens * size }, (_, i) => Math.sin(step * i * i))
    );
    const attended = (kernels: Kernels) => {
      const out = new Float32Array(tokens * size);
      attention(kernels, "attend", q, k, v, null, 1, tokens, 1, 1, size, 0, 0.1, out);
      return out;
    };
    let evictions = 0;
    const { makeRoom } = DeviceArrays.prototype;
    DeviceArrays.prototype.makeRoom = () => void evictions++;
    try {
      expect([attended(gpu), attended(gpu)]).toEqual([attended(cpu), attended(cpu)]);
    } finally {
      DeviceArrays.prototype.makeRoom = makeRoom;
    }
    const told = lines.filter((line) => line.includes("attention"));
    expect(told).toEqual(["cuda: no kernel of these sizes on the device for attention: the CPU does it"]);
    expect(evictions).toBe(0);
  });

  test("packed codes and their scales are brought to the device once", async () => {
    if (!COMPUTES || await deviceLine() === undefined) return;
    using gpu = await openKernels({ backend: "cuda" });
    const place = workplace(), { upload } = DeviceMemory.prototype, brought: ArrayBufferView[] = [];
    DeviceMemory.prototype.upload = function (data, ...rest) {
      if (data instanceof Uint32Array || data instanceof Uint16Array) brought.push(data);
      upload.call(this, data, ...rest);
    };
    try {
      const output = place.fresh(),
        { config } = resolveConfig({ overrides: { solver: "round", bit_width: 4 } });
      await quantizeCheckpoint({ input: join(MODELS, "dream-mini"), output, config, kernels: gpu });
      brought.length = 0;
      const model = loadDream(output, gpu), inputIds = Int32Array.from({ length: 8 }, (_, i) => i);
      for (let pass = 0; pass < 2; pass++) model.forward(inputIds, 1);
      expect(brought.filter((data) => data instanceof Uint32Array).length).toBeGreaterThan(10);
      expect(brought.filter((data) => data instanceof Uint16Array).length).toBeGreaterThan(20);
      expect(new Set(brought).size).toBe(brought.length);
    } finally {
      DeviceMemory.prototype.upload = upload;
      place.remove();
    }
  });

  test(
    "rotated weights are run there: hidden states are brought once, they and logits come back",
    async () => {
      if (!COMPUTES || await deviceLine() === undefined) return;
      using gpu = await openKernels({ backend: "cuda" });
      using cpu = await openKernels({ backend: "cpu" });
      const { download, upload } = DeviceMemory.prototype, moved: number[] = [];
      const brought: ArrayBufferView[] = [], { wrote } = DeviceArrays.prototype;
      DeviceMemory.prototype.download = function (handle, array, ...rest) {
        moved.push(array.byteLength);
        download.call(this, handle, array, ...rest);
      };
      DeviceMemory.prototype.upload = function (data, ...rest) {
        brought.push(data);
        upload.call(this, data, ...rest);
      };
      DeviceArrays.prototype.wrote = function (array, handle) {
        if (array instanceof Float32Array) array.fill(NaN); // until it is asked for
        wrote.call(this, array, handle);
      };
      try {
        using checkpoint = openCheckpoint(join(MODELS, "dream-mini"));
        const stages = loadDream(checkpoint.path, cpu).stages.filter(({ block }) => block === 1);
        const weights = new Map(
          stages.flatMap(({ layers }) => layers).map((layer) => {
            const dense = { data: denseWeights(cpu, layer), dtype: "F32" } as const,
              { rows, cols } = layer.weights;
            const format = {
              bits: 2,
              groupSize: 0,
              zeroPoint: "real",
              scaleBits: 0,
              codes: "trellis",
            } as const;
            return [layer.name, quantizeByWeights(cpu, dense, rows, cols, { ...format, solver: "clip" })];
          }),
        );
        expect([...weights.values()].filter(isRotated).length).toBeGreaterThan(3);
        for (const tokens of [1, 24]) { // below and above what tensor cores are for
          const inputIds = Int32Array.from({ length: tokens }, (_, i) => i % 16);
          const [own, wanted] = [gpu, cpu].map((kernels) => {
            const { model, kind } = modelFrom(checkpoint, kernels, { weights });
            if (kind !== "dream") throw new Error("expected a Dream model");
            model.forward(inputIds, 1);
            moved.length = brought.length = 0;
            const logits = model.forward(inputIds, 1).slice();
            const hidden = 4 * tokens * model.config.hiddenSize;
            if (kernels === gpu) expect(moved).toEqual([logits.byteLength, hidden]);
            // what is held comes as bytes: the hidden states; all else is no larger than a norm's weights
            const bytes = brought.filter((data) => data instanceof Uint8Array).map((data) => data.byteLength);
            const floats = brought.filter((data) => data instanceof Float32Array);
            if (kernels === gpu) expect(bytes).toEqual([hidden]);
            expect(floats.filter((data) => data.byteLength > 4 * model.config.hiddenSize)).toEqual([]);
            return logits;
          });
          expect(apart(own!, wanted!)).toBeLessThan(1e-4);
        }
      } finally {
        Object.assign(DeviceMemory.prototype, { download, upload });
        DeviceArrays.prototype.wrote = wrote;
      }
    },
    120_000,
  );

  test("8-bit activations and their products are the CPU's, byte for byte, and in a pass codes stay there", async () => {
    if (!COMPUTES || await deviceLine() === undefined) return;
    using gpu = await openKernels({ backend: "cuda" });
    using cpu = await openKernels({ backend: "cpu" });
    const [tokens, rows, cols] = [11, 9, 96],
      x = Float32Array.from({ length: tokens * cols }, (_, i) => Math.sin(i * i));
    const data = Float32Array.from({ length: rows * cols }, (_, i) => Math.cos(i * i));
    for (const grid of [undefined, { scale: 0.01, zeroPoint: 100 }]) {
      const [own, wanted] = [gpu, cpu].map((kernels) => {
        const weights = quantize(cpu, { data, dtype: "F32" }, rows, cols, { bits: 4, groupSize: 32 });
        if (!takesIntegers(weights)) throw new Error("expected one level of scales");
        const codes = quantizeActivations(kernels, x, tokens, cols, { grid });
        return [codes, linearPackedInt8(kernels, { weights }, codes)];
      });
      expect(own).toEqual(wanted!);
    }
    expect(() => quantizeActivations(gpu, x.map((value, i) => i === 500 ? NaN : value), tokens, cols))
      .toThrow(/NaN/);
    const place = workplace(), { upload, download } = DeviceMemory.prototype, moved: ArrayBufferView[] = [];
    const { hold } = DeviceArrays.prototype, codes = new Set<ArrayBufferLike>();
    try {
      const output = place.fresh(),
        { config } = resolveConfig({ overrides: { solver: "round", bit_width: 4 } });
      await quantizeCheckpoint({ input: join(MODELS, "dream-mini"), output, config, kernels: cpu });
      const models = [gpu, cpu].map((kernels) => loadDream(output, kernels, { activations: "int8" }));
      const inputIds = Int32Array.from({ length: 8 }, (_, i) => i);
      models[0]!.forward(inputIds, 1); // weights go to the device
      DeviceMemory.prototype.upload = function (array, ...rest) {
        moved.push(array);
        upload.call(this, array, ...rest);
      };
      DeviceMemory.prototype.download = function (handle, array, ...rest) {
        moved.push(array);
        download.call(this, handle, array, ...rest);
      };
      DeviceArrays.prototype.hold = function (array, isScratch) {
        if (array instanceof Uint8Array) codes.add(array.buffer);
        return hold.call(this, array, isScratch) as typeof array;
      };
      const [own, wanted] = models.map((model) => model.forward(inputIds, 1).slice());
      expect(apart(own!, wanted!)).toBeLessThan(0.05); // single codes differ where a sum's last bit does
      expect(moved.length).toBeGreaterThan(0);
      expect(codes.size).toBeGreaterThan(0);
      expect(moved.filter(({ buffer }) => codes.has(buffer))).toEqual([]);
    } finally {
      Object.assign(DeviceMemory.prototype, { upload, download });
      DeviceArrays.prototype.hold = hold;
      place.remove();
    }
  });

  test("layers that depend on time run there as without time: only logits come back", async () => {
    if (!COMPUTES || await deviceLine() === undefined) return;
    using gpu = await openKernels({ backend: "cuda" });
    using cpu = await openKernels({ backend: "cpu" });
    const x = Float32Array.from({ length: 11 * 300 }, (_, i) => Math.sin(i * i));
    for (const bits of [4, 8] as const) {
      for (const grid of [undefined, { scale: 0.01, zeroPoint: 7 }]) {
        const [own, wanted] = [gpu, cpu].map((kernels) =>
          roundActivations(kernels, x, 11, { bits, grid }, new Float32Array(x.length))
        );
        expect(own).toEqual(wanted!);
      }
    }
    const place = workplace(), { download } = DeviceMemory.prototype, { wrote } = DeviceArrays.prototype;
    let downloads = 0;
    try {
      const packed = place.fresh(),
        { config } = resolveConfig({ overrides: { solver: "round", bit_width: 4 } });
      await quantizeCheckpoint({ input: join(MODELS, "dream-mini"), output: packed, config, kernels: cpu });
      DeviceMemory.prototype.download = function (...parameters) {
        downloads++;
        download.apply(this, parameters);
      };
      DeviceArrays.prototype.wrote = function (array, handle) {
        if (array instanceof Float32Array) array.fill(NaN); // until it is asked for
        wrote.call(this, array, handle);
      };
      const groups = equalTimeGroups(maskRatioAxis(4), 2),
        inputIds = Int32Array.from({ length: 16 }, (_, i) => i % 16);
      for (const path of [join(MODELS, "dream-mini"), packed]) {
        const { linearLayers } = loadDream(path, cpu);
        const layers = linearLayers.map(({ name, weights }, i): [string, LayerParameters] => {
          const each = (of: (i: number) => number) =>
            Float32Array.from({ length: 2 * weights.rows }, (_, i) => of(i));
          const output = { gain: each((i) => 1 + 0.1 * Math.sin(i)), bias: each((i) => 0.01 * Math.cos(i)) };
          const activation = {
            bits: 8,
            scale: Float32Array.of(0.05, 0.06),
            zeroPoint: Int32Array.of(128, 120),
          } as const;
          if (i % 3 === 0) return [name, { perToken: 8, output }];
          if (!("packed" in weights) || weights.scaleBits !== undefined) {
            return [name, { activation, output }];
          }
          const twice = (array: Uint16Array | undefined) => array && Uint16Array.of(...array, ...array);
          const weightScales = { scale: twice(weights.scale)!, zeroPoint: twice(weights.zeroPoint) };
          return [name, { perToken: 4, output, weightScales }];
        });
        const timeParameters = new TimeParameters(groups, new Map(layers), "");
        for (const t of [0.5, [0.2, 0.8]]) {
          const [own, wanted] = [gpu, cpu].map((kernels) => {
            const model = loadDream(path, kernels, { timeParameters }), plain = loadDream(path, kernels);
            model.forward(inputIds, 2, { t });
            downloads = 0;
            plain.forward(inputIds, 2);
            const least = downloads;
            downloads = 0;
            const logits = model.forward(inputIds, 2, { t }).slice();
            expect([t, downloads]).toEqual([t, least]);
            return logits;
          });
          expect(apart(own!, wanted!)).toBeLessThan(0.05); // single codes differ where a sum's last bit does
        }
      }
    } finally {
      DeviceMemory.prototype.download = download;
      DeviceArrays.prototype.wrote = wrote;
      place.remove();
    }
  });

  test("experts are chosen and their rows moved there: of a mixture only the choice comes back", async () => {
    if (!COMPUTES || await deviceLine() === undefined) return;
    const python = readersPython();
    if (python === undefined) return console.log("skipped: no Python that makes the mixtures");
    using gpu = await openKernels({ backend: "cuda" });
    using cpu = await openKernels({ backend: "cpu" });
    const place = workplace(), folder = place.fresh(), { download } = DeviceMemory.prototype;
    const { wrote } = DeviceArrays.prototype, moved: number[] = [];
    DeviceMemory.prototype.download = function (handle, array, ...rest) {
      moved.push(array.byteLength);
      download.call(this, handle, array, ...rest);
    };
    DeviceArrays.prototype.wrote = function (array, handle) {
      if (array instanceof Float32Array) array.fill(NaN); // until it is asked for
      wrote.call(this, array, handle);
    };
    try {
      const names = await runReader(python, "language_models.py", ["make", folder]) as string[];
      const mixtures = names.filter((name) => name.includes("moe"));
      expect(mixtures.length).toBeGreaterThan(0);
      for (const name of mixtures) {
        const inputIds = Int32Array.from({ length: 24 }, (_, i) => i % 16), rows = Int32Array.of(3, 17);
        const [own, wanted] = [gpu, cpu].map((kernels) => {
          const model = loadLladaMoe(join(folder, name), kernels), seen: Float32Array[] = [];
          const observe = (_: unknown, x: Float32Array) => void seen.push(x.slice());
          moved.length = 0;
          const logits = model.forward(inputIds, 2).slice(), blocks = model.parts.blocks;
          const mixed = blocks.filter(({ mixture }) => mixture !== undefined).length;
          // the choices and their weights; logits and the hidden states
          if (kernels === gpu) expect([name, moved.length]).toEqual([name, 2 * mixed + 2]);
          const batch = { inputIds, batch: 2 }, hidden = model.start(batch), stops: Float32Array[] = [];
          for (const block of blocks.keys()) {
            for (const { x } of model.stagesOf(block, batch, hidden, {})) stops.push(x.slice());
          }
          return [
            logits,
            model.forward(inputIds, 2, { rows }).slice(),
            model.forward(inputIds, 2, { observe }).slice(),
            hidden,
            ...stops,
            ...seen,
          ];
        });
        expect(own!.length).toBe(wanted!.length);
        expect(Math.max(...own!.map((values, i) => apart(values, wanted![i]!) || 0))).toBeLessThan(1e-3);
      }
    } finally {
      DeviceMemory.prototype.download = download;
      DeviceArrays.prototype.wrote = wrote;
      place.remove();
    }
  }, 120_000);

  test("weights that are held are brought once, and again where other ones took their memory", async () => {
    if (!COMPUTES || await deviceLine() === undefined) return;
    using gpu = await openKernels({ backend: "cuda" });
    const place = workplace(), { upload } = DeviceMemory.prototype;
    let brought = 0;
    DeviceMemory.prototype.upload = function (data, ...rest) {
      if (data instanceof Uint16Array) brought++;
      upload.call(this, data, ...rest);
    };
    try {
      using checkpoint = openCheckpoint(
        store(place.fresh(), dreamCheckpoint({ ...SMALL_LANGUAGE, blocks: 2 }, "BF16")),
      );
      const inputIds = Int32Array.from({ length: 8 }, (_, i) => i);
      const runs = [1e9, 0].map((limit) => {
        const { model, kind } = modelFrom(checkpoint, gpu, { held: new HeldWeights(limit) });
        if (kind !== "dream") throw new Error("expected a Dream model");
        const logits = [1, 2].map(() => (brought = 0, model.forward(inputIds, 1).slice()));
        return { logits, again: brought };
      });
      expect(runs[0]!.again).toBe(0);
      expect(runs[1]!.again).toBeGreaterThan(14);
      for (const { logits } of runs) {
        for (const own of logits) expect(own).toEqual(runs[0]!.logits[0]!);
      }
    } finally {
      DeviceMemory.prototype.upload = upload;
      place.remove();
    }
  });

  test("layers solved on what a GPU's runs read have the CPU's errors", async () => {
    if (!COMPUTES || await deviceLine() === undefined) return;
    using gpu = await openKernels({ backend: "cuda" });
    using cpu = await openKernels({ backend: "cpu" });
    const place = workplace();
    try {
      const dit = store(place.fresh(), ditCheckpoint({ ...SMALL_IMAGE, blocks: 1 }));
      cpSync(join(MODELS, "glyph-dit", "scheduler_config.json"), join(dit, "scheduler_config.json"));
      for (const folder of [store(place.fresh(), dreamCheckpoint({ ...SMALL_LANGUAGE, blocks: 1 })), dit]) {
        const errors: number[][] = [];
        for (const kernels of [gpu, cpu]) {
          const model = loadModel(folder, kernels);
          const calibrated = await loadCalibration(model, { source: "synthetic", samples: 4, seed: 3 });
          const solved = await solveModel(calibrated, {
            kernels,
            solver: "best",
            settings: { ...DEFAULT_SOLVER_SETTINGS, rounds: 1, ratios: [1] },
            gridOf: () => ({ bits: 2, groupSize: 0, zeroPoint: "real" }),
          });
          errors.push([...solved.values()].map(({ relativeError }) => relativeError));
        }
        expect(errors[0]!.length).toBeGreaterThan(6);
        // a single other code of these small layers is some percent of the layer's error, up or down
        const ratios = errors[0]!.map((error, i) => Math.log(error / errors[1]![i]!));
        for (const ratio of ratios) expect(Math.abs(ratio)).toBeLessThan(0.15);
        expect(Math.abs(ratios.reduce((sum, ratio) => sum + ratio, 0) / ratios.length)).toBeLessThan(0.02);
      }
    } finally {
      place.remove();
    }
  });

  test("gradients of trellis codes are the CPU's, byte for byte", async () => {
    if (!COMPUTES || await deviceLine() === undefined) return;
    using gpu = await openKernels({ backend: "cuda" });
    using cpu = await openKernels({ backend: "cpu" });
    const [rows, cols, groupSize] = [5, 300, 64], lines = rows * Math.ceil(cols / groupSize);
    const dw = Float32Array.from({ length: rows * cols }, (_, i) => Math.sin(i * i));
    const { upload } = DeviceMemory.prototype;
    let uploads = 0;
    DeviceMemory.prototype.upload = function (...args) {
      uploads++;
      upload.apply(this, args);
    };
    try {
      for (const bits of [2, 3] as const) {
        const words = rows * Math.ceil(cols * bits / 32);
        const packed = Uint32Array.from({ length: words }, (_, i) => Math.imul(i + 1, 0x9e3779b1));
        const tensor = { rows, cols, bits, groupSize, packed } as unknown as TwoLevelTensor;
        const [own, wanted] = [gpu, cpu].map((kernels) => {
          const found = [new Float32Array(lines), new Float32Array(lines)] as const;
          trellisGradient(kernels, dw, tensor, ...found);
          return found;
        });
        expect(own!).toEqual(wanted!);
        expect(own!.every((values) => values.some((value) => value !== 0))).toBe(true);
      }
      expect(uploads).toBe(4);
    } finally {
      DeviceMemory.prototype.upload = upload;
    }
  });

  test("steps of phase 3's refinement have the CPU's losses", async () => {
    if (!COMPUTES || await deviceLine() === undefined) return;
    using gpu = await openKernels({ backend: "cuda" });
    using cpu = await openKernels({ backend: "cpu" });
    const place = workplace();
    try {
      const input = store(place.fresh(), ditCheckpoint({ ...SMALL_IMAGE, blocks: 1 })),
        output = place.fresh();
      const { config } = resolveConfig({ overrides: { solver: "clip", bit_width: 2, group_size: 16 } });
      await quantizeCheckpoint({ input, output, config, kernels: cpu });
      const reports = [gpu, cpu].map((kernels) => {
        const full = loadDit(input, kernels),
          samples = Float32Array.from(
            { length: 2 * full.imageElements },
            (_, i) => Math.sin(i * i),
          );
        const batch = { samples, timesteps: [10, 700], labels: [0, 1], varianceWeights: [1, 2] };
        const options = { learningRate: 0.01, maxIterations: 3, validateEvery: 3, convergenceThreshold: 0 };
        return refineDit(loadDit(output, kernels), full, { train: [batch], heldOut: [batch] }, options);
      });
      const [own, wanted] = reports.map(({ losses: { total }, heldOutAfter }) => [...total, heldOutAfter]);
      expect(own!.length).toBeGreaterThan(3);
      for (const [i, loss] of own!.entries()) expect(Math.abs(loss / wanted![i]! - 1)).toBeLessThan(1e-3);
      expect(wanted!.at(-1)).toBeLessThan(wanted![0]!);
    } finally {
      place.remove();
    }
  });

  test("generate.ts writes the tokens that the CPU writes", async () => {
    if (!COMPUTES || await deviceLine() === undefined) return;
    const place = workplace();
    try {
      const output = place.fresh(),
        quantized = [join(MODELS, "dream-mini"), output, "--bits", "4", "--scale-bits", "6"];
      expect(run("quantize.ts", [...quantized, "--solver", "round", "--backend", "cpu"]).code).toBe(0);
      const written = ["cuda", "cpu"].map((backend) =>
        run("generate.ts", [output, "--prompt", "47+38=", "--json", "--backend", backend])
      );
      expect(written.map(({ code }) => code)).toEqual([0, 0]);
      const [gpu, cpu] = written.map(({ stdout }) =>
        JSON.parse(stdout) as { tokens: number[]; activations: string }
      );
      expect([gpu!.tokens.length, gpu!.tokens]).toEqual([4, cpu!.tokens]);
      expect([gpu!.activations, cpu!.activations]).toEqual(["f32", "int8"]);
    } finally {
      place.remove();
    }
  }, 120_000);
});

describe("quantize.ts --backend cuda", () => {
  const place = workplace();
  afterAll(place.remove);
  const quantized = (options: readonly string[], variables: Readonly<Record<string, string>> = {}) => {
    const output = place.fresh();
    const result = run("quantize.ts", [join(MODELS, "dream-mini"), output, ...options], variables);
    return { ...result, output };
  };
  /** Two layers are solved, on statistics: runs of the model would have other last bits. */
  const solving = () => {
    const path = place.fresh("solving.yaml"), statistics = `${place.fresh()}.safetensors`;
    writeFileSync(path, "keep_patterns: ['layers.[123]', embed, lm_head, mlp, k_proj, v_proj]\n");
    const saved = ["--save-calibration", statistics, "--samples", "32", "--backend", "cpu"];
    const { code, stderr } = run("quantize.ts", [join(MODELS, "dream-mini"), ...saved]);
    expect([code, stderr.match(/error:.*/)?.[0]]).toEqual([0, undefined]);
    return ["--bits", "2", "--config", path, "--solver", "best", "--calibrate", statistics];
  };

  test("writes the folder that the CPU writes", async () => {
    const line = COMPUTES ? await deviceLine() : undefined;
    if (line === undefined) return;
    const solved = solving(), whole: string[] = [];
    for (const options of [["--bits", "2", "--scale-bits", "4", "--solver", "clip"], solved]) {
      const [gpu, cpu] = ["cuda", "cpu"].map((backend) => quantized([...options, "--backend", backend]));
      expect([gpu!.code, gpu!.stdout.includes(line), cpu!.stdout.includes(line)]).toEqual([0, true, false]);
      expect(differences(gpu!.output, cpu!.output)).toEqual([]);
      whole.push(cpu!.output);
    }
    // The emulator's device can be made small, and be lost; a real one ignores this.
    if (!line.includes("emulator")) return;
    const cuda = [...solved, "--backend", "cuda"], small = quantized(cuda, { AQ_EMULATED_BYTES: "60000" });
    expect(small.stdout + small.stderr).toMatch(/cuda: no room on the device for \w+: the CPU does it/);
    expect([small.code, differences(small.output, whole[1]!)]).toEqual([0, []]);
    const waiting = quantized(cuda, { AQ_EMULATED_PINNED: "0" }); // copies that do not overlap with work
    expect([waiting.code, differences(waiting.output, whole[1]!)]).toEqual([0, []]);
    const [failed, lost] = [{ AQ_EMULATED_COPIES: "100" }, { AQ_EMULATED_LAUNCHES: "100" }].map(
      (variables) => {
        const result = quantized(cuda, variables);
        expect([result.code, result.stderr.match(/Cannot go on with the GPU: [^;]*/)?.[0]]).toEqual([
          5,
          "Cannot go on with the GPU: the device was lost",
        ]);
        return result;
      },
    );
    expect(failed!.stderr).toContain("--resume");
    const again = run("quantize.ts", [join(MODELS, "dream-mini"), lost!.output, ...cuda, "--resume"]);
    expect([again.code, differences(lost!.output, whole[1]!)]).toEqual([0, []]);
  }, 240_000);

  test("writes the files for llama.cpp that the CPU writes, symmetric grids as well", async () => {
    if (!COMPUTES || await deviceLine() === undefined) return;
    using gpu = await openKernels({ backend: "cuda" });
    using cpu = await openKernels({ backend: "cpu" });
    const sizes = { ...SMALL_LANGUAGE, width: 256, inner: 256, heads: 4, kvHeads: 4, blocks: 1 };
    const input = store(place.fresh(), dreamCheckpoint(sizes)), { upload } = DeviceMemory.prototype;
    let uploads = 0;
    DeviceMemory.prototype.upload = function (...args) {
      uploads++;
      upload.apply(this, args);
    };
    try {
      for (const target_type of ["Q2_K", "Q3_K", "Q4_K", "Q6_K"]) {
        uploads = 0;
        const solver = target_type === "Q6_K" ? "round" : "clip", files: Buffer[] = [];
        const { config } = resolveConfig({ overrides: { target: "llama.cpp", target_type, solver } });
        for (const kernels of [gpu, cpu]) {
          const folder = place.fresh(), output = join(folder, "own.gguf"); // its name is in the file
          mkdirSync(folder);
          await quantizeFor({ input, output, kernels, config });
          files.push(readFileSync(output));
        }
        expect([target_type, files[0]!.equals(files[1]!)]).toEqual([target_type, true]);
        expect(uploads).toBeGreaterThanOrEqual(7); // a matrix each
      }
    } finally {
      DeviceMemory.prototype.upload = upload;
    }
  });

  test("writes the trellis codes that the CPU writes", async () => {
    if (!COMPUTES || await deviceLine() === undefined) return;
    const options = [...solving(), "--codes", "trellis", "--effort", "low"];
    const [gpu, cpu] = ["cuda", "cpu"].map((backend) => quantized([...options, "--backend", backend]));
    expect([gpu!.code, cpu!.code, differences(gpu!.output, cpu!.output)]).toEqual([0, 0, []]);
    expect(gpu!.stdout + gpu!.stderr).not.toContain("the CPU does it");
  }, 240_000);
});

describe("bench.ts --suite kernels --backend cuda", () => {
  test("without a GPU it is one line and exit status 5", async () => {
    const cuda = await opened();
    const found = cuda?.devices ?? 0, line = cuda?.describe();
    cuda?.close();
    if (found > 0) return console.log(`skipped: this has a GPU: ${line}`);
    const { code, stdout, stderr } = run("bench.ts", ["--suite", "kernels", "--backend", "cuda"]);
    expect([code, stdout]).toEqual([5, ""]);
    expect(stderr).toMatch(
      /^error: Cannot use the backend "cuda": [^\n]*; use the backend "cpu", or "auto"\n$/,
    );
  });

  test("checks every kernel before it times it, beside a copy in the same run", async () => {
    using cuda = await opened();
    if (cuda === undefined || cuda.devices === 0) {
      return console.log(`skipped: ${cuda?.describe() ?? "no CUDA library"}`);
    }
    using cpu = await openKernels({ backend: "cpu" });
    const { rows, goals, skipped }: SuiteReport = measureCuda(cuda, cpu, true, () => {});
    expect(rows[0]).toMatchObject({ kernel: "copy", ofCopy: 1 });
    expect(rows.length).toBe(9);
    for (const row of rows) {
      expect(row["milliseconds"]).toBeGreaterThan(0);
      expect(row["ofCopy"]).toBeGreaterThan(0);
    }
    expect([goals.length, skipped]).toEqual([6, []]);
  }, 120_000);
});
