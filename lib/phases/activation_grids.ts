/**
 * Static quantization parameters of activations: time groups by the inputs of layers at each time, parameters
 * for each layer and group, and the layers that gain most from per-token dynamic quantization.
 */
import { IntegerProducts } from "../models/layers/integer_products.ts";
import { linear } from "../models/layers/linear.ts";
import type { LinearLayer, LoadedModel } from "../models/mod.ts";
import {
  type ActivationBits,
  type ActivationGrid,
  type ActivationHistogram,
  type ActivationParameters,
  adaptiveTimeGroups,
  type RangeMethod,
  type TimeAxis,
  type TimeGroups,
} from "../time/mod.ts";
import { Workspace } from "../models/layers/workspace.ts";
import { mapShared, observeParts } from "./activations.ts";
import { type PhaseContext, transitionsOf } from "./context.ts";

/** Rows of an input on which errors are measured in each time group: more hardly change the order. */
const SAMPLED_ROWS = 512;

/** Default range methods: 255 steps need no cut, 15 do. */
const DEFAULT_RANGE: Readonly<Record<ActivationBits, RangeMethod>> = { 8: "minmax", 4: "mse" };

/** Layers that read the same input, and so share its quantization parameters. */
interface Reader {
  readonly name: string;
  readonly layers: readonly LinearLayer[];
}

function readersOf(loaded: LoadedModel, wanted: ReadonlySet<string>): Reader[] {
  const seen = new Set<string>(), readers: Reader[] = [];
  for (const stage of loaded.model.stages) {
    const layers = stage.layers.filter(({ name }) => wanted.has(name) && !seen.has(name));
    if (layers.length === 0) continue;
    for (const { name } of layers) seen.add(name);
    readers.push({ name: layers[0]!.name, layers });
  }
  return readers;
}

/**
 * Time groups whose boundaries lie where the wanted layers' inputs change: the logarithms of their largest
 * magnitude and root mean square at each observed time; undefined where there are more groups than times
 * observed.
 *
 * @throws {RangeError} as `adaptiveTimeGroups`
 */
export function groupsByInputs(
  context: PhaseContext,
  loaded: LoadedModel,
  wanted: ReadonlySet<string>,
  axis: TimeAxis,
  count: number,
): TimeGroups | undefined {
  const readers = readersOf(loaded, wanted);
  const indexOf = new Map(readers.map(({ name }, i) => [name, i]));
  interface Seen {
    readonly largest: Float64Array;
    readonly squares: Float64Array;
    readonly values: Float64Array;
    samples: number;
  }
  const bins = new Map<number, Seen>();
  observeParts(context, loaded, "fit", (times, { name, weights: { cols } }, x, rows) => {
    const index = indexOf.get(name);
    if (index === undefined) return;
    const each = rows / times.length * cols;
    for (const [item, time] of times.entries()) {
      const bin = axis.binOf(time);
      const own = bins.get(bin) ?? {
        largest: new Float64Array(readers.length),
        squares: new Float64Array(readers.length),
        values: new Float64Array(readers.length),
        samples: 0,
      };
      bins.set(bin, own);
      if (index === 0) own.samples++;
      own.values[index]! += each;
      for (let i = item * each; i < (item + 1) * each; i++) {
        const magnitude = Math.abs(x[i]!);
        if (magnitude > own.largest[index]!) own.largest[index] = magnitude;
        own.squares[index]! += magnitude * magnitude;
      }
    }
  });
  const observed = [...bins].sort(([a], [b]) => a - b);
  if (observed.length < count) return undefined;
  // An input of zeros has no logarithm; so small a magnitude is as good as none.
  const log = (value: number) => Math.log(Math.max(value, 1e-30));
  return adaptiveTimeGroups(axis, count, {
    bins: observed.map(([bin]) => bin),
    values: observed.flatMap(([, { largest, squares, values }]) => [
      ...Array.from(largest, log),
      ...Array.from(squares, (sum, i) => log(sum / values[i]!) / 2),
    ]),
    weights: observed.map(([, { samples }]) => Math.max(1, samples)),
  });
}

/** Static quantization parameters by layer, from histograms of its inputs in every time group. */
export function staticGrids(
  histograms: ReadonlyMap<string, readonly ActivationHistogram[]>,
  bits: ActivationBits,
  range: RangeMethod = DEFAULT_RANGE[bits],
): Map<string, ActivationParameters> {
  return mapShared(histograms, (own) => {
    const grids = own.map((histogram) => histogram.grid(range, bits));
    return {
      bits,
      scale: Float32Array.from(grids, ({ scale }) => scale),
      zeroPoint: Int32Array.from(grids, ({ zeroPoint }) => zeroPoint),
    };
  });
}

/** Visits evenly picked held-out rows of every reader, {@linkcode SAMPLED_ROWS} a group; `x` is scratch. */
function sampleInputs(
  context: PhaseContext,
  loaded: LoadedModel,
  groups: TimeGroups,
  readers: readonly Reader[],
  workspace: Workspace,
  visit: (reader: Reader, x: Float32Array<ArrayBuffer>, rows: number, time: number) => void,
): void {
  const byName = new Map(readers.map((reader) => [reader.name, reader]));
  const items = new Float64Array(groups.count), seen = new Map<string, Float64Array>();
  for (const { times } of context.calibrated.data.heldOut) {
    for (const time of times) items[groups.groupOf(time)]!++;
  }
  observeParts(context, loaded, "heldOut", (times, { name, weights: { cols } }, x, rows) => {
    const reader = byName.get(name);
    if (reader === undefined) return;
    const each = rows / times.length, own = seen.get(name) ?? new Float64Array(groups.count);
    seen.set(name, own);
    for (const [item, time] of times.entries()) {
      const group = groups.groupOf(time);
      const stride = Math.max(1, items[group]! * each / SAMPLED_ROWS);
      const picked: number[] = [];
      for (let row = 0; row < each; row++) {
        const at = own[group]!++;
        if (Math.floor(at / stride) !== Math.floor((at - 1) / stride)) picked.push(item * each + row);
      }
      if (picked.length === 0) continue;
      const part = workspace.take("picked", picked.length * cols);
      for (const [to, from] of picked.entries()) {
        part.set(x.subarray(from * cols, (from + 1) * cols), to * cols);
      }
      visit(reader, part, picked.length, time);
    }
  });
}

/**
 * Layers in the order of what static quantization costs them on held-out data, the costliest first: the ratio
 * of output errors `(static + weights) / (per token + weights)`, squared and weighted by the step, where
 * static and per token are the errors from quantized inputs and weights that from quantized weights. Layers
 * that read the same input stand together.
 *
 * @throws {WeightsError} when an input is not finite
 */
export function orderByStaticCost(
  context: PhaseContext,
  loaded: LoadedModel,
  grids: ReadonlyMap<string, ActivationParameters>,
  groups: TimeGroups,
): (readonly string[])[] {
  const { calibrated, kernels } = context;
  const plain = new Map(
    calibrated.model.stages.flatMap(({ layers }) => layers.map(({ name, weights }) => [name, weights])),
  );
  const transitions = transitionsOf(context);
  const readers = readersOf(loaded, new Set(grids.keys()));
  const sums = new Map(readers.map(({ name }) => [name, { weights: 0, static: 0, perToken: 0 }]));
  // Scratch is shared: hundreds of inputs would else wait for the garbage collector.
  const workspace = new Workspace(), products = new IntegerProducts(kernels, loaded.model.path);
  sampleInputs(context, loaded, groups, readers, workspace, ({ name, layers }, x, rows, time) => {
    const own = sums.get(name)!, weight = transitions.weightOf(time), group = groups.groupOf(time);
    const { bits, scale, zeroPoint } = grids.get(name)!;
    const grid = { scale: scale[group]!, zeroPoint: zeroPoint[group]! };
    const lost = (rounded: Float32Array<ArrayBuffer>) => {
      for (let i = 0; i < rounded.length; i++) rounded[i]! -= x[i]!;
      return rounded;
    };
    const rounded = (scratch: string, grid?: ActivationGrid) =>
      products.round(name, x, rows, { bits, grid }, workspace.take(scratch, x.length));
    const onStatic = lost(rounded("static", grid)), onOwn = lost(rounded("perToken"));
    for (const { name: layer, weights } of layers) {
      const times = (values: Float32Array, by: typeof weights, output = "output") => {
        const out = workspace.take(output, rows * by.rows);
        return linear(kernels, { weights: by }, values, rows, out);
      };
      const squares = (values: Float32Array) => values.reduce((sum, value) => sum + value * value, 0);
      own.static += weight * squares(times(onStatic, weights));
      own.perToken += weight * squares(times(onOwn, weights));
      const wanted = times(x, plain.get(layer)!, "wanted"), difference = times(x, weights);
      for (let i = 0; i < difference.length; i++) difference[i]! -= wanted[i]!;
      own.weights += weight * squares(difference);
    }
  });
  const cost = ({ name }: Reader) => {
    const own = sums.get(name)!, below = own.perToken + own.weights;
    return below > 0 ? (own.static + own.weights) / below : own.static > 0 ? Infinity : 1;
  };
  return readers.map((reader) => ({ reader, cost: cost(reader) }))
    .sort((a, b) => b.cost - a.cost)
    .map(({ reader }) => reader.layers.map(({ name }) => name));
}

/**
 * The fewest of the first entries that have to change for a cost to fall to a limit: 1, 2, 4 … are tried,
 * then bisection between the last two. Exact where the cost falls with every entry.
 *
 * @param costOf cost with the first so many entries changed
 * @returns at most `count`, whose cost is taken to be within the limit
 */
export function fewestWithin(count: number, limit: number, costOf: (changed: number) => number): number {
  if (costOf(0) <= limit) return 0;
  let above = 0, within = 1;
  while (within < count && costOf(within) > limit) [above, within] = [within, 2 * within];
  within = Math.min(within, count);
  while (within - above > 1) {
    const middle = (above + within) >> 1;
    if (costOf(middle) <= limit) within = middle;
    else above = middle;
  }
  return within;
}
