/**
 * Gradient refinement (phase 3): Adam on the scales, zero points and biases of a packed model against the
 * true step KL to the full-precision model's distribution. Codes stay. Kept only if the held-out step KL
 * falls.
 */
import { type LossTerms, markovLoss } from "../../thermo/losses.ts";
import { tokenKl } from "../../thermo/masked_transition.ts";
import {
  firstLossOf,
  type OptimizationPlan,
  type OptimizationReport,
  optimize,
  type OptimizerOptions,
  type OptimizerState,
} from "../../thermo/optimizer/mod.ts";
import { PagedFloats } from "../../output/paged_floats.ts";
import type { PackedTensor } from "../../quant/mod.ts";
import type { LayerParameters } from "../../time/mod.ts";
import type { DitModel } from "../dit/model.ts";
import { Workspace } from "../layers/workspace.ts";
import type { MaskedTransformer } from "../masked/transformer.ts";
import { DitGradients } from "./dit.ts";
import type { GradientOptions, RefinableLinear } from "./linear.ts";
import { MaskedTransformerGradients } from "./masked_transformer.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Bytes of full-precision logits that are kept for batches seen again. */
const TEACHER_CACHE_BYTES = 2 ** 28;

/** Sequences with masks, and the rows of logits that predict the masked tokens. */
export interface MaskedBatch {
  /** `i32[batch, tokens]` */
  readonly inputIds: Int32Array;
  readonly batch: number;
  /** Flat positions of the logits that count; with Dream's shift already taken. */
  readonly rows: Int32Array;
  /** Mask ratio of each sequence, where there are time groups. */
  readonly times?: ArrayLike<number> | undefined;
  /** Weight of each row; default 1. Sums are divided by the weights' sum. */
  readonly weights?: ArrayLike<number> | undefined;
  readonly attentionMask?: Uint8Array | undefined;
}

/** A layer's new parameters: half floats as stored, beside codes that did not change. */
export interface RefinedLayer {
  /** As in `model.layers.0.mlp.up_proj.weight`. */
  readonly name: string;
  readonly weights: PackedTensor;
  readonly bias: Float32Array<ArrayBuffer> | undefined;
  /** `f32[time groups, rows]` beside `bias`: the bias of an output correction with gain 1. */
  readonly timeBias: Float32Array<ArrayBuffer> | undefined;
}

/** The result of a refinement. */
export interface RefinementReport extends OptimizationReport {
  /** Held-out loss (step KL) of the model as it came and as it is now. */
  readonly heldOutBefore: number;
  readonly heldOutAfter: number;
  /** The held-out loss fell, and the new parameters are in `layers`; otherwise `layers` is empty. */
  readonly kept: boolean;
  readonly layers: readonly RefinedLayer[];
  /** Parameters that were refined. */
  readonly parameters: number;
  /** Bytes of scratch at most. */
  readonly scratchBytes: number;
  /** Bytes of parameters, their gradients and what the optimizer keeps of them, in memory at most. */
  readonly parameterBytes: number;
}

export interface RefinementOptions
  extends OptimizerOptions, Pick<GradientOptions, "parts" | "recompute" | "timeGroups" | "memory"> {
  /** λ of the Markov term, on biases by time group; relative to the loss at the start. Default 0. */
  readonly markovWeight?: number | undefined;
  /**
   * Temperature τ at which the entropy term begins, in squared steps of the scale; it falls to 0 over the
   * iterations. The term is `−τ · mean H(soft code of a weight)`, relative to the loss at the start. Default
   * 0.
   */
  readonly entropyWeight?: number | undefined;
  /** Of the loss that gives gradients, as in `tokenKl`; held-out losses are always at 1. Default 1. */
  readonly temperature?: number | undefined;
  /** Iterations from one look at the held-out batches to the next. Default 25. */
  readonly validateEvery?: number | undefined;
  readonly onIteration?: ((iteration: number, loss: number) => void) | undefined;
  readonly onPlan?: ((plan: OptimizationPlan) => void) | undefined;
  /** As of `optimize`: where an earlier refinement of the same model was, and where this one is. */
  readonly start?: OptimizerState | undefined;
  readonly onState?: ((state: OptimizerState) => void) | undefined;
}

/** Inputs of a refinement: a model with gradients, the full-precision model, and their batches. */
interface Refined<Batch> {
  readonly quantized: MaskedTransformer | DitModel;
  readonly full: MaskedTransformer | DitModel;
  readonly data: RefinementData<Batch>;
  readonly gradients: MaskedTransformerGradients | DitGradients;
  /** Numbers that the models give for a batch. */
  outputs(batch: Batch): number;
  /** The full-precision model's output, which may be scratch. */
  wanted(batch: Batch): Float32Array;
  /** The refined model's output. */
  got(batch: Batch): Float32Array;
  /** Loss of a batch; its gradient by the output goes into `gradient`, where it is wanted. */
  loss(batch: Batch, wanted: Float32Array, got: Float32Array, gradient: Floats | undefined): number;
}

/** Batches: `train` gives gradients, `heldOut` decides which parameters are best and kept. */
interface RefinementData<Batch> {
  readonly train: readonly Batch[];
  readonly heldOut: readonly Batch[];
}

const cannotRefine = ({ path }: { readonly path: string }, reason: string) =>
  `Cannot refine ${JSON.stringify(path)}: ${reason}`;

/**
 * Refines a packed masked transformer towards the full-precision one: the loss is the weighted mean over
 * masked positions of `KL(p_F ‖ p_Q)`. Batches are taken in turn. Neither model is changed: the new
 * parameters are in the report.
 *
 * @throws {TypeError} when the models have different vocabularies or there is no batch or nothing to refine
 * @throws {RangeError} when an option is not allowed
 */
export function refineMaskedTransformer(
  quantized: MaskedTransformer,
  full: MaskedTransformer,
  data: RefinementData<MaskedBatch>,
  given: RefinementOptions = {},
): RefinementReport {
  const options = { ...given, memory: given.memory ?? new PagedFloats() };
  const { config, config: { vocabularySize } } = quantized, { temperature } = options;
  if (full.config.vocabularySize !== vocabularySize) {
    const got = full.config.vocabularySize;
    throw new TypeError(
      cannotRefine(quantized, `both models must have ${vocabularySize} tokens, got ${got}`),
    );
  }
  const gradients = new MaskedTransformerGradients(quantized, options);
  return refine<MaskedBatch>({
    quantized,
    full,
    data,
    gradients,
    outputs: ({ rows }) => rows.length * vocabularySize,
    wanted: ({ inputIds, batch, rows, attentionMask }) =>
      full.forward(inputIds, batch, { rows, attentionMask }),
    got: ({ inputIds, batch, rows, attentionMask, times }) =>
      gradients.forward(inputIds, batch, rows, attentionMask, times),
    loss(batch, wanted, got, gradient) {
      const weights = weightsOf(batch), own = gradient === undefined ? 1 : temperature;
      const kl = tokenKl(wanted, got, config, { gradient, weights, temperature: own });
      return kl.reduce((sum, value, row) => sum + value * weights[row]!, 0);
    },
  }, options);
}

/** Weights that add up to 1. */
function weightsOf({ rows, weights }: MaskedBatch): Float64Array {
  const all = weights === undefined ? new Float64Array(rows.length).fill(1) : Float64Array.from(weights);
  const sum = all.reduce((total, weight) => total + weight, 0);
  if (all.length !== rows.length || !(sum > 0 && sum < Infinity) || all.some((weight) => weight < 0)) {
    const wanted = `${rows.length} weights ≥ 0 with a sum above 0`;
    throw new RangeError(
      `Cannot refine a model: a batch must have ${wanted}, got ${all.length} with the sum ${sum}`,
    );
  }
  return all.map((weight) => weight / sum);
}

/** Noisy images, and how much an error at each counts. */
export interface DitBatch {
  /** `f32[batch, channels, size, size]` */
  readonly samples: Float32Array;
  readonly timesteps: ArrayLike<number>;
  readonly labels: ArrayLike<number>;
  /** Weight ω of each image's `‖Δ prediction‖²`: the step KL's, `TransitionComputer.weightOf`. Default 1. */
  readonly weights?: ArrayLike<number> | undefined;
  /** The same of its variance channels, where the model learns the variance: `learnedVarianceWeight`. */
  readonly varianceWeights?: ArrayLike<number> | undefined;
}

/**
 * Refines a packed DiT towards the full-precision one: the loss is the mean over images of `ω ‖Δ
 * prediction‖²`, the step KL. Batches are taken in turn. Neither model is changed: the new parameters are in
 * the report.
 *
 * @throws as {@linkcode refineMaskedTransformer}
 */
export function refineDit(
  quantized: DitModel,
  full: DitModel,
  data: RefinementData<DitBatch>,
  given: RefinementOptions = {},
): RefinementReport {
  const options = { ...given, memory: given.memory ?? new PagedFloats() };
  const { config, imageElements } = quantized, outputs = config.outputChannels * config.sampleSize ** 2;
  if (full.imageElements !== imageElements || full.config.outputChannels !== config.outputChannels) {
    throw new TypeError(
      cannotRefine(quantized, `both models must give ${outputs} numbers an image, got others`),
    );
  }
  const gradients = new DitGradients(quantized, options);
  return refine<DitBatch>({
    quantized,
    full,
    data,
    gradients,
    outputs: ({ labels }) => labels.length * outputs,
    wanted: ({ samples, timesteps, labels }) => full.forward(samples, timesteps, labels),
    got: ({ samples, timesteps, labels }) => gradients.forward(samples, timesteps, labels),
    loss(batch, wanted, got, gradient) {
      const images = batch.labels.length, weights = imageWeights("weights", batch.weights, images);
      if (config.learnsVariance && batch.varianceWeights === undefined) {
        const reason = "batches must have varianceWeights for a learned variance, got none";
        throw new TypeError(cannotRefine(quantized, reason));
      }
      const varianceWeights = imageWeights("varianceWeights", batch.varianceWeights, images);
      let loss = 0;
      for (let at = 0; at < got.length; at++) {
        const image = Math.floor(at / outputs), isPrediction = at % outputs < imageElements;
        const weight = (isPrediction ? weights : varianceWeights)[image]! / images;
        const error = got[at]! - wanted[at]!;
        loss += weight * error * error;
        if (gradient !== undefined) gradient[at] = 2 * weight * error;
      }
      return loss;
    },
  }, options);
}

function imageWeights(name: string, weights: ArrayLike<number> | undefined, images: number): Float64Array {
  const all = weights === undefined ? new Float64Array(images).fill(1) : Float64Array.from(weights);
  if (all.length !== images || all.some((weight) => !(weight >= 0 && weight < Infinity))) {
    throw new RangeError(
      `Cannot refine a model: ${name} must be ${images} finite numbers ≥ 0, got ${all.join(", ")}`,
    );
  }
  return all;
}

/** Loss of a batch; `backward` adds its gradients to the layers'. Full-precision outputs are kept. */
function lossOfBatches<Batch>(refined: Refined<Batch>): (batch: Batch, backward: boolean) => number {
  const { data: { train, heldOut }, gradients } = refined;
  const elements = [...train, ...heldOut].reduce((sum, batch) => sum + refined.outputs(batch), 0);
  const kept = 4 * elements <= TEACHER_CACHE_BYTES ? new Map<Batch, Float32Array>() : undefined;
  const workspace = new Workspace(); // outputs of a large vocabulary are not left to be collected
  const wantedOf = (batch: Batch) => {
    const known = kept?.get(batch);
    if (known !== undefined) return known;
    // What is not kept is the full model's scratch: nobody else runs it until the next batch.
    const own = refined.wanted(batch), copy = kept?.set(batch, own.slice()).get(batch);
    return copy ?? own;
  };
  return (batch, backward) => {
    const wanted = wantedOf(batch), got = refined.got(batch);
    const gradient = backward ? workspace.take("gradient", got.length).fill(0) : undefined;
    const loss = refined.loss(batch, wanted, got, gradient);
    if (gradient !== undefined) gradients.backward(gradient);
    return loss;
  };
}

/** Runs Adam on a model's layers. */
function refine<Batch>(
  refined: Refined<Batch>,
  options: RefinementOptions & { readonly memory: PagedFloats },
): RefinementReport {
  const { quantized, full, gradients: { layers }, data: { train, heldOut } } = refined;
  if (train.length === 0 || heldOut.length === 0) {
    const reason = "there must be batches to train on and held out";
    throw new TypeError(cannotRefine(quantized, `${reason}, got ${train.length} and ${heldOut.length}`));
  }
  const parameters = layers.flatMap((layer) => layer.parameters);
  if (parameters.length === 0) {
    const reason = "it must have packed layers with something to refine, got none";
    throw new TypeError(cannotRefine(quantized, reason));
  }
  const { markovWeight = 0, entropyWeight = 0, timeGroups, onPlan } = options;
  for (const [name, weight] of Object.entries({ markovWeight, entropyWeight })) {
    if (weight >= 0 && weight <= 100) continue;
    throw new RangeError(cannotRefine(quantized, `${name} must lie in [0, 100], got ${weight}`));
  }
  const store = () => layers.forEach((layer) => layer.store());
  const lossOf = lossOfBatches(refined);
  let iterations = options.maxIterations ?? 50;
  // The first loss: the other terms are relative to it.
  let scale = options.start && firstLossOf(options.start);
  const report = optimize(quantized.kernels, {
    parameters,
    loss: (iteration): LossTerms => {
      store();
      const quantization = lossOf(train[iteration % train.length]!, true);
      scale ??= quantization;
      const temperature = entropyWeight * (1 - iteration / iterations);
      return {
        quantization,
        markov: timeGroups === undefined ? 0 : markovTerm(layers, timeGroups.count, markovWeight * scale),
        entropy: temperature === 0 ? 0 : entropyTerm(layers, full, temperature, scale),
      };
    },
    validate() {
      store();
      return heldOut.reduce((sum, batch) => sum + lossOf(batch, false), 0) / heldOut.length;
    },
    validateEvery: options.validateEvery ?? 25,
    onIteration: options.onIteration,
    start: options.start,
    onState: options.onState,
    memory: options.memory,
    onPlan(plan) {
      ({ iterations } = plan);
      onPlan?.(plan);
    },
  }, options);
  store();
  const kept = report.best < report.initial;
  const packed = layers.filter((layer) => kept && layer.parameters.length > 0);
  return {
    ...report,
    heldOutBefore: report.initial,
    heldOutAfter: report.best,
    kept,
    layers: packed.map(({ layer: { name, weights, bias }, timeBias }) => {
      return { name, weights: weights as PackedTensor, bias, timeBias: timeBias?.values.slice() };
    }),
    parameters: parameters.reduce((sum, { length }) => sum + length, 0),
    scratchBytes: refined.gradients.scratchBytes,
    parameterBytes: options.memory.mostBytes,
  };
}

/** The Markov term of all layers, in units, as a mean over biases; its gradients are added. */
function markovTerm(layers: readonly RefinableLinear[], groups: number, weight: number): number {
  const all = layers.flatMap(({ timeBias }) => timeBias ?? []);
  const biases = all.reduce((sum, { length }) => sum + length, 0) / groups;
  let loss = 0;
  for (const { values, gradients, units } of weight > 0 ? all : []) {
    const inUnits = Float64Array.from(values, (value, i) => value / units[i]!);
    const term = markovLoss(inUnits, groups, weight / biases);
    loss += term.loss;
    for (let i = 0; i < gradients.length; i++) gradients[i]! += term.gradient[i]! / units[i]!;
  }
  return loss;
}

/** The entropy term of all layers, as a mean over weights; its gradients are added. */
function entropyTerm(
  layers: readonly RefinableLinear[],
  { kernels, linearLayers }: MaskedTransformer | DitModel,
  temperature: number,
  scale: number,
): number {
  const packed = layers.filter(({ parameters }) => parameters.length > 0);
  const weights = packed.reduce((sum, { rows, cols }) => sum + rows * cols, 0);
  const context = { kernels, workspace: new Workspace() };
  const originals = new Map(linearLayers.map((layer) => [layer.name, layer]));
  return packed.reduce((sum, layer) => {
    const original = originals.get(layer.layer.name)!;
    return sum + layer.entropy(context, original, temperature, scale / weights);
  }, 0);
}

/** Biases by time group of a refinement as output corrections with gain 1; empty without time groups. */
export function timeBiasesOf(refined: readonly RefinedLayer[]): Map<string, LayerParameters> {
  return new Map(
    refined.flatMap(({ name, timeBias }) =>
      timeBias === undefined
        ? []
        : [[name, { output: { gain: new Float32Array(timeBias.length).fill(1), bias: timeBias } }]]
    ),
  );
}
