import { afterAll, beforeAll, expect, test } from "bun:test";
import { join } from "node:path";
import { layerErrors } from "../../lib/eval/layer_errors.ts";
import { loadModel } from "../../lib/models/mod.ts";
import { type Kernels, openKernels } from "../../lib/native/mod.ts";
import { loadCalibration } from "../../lib/calibration/mod.ts";
import type { PhaseContext } from "../../lib/phases/context.ts";
import { denseWeights } from "../../lib/solve/dense_weights.ts";
import { dequantize, quantize } from "../../lib/quant/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { equalTimeGroups, maskRatioAxis, TimeParameters } from "../../lib/time/mod.ts";
import { MODELS } from "../_checkpoints.ts";

let kernels: Kernels;
beforeAll(async () => void (kernels = await openKernels()));
afterAll(() => kernels.close());

test(
  "errors of layers by time group are those of plain loops, with and without a grid of activations",
  async () => {
    const path = join(MODELS, "dream-mini");
    using checkpoint = openCheckpoint(path);
    const full = loadModel(path, kernels);
    if (full.kind === "dit") throw new TypeError("a language model is needed");
    const source = join(path, "calibration.jsonl");
    const calibrated = await loadCalibration(full, { source, samples: 24, seed: 1 });
    if (calibrated.kind !== "sequences") throw new TypeError("sequences are needed");
    const context: PhaseContext = { checkpoint, calibrated, kernels, source, seed: 1 };
    const groups = equalTimeGroups(maskRatioAxis(1000), 2);
    const layer = "model.layers.1.mlp.down_proj.weight";
    const { weights } = full.model.stages.flatMap(({ layers }) => layers).find(({ name }) => name === layer)!;
    const { rows, cols } = weights;
    const plain = denseWeights(kernels, { name: layer, weights } as Parameters<typeof denseWeights>[1]);
    const packed = quantize(kernels, { data: plain, dtype: "F32" }, rows, cols, { bits: 3, groupSize: 0 });
    const activation = {
      bits: 4,
      scale: Float32Array.of(0.5, 1.25),
      zeroPoint: Int32Array.of(8, 5),
    } as const;
    const timeParameters = new TimeParameters(groups, new Map([[layer, { activation }]]), "");
    const one = new Map([[layer, packed]]);
    const [bare, gridded] = layerErrors(context, full, [
      { weights: one, timeParameters: undefined },
      { weights: one, timeParameters },
    ], groups);

    const quantized = dequantize(kernels, packed);
    const sums = [0, 1].map(() => ({ norm: 0, bare: 0, gridded: 0, samples: 0 }));
    for (const { batch, times } of calibrated.data.heldOut) {
      full.model.forward(batch.inputIds, batch.batch, {
        observe: ({ name }, x, count) => {
          if (name !== layer) return;
          for (let row = 0; row < count; row++) {
            const item = Math.floor(row * times.length / count), group = times[item]! > 0.5 ? 1 : 0;
            const sum = sums[group]!;
            if (row % (count / times.length) === 0) sum.samples++;
            if (sum.samples > 8) continue; // as many as it looks at
            const scale = activation.scale[group]!, zero = activation.zeroPoint[group]!;
            for (let n = 0; n < rows; n++) {
              let y = 0, own = 0, rounded = 0;
              for (let k = 0; k < cols; k++) {
                const value = x[row * cols + k]!;
                const code = Math.min(15, Math.max(0, Math.round(value / scale) + zero));
                y += plain[n * cols + k]! * value;
                own += quantized[n * cols + k]! * value;
                rounded += quantized[n * cols + k]! * (code - zero) * scale;
              }
              sum.norm += y * y;
              sum.bare += (own - y) ** 2;
              sum.gridded += (rounded - y) ** 2;
            }
          }
        },
      });
    }
    for (const [measured, key] of [[bare!, "bare"], [gridded!, "gridded"]] as const) {
      expect(measured.map(({ layer, timeGroup }) => [layer, timeGroup])).toEqual([[layer, 0], [layer, 1]]);
      for (const { timeGroup, relativeError, samples } of measured) {
        const sum = sums[timeGroup]!;
        expect(samples).toBe(Math.min(8, sum.samples));
        expect(Math.abs(relativeError / (sum[key] / sum.norm) - 1)).toBeLessThan(1e-3);
      }
    }
    expect(gridded![0]!.relativeError).toBeGreaterThan(bare![0]!.relativeError);
  },
  120_000,
);
