/** Sampler correction of an image model: fitted by time group, kept where the held-out step KL falls. */
import type { LoadedModel } from "../models/mod.ts";
import { correctPredictions, PredictionRegression, type SamplerCorrection } from "../thermo/mod.ts";
import type { SamplerParameters, TimeGroups } from "../time/mod.ts";
import { type PhaseContext, transitionsOf } from "./context.ts";
import { imageStepKl } from "../calibration/step_kl.ts";

/** A correction that changes nothing: of a time group that no sample is in. */
const NONE: SamplerCorrection = { gain: 1, bias: 0, noiseVariance: 0 };

/**
 * Gain, bias and noise variance of a quantized model's predictions beside the full model's, one each a time
 * group, and the mean held-out step KL of the predictions as they are and corrected. The noise variance is
 * taken on held-out data: on those of the fit it would come out too small.
 *
 * @throws {TypeError} when the model is a language model
 */
export function fitSampler(
  context: PhaseContext,
  quantized: LoadedModel,
  groups: TimeGroups,
): { readonly sampler: SamplerParameters; readonly before: number; readonly after: number } {
  const { calibrated } = context;
  if (calibrated.kind !== "images" || quantized.kind !== "dit") {
    throw new TypeError("Cannot correct a sampler: the model must be an image model, got a language model");
  }
  const { model: full, data } = calibrated, { imageElements: elements } = full;
  const transitions = transitionsOf(context);
  const regressions = (part: "fit" | "heldOut") => {
    const all = Array.from({ length: groups.count }, () => new PredictionRegression());
    const outputs = data[part].map(({ batch: { samples, timesteps, labels } }) => {
      const wanted = full.forward(samples, timesteps, labels).slice();
      const got = quantized.model.forward(samples, timesteps, labels).slice();
      const size = wanted.length / timesteps.length;
      for (let i = 0; i < timesteps.length; i++) {
        const begin = i * size, end = begin + elements; // a learned variance lies behind the prediction
        all[groups.groupOf(timesteps[i]!)]!.add(wanted.subarray(begin, end), got.subarray(begin, end));
      }
      return { wanted, got, timesteps };
    });
    return { all, outputs };
  };
  const fitted = regressions("fit").all.map((own) => own.count < 2 ? NONE : own.correction());
  const { all, outputs } = regressions("heldOut");
  const corrections = fitted.map((own, g): SamplerCorrection => ({
    ...own,
    noiseVariance: all[g]!.count < 2 ? own.noiseVariance : all[g]!.correction().noiseVariance,
  }));
  let before = 0, after = 0, images = 0;
  for (const { wanted, got, timesteps } of outputs) {
    const size = wanted.length / timesteps.length;
    const total = () =>
      imageStepKl(full, transitions, wanted, got, timesteps).reduce((sum, kl) => sum + kl, 0);
    before += total();
    for (let i = 0; i < timesteps.length; i++) {
      const own = got.subarray(i * size, i * size + elements);
      correctPredictions(own, corrections[groups.groupOf(timesteps[i]!)]!, own);
    }
    after += total();
    images += timesteps.length;
  }
  const of = (key: keyof SamplerCorrection) => Float32Array.from(corrections, (own) => own[key]);
  return {
    sampler: { gain: of("gain"), bias: of("bias"), noiseVariance: of("noiseVariance") },
    before: before / images,
    after: after / images,
  };
}
