/**
 * Statistics that another program gathered, with the layers of a checkpoint that they are of: what is solved
 * without running the model.
 */
import { CalibrationError } from "../../errors.ts";
import { quote } from "../../files/whole.ts";
import { moduleFinder } from "../../lora/places.ts";
import { checkpointLayers, type HeldWeights, type ModelLayers } from "../../models/mod.ts";
import type { Kernels } from "../../native/mod.ts";
import { widen } from "../../models/layers/tensors.ts";
import type { DenseMatrix } from "../../models/layers/linear.ts";
import { type Checkpoint, namesOfGguf } from "../../tensor/mod.ts";
import { isSameWeights } from "../../time/calibration/model.ts";
import { type CalibrationStatistics, type LayerPlace, MODEL_SAMPLES } from "../../time/mod.ts";
import type { CalibrationSet } from "../draw.ts";
import { expertFinder, expertLayer, matrixShape, stackOf } from "./expert_stacks.ts";
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
function statisticsFor(statistics: CalibrationStatistics, use: StatisticsUse): CalibrationStatistics {
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

/** Layers in a checkpoint: by their names, behind other prefixes, or in an image model's other layout. */
function namesIn(checkpoint: Checkpoint, layers: readonly string[]): Map<string, LayerPlace> {
  const placesOf = moduleFinder(checkpoint), expertsOf = expertFinder(checkpoint);
  return new Map(layers.flatMap((layer): [string, LayerPlace][] => {
    const experts = [layer, ...namesOfGguf(layer)].map(expertsOf).find((found) => found !== undefined);
    if (experts !== undefined) return [[layer, experts]];
    const places = [layer, ...namesOfGguf(layer)].map((name) => placesOf(name.replace(/\.weight$/, "")))
      .find(({ length }) => length > 0) ?? [];
    const names = [...new Set(places.map(({ tensor }) => tensor))];
    const shapes = names.map((name) => checkpoint.tensors.get(name)!.info.shape);
    if (names.length === 0 || shapes.some(({ length }) => length !== 2)) return [];
    return [[layer, { names, isWhole: places.length === 1 && places[0]!.rows === shapes[0]![0] }]];
  }));
}

/** @throws {CalibrationError} when a layer has another shape in the checkpoint, or lacks statistics */
function checkShapes(
  statistics: CalibrationStatistics,
  names: ReadonlyMap<string, LayerPlace>,
  { checkpoint, path }: StatisticsUse,
): void {
  const fault = faultIn(path), { model } = statistics;
  for (const [layer, { names: [name], isWhole }] of names) {
    const { cols } = statistics.inputOf(layer), wanted = matrixShape(checkpoint, name!);
    const known = model?.layers.get(layer);
    const got = known !== undefined && isWhole ? known : [wanted[0]!, known?.[1] ?? cols] as const;
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
  const missing = [...model?.layers.keys() ?? []].filter((layer) => !names.has(layer));
  const [lacking] = namesIn(checkpoint, missing).keys();
  if (lacking === undefined) return;
  throw fault(
    `it must have statistics of every layer that it lists, got none of ${quote(lacking)}: collect them, or ` +
      "give the file that has them too",
    lacking,
  );
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
  // Experts of one tensor are one layer.
  const seen = new Set<string>();
  const groups = [...own.inputs.values()]
    .map(({ layers }) =>
      layers.map((layer) => stackOf(use.checkpoint, layer)).filter((name) =>
        !seen.has(name) && seen.add(name)
      )
    )
    .filter(({ length }) => length > 0);
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
  const parts = stages.flatMap(({ layers }) => layers).flatMap((layer) =>
    Array.from({ length: layer.experts ?? 1 }, (_, expert) => expertLayer(layer, expert))
  );
  for (const { name, weights } of parts) {
    const wanted = model?.samples?.get(name);
    if (wanted === undefined) continue;
    if (isSameWeights(sampledWeights(weights as DenseMatrix), wanted)) continue;
    throw faultIn(use.path)(
      `it must be of the model that is quantized, got statistics of one with other weights in ${quote(name)}`,
      name,
    );
  }
}

/** {@linkcode MODEL_SAMPLES} weights of a matrix, evenly spread from the first to the last. */
function sampledWeights(matrix: DenseMatrix): Float32Array {
  const { rows, cols } = matrix, one = new Float32Array(1);
  const read = matrix.floats ?? ((start: number, out: typeof one) => widen(matrix, start, out));
  return Float32Array.from({ length: MODEL_SAMPLES }, (_, i) => {
    read(Math.floor(i * (rows * cols - 1) / (MODEL_SAMPLES - 1)), one);
    return one[0]!;
  });
}
