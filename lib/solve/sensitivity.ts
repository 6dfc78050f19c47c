/**
 * Bits by budget. The cost of a layer's error to the whole model is measured: the layer alone is quantized
 * and the held-out distance to full precision taken; other bits and group sizes cost in proportion to the
 * error of the layer's objective. With saved statistics alone nothing is run: a layer costs the relative
 * error of its outputs, all layers alike.
 */
import { factorMoments, outputPower } from "../quant/solvers/factored_moment.ts";
import { type Config, type ConfigInForce, layerBitWidth, storedScales } from "../config/mod.ts";
import { CalibrationError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import { BIT_WIDTHS, type BitWidth, GROUP_SIZES, type GroupSize, matrixSizes } from "../quant/mod.ts";
import { solveLayer } from "../quant/solvers/solve_layer.ts";
import { type Checkpoint, elementCount } from "../tensor/mod.ts";
import {
  type BitPlan,
  fitBudget,
  type LayerGrid,
  type LayerOption,
  type LayerOptions,
  optionBytes,
} from "../plan/budget.ts";
import { solverSettings } from "./candidates.ts";
import type { Solvable } from "../calibration/statistics/alone.ts";
import { partsWith } from "../calibration/statistics/expert_stacks.ts";
import type { Blockwise, LinearLayer } from "../models/mod.ts";
import type { CalibrationStatistics } from "../time/mod.ts";
import { leastBits } from "../plan/rules.ts";
import { codesOf, isTokenTable, planQuantization, type PlanRow } from "../plan/plan.ts";
import { pause, type RunOptions } from "../progress.ts";
import { chooseMoment } from "../calibration/moment_structure.ts";
import { blockRuns, type RunsOptions, statisticsByRun } from "../calibration/collect.ts";
import { calibrationGroups } from "../calibration/saved_statistics.ts";
import { HeldOutMeter } from "../calibration/held_out.ts";
import type { MeasuredLayers } from "./measured_layers.ts";
import { denseWeights } from "./dense_weights.ts";

/** Group sizes that a budget chooses from; 0 is a whole row. */
const BUDGET_GROUP_SIZES: readonly GroupSize[] = [0, 128, 64, 32];
/** Bits at which a layer is quantized alone: coarse enough for a clear distance. */
const PROBE_BITS = 2;
/** Held-out batches that a layer alone is measured on. */
const PROBE_BATCHES = 2;

/** Options of {@linkcode planByBudget}. */
export interface BudgetOptions extends RunOptions, Pick<RunsOptions, "bytesAtOnce"> {
  /** Where measured layers are kept, with those of an earlier run. */
  readonly kept?: MeasuredLayers | undefined;
}

/**
 * Bits and group sizes of all layers within the budget that a configuration names.
 *
 * @throws {CalibrationError} when the budget is too small, or there is nothing held out to measure with
 */
export async function planByBudget(
  checkpoint: Checkpoint,
  calibrated: Solvable,
  config: ConfigInForce,
  kernels: Kernels,
  { onEvent, onProgress, signal, bytesAtOnce, kept }: BudgetOptions,
): Promise<BitPlan> {
  const { rows } = planQuantization(checkpoint, config);
  const wanted = rows.filter(isChosen);
  const { model, data } = calibrated, settings = solverSettings(config);
  checkHeldOut(calibrated);
  const weights = weightsOf(wanted);
  const layers = new Map(model.stages.flatMap(({ layers }) => layers.map((layer) => [layer.name, layer])));
  const budget = budgetBytes(rows, config, (name) => layers.has(name));
  // The solver that will be used, short of the refinements of `best`.
  const solver = config.solver === "best" ? "feedback" : config.solver;
  const measurable = wanted.filter(({ name }) => layers.has(name));
  const options = new Map<string, readonly LayerOption[]>(kept?.layers);
  const meter = calibrated.kind === "layers" || data.heldOut.length === 0
    ? undefined
    : new HeldOutMeter(calibrated, { batches: PROBE_BATCHES, signal });
  const names = new Set(measurable.map(({ name }) => name)), resumed = options.size;
  const parts = statisticsLeft(calibrated, options, {
    kernels,
    fingerprint: "",
    groups: calibrationGroups(data.axis, 1),
    second: "total",
    blockOf: (cols: number) => chooseMoment(settings, { cols, positions: data.distinctPositions }).block,
    run: { identity: "", source: data.source, isSynthetic: data.isSynthetic, samples: data.samples },
    names,
    signal,
    bytesAtOnce,
  });
  const partsOf = (name: string) =>
    partsWith(calibrated.statistics, layers.get(name)!).map((part) => part.name);
  calibrated.statistics?.checkLayers([...names].flatMap(partsOf));
  for await (const statistics of parts) {
    const known = new Set([...statistics.inputs.values()].flatMap((input) => input.layers));
    const isKnown = (name: string) => partsOf(name).some((part) => known.has(part));
    for (const row of measurable.filter(({ name }) => isKnown(name) && !options.has(name))) {
      const found = await layerOptions(
        { meter, config, kernels, solver, statistics, signal },
        row,
        layers.get(row.name)!,
      );
      options.set(row.name, found);
      kept?.add(row.name, found);
      onProgress?.({
        stage: "sensitivities",
        parts: "layers",
        tensor: `${row.name} (sensitivity)`,
        tensorsDone: options.size,
        tensors: measurable.length,
        weightsDone: options.size,
        weights: measurable.length,
        bytesDone: options.size,
        bytes: measurable.length,
        bytesResumed: resumed,
      });
      await pause(signal);
    }
  }
  const results = wanted.map((row): LayerOptions => {
    // No linear layer, nothing can be measured: as the configuration and the rules say.
    const { name } = row, grid = gridOf(row);
    return { name, options: options.get(name) ?? [{ ...grid, bytes: bytesOf(row, grid), cost: 0 }] };
  });
  const { plan, bytes, cost } = fitBudget(results, budget);
  const layersByBits = [...Map.groupBy(plan.values(), ({ bits }) => bits)].sort(([a], [b]) => a - b)
    .map(([bits, of]) => `${of.length} layers at ${bits} bits`).join(", ");
  onEvent?.({
    kind: "calibrate",
    message: `budget: ${(bytes * 8 / weights).toFixed(3)} bits per weight; ${
      meter === undefined
        ? "relative output errors of the layers add up to"
        : "expected held-out distance about"
    } ${cost.toPrecision(2)} with ${solver}; ${layersByBits}`,
  });
  return plan;
}

/**
 * Statistics of the layers that are not measured yet, a block or a few at a time: the moments of all layers
 * of a model of 7 B weights take 44 GB.
 */
function statisticsLeft(
  calibrated: Solvable,
  measured: ReadonlyMap<string, unknown>,
  options: RunsOptions,
): Iterable<CalibrationStatistics> | AsyncIterable<CalibrationStatistics> {
  const isLeft = (name: string) => options.names?.has(name) === true && !measured.has(name);
  if (![...options.names ?? []].some(isLeft)) return [];
  if (calibrated.kind === "layers" || calibrated.statistics !== undefined) return [calibrated.statistics!];
  const runs = blockRuns(calibrated.model as Blockwise<unknown>, options);
  const first = runs.findIndex(({ inputs }) =>
    [...inputs.values()].some(({ layers }) => layers.some(isLeft))
  );
  return statisticsByRun(calibrated, { ...options, start: { runs: first, parts: 0 } });
}

/** @throws {CalibrationError} when there is nothing to measure layers with */
function checkHeldOut({ data, statistics }: Solvable): void {
  if (data.heldOut.length > 0 || statistics !== undefined) return;
  throw new CalibrationError(
    "Cannot choose bits by a budget: 8 records or more are needed to hold some out, got fewer",
  );
}

/** Whether a budget chooses a row's bits; token tables have their own. */
export const isChosen = (row: PlanRow): boolean => row.action === "quantize" && !isTokenTable(row);

const weightsOf = (rows: readonly PlanRow[]) =>
  rows.reduce((sum, { shape }) => sum + elementCount(shape)!, 0);

/** A row's bits, groups and zero points without a budget. */
const gridOf = ({ bits, groupSize, zeroPoint }: PlanRow): LayerGrid => ({
  bits: bits!,
  groupSize: groupSize!,
  zeroPoint: zeroPoint!,
});

/** Bits that a budget may give a layer: those of `layer_bit_widths`, or all from a rule's least on. */
function bitsToChoose(name: string, config: Config): readonly BitWidth[] {
  const asked = layerBitWidth(config, name);
  if (asked !== undefined && asked !== 16) return [asked];
  return BIT_WIDTHS.filter((bits) => leastBits(name, bits) === undefined);
}

/** Bytes of a row's tensor with other bits and groups. */
const bytesOf = ({ shape }: PlanRow, { bits, groupSize, zeroPoint }: LayerGrid): number =>
  optionBytes([matrixSizes(shape).rows, matrixSizes(shape).cols], bits, groupSize, zeroPoint);

/**
 * Bytes that the quantized layers may take, at most those of the largest choices.
 *
 * @param isMeasured whether a layer's bits are chosen: it is a linear layer of the model; all where that is
 * not known yet
 * @throws {CalibrationError} when no choice fits
 */
export function budgetBytes(
  rows: readonly PlanRow[],
  config: Config,
  isMeasured: (name: string) => boolean = () => true,
): number {
  const weights = weightsOf(rows.filter(isChosen));
  const kept = rows.filter((row) => !isChosen(row)).reduce((sum, { bytesAfter }) => sum + bytesAfter, 0);
  const all = (gridOf: (row: PlanRow) => LayerGrid) =>
    rows.filter(isChosen).reduce((sum, row) => sum + bytesOf(row, gridOf(row)), 0);
  const { zeroPoint } = storedScales(config);
  const budget = Math.min(
    config.targetBitsPerWeight === null ? Infinity : config.targetBitsPerWeight * weights / 8,
    config.targetModelSizeMb === null ? Infinity : config.targetModelSizeMb * 1e6 - kept,
    all(() => ({ bits: 8, groupSize: 32, zeroPoint })),
  );
  const leastOf = (row: PlanRow): LayerGrid =>
    isMeasured(row.name)
      ? { bits: bitsToChoose(row.name, config)[0]!, groupSize: 0, zeroPoint: "symmetric" }
      : gridOf(row);
  const smallest = all(leastOf);
  if (smallest <= budget) return budget;
  const coarsest = Math.min(...BIT_WIDTHS);
  const held = rows.filter((row) => isChosen(row) && leastOf(row).bits > coarsest).length;
  throw new CalibrationError(
    `Cannot fit the layers into ${Math.floor(budget)} bytes: their smallest forms need ${smallest}, ${
      (smallest * 8 / weights).toFixed(3)
    } bits per weight${
      held === 0 ? "" : `; rules or layer_bit_widths hold ${held} of them above ${coarsest} bits`
    }`,
  );
}

/** Bytes and cost of every choice for a layer. */
async function layerOptions(
  { meter, config, kernels, solver, statistics, signal }: {
    /** Undefined where nothing is held out. */
    readonly meter: HeldOutMeter | undefined;
    readonly config: ConfigInForce;
    readonly kernels: Kernels;
    readonly solver: ConfigInForce["solver"];
    readonly statistics: CalibrationStatistics;
    readonly signal: AbortSignal | undefined;
  },
  row: PlanRow,
  layer: LinearLayer,
): Promise<LayerOption[]> {
  const { cols } = matrixSizes(row.shape), settings = solverSettings(config), { damping } = settings;
  const sizes = BUDGET_GROUP_SIZES.filter((size) => size < cols && GROUP_SIZES.includes(size));
  // Without stored zero points a row of few columns takes much less, and solvers make up for most of it.
  const { zeroPoint: kind } = storedScales(config);
  const kinds = kind === "symmetric" ? [kind] as const : [kind, "symmetric"] as const;
  const gridsOf = (bits: BitWidth) =>
    sizes.flatMap((groupSize) => kinds.map((zeroPoint) => ({ bits, groupSize, zeroPoint })));
  const chosen = bitsToChoose(row.name, config);
  // Also a layer that does not get so few bits is probed with them.
  const grids = [
    ...(chosen.includes(PROBE_BITS) ? [] : gridsOf(PROBE_BITS).slice(0, 1)),
    ...chosen.flatMap(gridsOf),
  ];
  const probed = grids.findIndex(({ bits }) => bits === PROBE_BITS), objectives = grids.map(() => 0);
  let distance = 0, power = 0;
  for (const part of partsWith(statistics, layer)) {
    const weights = denseWeights(kernels, part), { rows } = part.weights;
    const moment = factorMoments(kernels, statistics.moments(part.name), { damping });
    for (const [i, grid] of grids.entries()) {
      const problem = { weights, rows, cols, moment, ...grid, ...codesOf(grid, [rows, cols], config) };
      const { tensor, objective } = solveLayer(kernels, solver, problem, settings);
      objectives[i]! += objective;
      if (i === probed && meter !== undefined) {
        distance = await meter.distance(new Map([[row.name, tensor]]));
      }
      await pause(signal);
    }
    if (meter === undefined) power += outputPower(kernels, weights, rows, moment);
  }
  const objective = objectives[probed]!;
  if (meter === undefined) distance = objective / power;
  return grids.flatMap((grid, i): LayerOption[] => {
    const cost = objective > 0 ? distance * objectives[i]! / objective : 0;
    return chosen.includes(grid.bits) ? [{ ...grid, bytes: bytesOf(row, grid), cost }] : [];
  });
}
