/** Phase 3's gradient refinement as a step of the pipeline: its data, its guard, and biases as stored. */
import {
  type DitBatch,
  type MaskedBatch,
  refineDit,
  refineMaskedTransformer,
  type RefinementOptions,
  type RefinementReport,
} from "../models/backward/mod.ts";
import { gradientCost, type LoadedModel, modelConfig } from "../models/mod.ts";
import { PagedFloats } from "../output/paged_floats.ts";
import { groupCount, type PackedTensor } from "../quant/mod.ts";
import { secondsText } from "../progress.ts";
import type { OptimizationPlan, TransitionComputer } from "../thermo/mod.ts";
import type { TimeGroups } from "../time/mod.ts";
import { type Calibrated, type CalibrationPart, loadCalibration } from "../calibration/mod.ts";
import { maskedRows, meanStepKl, StepKlMeter } from "../calibration/step_kl.ts";
import { fromBfloat16, toBfloat16 } from "../tensor/bfloat16.ts";
import {
  fitsText,
  type LayerParameterCount,
  memoryText,
  memoryThatFits,
  parametersOf,
  REFINEMENT_HELD_OUT,
  type RefinementMemory,
  samplesOfStep,
  whatFits,
} from "./fitting.ts";
import { keepRefinement, keptRefinement, parametersPath } from "./kept_refinement.ts";
import { loadPhaseModel, type PhaseContext, type PhaseModel, transitionsOf } from "./context.ts";
import { REFINEMENT_DEFAULTS, type RefinementSettings } from "./settings.ts";

/** Longest gradient, in held-out step KLs of the start: else one rare large error undoes many steps. */
const CLIP = 20;
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

/**
 * Refines a packed model on new samples of the calibration data.
 *
 * @returns undefined where the time does not suffice for a step and for measuring what became of it
 * @throws as `loadCalibration`
 */
export async function refinePhase(
  context: PhaseContext,
  weights: ReadonlyMap<string, PackedTensor>,
  settings: RefinementSettings,
  timeGroups: TimeGroups | undefined,
): Promise<Refined | undefined> {
  const { calibrated, source, seed, checkpoint, gradientBytes = Infinity } = context,
    started = performance.now();
  const quantized = loadPhaseModel(context, { weights });
  // The two models run in turns; a batch of one is still read while the other runs.
  const full: LoadedModel = loadPhaseModel({ ...context, workspace: undefined }, {});
  const first: CalibrationPart<unknown> = calibrated.data.fit[0]!,
    tokens = first.weights.length / first.samples;
  const size = samplesOfStep(tokens);
  const defaults = REFINEMENT_DEFAULTS[calibrated.kind], transitions = transitionsOf(context);
  const { learningRate = defaults.learningRate, maxIterations = defaults.maxIterations } = settings;
  // New masks and noise every step; records come again.
  const more = await loadCalibration(full, {
    source,
    samples: size * maxIterations,
    seed,
    own: calibrated.data.own,
  });
  const task: RefinementTask = { quantized, full, more, transitions, size };
  const { entropyWeight, convergenceThreshold, maxMinutes = Infinity } = settings;
  const kept = context.place && keptRefinement(context.place);
  const fits = kept?.fits ?? whatFits({
    passSeconds: secondsOfPass(task),
    batches: Math.ceil(REFINEMENT_HELD_OUT[more.kind] / size),
    iterations: maxIterations,
    seconds: maxMinutes * 60 - (performance.now() - started) / 1000,
  });
  context.onPlan?.(
    kept === undefined
      ? fitsText(fits, { asked: maxIterations, minutes: maxMinutes, size, kind: more.kind })
      : "gradient refinement goes on from its last look at held-out samples",
  );
  if (fits.iterations === 0) return undefined;
  const meter = new StepKlMeter(firstHeldOut(more, fits.batches * size), transitions);
  const measure = (name: string, model: LoadedModel) =>
    meanStepKl(meter.measureOnce(`${name}, ${fits.batches * size} samples of the refinement`, () => model));
  const measuring = performance.now(), before = measure("before", quantized), now = performance.now();
  // The refined model is measured again at the end.
  const left = maxMinutes * 60_000 - (now - started) - (now - measuring);
  let iterations = maxIterations;
  const cost = gradientCost(modelConfig(checkpoint), { batch: size, tokens });
  const layers = parametersOfLayers(quantized, timeGroups?.count ?? 0);
  const held = memoryThatFits(cost, layers, gradientBytes);
  context.onPlan?.(memoryText(held));
  using memory = parameterMemory(context.place, held);
  const report = refineTask(task, fits.batches, {
    learningRate,
    maxIterations,
    maxMilliseconds: Math.max(1, left),
    convergenceThreshold,
    entropyWeight,
    timeGroups,
    markovWeight: settings.timeBiases,
    start: kept?.state,
    onState: (state) => context.place && keepRefinement(context.place, { fits, state }),
    recompute: held.recomputes,
    memory,
    validateEvery: Math.max(1, Math.round(maxIterations / VALIDATIONS)),
    clipNorm: Math.max(CLIP * before, Number.MIN_VALUE),
    onIteration: (iteration: number) => context.onStep?.("gradient refinement", iteration, iterations),
    onPlan(plan: OptimizationPlan) {
      ({ iterations } = plan);
      context.onPlan?.(planText(plan, maxIterations, `${size} ${more.kind}`, maxMinutes));
    },
  });
  const stepKlOf = (name: string, model: PhaseModel) => measure(name, loadPhaseModel(context, model));
  return { report, biases: storedBiases(checkpoint, report), before, stepKlOf };
}

/** Parameters of a packed model's layers. */
function parametersOfLayers({ model: { stages } }: LoadedModel, timeGroups: number): LayerParameterCount[] {
  const head = stages.at(-1)!.block;
  return stages.flatMap(({ block, layers }) =>
    layers.flatMap(({ weights, bias }) => {
      if (!("packed" in weights)) return [];
      const { rows, cols, groupSize, scaleBits } = weights;
      const isReal = scaleBits !== undefined || weights.zeroPointKind === "real";
      const perRow = Number(bias !== undefined) + timeGroups, groups = groupCount(cols, groupSize);
      return parametersOf(block === head ? undefined : block, { rows, groups, isReal, perRow });
    })
  );
}

/** Memory of parameters, which go to the work folder where they do not fit. */
function parameterMemory(
  place: PhaseContext["place"],
  { parameterBytes, heldBytes }: RefinementMemory,
): PagedFloats {
  if (place === undefined || heldBytes === parameterBytes) return new PagedFloats();
  return new PagedFloats({ memoryBytes: heldBytes, path: parametersPath(place) });
}

/** The two models and their data. */
interface RefinementTask {
  readonly quantized: LoadedModel;
  readonly full: LoadedModel;
  readonly more: Calibrated;
  readonly transitions: TransitionComputer;
  /** Samples of a step. */
  readonly size: number;
}

/** Refines on batches, of which so many are held out. */
function refineTask(
  { quantized, more, transitions, size }: RefinementTask,
  heldOut: number,
  options: RefinementOptions,
): RefinementReport {
  return more.kind === "sequences"
    ? refineMaskedTransformer(
      (quantized as Extract<LoadedModel, { kind: "dream" | "llada" }>).model,
      more.model,
      batchesOf(
        more,
        (part: Sequences["data"]["fit"][number]) => maskedBatches(more, part, size),
        heldOut,
      ),
      { ...options, temperature: TEMPERATURE },
    )
    : refineDit(
      (quantized as Extract<LoadedModel, { kind: "dit" }>).model,
      more.model,
      batchesOf(
        more,
        (part: Images["data"]["fit"][number]) => imageBatches(more, transitions, part, size),
        heldOut,
      ),
      options,
    );
}

/** Seconds of a pass of both models over a batch. */
function secondsOfPass({ quantized, full, more, transitions, size }: RefinementTask): number {
  const begin = performance.now();
  for (const { kind, model } of [quantized, full]) {
    if (more.kind === "sequences" && kind !== "dit") {
      const { inputIds, batch, rows } = maskedBatches(more, more.data.heldOut[0]!, size)[0]!;
      model.forward(inputIds, batch, { rows });
    } else if (more.kind === "images" && kind === "dit") {
      const { samples, timesteps, labels } = imageBatches(more, transitions, more.data.heldOut[0]!, size)[0]!;
      model.forward(samples, timesteps, labels);
    }
  }
  return (performance.now() - begin) / 1000;
}

/** New biases as the checkpoint will store them. */
function storedBiases(
  checkpoint: PhaseContext["checkpoint"],
  { layers }: RefinementReport,
): Map<string, Float32Array<ArrayBuffer>> {
  return new Map(layers.flatMap(({ name, bias }) => {
    const biasName = name.replace(/weight$/, "bias"), dtype = checkpoint.tensors.get(biasName)?.info.dtype;
    const isStored = dtype === "F32" || dtype === "F16" || dtype === "BF16";
    return bias === undefined || !isStored ? [] : [[biasName, asStored(bias, dtype)] as const];
  }));
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
  { data }: { readonly data: { fit: readonly Part[]; heldOut: readonly Part[] } },
  batches: (part: Part) => readonly Batch[],
  heldOut: number,
): { readonly train: readonly Batch[]; readonly heldOut: readonly Batch[] } {
  return { train: data.fit.flatMap(batches), heldOut: data.heldOut.flatMap(batches).slice(0, heldOut) };
}

/** The same with the first parts that hold so many held-out samples. */
function firstHeldOut(more: Calibrated, samples: number): Calibrated {
  const { heldOut } = more.data, count = Math.min(samples, REFINEMENT_HELD_OUT[more.kind]);
  const parts = Math.max(1, Math.ceil(count / (heldOut[0]?.samples ?? 1)));
  return { ...more, data: { ...more.data, heldOut: heldOut.slice(0, parts) } } as Calibrated;
}

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
