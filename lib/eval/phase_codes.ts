/** Codes of a row of the phase suite: what the pipeline chooses before the phases, with the time that it took. */
import type { Config } from "../config.ts";
import { CheckpointError } from "../errors.ts";
import { solvePlan } from "../pipeline/calibrated.ts";
import type { PhaseContext } from "../pipeline/phase_context.ts";
import { planQuantization } from "../pipeline/plan.ts";
import { denseWeights } from "../pipeline/solve.ts";
import { type PackedTensor, quantize } from "../quant/mod.ts";
import type { RowSetting } from "./phase_rows.ts";

/** Codes by a solver, with the seconds that they took. */
export interface Codes {
  readonly weights: ReadonlyMap<string, PackedTensor>;
  readonly seconds: number;
}

/** @throws {CheckpointError} when there is nothing to quantize */
export async function codesOf(
  context: PhaseContext,
  config: Config,
  solver: RowSetting["solver"],
): Promise<Codes> {
  const { checkpoint, calibrated, kernels, threads, signal } = context;
  const begin = performance.now();
  const plan = planQuantization(checkpoint, { ...config, solver });
  const layers = new Map(
    calibrated.model.stages.flatMap(({ layers }) => layers.map((layer) => [layer.name, layer])),
  );
  const rows = plan.rows.filter(({ action, name }) => action === "quantize" && layers.has(name));
  if (rows.length === 0) {
    throw new CheckpointError(
      `Cannot measure ${JSON.stringify(checkpoint.path)}: it must have layers to quantize, got none`,
      {
        path: checkpoint.path,
      },
    );
  }
  let weights: Map<string, PackedTensor>;
  if (solver === "best") {
    const solved = await solvePlan(calibrated, plan, { ...config, solver }, kernels, threads, undefined, "", {
      signal,
    });
    weights = new Map([...solved.layers].map(([name, { tensor }]) => [name, tensor]));
  } else {
    weights = new Map(rows.map(({ name, shape, bits, groupSize, zeroPoint, scaleBits }) => {
      const [height, width] = shape as [number, number];
      const data = denseWeights(kernels, layers.get(name)!, threads);
      return [
        name,
        quantize(kernels, { data, dtype: "F32" }, height, width, {
          bits: bits!,
          groupSize: groupSize!,
          zeroPoint: zeroPoint!,
          scaleBits,
          solver: "round",
          threads,
        }),
      ];
    }));
  }
  return { weights, seconds: (performance.now() - begin) / 1000 };
}
