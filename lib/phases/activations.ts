/** Inputs of layers by time group: their histograms, and phase 2's guard, which accepts smoothed ranges. */
import { CalibrationError } from "../errors.ts";
import { IntegerProducts } from "../models/layers/integer_products.ts";
import { linear } from "../models/layers/linear.ts";
import type { LoadedModel } from "../models/mod.ts";
import { type GuardReport, keepWhereErrorDoesNotRise } from "../thermo/mod.ts";
import { ActivationHistogram, type ActivationParameters, type TimeGroups } from "../time/mod.ts";
import type { Calibrated } from "../calibration/mod.ts";
import type { PhaseContext } from "./context.ts";
import type { TimedObserver } from "../calibration/step_kl.ts";

/** Runs a model over calibration data; the observer also gets the time of each item of the batch. */
export function observeParts(
  { calibrated }: PhaseContext,
  loaded: LoadedModel,
  part: "fit" | "heldOut",
  observer: TimedObserver,
): void {
  if (calibrated.kind === "sequences") {
    if (loaded.kind === "dit") {
      throw new TypeError("Cannot calibrate an image model with sequences of tokens");
    }
    for (const { batch: { inputIds, batch }, times } of calibrated.data[part]) {
      loaded.model.forward(inputIds, batch, { observe: (...input) => observer(times, ...input) });
    }
  } else {
    if (loaded.kind !== "dit") throw new TypeError("Cannot calibrate a language model with images");
    for (const { batch: { samples, timesteps, labels }, times } of calibrated.data[part]) {
      loaded.model.forward(samples, timesteps, labels, { observe: (...input) => observer(times, ...input) });
    }
  }
}

/**
 * Maps values that layers share: each distinct value once, and its result is shared as the value was.
 *
 * @param make from a value, and a layer's name
 */
export function mapShared<Value, Result>(
  values: ReadonlyMap<string, Value>,
  make: (value: Value, name: string) => Result,
): Map<string, Result> {
  const made = new Map<Value, Result>();
  return new Map([...values].map(([name, value]) => {
    if (!made.has(value)) made.set(value, make(value, name));
    return [name, made.get(value)!];
  }));
}

/** Histograms of the wanted layers' inputs in every time group; layers with the same input share them. */
export function observeActivations(
  context: PhaseContext,
  loaded: LoadedModel,
  wanted: ReadonlySet<string>,
  groups: TimeGroups,
  warnings: string[],
): { readonly histograms: Map<string, readonly ActivationHistogram[]>; readonly bytes: number } {
  const histograms = new Map<string, ActivationHistogram[]>();
  const leaders = new Set<string>();
  for (const { layers } of loaded.model.stages) {
    const own = layers.filter(({ name }) => wanted.has(name) && !histograms.has(name));
    if (own.length === 0) continue;
    leaders.add(own[0]!.name);
    const shared = Array.from({ length: groups.count }, () => new ActivationHistogram());
    for (const { name } of own) histograms.set(name, shared);
  }
  observeParts(context, loaded, "fit", (times, { name, weights: { cols } }, x, rows) => {
    if (!leaders.has(name)) return;
    const own = histograms.get(name)!, each = rows / times.length * cols;
    for (const [item, time] of times.entries()) {
      own[groups.groupOf(time)]!.add(x.subarray(item * each, (item + 1) * each));
    }
  });
  const empty = new Set<number>();
  const filled = mapShared(histograms, (own, name) =>
    own.map((histogram, g) => {
      if (histogram.count > 0) return histogram;
      empty.add(g);
      const nearest = own.map((other, i) => ({ other, distance: Math.abs(i - g) }))
        .filter(({ other }) => other.count > 0)
        .sort((a, b) => a.distance - b.distance)[0];
      if (nearest === undefined) {
        throw new CalibrationError(
          `Cannot calibrate ${JSON.stringify(name)}: it must read something, got nothing`,
          {
            tensor: name,
          },
        );
      }
      return nearest.other;
    }));
  if (empty.size > 0) {
    warnings.push(
      `no calibration sample is in ${empty.size} of ${groups.count} time groups: they take their neighbours' ranges`,
    );
  }
  const bytes = [...leaders].reduce(
    (sum, name) => sum + histograms.get(name)!.reduce((all, histogram) => all + histogram.bytes, 0),
    0,
  );
  return { histograms: filled, bytes };
}

/** Calibration data with some of the held-out samples alone. @param isWanted by time */
export function heldOutWhere(calibrated: Calibrated, isWanted: (time: number) => boolean): Calibrated {
  const wanted = ({ times }: { readonly times: Float64Array }) =>
    [...times.keys()].filter((i) => isWanted(times[i]!));
  const pick = <Values extends Float32Array | Int32Array>(
    values: Values,
    samples: number,
    items: number[],
  ) => {
    const each = values.length / samples;
    const out = values.slice(0, items.length * each);
    for (const [to, from] of items.entries()) {
      out.set(values.subarray(from * each, (from + 1) * each), to * each);
    }
    return out as Values;
  };
  if (calibrated.kind === "sequences") {
    const heldOut = calibrated.data.heldOut.flatMap((part) => {
      const items = wanted(part);
      if (items.length === 0) return [];
      return [{
        batch: { inputIds: pick(part.batch.inputIds, part.samples, items), batch: items.length },
        samples: items.length,
        weights: pick(part.weights, part.samples, items),
        times: Float64Array.from(items, (i) => part.times[i]!),
      }];
    });
    return { ...calibrated, data: { ...calibrated.data, heldOut } };
  }
  const heldOut = calibrated.data.heldOut.flatMap((part) => {
    const items = wanted(part);
    if (items.length === 0) return [];
    return [{
      batch: {
        samples: pick(part.batch.samples, part.samples, items),
        timesteps: items.map((i) => part.batch.timesteps[i]!),
        labels: items.map((i) => part.batch.labels[i]!),
      },
      samples: items.length,
      weights: pick(part.weights, part.samples, items),
      times: Float64Array.from(items, (i) => part.times[i]!),
    }];
  });
  return { ...calibrated, data: { ...calibrated.data, heldOut } };
}

/** About so many held-out samples, spread evenly over their times; all or none of the samples at a time. */
export function fewHeldOut(calibrated: Calibrated, most: number): Calibrated {
  const parts: readonly { readonly times: Float64Array }[] = calibrated.data.heldOut;
  const times = parts.flatMap((part) => [...part.times]);
  if (times.length <= most) return calibrated;
  const byTime = [...times.keys()].sort((a, b) => times[a]! - times[b]! || a - b);
  const chosen = new Set(
    Array.from({ length: most }, (_, i) => times[byTime[Math.floor((i + 0.5) * times.length / most)]!]),
  );
  return heldOutWhere(calibrated, (time) => chosen.has(time));
}

/** The guard measures one in so many rows: neighbours in a sequence or an image are alike. */
const GUARD_STRIDE = 2;

/**
 * Decides layer by layer by ‖Ŵ (Q(x) − x)‖² over inputs at the times where the two quantizations differ.
 *
 * @returns an observer of the model's run over held-out samples, and the decision it leads to
 */
export function layerGuard(
  { kernels, checkpoint }: PhaseContext,
  groups: TimeGroups,
  before: ReadonlyMap<string, ActivationParameters>,
  after: ReadonlyMap<string, ActivationParameters>,
): { readonly observe: TimedObserver; report(): GuardReport } {
  const errors = new Map([...before.keys()].map((name) => [name, { before: 0, after: 0 }]));
  const products = new IntegerProducts(kernels, checkpoint.path);
  let lost = new Float32Array(0), outputs = new Float32Array(0), input = new Float32Array(0);
  // Errors of the previous layer's input, which layers that read the same input share.
  let last: { readonly times: Float64Array; readonly old: ActivationParameters } | undefined, rowsLost = 0;
  return {
    observe(times, { name, weights }, x, rows) {
      const sums = errors.get(name);
      if (sums === undefined) return;
      const old = before.get(name)!, { cols } = weights;
      if (last?.times !== times || last.old !== old) {
        const taken = lose(name, times, x, rows / times.length, cols, old, after.get(name)!);
        [last, rowsLost] = [{ times, old }, taken];
      }
      if (rowsLost === 0) return;
      const size = 2 * rowsLost * weights.rows, middle = size / 2;
      if (outputs.length < size) outputs = new Float32Array(size);
      const out = outputs.subarray(0, size), input = lost.subarray(0, 2 * rowsLost * cols);
      linear(kernels, { weights }, input, 2 * rowsLost, out);
      for (let k = 0; k < middle; k++) sums.before += out[k]! * out[k]!;
      for (let k = middle; k < size; k++) sums.after += out[k]! * out[k]!;
    },
    report: () => keepWhereErrorDoesNotRise(before.keys(), (name) => errors.get(name)!),
  };

  /**
   * `Q(x) − x` of some rows of all items whose parameters differ: with the old ones, then with the smooth
   * ones.
   *
   * @returns how many rows of each
   */
  function lose(
    name: string,
    times: Float64Array,
    x: Float32Array,
    each: number,
    cols: number,
    old: ActivationParameters,
    smooth: ActivationParameters,
  ): number {
    const differing = Array.from(times, (time, item) => {
      const bin = groups.axis.binOf(time);
      return { item, bin, group: groups.groupOfBin(bin) };
    }).filter(({ bin, group }) =>
      old.scale[group] !== smooth.scale[bin] || old.zeroPoint[group] !== smooth.zeroPoint[bin]
    );
    const taken = Math.ceil(each / GUARD_STRIDE), half = differing.length * taken;
    if (lost.length < 2 * half * cols) lost = new Float32Array(2 * half * cols);
    for (const [i, { item, bin, group }] of differing.entries()) {
      if (input.length !== taken * cols) input = new Float32Array(taken * cols);
      for (let row = 0; row < taken; row++) {
        const begin = (item * each + row * GUARD_STRIDE) * cols;
        input.set(x.subarray(begin, begin + cols), row * cols);
      }
      for (
        const [{ scale, zeroPoint, bits }, index, place] of [[old, group, 0], [smooth, bin, half]] as const
      ) {
        const to = (place + i * taken) * cols, own = lost.subarray(to, to + input.length);
        const grid = { scale: scale[index]!, zeroPoint: zeroPoint[index]! };
        products.round(name, input, taken, { bits, grid }, own);
        for (let k = 0; k < own.length; k++) own[k]! -= input[k]!;
      }
    }
    return half;
  }
}
