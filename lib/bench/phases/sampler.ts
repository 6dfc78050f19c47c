/** The sampler's correction: drawings from the same noise, and the noise error at every step. */
import { type DitModel, imageSteps, type SamplerName, type Scheduler } from "../../models/mod.ts";
import { drawImages, type NoisyImages, predictionsAt } from "../../eval/images.ts";
import { bootstrapRatio, type Interval } from "../../eval/intervals.ts";
import { squaredDistances } from "../../eval/statistics.ts";
import { correctPredictions } from "../../thermo/mod.ts";
import type { Section } from "../suite.ts";

const IMAGES = 32, STEPS = 20;
const QUICK_IMAGES = 4, QUICK_STEPS = 4;
const SAMPLERS: readonly SamplerName[] = ["ddim", "ddpm"];

/** A full-precision model, and a quantized one with its sampler's correction and without. */
type CorrectedModels = Readonly<Record<"full" | "plain" | "corrected", DitModel>>;

interface Run extends CorrectedModels {
  readonly scheduler: Scheduler;
  readonly images: number;
  readonly steps: number;
  readonly seed: number;
}

/** A measurement with the correction and without. */
interface Pair {
  /** Sampler, or timestep. */
  readonly at: string | number;
  readonly without: Interval;
  readonly with: Interval;
}

export type SamplerRow = Pick<Pair, "at"> & {
  readonly suite: "phases";
  readonly model: string;
  readonly what: string;
  readonly without: number;
  readonly with: number;
};

export function samplerSections(
  name: string,
  models: CorrectedModels,
  scheduler: Scheduler,
  { seed, quick }: { readonly seed: number; readonly quick: boolean },
): { readonly sections: Section[]; readonly rows: SamplerRow[] } {
  const images = quick ? QUICK_IMAGES : IMAGES, steps = quick ? QUICK_STEPS : STEPS;
  const run = { ...models, scheduler, images, steps, seed };
  const groups = models.corrected.timeParameters!.groups.count;
  const text = ({ value, low, high }: Interval) =>
    `${value.toPrecision(3)} (${low.toPrecision(2)}-${high.toPrecision(2)})`;
  const parts = [{
    what: "drift",
    note:
      `${images} images of ${steps} steps from the same noise: ‖x − full‖² / ‖full‖² at the end, by ${groups} time groups.`,
    key: "sampler",
    pairs: driftOf(run),
  }, {
    what: "noise error by step",
    note: "At every state of the full-precision DDIM trajectory: ‖ε̂ − ε‖² / ‖ε‖².",
    key: "timestep",
    pairs: errorsOf(run),
  }];
  return {
    sections: parts.map(({ what, note, key, pairs }) => ({
      title: `${name}: the sampler's correction, ${what}`,
      notes: [note],
      columns: [key, "without", "with"].map((each) => ({ key: each, title: each })),
      rows: pairs.map((pair) => ({ [key]: pair.at, without: text(pair.without), with: text(pair.with) })),
    })),
    rows: parts.flatMap(({ what, pairs }) =>
      pairs.map((pair) => ({
        suite: "phases" as const,
        model: name,
        what: `sampler ${what}`,
        at: pair.at,
        without: pair.without.value,
        with: pair.with.value,
      }))
    ),
  };
}

/** `Σ ‖x − wanted‖² / Σ ‖wanted‖²` with its interval, without a learned variance. */
function relativeError({ full, images, seed }: Run, x: Float32Array, wanted: Float32Array): Interval {
  const { errors, norms } = squaredDistances(x, wanted, images, full.imageElements);
  return bootstrapRatio(errors, norms, { seed });
}

/** Distance of finished drawings to the full-precision ones. */
function driftOf(run: Run): Pair[] {
  const { full, plain, corrected, scheduler, images, steps, seed } = run;
  return SAMPLERS.map((sampler) => {
    const [wanted, without, own] = [full, plain, corrected].map((model) =>
      drawImages(model, scheduler, images, { sampler, steps, seed, batch: images }).images
    ) as [Float32Array, Float32Array, Float32Array];
    const error = (x: Float32Array) => relativeError(run, x, wanted);
    return { at: sampler, without: error(without), with: error(own) };
  });
}

/** Error of the noise at the states of the full-precision trajectory. */
function errorsOf(run: Run): Pair[] {
  const { full, plain, corrected, scheduler, images, steps, seed } = run;
  const { sampler: theta, groups } = corrected.timeParameters!, elements = full.imageElements;
  const labels = Array.from({ length: images }, (_, i) => i % full.config.classes);
  const states: NoisyImages[] = [];
  for (const { timestep, samples } of imageSteps(full, scheduler, labels, { sampler: "ddim", steps, seed })) {
    if (timestep !== undefined) states.push({ timestep, samples: samples.slice(), labels });
  }
  const [wanted, got] = [full, plain].map((model) => predictionsAt(model, states)) as [
    Float32Array<ArrayBuffer>[],
    Float32Array<ArrayBuffer>[],
  ];
  return states.map(({ timestep }, i) => {
    const group = groups.groupOf(timestep), without = got[i]!, size = without.length / images;
    const correction = {
      gain: theta!.gain[group]!,
      bias: theta!.bias[group]!,
      noiseVariance: theta!.noiseVariance[group]!,
    };
    const own = without.slice();
    // A learned variance follows each prediction.
    for (let image = 0; image < images; image++) {
      const prediction = own.subarray(image * size, image * size + elements);
      correctPredictions(prediction, correction, prediction);
    }
    const error = (x: Float32Array) => relativeError(run, x, wanted[i]!);
    return { at: timestep, without: error(without), with: error(own) };
  });
}
