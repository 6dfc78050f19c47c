import { afterAll, expect, test } from "bun:test";
import { mkdirSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { HeldOutMeter } from "../../lib/calibration/held_out.ts";
import { loadCalibration } from "../../lib/calibration/mod.ts";
import { HeldWeights, modelFrom } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import type { KeptArraysOptions } from "../../lib/solve/kept_arrays.ts";
import { solveModel } from "../../lib/solve/solve_model.ts";
import { DEFAULT_SOLVER_SETTINGS } from "../../lib/quant/solvers/settings.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { MODELS, workplace } from "../_checkpoints.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

/** Solved layers and held-out distance of a model in little memory or in much. */
async function solved(
  name: string,
  { held, batchPositions, kept }: {
    readonly held?: HeldWeights;
    readonly batchPositions?: number;
    readonly kept?: KeptArraysOptions;
  },
) {
  using checkpoint = openCheckpoint(join(MODELS, name));
  const loaded = modelFrom(checkpoint, kernels, { held });
  const calibrated = await loadCalibration(loaded, {
    source: "synthetic",
    samples: 32,
    seed: 1,
    batchPositions,
  });
  const layers = await solveModel(calibrated, {
    kernels,
    solver: "best",
    settings: { ...DEFAULT_SOLVER_SETTINGS, rounds: 1, ratios: [1] },
    gridOf: (layer) =>
      /layers\.1\.|blocks\.1\./.test(layer) ? { bits: 2, groupSize: 32, zeroPoint: "real" } : undefined,
    kept,
  });
  const tensors = new Map([...layers].map(([layer, { tensor }]) => [layer, tensor]));
  const distance = await new HeldOutMeter(calibrated).distance(tensors);
  return { tensors, distance, parts: calibrated.data.fit.length };
}

for (const name of ["dream-mini", "glyph-dit"]) {
  test(`tokens a batch, held weights and states in files change no byte (${name})`, async () => {
    const folder = place.fresh("states");
    mkdirSync(folder);
    const much = await solved(name, {}), held = new HeldWeights(1);
    const little = await solved(name, { held, batchPositions: 256, kept: { memoryBytes: 0, folder } });
    expect(little.parts).toBeGreaterThan(2 * much.parts);
    expect(held.bytesRead).toBeGreaterThan(10 * held.bytes);
    expect(much.tensors.size).toBeGreaterThan(5);
    expect(little.tensors).toEqual(much.tensors);
    // Sums over parts are added up in another order.
    expect(Math.abs(little.distance - much.distance)).toBeLessThan(1e-9 * much.distance);
    expect(readdirSync(folder)).toEqual([]);
  }, 120_000);
}
