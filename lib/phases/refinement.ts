/** Gradient refinement of phase 3 as a step of the pipeline: its data, its guard, and biases as they will be stored. */
import {
  type DitBatch,
  type MaskedBatch,
  refineDit,
  refineMaskedTransformer,
  type RefinementReport,
} from "../models/backward/mod.ts";
import type { LoadedModel, Scheduler } from "../models/mod.ts";
import type { PackedTensor } from "../quant/mod.ts";
import { learnedVarianceWeight } from "../thermo/mod.ts";
import type { TimeGroups } from "../time/mod.ts";
import { type Calibrated, type CalibrationPart, loadCalibration } from "../calibration/mod.ts";
import { loadPhaseModel, type PhaseContext } from "./context.ts";
import { maskedRows, meanStepKl, StepKlMeter, stepWeights } from "../calibration/step_kl.ts";

/** Positions of one refinement step, roughly. */
const STEP_POSITIONS = 1152;
/** Longest gradient, in held-out step KLs of the start: a batch with one of the rare large errors would else undo many steps. */
const CLIP = 20;
/** Samples held out from the refinement: of language models more, because rare large errors decide their mean. */
const REFINEMENT_HELD_OUT = { sequences: 1024, images: 256 };
/**
 * Temperature of the loss of language models: step KL itself is decided by one position in hundreds, so that its gradient is mostly chance; at
 * a temperature every logit counts.
 */
const TEMPERATURE = 3;
/** Iterations from one look at the held-out samples to the next. */
const VALIDATE_EVERY = 50;

export interface RefinementSettings {
  readonly learningRate: number;
  readonly maxIterations: number;
  readonly convergenceThreshold: number;
  /** λ of the Gauss-Markov prior on biases by time group; undefined refines no such biases. */
  readonly timeBiases?: number | undefined;
}

/**
 * Refines a packed model on new samples of the calibration data.
 *
 * @throws {CalibrationError | FormatError} as `loadCalibration`
 */
export async function refinePhase(
  context: PhaseContext,
  scheduler: Scheduler | undefined,
  weights: ReadonlyMap<string, PackedTensor>,
  { timeBiases, ...settings }: RefinementSettings,
  timeGroups: TimeGroups | undefined,
): Promise<
  {
    readonly report: RefinementReport;
    readonly biases: ReadonlyMap<string, Float32Array<ArrayBuffer>>;
    /** Of data that decide whether it is kept, and what they say of the model as it came. */
    readonly meter: StepKlMeter;
    readonly before: number;
  }
> {
  const { checkpoint, calibrated, source, seed } = context;
  const quantized = loadPhaseModel(context, { weights });
  // Both run in turns; a batch of the one is still read while the other runs.
  const full: LoadedModel = loadPhaseModel({ ...context, workspace: undefined }, {});
  const first: CalibrationPart<unknown> = calibrated.data.fit[0]!;
  const positions = first.weights.length / first.samples;
  const size = Math.max(1, Math.floor(STEP_POSITIONS / positions));
  // New masks and noise every step; records come again.
  const more = await loadCalibration(full, { source, samples: size * settings.maxIterations, seed });
  const heldOut = {
    ...more,
    data: { ...more.data, heldOut: more.data.heldOut.slice(0, enoughParts(more)) },
  } as Calibrated;
  const meter = new StepKlMeter(heldOut, scheduler);
  const before = meanStepKl(meter.measure(quantized));
  const options = {
    ...settings,
    timeGroups,
    markovWeight: timeBiases,
    validateEvery: VALIDATE_EVERY,
    clipNorm: Math.max(CLIP * before, Number.MIN_VALUE),
  };
  const report = more.kind === "sequences"
    ? refineMaskedTransformer(
      (quantized as Extract<LoadedModel, { kind: "dream" | "llada" }>).model,
      more.model,
      {
        train: more.data.fit.flatMap((part) => maskedBatches(more, part, size)),
        heldOut: firstSamples(
          more.data.heldOut.flatMap((part) => maskedBatches(more, part, size)),
          REFINEMENT_HELD_OUT.sequences,
          size,
        ),
      },
      { ...options, temperature: TEMPERATURE },
    )
    : refineDit(
      (quantized as Extract<LoadedModel, { kind: "dit" }>).model,
      more.model,
      {
        train: more.data.fit.flatMap((part) => imageBatches(more, scheduler!, part, size)),
        heldOut: firstSamples(
          more.data.heldOut.flatMap((part) => imageBatches(more, scheduler!, part, size)),
          REFINEMENT_HELD_OUT.images,
          size,
        ),
      },
      options,
    );
  const biases = new Map(report.layers.flatMap(({ name, bias }) => {
    const biasName = name.replace(/weight$/, "bias"), dtype = checkpoint.tensors.get(biasName)?.info.dtype;
    const isStored = dtype === "F32" || dtype === "F16" || dtype === "BF16";
    return bias === undefined || !isStored ? [] : [[biasName, asStored(bias, dtype)] as const];
  }));
  return { report, biases, meter, before };
}

const firstSamples = <Batch>(batches: readonly Batch[], samples: number, size: number): readonly Batch[] =>
  batches.slice(0, Math.max(1, Math.ceil(samples / size)));

/** Parts that hold the held-out samples of the refinement. */
const enoughParts = ({ kind, data: { heldOut } }: Calibrated) =>
  Math.max(1, Math.ceil(REFINEMENT_HELD_OUT[kind] / (heldOut[0]?.samples ?? 1)));

/** Values as a type of the checkpoint gives them back. */
function asStored(values: Float32Array<ArrayBuffer>, dtype: string): Float32Array<ArrayBuffer> {
  if (dtype === "F16") return values.map(Math.f16round);
  if (dtype !== "BF16") return values.slice();
  const words = new Uint32Array(values.slice().buffer);
  for (let i = 0; i < words.length; i++) {
    words[i] = (words[i]! + 0x7fff + ((words[i]! >>> 16) & 1)) & 0xffff0000; // half to even
  }
  return new Float32Array(words.buffer);
}

type Sequences = Extract<Calibrated, { kind: "sequences" }>;
type Images = Extract<Calibrated, { kind: "images" }>;

function maskedBatches(
  { model: { config }, shift }: Sequences,
  { batch: { inputIds }, samples, times }: Sequences["data"]["fit"][number],
  size: number,
): MaskedBatch[] {
  const { maskToken } = config, tokens = inputIds.length / samples;
  return Array.from({ length: Math.ceil(samples / size) }, (_, i): MaskedBatch => {
    const begin = i * size, end = Math.min(samples, begin + size);
    const ids = inputIds.slice(begin * tokens, end * tokens);
    return {
      inputIds: ids,
      batch: end - begin,
      times: times.slice(begin, end),
      rows: maskedRows(ids, tokens, maskToken, shift),
    };
  });
}

function imageBatches(
  { model: { imageElements, config } }: Images,
  scheduler: Scheduler,
  { batch: { samples, timesteps, labels } }: Images["data"]["fit"][number],
  size: number,
): DitBatch[] {
  const transitions = stepWeights(scheduler);
  return Array.from({ length: Math.ceil(labels.length / size) }, (_, i): DitBatch => {
    const begin = i * size, end = Math.min(labels.length, begin + size);
    const times = Array.from(timesteps).slice(begin, end);
    return {
      samples: samples.slice(begin * imageElements, end * imageElements),
      timesteps: times,
      labels: Array.from(labels).slice(begin, end),
      weights: times.map((t) => transitions.weightOf(t)),
      varianceWeights: config.learnsVariance
        ? times.map((t) => learnedVarianceWeight(transitions.schedule, t))
        : undefined,
    };
  });
}
