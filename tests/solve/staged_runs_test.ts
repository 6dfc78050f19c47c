import { afterAll, describe, expect, test } from "bun:test";
import { cpSync, mkdirSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { type Calibrated, loadCalibration } from "../../lib/calibration/mod.ts";
import { type Blockwise, loadModel } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { DEFAULT_SOLVER_SETTINGS } from "../../lib/quant/solvers/settings.ts";
import { KeptArrays } from "../../lib/solve/kept_arrays.ts";
import { solveModel, type SolveOptions } from "../../lib/solve/solve_model.ts";
import { StagedRuns } from "../../lib/solve/staged_runs.ts";
import { MODELS, workplace } from "../_checkpoints.ts";
import { ditCheckpoint, dreamCheckpoint, SMALL_IMAGE, SMALL_LANGUAGE, store } from "../_models.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

const FOLDERS = {
  dream: store(place.fresh(), dreamCheckpoint({ ...SMALL_LANGUAGE, blocks: 3 })),
  dit: store(place.fresh(), ditCheckpoint({ ...SMALL_IMAGE, blocks: 3 })),
};
cpSync(join(MODELS, "glyph-dit", "scheduler_config.json"), join(FOLDERS.dit, "scheduler_config.json"));

/** A model with three parts of data, the last one shorter. */
async function calibratedOf(name: keyof typeof FOLDERS) {
  const calibrated = await loadCalibration(loadModel(FOLDERS[name], kernels), {
    source: "synthetic",
    samples: 24,
    seed: 3,
  });
  const [part] = calibrated.data.fit as [Calibrated["data"]["fit"][number]];
  const parts = [16, 16, 8].map((samples) => shortened(part, samples));
  return { ...calibrated, data: { ...calibrated.data, fit: parts } } as Calibrated;
}

/** The first samples of a part. */
function shortened(part: Calibrated["data"]["fit"][number], samples: number) {
  const cut = <T extends { readonly length: number; slice(begin: number, end: number): T }>(values: T) =>
    values.slice(0, values.length / part.samples * samples);
  const { batch } = part;
  return {
    ...part,
    samples,
    weights: cut(part.weights),
    times: cut(part.times),
    batch: "inputIds" in batch ? { ...batch, inputIds: cut(batch.inputIds), batch: samples } : {
      samples: cut(batch.samples),
      timesteps: cut([...batch.timesteps as number[]]),
      labels: cut([...batch.labels as number[]]),
    },
  };
}

const optionsOf = (more: Partial<SolveOptions>): SolveOptions => ({
  kernels,
  solver: "best",
  settings: { ...DEFAULT_SOLVER_SETTINGS, rounds: 1, ratios: [1] },
  gridOf: () => ({ bits: 2, groupSize: 0, zeroPoint: "real" }),
  ...more,
});

describe("runs from stage to stage", () => {
  for (const name of ["dream", "dit"] as const) {
    test(`read what one forward pass shows, in memory and from files (${name})`, async () => {
      const { model: loaded, data } = await calibratedOf(name), model = loaded as Blockwise<unknown>;
      const folder = place.fresh();
      mkdirSync(folder);
      for (const options of [{}, { memoryBytes: 2000, folder }]) {
        const kept = new KeptArrays(options), runs = new StagedRuns(model, data.fit, kept, "run");
        const seen = new Set<string>();
        for (const { block, layers: [first] } of model.stages) {
          if (seen.has(first!.name)) continue;
          seen.add(first!.name);
          for (const [i, { batch }] of data.fit.entries()) {
            let wanted: Float32Array | undefined;
            const observe = ({ name }: { name: string }, x: Float32Array) => {
              if (name === first!.name) wanted ??= x.slice();
            };
            const hidden = model.start(batch);
            for (let at = 0; at <= Math.min(block, model.stages.at(-1)!.block - 1); at++) {
              model.runBlock(at, batch, hidden, { observe });
            }
            if (block === model.stages.at(-1)!.block) model.finish(batch, hidden, { observe });
            expect(runs.stop(i, block, first!.name).x).toEqual(wanted! as Float32Array<ArrayBuffer>);
          }
        }
        expect(kept.bytes).toBeLessThanOrEqual(options.memoryBytes ?? Infinity);
        expect(readdirSync(folder).length > 0).toBe("folder" in options);
        kept.drop();
        expect(readdirSync(folder)).toEqual([]);
      }
    });

    test(`a block runs once, and files in place of memory change no byte (${name})`, async () => {
      const calibrated = await calibratedOf(name), begun = new Map<number, number>();
      const { model } = calibrated, stagesOf = model.stagesOf.bind(model) as typeof model.stagesOf;
      model.stagesOf = ((block: number, ...rest: unknown[]) => {
        begun.set(block, (begun.get(block) ?? 0) + 1);
        return (stagesOf as (...all: unknown[]) => unknown)(block, ...rest);
      }) as typeof model.stagesOf;
      const solved = await solveModel(calibrated, optionsOf({}));
      // Three parts, each in full precision and quantized.
      expect([...begun]).toEqual([[0, 6], [1, 6], [2, 6], [3, 6]]);
      const folder = place.fresh();
      mkdirSync(folder);
      const spilled = await solveModel(calibrated, optionsOf({ kept: { memoryBytes: 0, folder } }));
      for (const [name, { tensor }] of solved) expect(spilled.get(name)!.tensor).toEqual(tensor);
      begun.clear();
      await solveModel(calibrated, optionsOf({ mode: "once" }));
      expect([...begun.values()]).toEqual([3, 3, 3, 3]);
    });
  }
});
