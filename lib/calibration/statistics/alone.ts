/**
 * Statistics that another program gathered, with the layers of a checkpoint that they are of: what is solved
 * without running the model.
 */
import { CalibrationError } from "../../errors.ts";
import { quote } from "../../files/whole.ts";
import { checkpointLayers, type HeldWeights, type ModelLayers } from "../../models/mod.ts";
import type { Kernels } from "../../native/mod.ts";
import { widen } from "../../models/layers/tensors.ts";
import type { DenseMatrix } from "../../models/layers/linear.ts";
import { type Checkpoint, namesOfGguf } from "../../tensor/mod.ts";
import { type CalibrationStatistics, MODEL_SAMPLES } from "../../time/mod.ts";
import type { CalibrationSet } from "../draw.ts";
import { type Calibrated, knownSchedule } from "../mod.ts";

/** Layers of a checkpoint with statistics of what they read; the model is not run. */
export interface CalibratedLayers {
  readonly kind: "layers";
  readonly model: ModelLayers;
  readonly statistics: CalibrationStatistics;
  /** Without samples: what reports say of the data. */
  readonly data: CalibrationSet<never>;
}

/** What layers can be solved on: a model that runs, or statistics alone. */
export type Solvable = Calibrated | CalibratedLayers;

/** @throws {CalibrationError} when there are only statistics, for work that runs the model */
export function thatRuns(solvable: Solvable, doing: string): Calibrated {
  if (solvable.kind !== "layers") return solvable;
  throw new CalibrationError(
    `Cannot ${doing}: there must be calibration data and a model that runs here, got statistics alone`,
  );
}

/** Prefixes that programs put before, or leave out of, the names of a model's tensors. */
const PREFIXES = ["model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "model.", "module."];

/** Largest difference of weights of one model in other number formats, as part of their size. */
const SAME_WEIGHTS = 0.1;

/** What a file is to be solved for. */
export interface StatisticsUse {
  readonly checkpoint: Checkpoint;
  /** As they were named by the user, for messages. */
  readonly path: string;
}

/**
 * Statistics by the names that a checkpoint has for the layers; those of which nothing was seen are left out.
 *
 * @throws {CalibrationError} when they are of another model: no name, another shape or other weights
 */
export function statisticsFor(statistics: CalibrationStatistics, use: StatisticsUse): CalibrationStatistics {
  const { checkpoint, path } = use, fault = faultIn(path);
  const names = namesIn(checkpoint, [...statistics.inputs.values()].flatMap(({ layers }) => layers));
  if (names.size === 0) {
    const [first] = [...statistics.inputs.values()].flatMap(({ layers }) => layers);
    throw fault(
      `it must have layers of ${quote(checkpoint.path)}, got statistics of ${
        quote(statistics.model?.name ?? "another model")
      }, whose first layer is ${quote(first ?? "")}`,
      first,
    );
  }
  checkShapes(statistics, names, use);
  return statistics.renamed((layer) => names.get(layer));
}

const faultIn = (path: string) => (reason: string, tensor?: string) =>
  new CalibrationError(
    `Cannot use ${quote(path)}: ${reason}`,
    tensor === undefined ? { path } : { path, tensor },
  );

/** Names of layers in a checkpoint: the same, or the same behind other prefixes. */
function namesIn({ tensors }: Checkpoint, layers: readonly string[]): Map<string, string> {
  const bare = (name: string): string => {
    const prefix = PREFIXES.find((each) => name.startsWith(each));
    return prefix === undefined ? name : bare(name.slice(prefix.length));
  };
  const byBare = new Map<string, string | undefined>();
  for (const [name, { info }] of tensors) {
    if (info.shape.length !== 2) continue;
    byBare.set(bare(name), byBare.has(bare(name)) ? undefined : name); // of two that differ no more none is meant
  }
  return new Map(layers.flatMap((layer): [string, string][] => {
    const names = [layer, ...namesOfGguf(layer)];
    const own = names.find((name) => tensors.get(name)?.info.shape.length === 2) ??
      names.map((name) => byBare.get(bare(name))).find((name) => name !== undefined);
    return own === undefined ? [] : [[layer, own]];
  }));
}

/** @throws {CalibrationError} when a layer has another shape in the checkpoint, or no statistics where it must */
function checkShapes(
  statistics: CalibrationStatistics,
  names: ReadonlyMap<string, string>,
  { checkpoint, path }: StatisticsUse,
): void {
  const fault = faultIn(path), { model } = statistics;
  for (const [layer, name] of names) {
    const { cols } = statistics.inputOf(layer), wanted = checkpoint.tensors.get(name)!.info.shape;
    const got = model?.layers.get(layer) ?? [wanted[0]!, cols];
    if (got[1] !== cols) {
      throw fault(`${quote(layer)} must have the same columns everywhere, got ${got[1]} and ${cols}`, layer);
    }
    if (got.join() === wanted.join()) continue;
    throw fault(
      `${quote(layer)} must be of a layer of [${wanted.join(", ")}] as in ${quote(checkpoint.path)}, got [${
        got.join(", ")
      }]: they are of another model`,
      layer,
    );
  }
  for (const layer of model?.layers.keys() ?? []) {
    if (names.has(layer) || namesIn(checkpoint, [layer]).size === 0) continue;
    throw fault(
      `it must have statistics of every layer that it lists, got none of ${quote(layer)}: collect them, or ` +
        "give the file that has them too",
      layer,
    );
  }
}

/**
 * The layers of a checkpoint of which there are statistics.
 *
 * @throws {CalibrationError} as {@linkcode statisticsFor}, and when a layer's weights are others
 */
export function layersWith(
  statistics: CalibrationStatistics,
  kernels: Kernels,
  use: StatisticsUse & { readonly held?: HeldWeights | undefined },
): CalibratedLayers {
  const own = statisticsFor(statistics, use), { source, isSynthetic, samples, groups: { axis } } = own;
  const groups = [...own.inputs.values()].map(({ layers }) => layers);
  const model = checkpointLayers(use.checkpoint, kernels, groups, use.held);
  checkWeights(own, model, use);
  const distinctPositions = Infinity, scheduler = knownSchedule(use.checkpoint.folder);
  const data = {
    source,
    isSynthetic,
    samples,
    warnings: [],
    distinctPositions,
    axis,
    scheduler,
    fit: [],
    heldOut: [],
  };
  return { kind: "layers", model, statistics: own, data };
}

/** @throws {CalibrationError} when a layer's weights are not those that statistics were gathered with */
function checkWeights({ model }: CalibrationStatistics, { stages }: ModelLayers, use: StatisticsUse): void {
  for (const { name, weights } of stages.flatMap(({ layers }) => layers)) {
    const wanted = model?.samples?.get(name);
    if (wanted === undefined) continue;
    const got = sampledWeights(weights as DenseMatrix);
    let difference = 0, size = 0;
    for (const [i, value] of wanted.entries()) {
      difference += (got[i]! - value) ** 2;
      size += value ** 2;
    }
    if (difference <= SAME_WEIGHTS ** 2 * size) continue;
    throw faultIn(use.path)(
      `it must be of the model that is quantized, got statistics of one with other weights in ${quote(name)}`,
      name,
    );
  }
}

/** {@linkcode MODEL_SAMPLES} weights of a matrix, evenly spread from the first to the last. */
function sampledWeights(matrix: DenseMatrix): Float32Array {
  const { rows, cols } = matrix, dense = { ...matrix }, one = new Float32Array(1); // read once
  return Float32Array.from({ length: MODEL_SAMPLES }, (_, i) => {
    widen(dense, Math.floor(i * (rows * cols - 1) / (MODEL_SAMPLES - 1)), one);
    return one[0]!;
  });
}
