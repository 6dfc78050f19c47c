/**
 * Calibration data ready to run: sequences with masks drawn as in training, images noised to every timestep,
 * each with the weights of its positions, split into a part to solve on and a held-out part. Synthetic data
 * are marked as such.
 */
import { existsSync } from "node:fs";
import { checkWhole } from "../native/call.ts";
import { CheckpointError, FormatError } from "../errors.ts";
import {
  type DitModel,
  type ImageBatch,
  type LoadedModel,
  loadScheduler,
  type MaskedTransformer,
  type Scheduler,
  type SequenceBatch,
} from "../models/mod.ts";
import type { CalibrationStatistics } from "../time/mod.ts";
import { calibrationFault, type CalibrationOptions, type CalibrationSet } from "./draw.ts";
import { imageSet } from "./images.ts";
import { makeOwnSamples, type OwnSampleOptions, type OwnSampleSettings } from "./own_samples.ts";
import { sequenceSet } from "./sequences.ts";

export type { CalibrationOptions, CalibrationPart, CalibrationSet } from "./draw.ts";
export { type LabelledImages, readLabelledImages } from "./images.ts";
export { randomTokens } from "./random_tokens.ts";
export { MAX_SEQUENCE_TOKENS, POSITION_WEIGHTS } from "./sequences.ts";

/** How much a model makes of its own where nothing else is asked for. */
const OWN_SAMPLES: OwnSampleSettings = { records: null, tokens: 128, steps: null };

/** A model with its calibration data, and statistics that were gathered from them before, if any. */
export type Calibrated =
  & { readonly statistics?: CalibrationStatistics | undefined }
  & (
    | {
      readonly kind: "sequences";
      readonly model: MaskedTransformer;
      /** Position `i` is predicted by the logits at `i − shift`. */
      readonly shift: number;
      readonly data: CalibrationSet<SequenceBatch>;
    }
    | { readonly kind: "images"; readonly model: DitModel; readonly data: CalibrationSet<ImageBatch> }
  );

/** A model with saved statistics instead of data: nothing is run, nothing is held out. */
export function withStatistics(loaded: LoadedModel, statistics: CalibrationStatistics): Calibrated {
  const { source, isSynthetic, samples, groups: { axis } } = statistics;
  const data = {
    source,
    isSynthetic,
    samples,
    warnings: [],
    distinctPositions: Infinity,
    axis,
    scheduler: knownSchedule(loaded.folder),
    fit: [],
    heldOut: [],
  };
  return loaded.kind === "dit"
    ? { kind: "images", model: loaded.model, data, statistics }
    : { kind: "sequences", model: loaded.model, shift: loaded.model.config.logitShift, data, statistics };
}

/** The noise schedule of a checkpoint in a folder; undefined where it has none, or one that is not DDPM's. */
export function knownSchedule(folder: string): Scheduler | undefined {
  try {
    return loadScheduler(folder, "ddim");
  } catch (error) {
    if (error instanceof CheckpointError || error instanceof FormatError) return undefined;
    throw error;
  }
}

/**
 * Loads a model's calibration data.
 *
 * @throws {CalibrationError} when the file is not what the model reads: another vocabulary, another image
 * size, an unknown form
 */
export async function loadCalibration(
  loaded: LoadedModel,
  given: CalibrationOptions & { readonly self?: OwnSampleSettings | undefined },
  run: OwnSampleOptions = {},
): Promise<Calibrated> {
  const { source, samples, seed, self = OWN_SAMPLES } = given;
  if (samples !== undefined) checkWhole("calibrate", "samples", samples, 1);
  const isMade = source === "synthetic" || source === "self";
  if (!isMade && !existsSync(source)) {
    throw calibrationFault(
      source,
      'it must be a JSONL or safetensors file, "self" or "synthetic", got nothing there',
    );
  }
  const own = source !== "self" ? undefined : given.own ?? await makeOwnSamples(loaded, self, seed, run);
  const options = { ...given, own };
  if (loaded.kind === "dit") {
    if (!isMade && !source.endsWith(".safetensors")) {
      throw calibrationFault(source, "an image model reads images and labels from a safetensors file");
    }
    return { kind: "images", model: loaded.model, data: imageSet(loaded.model, loaded.folder, options) };
  }
  const { model } = loaded;
  return {
    kind: "sequences",
    model,
    shift: model.config.logitShift,
    data: await sequenceSet(loaded, options),
  };
}
