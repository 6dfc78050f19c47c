/** Static grids of activations by time group: what layers read, and whether smooth grids (phase 2) are kept. */
import { CalibrationError } from "../errors.ts";
import { linear } from "../models/kernels.ts";
import type { LayerObserver, LoadedModel } from "../models/mod.ts";
import { type GuardReport, keepWhereErrorDoesNotRise } from "../thermo/mod.ts";
import {
  ActivationHistogram,
  type ActivationParameters,
  fakeQuantize,
  type TimeGroups,
} from "../time/mod.ts";
import type { Calibrated } from "./calibration_data.ts";
import type { PhaseContext } from "./phase_context.ts";

/** Runs a model over calibration data; the observer also gets the time of each item of the batch. */
function observeParts(
  { calibrated }: PhaseContext,
  loaded: LoadedModel,
  part: "fit" | "heldOut",
  observer: (times: Float64Array, ...input: Parameters<LayerObserver>) => void,
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

/** What the inputs of the wanted layers are in every time group; layers that read the same share them. */
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
  const filled = new Map([...histograms].map(([name, own]) => [
    name,
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
    }),
  ]));
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

/** The held-out samples at some times alone. */
export function heldOutAt(calibrated: Calibrated, isWanted: (time: number) => boolean): Calibrated {
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

/** Decides layer by layer by ‖Ŵ (Q(x) − x)‖² over held-out inputs at the times where the grids differ. */
export function guardLayers(
  context: PhaseContext,
  loaded: LoadedModel,
  groups: TimeGroups,
  before: ReadonlyMap<string, ActivationParameters>,
  after: ReadonlyMap<string, ActivationParameters>,
): GuardReport {
  const { kernels, threads } = context;
  const errors = new Map([...before.keys()].map((name) => [name, { before: 0, after: 0 }]));
  observeParts(context, loaded, "heldOut", (times, { name, weights }, x, rows) => {
    const sums = errors.get(name);
    if (sums === undefined) return;
    const old = before.get(name)!, smooth = after.get(name)!;
    const each = rows / times.length, { cols } = weights;
    for (const [item, time] of times.entries()) {
      const bin = groups.axis.binOf(time), group = groups.groupOfBin(bin);
      if (old.scale[group] === smooth.scale[bin] && old.zeroPoint[group] === smooth.zeroPoint[bin]) continue;
      const input = x.subarray(item * each * cols, (item + 1) * each * cols);
      const errorOf = ({ scale, zeroPoint, bits }: ActivationParameters, index: number) => {
        const lost = fakeQuantize(
          input,
          { scale: scale[index]!, zeroPoint: zeroPoint[index]! },
          bits,
          new Float32Array(input.length),
        );
        for (let i = 0; i < lost.length; i++) lost[i]! -= input[i]!;
        return linear(kernels, lost, each, weights, undefined, { threads }).reduce(
          (sum, v) => sum + v * v,
          0,
        );
      };
      sums.before += errorOf(old, group);
      sums.after += errorOf(smooth, bin);
    }
  });
  return keepWhereErrorDoesNotRise(before.keys(), (name) => errors.get(name)!);
}
