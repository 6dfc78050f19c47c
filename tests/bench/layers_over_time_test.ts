import { afterAll, expect, test } from "bun:test";
import { layerSection, layersOverTime } from "../../lib/bench/layers_over_time.ts";
import { resolveConfig } from "../../lib/config/mod.ts";
import { loadModel } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { loadCalibration } from "../../lib/calibration/mod.ts";
import { join } from "node:path";
import { MODELS, workplace } from "../_checkpoints.ts";

const place = workplace(), kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});
const path = join(MODELS, "dream-mini");

test("the errors of a folder's layers by time group are those of its dequantized weights on held-out inputs", async () => {
  const output = place.fresh("packed"), plain = place.fresh("plain");
  const { config } = resolveConfig({
    overrides: { solver: "clip", bit_width: 2, calibration_samples: 64, num_time_groups: 3 },
  });
  await quantizeCheckpoint({ input: path, output, config, kernels });
  const { groups, layerErrors, source } = await layersOverTime(kernels, path, output, config);
  expect(groups.count).toBe(3);
  expect(source).toContain("calibration.jsonl");
  expect(new Set(layerErrors!.map(({ layer }) => layer)).size).toBe(28);

  const { dequantizeCheckpoint } = await import("../../lib/pipeline/mod.ts");
  await dequantizeCheckpoint({ input: output, output: plain, kernels, dtype: "F32" });
  const name = "model.layers.1.mlp.up_proj.weight";
  using before = openCheckpoint(path);
  using after = openCheckpoint(plain);
  const { info: { shape: [rows, cols] } } = after.tensors.get(name)!;
  // BF16 is the upper half of float32.
  const w = Float32Array.from(
    new Uint16Array(new Uint8Array(before.read(name)).buffer),
    (bits) => new Float32Array(Uint32Array.of(bits << 16).buffer)[0]!,
  );
  const q = new Float32Array(new Uint8Array(after.read(name)).buffer);
  const loaded = loadModel(path, kernels);
  const calibrated = await loadCalibration(loaded, {
    source: join(path, "calibration.jsonl"),
    samples: config.calibrationSamples ?? undefined,
    seed: config.calibrationSeed,
  });
  if (loaded.kind === "dit" || calibrated.kind !== "sequences") throw new Error("a language model is needed");
  const sums = Array.from({ length: 3 }, () => ({ error: 0, norm: 0, samples: 0 }));
  for (const { batch: { inputIds, batch }, times } of calibrated.data.heldOut) {
    loaded.model.forward(inputIds, batch, {
      observe: (layer, x, count) => {
        if (layer.name !== name) return;
        const each = count / times.length;
        for (const [i, time] of times.entries()) {
          const sum = sums[groups.groupOf(time)]!;
          if (sum.samples++ >= 8) continue;
          for (let t = i * each; t < (i + 1) * each; t++) {
            for (let r = 0; r < rows!; r++) {
              let y = 0, z = 0;
              for (let c = 0; c < cols!; c++) {
                y += w[r * cols! + c]! * x[t * cols! + c]!;
                z += q[r * cols! + c]! * x[t * cols! + c]!;
              }
              sum.error += (z - y) ** 2;
              sum.norm += y * y;
            }
          }
        }
      },
    });
  }
  for (const { layer, timeGroup, samples, relativeError } of layerErrors!) {
    if (layer !== name) continue;
    const { error, norm, samples: seen } = sums[timeGroup]!;
    expect(samples).toBe(Math.min(8, seen));
    expect(relativeError / (error / norm)).toBeCloseTo(1, 3);
  }
  const { rows: table, columns } = layerSection({ model: "m", setting: "s", groups, layerErrors, source });
  expect([table.length, columns.map(({ title }) => title).join()]).toEqual([
    28,
    "layer,group 0,group 1,group 2",
  ]);
});
