/** What the sampler's correction is worth: images drawn freely from the same noise, and the noise error at every step, with it and without. */
import { type DitModel, imageSteps, type SamplerName, type Scheduler } from "../../models/mod.ts";
import { correctPredictions } from "../../thermo/mod.ts";
import { bootstrapRatio, type Interval } from "../../eval/intervals.ts";
import { squaredDistances } from "../../eval/statistics.ts";
import type { Section } from "../suite.ts";
import type { TableRow } from "../../eval/table.ts";

const IMAGES = 32;
const QUICK_IMAGES = 4;
const STEPS = 20;
const QUICK_STEPS = 4;
const SAMPLERS: readonly SamplerName[] = ["ddim", "ddpm"];

/** A quantized model as it is and with its sampler's correction. */
export interface CorrectedPair {
  readonly full: DitModel;
  readonly plain: DitModel;
  readonly corrected: DitModel;
}

/** `Σ ‖x − wanted‖² / Σ ‖wanted‖²` with its interval over images. */
function relativeError(x: Float32Array, wanted: Float32Array, images: number, seed: number): Interval {
  const { errors, norms } = squaredDistances(x, wanted, images);
  return bootstrapRatio(errors, norms, { seed });
}

/** The rows of both tables, and the tables. */
export function samplerSections(
  name: string,
  { full, plain, corrected }: CorrectedPair,
  scheduler: Scheduler,
  { seed, quick }: { readonly seed: number; readonly quick: boolean },
): { readonly sections: Section[]; readonly rows: TableRow[] } {
  const images = quick ? QUICK_IMAGES : IMAGES, steps = quick ? QUICK_STEPS : STEPS;
  const labels = Array.from({ length: images }, (_, i) => i % full.config.classes);
  const drawn = (model: DitModel, sampler: SamplerName) => {
    const turns = imageSteps(model, scheduler, labels, { sampler, steps, seed });
    while (true) {
      const { done, value } = turns.next();
      if (done) return value.slice();
    }
  };
  const drift = SAMPLERS.map((sampler) => {
    const wanted = drawn(full, sampler);
    const [without, with_] = [plain, corrected].map((model) =>
      relativeError(drawn(model, sampler), wanted, images, seed)
    ) as [Interval, Interval];
    return { sampler, without, with: with_ };
  });
  const { sampler: theta, groups } = corrected.timeParameters!;
  const turns = imageSteps(full, scheduler, labels, { sampler: "ddim", steps, seed });
  const errors: { timestep: number; without: Interval; with: Interval }[] = [];
  for (const { timestep, samples } of turns) {
    if (timestep === undefined) break;
    const times = new Array<number>(images).fill(timestep), elements = full.imageElements;
    // A learned variance lies behind each prediction.
    const predicted = (model: DitModel) => {
      const output = model.forward(samples, times, labels), size = output.length / images;
      const out = new Float32Array(images * elements);
      for (let i = 0; i < images; i++) out.set(output.subarray(i * size, i * size + elements), i * elements);
      return out;
    };
    const wanted = predicted(full), got = predicted(plain), group = groups.groupOf(timestep);
    const without = relativeError(got, wanted, images, seed);
    correctPredictions(
      got,
      {
        gain: theta!.gain[group]!,
        bias: theta!.bias[group]!,
        noiseVariance: theta!.noiseVariance[group]!,
      },
      got,
    );
    errors.push({ timestep, without, with: relativeError(got, wanted, images, seed) });
  }
  const span = ({ value, low, high }: Interval) =>
    `${value.toPrecision(3)} (${low.toPrecision(2)}-${high.toPrecision(2)})`;
  const columns = [{ key: "without", title: "without" }, { key: "with", title: "with" }];
  return {
    sections: [{
      title: `${name}: the sampler's correction, drift`,
      notes: [
        `${images} images of ${steps} steps from the same noise: ‖x − full‖² / ‖full‖² at the end, by ${groups.count} time groups.`,
      ],
      columns: [{ key: "sampler", title: "sampler" }, ...columns],
      rows: drift.map((row) => ({
        sampler: row.sampler,
        without: span(row.without),
        with: span(row.with),
      })),
    }, {
      title: `${name}: the sampler's correction, noise error by step`,
      notes: ["At every state of full precision's own DDIM trajectory: ‖ε̂ − ε‖² / ‖ε‖²."],
      columns: [{ key: "timestep", title: "timestep" }, ...columns],
      rows: errors.map((row) => ({
        timestep: row.timestep,
        without: span(row.without),
        with: span(row.with),
      })),
    }],
    rows: [
      ...drift.map(({ sampler, without, with: own }) => ({
        suite: "phases",
        model: name,
        what: "sampler drift",
        sampler,
        without: without.value,
        with: own.value,
      })),
      ...errors.map(({ timestep, without, with: own }) => ({
        suite: "phases",
        model: name,
        what: "sampler noise error",
        timestep,
        without: without.value,
        with: own.value,
      })),
    ],
  };
}
