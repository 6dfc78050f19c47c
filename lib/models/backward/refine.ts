/**
 * Gradient refinement (phase 3): Adam on the scales, zero points and biases of a packed model against the
 * true step KL to the full-precision model's distribution. Codes stay. Kept only if the held-out step KL
 * falls.
 */
import { type LossTerms, markovLoss } from "../../thermo/losses.ts";
import { tokenKl } from "../../thermo/masked_transition.ts";
import { type OptimizationReport, optimize, type OptimizerOptions } from "../../thermo/optimizer.ts";
import type { OneLevelTensor } from "../../quant/mod.ts";
import type { LayerParameters } from "../../time/mod.ts";
import type { DitModel } from "../dit/model.ts";
import { Workspace } from "../layers/workspace.ts";
import type { MaskedTransformer } from "../masked/transformer.ts";
import { DitGradients } from "./dit.ts";
import type { GradientOptions, RefinableLinear } from "./linear.ts";
import { MaskedTransformerGradients } from "./masked_transformer.ts";

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
  readonly weights: OneLevelTensor;
  readonly bias: Float32Array<ArrayBuffer> | undefined;
  /**
   * `f32[time groups, rows]` beside `bias`, where there are time groups: the bias of an output correction
   * with gain 1.
   */
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
}

export interface RefinementOptions
  extends OptimizerOptions, Pick<GradientOptions, "parts" | "recompute" | "timeGroups"> {
  /** λ of the Markov term, on biases by time group; relative to the loss at the start. Default 0. */
  readonly markovWeight?: number | undefined;
  /**
   * Temperature τ at which the entropy term begins, in squared steps of the scale; it falls to 0 over the
   * iterations. The term is `−τ · mean H(soft code of a weight)`, relative to the loss at the start. Default
   * 0.
   */
  readonly entropyWeight?: number | undefined;
  /**
   * Of the loss that gives gradients, as in `tokenKl`; what is held out is always measured at 1. Default 1.
   */
  readonly temperature?: number | undefined;
  /** Iterations from one look at the held-out batches to the next. Default 25. */
  readonly validateEvery?: number | undefined;
  readonly onIteration?: ((iteration: number, loss: number) => void) | undefined;
}

/**
 * Refines a packed masked transformer towards the full-precision one: the loss is the weighted mean over
 * masked positions of `KL(p_F ‖ p_Q)`. Batches are taken in turn. Neither model is changed; {@linkcode
 * applyRefinement} does that.
 *
 * @param data `train` gives gradients, `heldOut` decides which parameters are best and whether they are kept
 * @throws {TypeError} when the models have different vocabularies or there is no batch or nothing to refine
 * @throws {RangeError} when an option is not allowed
 */
export function refineMaskedTransformer(
  quantized: MaskedTransformer,
  full: MaskedTransformer,
  data: { readonly train: readonly MaskedBatch[]; readonly heldOut: readonly MaskedBatch[] },
  options: RefinementOptions = {},
): RefinementReport {
  const { vocabularySize } = quantized.config;
  const fail = (reason: string) => `Cannot refine ${JSON.stringify(quantized.path)}: ${reason}`;
  if (full.config.vocabularySize !== vocabularySize) {
    throw new TypeError(
      fail(`both models must have ${vocabularySize} tokens, got ${full.config.vocabularySize}`),
    );
  }
  checkBatches(data, fail);
  const { temperature } = options;
  const gradients = new MaskedTransformerGradients(quantized, options);
  const wantedBytes = [...data.train, ...data.heldOut].reduce(
    (sum, { rows }) => sum + rows.length * vocabularySize * 4,
    0,
  );
  const kept = wantedBytes <= TEACHER_CACHE_BYTES ? new Map<MaskedBatch, Float32Array>() : undefined;
  const teacher = (batch: MaskedBatch) => {
    const known = kept?.get(batch);
    if (known !== undefined) return known;
    const { inputIds, rows, attentionMask } = batch;
    const logits = full.forward(inputIds, batch.batch, { rows, attentionMask }).slice();
    kept?.set(batch, logits);
    return logits;
  };
  const lossOf = (batch: MaskedBatch, backward: boolean) => {
    const { inputIds, rows, attentionMask } = batch;
    const weights = weightsOf(batch);
    const target = teacher(batch);
    const logits = gradients.forward(inputIds, batch.batch, rows, attentionMask, batch.times);
    const gradient = backward ? new Float32Array(logits.length) : undefined;
    const kl = tokenKl(target, logits, quantized.config, {
      gradient,
      weights,
      temperature: backward ? temperature : 1,
    });
    if (gradient !== undefined) gradients.backward(gradient);
    return kl.reduce((sum, value, row) => sum + value * weights[row]!, 0);
  };
  return refine(gradients, {
    loss: (iteration) => lossOf(data.train[iteration % data.train.length]!, true),
    heldOut: () => data.heldOut.reduce((sum, batch) => sum + lossOf(batch, false), 0) / data.heldOut.length,
  }, { ...options, quantized, full, fail });
}

/** Weights that add up to 1. */
function weightsOf({ rows, weights }: MaskedBatch): Float64Array {
  const all = weights === undefined ? new Float64Array(rows.length).fill(1) : Float64Array.from(weights);
  const sum = all.reduce((total, weight) => total + weight, 0);
  if (all.length !== rows.length || !(sum > 0 && sum < Infinity) || all.some((weight) => weight < 0)) {
    throw new RangeError(
      `Cannot refine a model: a batch must have ${rows.length} weights ≥ 0 with a sum above 0, got ${all.length} with the sum ${sum}`,
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
 * prediction‖²`, the step KL. Batches are taken in turn. Neither model is changed; {@linkcode
 * applyRefinement} does that.
 *
 * @throws as {@linkcode refineMaskedTransformer}
 */
export function refineDit(
  quantized: DitModel,
  full: DitModel,
  data: { readonly train: readonly DitBatch[]; readonly heldOut: readonly DitBatch[] },
  options: RefinementOptions = {},
): RefinementReport {
  const { config } = quantized;
  const fail = (reason: string) => `Cannot refine ${JSON.stringify(quantized.path)}: ${reason}`;
  const outputs = config.outputChannels * config.sampleSize ** 2;
  if (
    full.imageElements !== quantized.imageElements || full.config.outputChannels !== config.outputChannels
  ) {
    throw new TypeError(fail(`both models must give ${outputs} numbers an image, got others`));
  }
  checkBatches(data, fail);
  const gradients = new DitGradients(quantized, options);
  const images = [...data.train, ...data.heldOut].reduce((sum, { labels }) => sum + labels.length, 0);
  const kept = images * outputs * 4 <= TEACHER_CACHE_BYTES ? new Map<DitBatch, Float32Array>() : undefined;
  const teacher = (batch: DitBatch) => {
    const known = kept?.get(batch);
    if (known !== undefined) return known;
    const output = full.forward(batch.samples, batch.timesteps, batch.labels).slice();
    kept?.set(batch, output);
    return output;
  };
  const lossOf = (batch: DitBatch, backward: boolean) => {
    const { samples, timesteps, labels } = batch;
    const weights = imageWeights("weights", batch.weights, labels.length);
    if (config.learnsVariance && batch.varianceWeights === undefined) {
      throw new TypeError(fail("batches must have varianceWeights for a learned variance, got none"));
    }
    const varianceWeights = imageWeights("varianceWeights", batch.varianceWeights, labels.length);
    const target = teacher(batch);
    const output = gradients.forward(samples, timesteps, labels);
    const gradient = new Float32Array(backward ? output.length : 0);
    const predicted = quantized.imageElements;
    let loss = 0;
    for (let image = 0; image < labels.length; image++) {
      for (let i = 0; i < outputs; i++) {
        const at = image * outputs + i;
        const weight = (i < predicted ? weights : varianceWeights)[image]! / labels.length;
        const error = output[at]! - target[at]!;
        loss += weight * error * error;
        if (backward) gradient[at] = 2 * weight * error;
      }
    }
    if (backward) gradients.backward(gradient);
    return loss;
  };
  return refine(gradients, {
    loss: (iteration) => lossOf(data.train[iteration % data.train.length]!, true),
    heldOut: () => data.heldOut.reduce((sum, batch) => sum + lossOf(batch, false), 0) / data.heldOut.length,
  }, { ...options, quantized, full, fail });
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

function checkBatches(
  data: { readonly train: readonly unknown[]; readonly heldOut: readonly unknown[] },
  fail: (reason: string) => string,
): void {
  if (data.train.length > 0 && data.heldOut.length > 0) return;
  throw new TypeError(
    fail(
      `there must be batches to train on and held out, got ${data.train.length} and ${data.heldOut.length}`,
    ),
  );
}

/** A model with gradients. */
export interface Refinable {
  readonly layers: readonly RefinableLinear[];
  readonly scratchBytes: number;
}

/** Options of a refinement with the models between which it is. */
interface RefineOptions extends RefinementOptions {
  readonly quantized: MaskedTransformer | DitModel;
  readonly full: MaskedTransformer | DitModel;
  readonly fail: (reason: string) => string;
}

/** Runs Adam on a model's layers. @internal */
export function refine(
  model: Refinable,
  problem: { loss(iteration: number): number; heldOut(): number },
  options: RefineOptions,
): RefinementReport {
  const { layers } = model;
  const parameters = layers.flatMap((layer) => layer.parameters);
  if (parameters.length === 0) {
    throw new TypeError(options.fail("it must have packed layers with something to refine, got none"));
  }
  const store = () => {
    for (const layer of layers) layer.store();
  };
  const heldOut = () => {
    store();
    return problem.heldOut();
  };
  const { markovWeight = 0, entropyWeight = 0, timeGroups, maxIterations = 50 } = options;
  for (const [name, weight] of Object.entries({ markovWeight, entropyWeight })) {
    if (!(weight >= 0 && weight <= 100)) {
      throw new RangeError(options.fail(`${name} must lie in [0, 100], got ${weight}`));
    }
  }
  let scale: number | undefined; // the first loss: the other terms are relative to it
  const report = optimize(options.quantized.kernels, {
    parameters,
    loss: (iteration): LossTerms => {
      store();
      const quantization = problem.loss(iteration);
      scale ??= quantization;
      const temperature = entropyWeight * (1 - iteration / maxIterations);
      return {
        quantization,
        markov: timeGroups === undefined ? 0 : markovTerm(layers, timeGroups.count, markovWeight * scale),
        entropy: temperature === 0 ? 0 : entropyTerm(layers, options.full, temperature, scale),
      };
    },
    validate: heldOut,
    validateEvery: options.validateEvery ?? 25,
    onIteration: options.onIteration,
  }, options);
  store();
  const kept = report.best < report.initial;
  return {
    ...report,
    heldOutBefore: report.initial,
    heldOutAfter: report.best,
    kept,
    layers: kept
      ? layers.filter((layer) => layer.parameters.length > 0).map(({ layer, timeBias }) => ({
        name: layer.name,
        weights: layer.weights as OneLevelTensor,
        bias: layer.bias,
        timeBias: timeBias?.values.slice(),
      }))
      : [],
    parameters: parameters.reduce((sum, { values }) => sum + values.length, 0),
    scratchBytes: model.scratchBytes,
  };
}

/** The Markov term of all layers, in units, as a mean over biases; its gradients are added. */
function markovTerm(layers: readonly RefinableLinear[], groups: number, weight: number): number {
  const all = layers.flatMap(({ timeBias }) => timeBias ?? []);
  const biases = all.reduce((sum, { values }) => sum + values.length, 0) / groups;
  let loss = 0;
  for (const { values, gradients, units } of weight > 0 ? all : []) {
    const term = markovLoss(
      Float64Array.from(values, (value, i) => value / units[i]!),
      groups,
      weight / biases,
    );
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

/**
 * Writes refined parameters into a loaded model's weights, in place; biases by time group are no part of
 * them: see {@linkcode timeBiasesOf}.
 *
 * @throws {TypeError} when the model has no such packed layer
 */
export function applyRefinement(
  model: MaskedTransformer | DitModel,
  refined: readonly RefinedLayer[],
): void {
  const layers = new Map(model.linearLayers.map((layer) => [layer.name, layer]));
  for (const { name, weights, bias } of refined) {
    const layer = layers.get(name);
    if (
      layer === undefined || !("packed" in layer.weights) || layer.weights.scaleBits !== undefined ||
      layer.weights.scale.length !== weights.scale.length || layer.bias?.length !== bias?.length
    ) {
      throw new TypeError(
        `Cannot refine ${JSON.stringify(model.path)}: it must have the packed layer ${JSON.stringify(name)}`,
      );
    }
    layer.weights.scale.set(weights.scale);
    if (weights.zeroPoint !== undefined) layer.weights.zeroPoint!.set(weights.zeroPoint);
    if (bias !== undefined) layer.bias!.set(bias);
  }
}

/**
 * The biases by time group of a refinement as output corrections with gain 1, for `TimeParameters`; empty
 * where it had no time groups.
 */
export function timeBiasesOf(refined: readonly RefinedLayer[]): Map<string, LayerParameters> {
  return new Map(
    refined.flatMap(({ name, timeBias }) =>
      timeBias === undefined
        ? []
        : [[name, { output: { gain: new Float32Array(timeBias.length).fill(1), bias: timeBias } }]]
    ),
  );
}
