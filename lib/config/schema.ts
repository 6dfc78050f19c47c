/**
 * The schema of the configuration: one typed row a key, and the object that they make. The compiler checks
 * that both have the same keys and types; parsing, overrides, `formatConfig` and docs/configuration.md are
 * derived from the rows.
 */
import {
  boolean,
  choice,
  integer,
  integerOf,
  type Kind,
  layerBits,
  layerTypes,
  list,
  number,
  orNull,
  positive,
  text,
} from "./kinds.ts";
import {
  type BackendChoice,
  BACKENDS,
  type BitWidth,
  CODES,
  type Codes,
  type Effort,
  EFFORTS,
  type GridKind,
  type GroupSize,
  type LayerBits,
  MOMENT_BLOCKS,
  MOMENT_STRUCTURES,
  type MomentBlockSize,
  type MomentStructure,
  type ScaleBits,
  type SolverChoice,
  SOLVERS,
} from "./names.ts";
import { GRIDS, TARGETS } from "./targets.ts";

/** Named set of `bit_width`, `num_time_groups` and `group_size`. */
export type DeploymentProfile = "edge" | "local" | "cloud";

/** The effective configuration, deeply frozen. Each field's meaning stands in docs/configuration.md. */
export interface Config {
  readonly deploymentProfile: DeploymentProfile | null;
  readonly bitWidth: BitWidth;
  readonly groupSize: GroupSize;
  /** 4 and 6: two-level scales. */
  readonly scaleBits: ScaleBits | 16;
  readonly codes: Codes;
  readonly numTimeGroups: number;
  readonly solver: SolverChoice;
  readonly calibrationData: string | null;
  readonly calibrationSamples: number | null;
  readonly calibrationSeed: number;
  readonly calibrationMode: "blocks" | "once";
  readonly selfCalibration: {
    readonly records: number | null;
    readonly tokens: number;
    readonly steps: number | null;
  };
  readonly solverOptions: {
    readonly damping: number;
    readonly effort: Effort;
    readonly rounds: number | null;
    readonly refit: boolean;
    readonly correction: number;
    readonly residualCorrection: number;
    readonly moment: MomentStructure | "auto";
    readonly momentBlock: MomentBlockSize;
    readonly candidates: number | null;
  };
  readonly zeroPoint: GridKind;
  readonly minAccuracy: number;
  readonly embeddingBits: LayerBits | null;
  readonly headBits: LayerBits | null;
  readonly layerBitWidths: Readonly<Record<string, LayerBits>>;
  readonly skipSensitiveLayers: boolean;
  readonly sensitiveLayerNames: readonly string[];
  readonly sensitiveLayerPatterns: readonly string[];
  readonly keepPatterns: readonly string[];
  readonly nonFinite: "fail" | "keep";
  readonly failFast: boolean;
  readonly backend: BackendChoice;
  readonly numThreads: number;
  readonly modality: "auto" | "text" | "image";
  readonly enableTimeAware: boolean;
  readonly timeGroups: "equal" | "adaptive";
  readonly activationBits: 4 | 8;
  readonly perTokenLimit: number | null;
  readonly outputCorrection: boolean;
  readonly timeScales: "shared" | "per_group";
  readonly samplerCorrection: boolean;
  readonly target: string | null;
  readonly targetType: string | null;
  readonly layerTypes: Readonly<Record<string, string>>;
  readonly targetModelSizeMb: number | null;
  readonly targetBitsPerWeight: number | null;
  readonly bitPlan: string | null;
  readonly thermodynamic: {
    readonly validation: {
      readonly enabled: boolean;
      readonly smoothnessThreshold: number;
      readonly logViolations: boolean;
    };
    readonly boundarySmoothing: {
      readonly enabled: boolean;
      readonly windowSize: number;
      readonly interpolation: "linear" | "cubic" | "sigmoid";
    };
    readonly transitionOptimization: {
      readonly enabled: boolean;
      readonly timeWeights: "auto" | "none" | "ddpm" | "ddim";
      readonly markovWeight: number;
      readonly entropyWeight: number;
      readonly learningRate: number | null;
      readonly maxIterations: number | null;
      readonly maxMinutes: number;
      readonly convergenceThreshold: number;
      readonly betaSchedule: "auto" | "linear" | "cosine";
    };
  };
}

/** A row of the schema. */
interface KeyOf<V> {
  readonly kind: Kind<V>;
  readonly default: V;
  readonly description: string;
  readonly unit?: string;
  /** Accepted and validated, without effect. */
  readonly later?: true;
  /** At its default it does not stand among the settings of an output. */
  readonly silent?: true;
  /** Never changes a byte of the output: results do not depend on it, or it acts only through other keys. */
  readonly neutral?: true;
}

/** A name in snake case. */
type Snake<S extends string> = S extends `${infer First}${infer Rest}`
  ? `${First extends Lowercase<First> ? First : `_${Lowercase<First>}`}${Snake<Rest>}`
  : S;

/** Every key path of a configuration with the type of its value. */
type Entries<T, Prefix extends string = ""> = {
  [K in keyof T & string]: T[K] extends Readonly<Record<string, unknown>>
    ? string extends keyof T[K] ? [`${Prefix}${Snake<K>}`, T[K]] : Entries<T[K], `${Prefix}${Snake<K>}.`>
    : [`${Prefix}${Snake<K>}`, T[K]];
}[keyof T & string];

type Rows = { readonly [E in Entries<Config> as E[0]]: KeyOf<E[1]> };

const key = <V>(
  kind: Kind<V>,
  value: NoInfer<V>,
  more: Pick<KeyOf<V>, "unit" | "later" | "neutral" | "silent"> = {},
) => ({ means: (description: string): KeyOf<V> => ({ kind, default: value, description, ...more }) });

/** Every key, in the order in which it is printed; the keys of one section stand together. */
const ROWS: Rows = {
  deployment_profile: key(orNull(choice("edge", "local", "cloud")), null, { neutral: true }).means(
    "Sets `bit_width`, `num_time_groups`, `group_size`: edge 2, 5, 256; local 4, 10, 128; cloud 8, 20, " +
      "64. A key set anywhere else wins",
  ),
  bit_width: key(integerOf(2, 3, 4, 8), 4, { unit: "bits" }).means("Bits of a quantized weight"),
  group_size: key(integerOf(0, 16, 32, 64, 128, 256), 64, { unit: "weights" }).means(
    "Consecutive weights of a row that share a scale; 0 is a whole row. With two-level scales 16, 32, " +
      "64 or 128; where it is not set, 16 for 2 and 3 bits, 32 for 4 and 8",
  ),
  scale_bits: key(integerOf(0, 3, 4, 6, 16), 16, { unit: "bits" }).means(
    "16: a half-precision scale and zero point for each group. 4 and 6: two-level scales, codes of 4 or " +
      "6 bits under half-precision scales for every 256 weights of a row, as in ggml's Q2_K and Q4_K; " +
      "they need `zero_point` real. 3, with `codes` trellis alone: a group's scale is one of eight, and it " +
      "has no offset, for the least bits of short rows or small groups. 0, with trellis codes and `group_size` 0: " +
      "one scale a tensor, whose weights are rotated on both sides, where rows have at most 1600 weights and a " +
      "power of two of at least 32 divides both sides",
  ),
  codes: key(choice(...CODES), "uniform").means(
    "`uniform`: evenly spaced levels, the same for every weight. `trellis`: the level of a weight of 2 or 3 bits " +
      "depends on the codes before it as well, at the same size; layers of other bits and tables of tokens " +
      "stay uniform. It needs solver `best` or `auto`, and `zero_point` real",
  ),
  num_time_groups: key(integer(1, 100), 10).means(
    "Time groups of the timesteps or mask ratios, when a phase is enabled and in saved calibration " +
      "statistics",
  ),
  solver: key(choice("auto", ...SOLVERS), "auto").means(
    "How codes and scales are chosen: `round` to nearest; `clip` search with least squares; on " +
      "calibration data `feedback` (error feedback), or `best`, which adds refits, coordinate descent and " +
      "corrected targets. `auto`: 8 bits `round`; fewer `best` where the model can run here, otherwise " +
      "`clip` for language models and `round` for others; a run says which and why",
  ),
  calibration_data: key(orNull(text), null).means(
    "File of calibration data, JSONL or safetensors; or `self`, what the model makes with its own sampler; or " +
      "`synthetic`; or files of saved statistics or importance matrices of llama.cpp, separated by commas. By default the file beside the " +
      "checkpoint, `self` where there is none",
  ),
  calibration_samples: key(orNull(integer(32, 1024)), null, { unit: "samples" }).means(
    "Sequences or noised images to solve on; records are masked or noised again when there are fewer; null is 512, " +
      "or what bounded work allows, at least 4096 positions or 64 images",
  ),
  calibration_seed: key(integer(0, 2 ** 31 - 1), 0).means("Seed of masks, noise and the choice of records"),
  calibration_mode: key(choice("blocks", "once"), "blocks").means(
    "Where the inputs of a layer come from: `blocks`, the quantized layers before it; `once`, the " +
      "full-precision model",
  ),
  "self_calibration.records": key(orNull(integer(8, 4096)), null, { unit: "records" }).means(
    "With `self`: sequences that a language model writes, or images that an image model draws; null is 512 or " +
      "128, or what bounded work allows",
  ),
  "self_calibration.tokens": key(integer(8, 2048), 128, { unit: "tokens" }).means(
    "With `self`: tokens of the longest sequences",
  ),
  "self_calibration.steps": key(orNull(integer(1, 1000)), null, { unit: "steps" }).means(
    "With `self`: steps of the sampler; null is 32, or what bounded work allows",
  ),
  "solver_options.damping": key(positive(10), 0.01).means(
    "Share of the mean diagonal of a second moment that is added to its diagonal",
  ),
  "solver_options.effort": key(choice(...EFFORTS), "medium").means(
    "How many ranges `best` tries and refines, how often, and how many candidates it solves",
  ),
  "solver_options.rounds": key(orNull(integer(0, 100)), null).means(
    "Rounds of refits and coordinate descent of `best`; null: by the effort",
  ),
  "solver_options.refit": key(boolean, true).means("Whether `best` refits scales and zero points"),
  "solver_options.correction": key(number(0, 1), 1).means(
    "Share of the error of earlier layers that `best` corrects in a layer's target",
  ),
  "solver_options.residual_correction": key(number(0, 1), 1).means(
    "The same for the error of the residual stream to which the output of a layer is added",
  ),
  "solver_options.candidates": key(orNull(integer(1, 4)), null).means(
    "Settings that `best` tries on the whole model; the held-out error selects one. null: 2, and 1 with `effort: low` " +
      "or, with `effort: medium`, for more than 67 million weights",
  ),
  "solver_options.moment": key(choice("auto", ...MOMENT_STRUCTURES), "auto").means(
    "What is kept of the second moment of a layer's inputs: all of it; the blocks of columns on its diagonal, which " +
      "take less memory and time; the diagonal alone. auto: `full` up to 8192 columns, where memory and calibration " +
      "positions suffice, else `block`",
  ),
  "solver_options.moment_block": key(integerOf(...MOMENT_BLOCKS), 1024, { unit: "columns" }).means(
    "Columns of a block of a moment; at least those of a group",
  ),
  zero_point: key(choice("real", "integer", "symmetric", "offset"), "real").means(
    "Zero point of a group: any real number, an integer code, or fixed in the middle of the codes. `offset`: " +
      "weights are scale · code + offset, both half floats, as MLX and ggml's Q4_1 store them; groups of 16 to 128",
  ),
  min_accuracy: key(number(0, 1), 0).means(
    "Smallest cosine between a tensor and its quantized form; below it the tensor is quantized again " +
      "with 3, 4, then 8 bits. 0: never",
  ),
  embedding_bits: key(orNull(integerOf(2, 3, 4, 8, 16)), null, { unit: "bits" }).means(
    "Bits of the token embedding; 16 keeps it as it is. null: 4 with `bit_width` 2 and 3, else 8, for a table of " +
      "65,536 weights or more and `zero_point` real or offset; otherwise 16",
  ),
  head_bits: key(orNull(integerOf(2, 3, 4, 8, 16)), null, { unit: "bits" }).means(
    "Bits of the layer that scores tokens, also where it is the embedding; 16 keeps it as it is. null: 8 " +
      "for a layer of 65,536 weights or more and `zero_point` real or offset; otherwise 16",
  ),
  layer_bit_widths: key(layerBits, {}).means(
    "Bits for single tensors, by name or pattern; 16 keeps the tensor as it is. A tensor's own name " +
      "(with or without `.weight`) wins over patterns, and of several patterns the one with most bits",
  ),
  skip_sensitive_layers: key(boolean, false).means(
    "Keep the tensors named by the two keys below as they are",
  ),
  sensitive_layer_names: key(list(false), []).means("Names of sensitive tensors, with or without `.weight`"),
  sensitive_layer_patterns: key(list(true), []).means("Patterns of the names of sensitive tensors"),
  keep_patterns: key(list(true), []).means(
    "Patterns of the names of tensors that are always kept as they are",
  ),
  non_finite: key(choice("fail", "keep"), "fail").means(
    "A tensor that holds NaN or infinity, kept ones included: stop with an error, or store it " +
      "unquantized",
  ),
  fail_fast: key(boolean, false, { neutral: true }).means(
    "Stop at the first tensor that fails instead of reporting all of them",
  ),
  backend: key(choice(...BACKENDS), "auto", { neutral: true }).means(
    "Where kernels run: on a GPU if there is one; only on a GPU; on the CPU, by its native library or " +
      "WebAssembly; only one of these two",
  ),
  num_threads: key(integer(0, 64), 0, { unit: "threads", neutral: true }).means(
    "Threads of the kernels; 0 is one per core",
  ),
  modality: key(choice("auto", "text", "image"), "auto", { later: true }).means(
    "Accepted and ignored: the checkpoint says what the model generates",
  ),
  enable_time_aware: key(boolean, true).means(
    "When a phase is enabled: static activation quantization by time group, stored beside the model as " +
      "`time_parameters.safetensors`",
  ),
  activation_bits: key(integerOf(4, 8), 8, { unit: "bits" }).means(
    "With `enable_time_aware`: bits of static and of per-token dynamic activation quantization",
  ),
  time_groups: key(choice("equal", "adaptive"), "equal").means(
    "With `enable_time_aware`: time groups of equal width, or with boundaries where the layers' inputs " +
      "change, kept if the held-out step KL falls",
  ),
  per_token_limit: key(orNull(number(1, 100)), 1.05).means(
    "With `enable_time_aware`: dynamic per-token activation quantization for the layers that lose most " +
      "with static ranges, until the held-out step KL is at most this many times that of dynamic " +
      "quantization everywhere; null keeps static ranges for all",
  ),
  output_correction: key(boolean, false).means(
    "With `enable_time_aware`: a gain and a bias for each output and time group in closed form, under " +
      "`markov_weight`, kept if the held-out step KL falls",
  ),
  time_scales: key(choice("shared", "per_group"), "shared").means(
    "With `enable_time_aware`: weight scales for each time group over shared codes, kept if the " +
      "held-out step KL falls; not with `output_correction`",
  ),
  sampler_correction: key(boolean, false).means(
    "With `enable_time_aware`, image models: correct the sampler's steps for gain, bias and noise " +
      "variance of quantized predictions, kept if the held-out step KL falls",
  ),
  target: key(orNull(choice(...Object.keys(TARGETS))), null, { silent: true }).means(
    "Program that the result is for: groups, scales and zero points are such that its files hold the " +
      "weights exactly (docs/interop.md)",
  ),
  target_type: key(orNull(choice(...Object.keys(GRIDS))), null, { silent: true }).means(
    "Type of the target for layers of `bit_width`; null chooses by the bits",
  ),
  layer_types: key(layerTypes, {}, { silent: true }).means(
    "Types of the target for single tensors, by name or pattern, also for embeddings and heads",
  ),
  target_model_size_mb: key(orNull(positive(1e9)), null, { unit: "MB" }).means(
    "Largest size of the quantized model, all tensors together; bits are chosen by layer; needs " +
      "calibration data",
  ),
  target_bits_per_weight: key(orNull(number(2, 16)), null, { unit: "bits" }).means(
    "Most bits per weight of all quantized layers together, every stored byte counted; bits and group " +
      "sizes are chosen by layer; needs calibration data",
  ),
  bit_plan: key(orNull(text), null).means(
    "File of bits and group sizes by layer, in the form in which a budget's plan is saved",
  ),
  "thermodynamic.validation.enabled": key(boolean, false).means(
    "Phase 1: report jumps between neighbouring time groups, and the held-out step KL of each; needs " +
      "calibration data",
  ),
  "thermodynamic.validation.smoothness_threshold": key(number(0, 1), 0.3).means(
    "Relative jump above which a boundary is a violation",
  ),
  "thermodynamic.validation.log_violations": key(boolean, true).means("Log each violation"),
  "thermodynamic.boundary_smoothing.enabled": key(boolean, false).means(
    "Phase 2: blend the time parameters across boundaries where held-out errors do not rise; needs " +
      "calibration data",
  ),
  "thermodynamic.boundary_smoothing.window_size": key(integer(1, 1000), 5, { unit: "timesteps" }).means(
    "Distance from a boundary within which parameters blend",
  ),
  "thermodynamic.boundary_smoothing.interpolation": key(choice("linear", "cubic", "sigmoid"), "linear").means(
    "Shape of the blend",
  ),
  "thermodynamic.transition_optimization.enabled": key(boolean, false).means(
    "Phase 3: codes by `best` (or by `feedback`, if that is the solver), then gradient refinement of " +
      "scales, zero points and biases on the step KL, kept if it falls on held-out data; needs " +
      "calibration data",
  ),
  "thermodynamic.transition_optimization.time_weights": key(choice("auto", "none", "ddpm", "ddim"), "auto")
    .means(
      "Weights of calibration samples by timestep when codes are solved: the KL of the DDPM step, or the " +
        "squared displacement of the DDIM step; in masked diffusion both are the probability of writing a " +
        "position. Kept if the held-out error falls. auto is ddpm for image models, none for language " +
        "models",
    ),
  "thermodynamic.transition_optimization.markov_weight": key(number(0, 100), 0.1).means(
    "Weight of the Gauss-Markov prior on output corrections of neighbouring time groups, relative to " +
      "the data term; with `output_correction` also of the Markov term of the refinement's loss, which " +
      "then has a bias for each output and time group",
  ),
  "thermodynamic.transition_optimization.entropy_weight": key(number(0, 100), 0).means(
    "Initial temperature of the annealing of codes by `best` and of the entropy term of the " +
      "refinement's loss, in squared quantization steps; 0 for neither; kept if the held-out error falls",
  ),
  "thermodynamic.transition_optimization.learning_rate": key(orNull(positive(1)), null).means(
    "Step size of the gradient refinement; null is 0.01 for language models, 0.002 for image models",
  ),
  "thermodynamic.transition_optimization.max_iterations": key(orNull(integer(1, 100_000)), null, {
    unit: "iterations",
  }).means(
    "Most iterations of the gradient refinement; null is 300 for language models, 150 for image models",
  ),
  "thermodynamic.transition_optimization.max_minutes": key(positive(100_000), 60, { unit: "minutes" }).means(
    "Time of the gradient refinement. Before the first step it says how many are expected to fit, with how many " +
      "held-out samples, and is left out where none does; it ends with the best parameters so far. What does not reach it is the same in every run",
  ),
  "thermodynamic.transition_optimization.convergence_threshold": key(positive(1), 1e-4).means(
    "Relative change of the loss below which the refinement has converged",
  ),
  "thermodynamic.transition_optimization.beta_schedule": key(choice("auto", "linear", "cosine"), "auto")
    .means(
      "Noise schedule of Gaussian diffusion behind `time_weights`; auto takes the model's. Masked " +
        "diffusion has the same weights with any",
    ),
};

/** A key of the configuration. */
export interface Key extends KeyOf<unknown> {
  /** Its path, as in `thermodynamic.validation.enabled`. */
  readonly key: string;
}

/** Every key, in the order in which it is printed. */
export const SCHEMA: readonly Key[] = Object.entries(ROWS).map(([key, row]) => ({
  key,
  ...row as KeyOf<unknown>,
}));

/** Keys that are accepted and validated but have no effect. */
export const LATER_KEYS: readonly string[] = Object.freeze(SCHEMA.filter((k) => k.later).map((k) => k.key));

export const ENVIRONMENT_PREFIX = "ARROW_QUANT_";

/** The variable that sets a key: prefix, then the path in capitals with its dots turned into underscores. */
export function environmentName(key: string): string {
  return ENVIRONMENT_PREFIX + key.replaceAll(".", "_").toUpperCase();
}

/** Names of the fields of {@linkcode Config} that lead to a key. */
export function fieldPath(key: string): string[] {
  return key.split(".").map((name) => name.replace(/_(.)/g, (_, letter: string) => letter.toUpperCase()));
}

/** The value of a key. */
export function valueAt(config: Config, key: string): unknown {
  return fieldPath(key).reduce<unknown>((value, name) => (value as Record<string, unknown>)[name], config);
}
