/** Phase 3's gradient refinement as a step of the pipeline: its data, its guard, and biases as stored. */
import {
  type DitBatch,
  type MaskedBatch,
  refineDit,
  refineMaskedTransformer,
  type RefinementReport,
} from "../models/backward/mod.ts";
import type { LoadedModel } from "../models/mod.ts";
import type { PackedTensor } from "../quant/mod.ts";
import { secondsText } from "../progress.ts";
import type { OptimizationPlan, TransitionComputer } from "../thermo/mod.ts";
import type { TimeGroups } from "../time/mod.ts";
import { type Calibrated, type CalibrationPart, loadCalibration } from "../calibration/mod.ts";
import { maskedRows, meanStepKl, StepKlMeter } from "../calibration/step_kl.ts";
import { fromBfloat16, toBfloat16 } from "../tensor/bfloat16.ts";
import { loadPhaseModel, type PhaseContext, type PhaseModel, transitionsOf } from "./context.ts";
import { REFINEMENT_DEFAULTS, type RefinementSettings } from "./settings.ts";

/** Positions of one refinement step, roughly. */
const STEP_POSITIONS = 1152;
/** Longest gradient, in held-out step KLs of the start: else one rare large error undoes many steps. */
const CLIP = 20;
/** Samples held out from the refinement; rare large errors decide a language model's mean. */
const REFINEMENT_HELD_OUT = { sequences: 1024, images: 256 };
/**
 * Temperature of the loss of language models: step KL itself is decided by one position in hundreds, so that
 * its gradient is mostly chance; at a temperature every logit counts.
 */
const TEMPERATURE = 3;
/** How often held-out samples are measured to choose the best parameters; each costs about ten steps. */
const VALIDATIONS = 6;

/** A refinement and the measure that decides whether it is kept. */
export interface Refined {
  readonly report: RefinementReport;
  /** As the checkpoint will store them. */
  readonly biases: ReadonlyMap<string, Float32Array<ArrayBuffer>>;
  /** Mean step KL of the model before, on the refinement's held-out samples. */
  readonly before: number;
  /** The same of a model by a name. */
  stepKlOf(name: string, model: PhaseModel): number;
}

/** Refines a packed model on new samples of the calibration data. @throws as `loadCalibration` */
export async function refinePhase(
  context: PhaseContext,
  weights: ReadonlyMap<string, PackedTensor>,
  settings: RefinementSettings,
  timeGroups: TimeGroups | undefined,
): Promise<Refined> {
  const { checkpoint, calibrated, source, seed } = context, started = performance.now();
  const quantized = loadPhaseModel(context, { weights });
  // The two models run in turns; a batch of one is still read while the other runs.
  const full: LoadedModel = loadPhaseModel({ ...context, workspace: undefined }, {});
  const first: CalibrationPart<unknown> = calibrated.data.fit[0]!;
  const size = Math.max(1, Math.floor(STEP_POSITIONS * first.samples / first.weights.length));
  const defaults = REFINEMENT_DEFAULTS[calibrated.kind], transitions = transitionsOf(context);
  const { learningRate = defaults.learningRate, maxIterations = defaults.maxIterations } = settings;
  // New masks and noise every step; records come again.
  const more = await loadCalibration(full, {
    source,
    samples: size * maxIterations,
    seed,
    own: calibrated.data.own,
  });
  const data = { ...more.data, heldOut: more.data.heldOut.slice(0, enoughParts(more)) };
  const meter = new StepKlMeter({ ...more, data } as Calibrated, transitions);
  const measure = (name: string, model: LoadedModel) =>
    meanStepKl(meter.measureOnce(`${name}, samples of the refinement`, () => model));
  const measuring = performance.now(), before = measure("before", quantized), now = performance.now();
  const { entropyWeight, convergenceThreshold, maxMinutes = Infinity } = settings;
  // The refined model is measured again at the end.
  const left = maxMinutes * 60_000 - (now - started) - (now - measuring);
  let iterations = maxIterations;
  const options = {
    learningRate,
    maxIterations,
    maxMilliseconds: Math.max(1, left),
    convergenceThreshold,
    entropyWeight,
    timeGroups,
    markovWeight: settings.timeBiases,
    validateEvery: Math.max(1, Math.round(maxIterations / VALIDATIONS)),
    clipNorm: Math.max(CLIP * before, Number.MIN_VALUE),
    onIteration: (iteration: number) => context.onStep?.("gradient refinement", iteration, iterations),
    onPlan(plan: OptimizationPlan) {
      ({ iterations } = plan);
      context.onPlan?.(planText(plan, maxIterations, `${size} ${more.kind}`, maxMinutes));
    },
  };
  const report = more.kind === "sequences"
    ? refineMaskedTransformer(
      (quantized as Extract<LoadedModel, { kind: "dream" | "llada" }>).model,
      more.model,
      batchesOf(more, (part: Sequences["data"]["fit"][number]) => maskedBatches(more, part, size), size),
      { ...options, temperature: TEMPERATURE },
    )
    : refineDit(
      (quantized as Extract<LoadedModel, { kind: "dit" }>).model,
      more.model,
      batchesOf(
        more,
        (part: Images["data"]["fit"][number]) => imageBatches(more, transitions, part, size),
        size,
      ),
      options,
    );
  const biases = new Map(report.layers.flatMap(({ name, bias }) => {
    const biasName = name.replace(/weight$/, "bias"), dtype = checkpoint.tensors.get(biasName)?.info.dtype;
    const isStored = dtype === "F32" || dtype === "F16" || dtype === "BF16";
    return bias === undefined || !isStored ? [] : [[biasName, asStored(bias, dtype)] as const];
  }));
  const stepKlOf = (name: string, model: PhaseModel) => measure(name, loadPhaseModel(context, model));
  return { report, biases, before, stepKlOf };
}

/** What the refinement will do. */
function planText(
  { iterations, validations, stepMilliseconds, milliseconds }: OptimizationPlan,
  asked: number,
  batch: string,
  minutes: number,
): string {
  const count = iterations === asked ? `${asked}` : `${iterations} of ${asked}`;
  const budget = Number.isFinite(minutes) ? `; it may take ${minutes} min (max_minutes)` : "";
  return `gradient refinement: ${count} steps of ${batch}, ${validations} looks at held-out samples, about ${
    secondsText(milliseconds / 1000)
  } at ${secondsText(stepMilliseconds / 1000)} a step${budget}`;
}

/** Batches to train on, and the first of the held-out ones. */
function batchesOf<Part, Batch>(
  { kind, data }: {
    readonly kind: Calibrated["kind"];
    readonly data: { fit: readonly Part[]; heldOut: readonly Part[] };
  },
  batches: (part: Part) => readonly Batch[],
  size: number,
): { readonly train: readonly Batch[]; readonly heldOut: readonly Batch[] } {
  const most = Math.max(1, Math.ceil(REFINEMENT_HELD_OUT[kind] / size));
  return { train: data.fit.flatMap(batches), heldOut: data.heldOut.flatMap(batches).slice(0, most) };
}

/** Parts that hold the held-out samples of the refinement. */
const enoughParts = ({ kind, data: { heldOut } }: Calibrated) =>
  Math.max(1, Math.ceil(REFINEMENT_HELD_OUT[kind] / (heldOut[0]?.samples ?? 1)));

/** Values as a type of the checkpoint gives them back. */
function asStored(values: Float32Array<ArrayBuffer>, dtype: string): Float32Array<ArrayBuffer> {
  if (dtype === "F16") return values.map(Math.f16round);
  return dtype === "BF16" ? fromBfloat16(toBfloat16(values)) : values.slice();
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
  transitions: TransitionComputer,
  { batch: { samples, timesteps, labels } }: Images["data"]["fit"][number],
  size: number,
): DitBatch[] {
  return Array.from({ length: Math.ceil(labels.length / size) }, (_, i): DitBatch => {
    const begin = i * size, end = Math.min(labels.length, begin + size);
    const times = Array.from(timesteps).slice(begin, end);
    return {
      samples: samples.slice(begin * imageElements, end * imageElements),
      timesteps: times,
      labels: Array.from(labels).slice(begin, end),
      weights: times.map((t) => transitions.weightOf(t)),
      varianceWeights: config.learnsVariance ? times.map((t) => transitions.varianceWeightOf(t)) : undefined,
    };
  });
}
