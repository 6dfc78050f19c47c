/**
 * How near a quantized model stays to full precision on synthetic inputs, for models that come without tasks: distributions at the masked
 * positions of made-up sequences, predictions along full precision's own trajectories. What full precision said is kept, not the model: only one
 * model is in memory at a time. Nothing here is an accuracy.
 */
import type { DitModel, MaskedTransformer, MaskedTransformerConfig, Scheduler } from "../../models/mod.ts";
import { RandomStream } from "../../models/random.ts";
import {
  drawImages,
  type DrawnImages,
  type StepDrift,
  type TimestepError,
  trajectoryDrift,
} from "../../eval/images.ts";
import { type BootstrapOptions, bootstrapRatio, type Interval } from "../../eval/intervals.ts";

// Masked language models -----------------------------------------------------------------------------------------

/** Random tokens, some of them masked. */
export interface SyntheticSequence {
  /** Probability with which each position was masked. */
  readonly maskRatio: number;
  /** `i32[tokens]` */
  readonly tokens: Int32Array<ArrayBuffer>;
  /** Masked positions. */
  readonly places: readonly number[];
}

/**
 * Sequences of tokens drawn evenly from all but the special ones; mask ratios are spread evenly over (0, 1], at least one position is masked.
 *
 * @throws {RangeError} when the vocabulary has nothing but special tokens
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 * import { loadDream } from "../../models/mod.ts";
 * import { maskedFidelity, maskedLogits, syntheticSequences } from "./fidelity.ts";
 * const model = loadDream("tests/models/dream-mini", await openKernels());
 * const sequences = syntheticSequences(model.config, { sequences: 4, tokens: 16, seed: 1 });
 * const logits = maskedLogits(model, sequences);
 * console.log(maskedFidelity(model.config, sequences, logits, logits).at(-1)!.kl.value); // 0 from itself
 * ```
 */
export function syntheticSequences(
  { vocabularySize, maskToken, padToken, bosToken, eosToken }: MaskedTransformerConfig,
  { sequences, tokens, seed = 0 }: {
    readonly sequences: number;
    readonly tokens: number;
    readonly seed?: number | undefined;
  },
): SyntheticSequence[] {
  const special = new Set([maskToken, padToken, bosToken, eosToken]);
  if (special.size >= vocabularySize) {
    throw new RangeError(
      `Cannot make sequences: the vocabulary must have ordinary tokens, got only ${vocabularySize} special ones`,
    );
  }
  return Array.from({ length: sequences }, (_, i) => {
    const random = new RandomStream(seed, i);
    const maskRatio = (i + 0.5) / sequences;
    const ordinary = () => {
      while (true) {
        const token = random.below(vocabularySize);
        if (!special.has(token)) return token;
      }
    };
    const ids = Int32Array.from({ length: tokens }, ordinary);
    const places = [...ids.keys()].filter(() => random.uniform() < maskRatio);
    if (places.length === 0) places.push(random.below(tokens));
    for (const place of places) ids[place] = maskToken;
    return { maskRatio, tokens: ids, places };
  });
}

/**
 * Logits at the masked positions, sequence after sequence.
 *
 * **Shapes** one `f32[masked positions, vocabulary]` a sequence
 */
export function maskedLogits(
  model: MaskedTransformer,
  sequences: readonly SyntheticSequence[],
): Float32Array<ArrayBuffer>[] {
  return sequences.map(({ tokens, places }) => {
    const rows = Int32Array.from(places, (place) => model.logitRow(place, tokens.length));
    return Float32Array.from(model.forward(tokens, 1, { rows }));
  });
}

/** How near two models' distributions are, for a range of mask ratios. */
export interface MaskedFidelity {
  /** Mask ratios (low, high]. */
  readonly low: number;
  readonly high: number;
  readonly sequences: number;
  readonly positions: number;
  /** Mean over masked positions of KL(full ‖ other), in nats. */
  readonly kl: Interval;
  /** Share of masked positions at which both have the same most probable token. */
  readonly agreement: Interval;
}

/**
 * KL divergence from full precision, and agreement of the most probable token, by mask ratio; the last entry is over all. The mask has
 * probability 0, as in generation. Intervals are of a bootstrap over sequences.
 *
 * **Shapes** `full` and `other`: as {@linkcode maskedLogits} gives them
 */
export function maskedFidelity(
  { vocabularySize, maskToken }: MaskedTransformerConfig,
  sequences: readonly SyntheticSequence[],
  full: readonly Float32Array[],
  other: readonly Float32Array[],
  { bins = 4, ...bootstrap }: BootstrapOptions & { readonly bins?: number } = {},
): MaskedFidelity[] {
  const [p, q] = [new Float64Array(vocabularySize), new Float64Array(vocabularySize)];
  const measured = sequences.map(({ maskRatio, places }, s) => {
    let kl = 0, agreed = 0;
    for (let row = 0; row < places.length; row++) {
      const best = logSoftmax(full[s]!, row * vocabularySize, maskToken, p);
      if (logSoftmax(other[s]!, row * vocabularySize, maskToken, q) === best) agreed++;
      for (let i = 0; i < p.length; i++) if (i !== maskToken) kl += Math.exp(p[i]!) * (p[i]! - q[i]!);
    }
    return { maskRatio, positions: places.length, kl, agreed };
  });
  const summary = (low: number, high: number): MaskedFidelity[] => {
    const part = measured.filter(({ maskRatio }) => maskRatio > low && maskRatio <= high);
    if (part.length === 0) return [];
    const positions = part.map((each) => each.positions);
    const ratio = (key: "kl" | "agreed") =>
      bootstrapRatio(part.map((each) => each[key]), positions, bootstrap);
    return [{
      low,
      high,
      sequences: part.length,
      positions: positions.reduce((sum, count) => sum + count, 0),
      kl: ratio("kl"),
      agreement: ratio("agreed"),
    }];
  };
  return [
    ...Array.from({ length: bins }, (_, i) => summary(i / bins, (i + 1) / bins)).flat(),
    ...summary(0, 1),
  ];
}

/** Log-probabilities of a row of logits without one token; returns the most probable. */
function logSoftmax(logits: Float32Array, begin: number, excluded: number, out: Float64Array): number {
  let best = excluded === 0 ? 1 : 0;
  for (let i = 0; i < out.length; i++) {
    out[i] = logits[begin + i]!;
    if (i !== excluded && out[i]! > out[best]!) best = i;
  }
  let sum = 0;
  const largest = out[best]!;
  for (let i = 0; i < out.length; i++) if (i !== excluded) sum += Math.exp(out[i]! - largest);
  const offset = largest + Math.log(sum);
  for (let i = 0; i < out.length; i++) out[i]! -= offset;
  return best;
}

// Image models ---------------------------------------------------------------------------------------------------

export interface TrajectoryOptions {
  readonly images: number;
  readonly steps: number;
  /** Images of one forward pass. Default 16. */
  readonly batch?: number | undefined;
  readonly seed?: number | undefined;
}

/** A model's trajectory and what it predicted on the way. */
export interface Trajectory {
  readonly drawn: DrawnImages;
  readonly timesteps: readonly number[];
  /** `f32[images, elements]` a step: predictions at full precision's states. */
  readonly predictions: readonly Float32Array<ArrayBuffer>[];
}

/**
 * Draws with a model by DDIM, then lets it predict at each state of full precision's trajectory - its own, when none is given.
 *
 * @param full full precision's, with the same options
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 * import { loadDit, loadScheduler } from "../../models/mod.ts";
 * import { trajectoryFidelity, trajectoryOf } from "./fidelity.ts";
 * const model = loadDit("tests/models/glyph-dit", await openKernels());
 * const full = trajectoryOf(model, loadScheduler("tests/models/glyph-dit"), { images: 2, steps: 3 });
 * console.log(trajectoryFidelity(full, full).drift.at(-1)!.relativeDistance.value); // 0 from itself
 * ```
 */
export function trajectoryOf(
  model: DitModel,
  scheduler: Scheduler,
  { images, steps, batch = 16, seed = 0 }: TrajectoryOptions,
  full?: Trajectory,
): Trajectory {
  const drawn = drawImages(model, scheduler, images, {
    sampler: "ddim",
    steps,
    batch,
    seed,
    trajectory: true,
  });
  const timesteps = [...scheduler.timesteps(steps)];
  const states = (full?.drawn ?? drawn).trajectory!;
  const { elements, labels } = drawn;
  const predictions = timesteps.map((timestep, step) => {
    const own = new Float32Array(images * elements);
    for (let begin = 0; begin < images; begin += batch) {
      const count = Math.min(batch, images - begin);
      const samples = states[step]!.subarray(begin * elements, (begin + count) * elements);
      const times = new Array<number>(count).fill(timestep);
      const output = model.forward(samples, times, labels.subarray(begin, begin + count));
      const width = output.length / count; // a learned variance follows the prediction
      for (let i = 0; i < count; i++) {
        own.set(output.subarray(i * width, i * width + elements), (begin + i) * elements);
      }
    }
    return own;
  });
  return { drawn, timesteps, predictions };
}

/** How near a trajectory stays to full precision's. */
export interface TrajectoryFidelity {
  /** ‖ε̂ − ε‖² / ‖ε‖² at the states of full precision's trajectory, by timestep. */
  readonly byTimestep: readonly TimestepError[];
  /** ‖x̂ − x‖² / ‖x‖² of the free-running trajectories after each step. */
  readonly drift: readonly StepDrift[];
}

/** Errors of predictions at the same states and drift of the trajectory, against full precision's; intervals by a bootstrap over images. */
export function trajectoryFidelity(
  full: Trajectory,
  other: Trajectory,
  bootstrap: BootstrapOptions = {},
): TrajectoryFidelity {
  const { elements, labels: { length: images } } = full.drawn;
  const byTimestep = full.timesteps.map((timestep, step): TimestepError => {
    const wanted = full.predictions[step]!, got = other.predictions[step]!;
    const errors = new Float64Array(images), norms = new Float64Array(images);
    for (let i = 0; i < wanted.length; i++) {
      const image = Math.floor(i / elements);
      errors[image]! += (got[i]! - wanted[i]!) ** 2;
      norms[image]! += wanted[i]! ** 2;
    }
    return {
      timestep,
      images,
      relativeError: bootstrapRatio(errors, norms, bootstrap),
      perImage: errors.map((error, i) => error / norms[i]!),
    };
  });
  return { byTimestep, drift: trajectoryDrift(full.drawn, other.drawn, bootstrap) };
}
