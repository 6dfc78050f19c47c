/**
 * What each layer's error costs the whole model, measured: the layer alone is quantized and the held-out distance to full precision
 * taken; other bits and group sizes cost in proportion to the error that the layer's own objective says they make.
 */
import { factorMoments } from "../quant/solvers/factored_moment.ts";
import type { Config } from "../config/mod.ts";
import { CalibrationError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import { BIT_WIDTHS, GROUP_SIZES, type GroupSize } from "../quant/mod.ts";
import { solveLayer } from "../quant/solvers/solve_layer.ts";
import { BYTES_PER_ELEMENT, type Checkpoint, elementCount } from "../tensor/mod.ts";
import {
  type BitPlan,
  fitBudget,
  type LayerGrid,
  type LayerOption,
  type LayerOptions,
  optionBytes,
} from "../plan/budget.ts";
import { solverSettings } from "./candidates.ts";
import type { Calibrated } from "../calibration/mod.ts";
import { planQuantization } from "../plan/plan.ts";
import { pause, type RunOptions } from "../progress.ts";
import { collectStatistics } from "../calibration/collect.ts";
import { calibrationGroups } from "../calibration/saved_statistics.ts";
import { heldOutDistance } from "../calibration/held_out.ts";
import { denseWeights } from "./solve_model.ts";

/** Group sizes that a budget chooses from: whole rows, and three that share scales more and more closely. */
const BUDGET_GROUP_SIZES: readonly GroupSize[] = [0, 128, 64, 32];
/** Bits at which a layer is quantized alone: coarse enough to stand out of rounding. */
const PROBE_BITS = 2;

/**
 * Bits and group sizes of all layers within the budget that a configuration names.
 *
 * @throws {CalibrationError} when the budget is too small, or there is nothing held out to measure with
 */
export async function planByBudget(
  checkpoint: Checkpoint,
  calibrated: Calibrated,
  config: Config,
  kernels: Kernels,
  { onEvent, onProgress, signal }: RunOptions,
): Promise<BitPlan> {
  const rows = planQuantization(checkpoint, config).rows;
  const wanted = rows.filter(({ action }) => action === "quantize");
  const { model, data } = calibrated;
  if (data.heldOut.length === 0) {
    throw new CalibrationError(
      "Cannot choose bits by a budget: 8 records or more are needed to hold some out, got " +
        (calibrated.statistics === undefined
          ? "fewer"
          : "saved statistics without any: give the data themselves"),
    );
  }
  const weights = wanted.reduce((sum, { shape }) => sum + elementCount(shape)!, 0);
  const kept = rows.filter(({ action }) => action === "keep")
    .reduce((sum, { dtype, shape }) => sum + elementCount(shape)! * BYTES_PER_ELEMENT[dtype], 0);
  const budget = Math.min(
    config.targetBitsPerWeight === null ? Infinity : config.targetBitsPerWeight * weights / 8,
    config.targetModelSizeMb === null ? Infinity : config.targetModelSizeMb * 1e6 - kept,
  );
  // Before minutes of measuring: whether any choice fits.
  const smallest = wanted.reduce((sum, { shape, rank }) => {
    return sum + optionBytes(shape as [number, number], 2, 0, "symmetric", rank);
  }, 0);
  if (smallest > budget) {
    throw new CalibrationError(
      `Cannot fit the layers into ${Math.floor(budget)} bytes: their smallest forms need ${smallest}, ${
        (smallest * 8 / weights).toFixed(3)
      } bits per weight`,
    );
  }
  const layers = new Map(model.stages.flatMap(({ layers }) => layers.map((layer) => [layer.name, layer])));
  const settings = solverSettings(config);
  // What will be used, short of the refinements of `best`.
  const solver = config.solver === "best" ? "feedback" : config.solver;
  const linear = new Set(wanted.flatMap(({ name }) => layers.has(name) ? [name] : []));
  const statistics = calibrated.statistics ?? await collectStatistics(calibrated, {
    kernels,
    fingerprint: "",
    groups: calibrationGroups(data.axis, 1),
    second: "total",
    run: { identity: "", source: data.source, isSynthetic: data.isSynthetic, samples: data.samples },
    names: linear,
    signal,
  });
  const results: LayerOptions[] = [];
  for (const [index, { name, shape, bytesBefore, rank }] of wanted.entries()) {
    const layer = layers.get(name);
    const [height, width] = shape as [number, number];
    const bytesOf = ({ bits, groupSize, zeroPoint }: LayerGrid) =>
      optionBytes([height, width], bits, groupSize, zeroPoint, rank);
    if (layer === undefined) {
      // No linear layer, nothing can be measured: as the configuration says.
      const grid = { bits: config.bitWidth, groupSize: config.groupSize, zeroPoint: config.zeroPoint };
      results.push({ name, options: [{ ...grid, bytes: bytesOf(grid), cost: 0 }] });
      continue;
    }
    const dense = denseWeights(kernels, layer);
    const moment = factorMoments(kernels, statistics.moments(name), { damping: settings.damping });
    const sizes = BUDGET_GROUP_SIZES.filter((size) => size < width && GROUP_SIZES.includes(size));
    // Without stored zero points a row of few columns takes much less, and solvers make up for most of it.
    const kinds = config.zeroPoint === "symmetric"
      ? ["symmetric"] as const
      : [config.zeroPoint, "symmetric"] as const;
    const grids = BIT_WIDTHS.flatMap((bits) =>
      sizes.flatMap((groupSize) => kinds.map((zeroPoint) => ({ bits, groupSize, zeroPoint })))
    );
    let probe: { distance: number; objective: number } | undefined;
    const options: LayerOption[] = [];
    for (const grid of grids) {
      const { tensor, objective } = solveLayer(kernels, solver, {
        weights: dense,
        rows: height,
        cols: width,
        moment,
        ...grid,
      }, settings);
      if (probe === undefined && grid.bits === PROBE_BITS) {
        probe = { distance: heldOutDistance(calibrated, new Map([[name, tensor]]), 2), objective };
      }
      const cost = probe!.objective > 0 ? probe!.distance * objective / probe!.objective : 0;
      options.push({ ...grid, bytes: bytesOf(grid), cost });
    }
    results.push({ name, options });
    onProgress?.({
      tensor: `${name} (sensitivity)`,
      tensorsDone: index + 1,
      tensors: wanted.length,
      weightsDone: index + 1,
      weights: wanted.length,
      bytesDone: bytesBefore,
      bytes: bytesBefore,
      bytesResumed: 0,
    });
    await pause(signal);
  }
  const { plan, bytes, cost } = fitBudget(results, budget);
  onEvent?.({
    kind: "calibrate",
    message: `budget: ${(bytes * 8 / weights).toFixed(3)} bits per weight; expected held-out distance about ${
      cost.toPrecision(2)
    } with ${solver}; ${
      [...Map.groupBy(plan.values(), ({ bits }) => bits)].sort(([a], [b]) => a - b)
        .map(([bits, of]) => `${of.length} layers at ${bits} bits`).join(", ")
    }`,
  });
  return plan;
}
