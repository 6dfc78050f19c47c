import { afterAll, describe, expect, test } from "bun:test";
import { truncateSync } from "node:fs";
import { loadCalibration } from "../../lib/calibration/mod.ts";
import { resolveConfig } from "../../lib/config/mod.ts";
import { HeldWeights, loadDream, modelFrom } from "../../lib/models/mod.ts";
import { withCuda } from "../../lib/native/cuda/kernels.ts";
import type { CudaKernels } from "../../lib/native/cuda/mod.ts";
import { gatherRows } from "../../lib/native/functions.ts";
import { type ComingArray, HOST_ARRAYS } from "../../lib/native/kernels.ts";
import { type Kernels, openKernels } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { DEFAULT_SOLVER_SETTINGS } from "../../lib/quant/solvers/settings.ts";
import { solveModel } from "../../lib/solve/solve_model.ts";
import { type Checkpoint, openCheckpoint } from "../../lib/tensor/mod.ts";
import { equalTimeGroups, maskRatioAxis, TimeParameters } from "../../lib/time/mod.ts";
import { workplace } from "../_checkpoints.ts";
import { dreamCheckpoint, SMALL_LANGUAGE, store } from "../_models.ts";
import { answered, device, LOST } from "./_cuda.ts";

const place = workplace();
afterAll(place.remove);
const folder = store(place.fresh(), dreamCheckpoint({ ...SMALL_LANGUAGE, blocks: 3 }, "BF16"));
const cuda = await device(), base = await openKernels({ backend: "cpu" });
afterAll(() => {
  cuda?.close();
  base.close();
});

const batch = { inputIds: Int32Array.from({ length: 16 }, (_, i) => i), batch: 2 };
const QUERY = "model.layers.1.self_attn.q_proj.weight";

function modelOf(checkpoint: Checkpoint, kernels: Kernels, limit = Infinity) {
  const held = new HeldWeights(limit), { model, kind } = modelFrom(checkpoint, kernels, { held });
  if (kind !== "dream") throw new Error("expected a Dream model");
  return { model, held };
}

interface Watched {
  readonly statusOf?: Parameters<typeof answered>[1];
  /** Bytes of the device. */
  readonly most?: number | undefined;
  /** Nothing is read before it is needed. */
  readonly isLate?: boolean;
}

/** Kernels of a library whose calls a test sees and answers, and the lines that they tell. */
function opened(library: CudaKernels, { statusOf = () => undefined, most, isLate = false }: Watched = {}) {
  const own = answered(library, statusOf, most), lines: string[] = [];
  const gpu = withCuda({ ...base, close() {} }, own.library, (line) => lines.push(line));
  if (isLate) gpu.arrays.ahead = () => {};
  return { ...own, lines, gpu };
}

/** What was asked of the device: the names of calls, and of uploads of a checkpoint's matrix its name. */
function watched(library: CudaKernels, checkpoint: Checkpoint, options: Watched) {
  const seen: string[] = [];
  const names = new Map(
    [...checkpoint.tensors.keys()].map((name) => [String(checkpoint.read(name)), name]),
  );
  const statusOf: Watched["statusOf"] = (name, _, args) => {
    const data = args[0] as Uint16Array;
    const isMatrix = name === "aq_cuda_upload" && data instanceof Uint16Array;
    const bytes = () => String(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
    seen.push((isMatrix ? names.get(bytes()) : undefined) ?? name);
    return undefined;
  };
  const own = opened(library, { ...options, statusOf });
  return { ...own, seen };
}

describe("weights of the next block", () => {
  test("are on their way to the device before what this block's layers read is asked back", () => {
    if (cuda === undefined) return;
    using checkpoint = openCheckpoint(folder);
    for (const isLate of [false, true]) {
      const { gpu, seen } = watched(cuda, checkpoint, { isLate }), { model } = modelOf(checkpoint, gpu);
      const hidden = model.start(batch), run = model.stagesOf(0, batch, hidden, {});
      run.next();
      expect(seen.includes("aq_cuda_download")).toBe(true);
      expect(seen.slice(0, seen.indexOf("aq_cuda_download")).includes(QUERY)).toBe(!isLate);
      for (const _ of run);
      const all = checkpoint.tensors.keys().filter((name) => /layers\.1\..*_proj\.weight/.test(name));
      for (const name of all) expect(seen.filter((own) => own === name).length).toBe(isLate ? 0 : 1);
      seen.length = 0;
      model.runBlock(1, batch, hidden, {});
      expect(seen.includes(QUERY)).toBe(isLate); // they are there
      gpu.close();
    }
  });

  test("change no byte of what is solved, and are brought no more often", async () => {
    if (cuda === undefined) return;
    using checkpoint = openCheckpoint(store(place.fresh(), dreamCheckpoint(SMALL_LANGUAGE, "BF16")));
    const results = [];
    for (const [isLate, limit] of [[true, Infinity], [false, Infinity], [false, 1e5]] as const) {
      const { gpu, seen, buffers } = watched(cuda, checkpoint, { isLate }),
        { model, held } = modelOf(checkpoint, gpu, limit);
      const loaded = { kind: "dream", folder, model } as const;
      const calibrated = await loadCalibration(loaded, {
        source: "synthetic",
        samples: 4,
        seed: 3,
        batchPositions: 64,
      });
      expect(calibrated.data.fit.length).toBeGreaterThan(1);
      const layers = await solveModel(calibrated, {
        kernels: gpu,
        solver: "best",
        settings: { ...DEFAULT_SOLVER_SETTINGS, rounds: 1, ratios: [1] },
        gridOf: (name) =>
          /(q|down)_proj/.test(name) ? { bits: 2, groupSize: 0, zeroPoint: "real" } : undefined,
      });
      expect(held.bytes).toBeLessThanOrEqual(limit);
      results.push({
        tensors: [...layers].map(([name, { tensor }]) => [name, tensor]),
        brought: seen.filter((name) => name.startsWith("model.layers")).length,
        bytesRead: held.bytesRead,
      });
      gpu.close();
      expect(buffers.size).toBe(0);
    }
    const [late, early, inLittle] = results;
    expect(late!.tensors.length).toBe(4);
    for (const own of [early, inLittle]) expect(own!.tensors).toEqual(late!.tensors);
    expect([early!.bytesRead, early!.brought - late!.brought]).toEqual([late!.bytesRead, 1]); // the last one's down
  }, 120_000);

  test("are left where they are without room on the host or on the device", () => {
    if (cuda === undefined) return;
    using checkpoint = openCheckpoint(folder);
    const run = (isLate: boolean, limit: number, most = Infinity) => {
      const own = watched(cuda, checkpoint, { most, isLate });
      const { model, held } = modelOf(checkpoint, own.gpu, limit), hidden = model.start(batch);
      const blocks = [0, 1, 2].map((block) => {
        for (let pass = 0; pass < 2; pass++) model.runBlock(block, batch, hidden.slice(), {});
        model.runBlock(block, batch, hidden, {});
        return { read: held.bytesRead, isAhead: own.seen.includes(QUERY), peak: own.peak() };
      });
      own.gpu.close();
      const read = blocks.map(({ read }) => read);
      return { hidden, read, first: blocks[0]!, lines: own.lines, left: own.buffers.size };
    };
    const late = run(true, Infinity), early = run(false, Infinity);
    expect(early.read[0]!).toBeGreaterThan(late.read[0]!);
    expect(early.read[2]!).toBe(late.read[2]!); // nothing that no block needs
    const alone = run(false, late.read[0]!); // embeddings and a block
    expect(alone.read).toEqual(late.read);
    const small = run(false, Infinity, late.first.peak);
    expect([early, alone, small].map(({ first }) => first.isAhead)).toEqual([true, false, false]);
    for (const own of [early, alone, small]) {
      expect([own.hidden, own.lines, own.left]).toEqual([late.hidden, [], 0]);
    }
  });

  test("do not drive out what the block at work reads in pass after pass", () => {
    if (cuda === undefined) return;
    using checkpoint = openCheckpoint(folder);
    const run = (isLate: boolean, most: number) => {
      let brought = 0;
      const statusOf: Watched["statusOf"] = (name, _, [data]) => {
        if (name === "aq_cuda_upload" && data instanceof Uint16Array) brought += data.byteLength;
        return undefined;
      };
      const { gpu, peak, lines } = opened(cuda, { statusOf, most, isLate });
      const { model } = modelOf(checkpoint, gpu), hidden = model.start(batch);
      for (const block of [0, 1, 2]) {
        for (let pass = 0; pass < 6; pass++) {
          for (const _ of model.stagesOf(block, batch, hidden.slice(), {}));
        }
        model.runBlock(block, batch, hidden, {});
      }
      const found = { hidden, brought, peak: peak(), lines };
      gpu.close();
      return found;
    };
    const whole = run(true, Infinity);
    const most = Math.round(whole.peak * 0.6); // a block and its activations, and a part of the next block
    const late = run(true, most), early = run(false, most);
    expect([early.hidden, early.lines]).toEqual([whole.hidden, []]);
    expect(late.brought).toBe(whole.brought);
    expect(early.brought).toBeLessThan(1.5 * late.brought);
  }, 60_000);

  test("are on their way before any other wait", () => {
    if (cuda === undefined) return;
    const calls: string[] = [];
    const { gpu, buffers } = opened(cuda, { statusOf: (name) => void calls.push(name) });
    const coming = gpu.arrays.constant(new Float32Array(100)),
      [x, out] = [new Float32Array(8), new Float32Array(8)];
    gpu.arrays.open();
    gpu.arrays.ahead(0, [{ array: coming, bytesRead: 0 }].values());
    gatherRows(gpu, "test", x, new Int32Array(1), 1, 1, 8, out); // not held: it comes back at once
    expect(calls.filter((name) => /load/.test(name))).toEqual(
      ["upload", "upload", "upload", "download"].map((name) => `aq_cuda_${name}`),
    );
    gpu.close();
    expect(buffers.size).toBe(0);
  });

  test("that cannot be read are an error when they are needed, the same as ever", () => {
    if (cuda === undefined) return;
    const errors = [false, true].map((isLate) => {
      const own = store(place.fresh(), dreamCheckpoint({ ...SMALL_LANGUAGE, blocks: 3 }, "BF16"));
      using checkpoint = openCheckpoint(own);
      const { gpu, buffers } = opened(cuda, { isLate }), { model, held } = modelOf(checkpoint, gpu);
      const hidden = model.start(batch), tensor = checkpoint.tensors.get(QUERY)!;
      truncateSync(tensor.file.path, tensor.info.byteOffset + 8);
      model.runBlock(0, batch, hidden, {});
      expect(held.bytesRead > 0).toBe(true);
      let failure: unknown;
      try {
        model.runBlock(1, batch, hidden, {});
      } catch (error) {
        failure = error;
      }
      gpu.close();
      expect(buffers.size).toBe(0);
      const { name, message, tensor: named } = failure as Error & { tensor?: string };
      return [name, message.replaceAll(own, ""), named];
    });
    expect(errors[0]).toEqual(errors[1]!);
    expect(errors[0]![0]).toBe("FormatError");
  });

  test("on a device that is lost are an error that names the way out", () => {
    if (cuda === undefined) return;
    using checkpoint = openCheckpoint(folder);
    const wanted = String(checkpoint.read(QUERY));
    const statusOf: Watched["statusOf"] = (name, _, [data]) => {
      const isMatrix = name === "aq_cuda_upload" && data instanceof Uint16Array;
      return isMatrix && String(new Uint8Array(data.buffer)) === wanted ? LOST : undefined;
    };
    const { gpu, buffers } = opened(cuda, { statusOf });
    const { model } = modelOf(checkpoint, gpu), hidden = model.start(batch);
    expect(() => model.runBlock(0, batch, hidden, {})).toThrow(
      /^Cannot go on with the GPU: .*--resume.*"cpu"/,
    );
    gpu.close();
    expect(buffers.size).toBe(0);
  });
});

describe("packed weights of a model that goes round", () => {
  test("are those of the times in force", async () => {
    const plain = store(place.fresh(), dreamCheckpoint({ ...SMALL_LANGUAGE, blocks: 3 })),
      output = place.fresh();
    const { config } = resolveConfig({ overrides: { solver: "round", bit_width: 4 } });
    await quantizeCheckpoint({ input: plain, output, config, kernels: base });
    const coming: (ArrayBufferView | undefined)[] = [];
    const ahead = (_: number, own: Iterator<ComingArray>) => {
      for (let next = own.next(); next.done !== true; next = own.next()) coming.push(next.value.array);
    };
    const kernels = { ...base, close() {}, arrays: { ...HOST_ARRAYS, ahead } };
    const { name, weights } = loadDream(output, base).linearLayers.find(({ name }) => name === QUERY)!;
    if (!("packed" in weights) || weights.scaleBits !== undefined) {
      throw new Error("expected one level of scales");
    }
    const twice = (array: Uint16Array, other: number) =>
      Uint16Array.of(...array, ...array.map((value) => value + other));
    const weightScales = { scale: twice(weights.scale, 1), zeroPoint: twice(weights.zeroPoint!, 1) };
    const groups = equalTimeGroups(maskRatioAxis(4), 2), layers = new Map([[name, { weightScales }]]);
    const timeParameters = new TimeParameters(groups, layers, ""),
      model = loadDream(output, kernels, { timeParameters });
    const count = (scale: Uint16Array) => coming.filter((array) => String(array) === String(scale)).length;
    const [first, second] = [0, 1].map((i) =>
      weightScales.scale.subarray(i * weights.scale.length, (i + 1) * weights.scale.length)
    );
    const found = [0.2, 0.8, [0.2, 0.8]].map((t) => {
      coming.length = 0;
      model.forward(batch.inputIds, 2, { t });
      return [count(first!), count(second!)];
    });
    expect(found).toEqual([[1, 0], [0, 1], [1, 1]]);
  });

  test("stay on the device as far as there is room, and steps give the same logits", async () => {
    if (cuda === undefined) return;
    const plain = store(place.fresh(), dreamCheckpoint({ ...SMALL_LANGUAGE, blocks: 8 })),
      output = place.fresh();
    const { config } = resolveConfig({ overrides: { solver: "round", bit_width: 4 } });
    await quantizeCheckpoint({ input: plain, output, config, kernels: base });
    const steps = (most: number) => {
      let brought = 0;
      const statusOf: Watched["statusOf"] = (name, _, [data]) => {
        const isCodes = data instanceof Uint32Array || data instanceof Uint16Array;
        if (name === "aq_cuda_upload" && isCodes) brought += data.byteLength;
        return undefined;
      };
      const own = opened(cuda, { statusOf, most });
      const model = loadDream(output, own.gpu);
      const found = Array.from({ length: 5 }, () => {
        brought = 0;
        return { logits: model.forward(batch.inputIds, batch.batch).slice(), brought };
      });
      own.gpu.close();
      return { found, peak: own.peak(), lines: own.lines, left: own.buffers.size };
    };
    const whole = steps(Infinity), all = whole.found[0]!.brought;
    expect(whole.found.slice(1).map(({ brought }) => brought)).toEqual([0, 0, 0, 0]);
    const most = whole.peak - Math.round(all / 4), small = steps(most);
    expect([small.lines, small.left]).toEqual([[], 0]);
    for (const { logits } of small.found) expect(logits).toEqual(whole.found[0]!.logits);
    // dropped in the order of their last use all would be brought in every step
    const brought = small.found.slice(2).reduce((sum, { brought }) => sum + brought, 0) / 3;
    expect(brought).toBeGreaterThanOrEqual(all / 4);
    expect(brought).toBeLessThan(0.7 * all);
  });
});
