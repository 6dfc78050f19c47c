/**
 * The schema of the configuration: kinds of values, how each is read from YAML or text and checked, and one row a key.
 *
 * Nothing here knows files, layers or the typed `Config`; that is config.ts.
 */

import { BACKENDS } from "./backends.ts";

/** Most entries of a list or map; more than any checkpoint known has layers. */
const MAX_ITEMS = 4096;
/** Longest name or pattern: a pattern is run against every tensor name, and longer ones are accidents. */
export const MAX_NAME_LENGTH = 256;
export const ENVIRONMENT_PREFIX = "ARROW_QUANT_";

// Kinds of values ----------------------------------------------------------------------------------------------

/** Notes a fault; `at` is added to the key path, `expected` replaces the kind's own text. */
type Reject = (value: unknown, at?: string, expected?: string) => void;

export interface Kind {
  readonly type: string;
  readonly allowed: string;
  /** Text of a variable or option to a value; text that does not convert comes back as it is, for `check` to reject. */
  fromText(text: string): unknown;
  /** The value as the configuration holds it; meaningless if `reject` was called. */
  check(value: unknown, reject: Reject): unknown;
}

const NUMBER_TEXT = /^[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?$/i;
const numberFromText = (text: string): unknown => NUMBER_TEXT.test(text) ? Number(text) : text;

function jsonFromText(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return text; // `check` rejects it and shows the text itself
  }
}

function numberKind(type: "integer" | "number", allowed: string, accepts: (value: number) => boolean): Kind {
  return {
    type,
    allowed,
    fromText: numberFromText,
    check(value, reject) {
      const ok = typeof value === "number" && Number.isFinite(value) && accepts(value) &&
        (type === "number" || Number.isInteger(value));
      if (!ok) return reject(value);
      return value + 0; // -0 becomes 0
    },
  };
}

const integer = (min: number, max: number): Kind =>
  numberKind("integer", `${min} to ${max}`, (v) => v >= min && v <= max);
const integerOf = (...choices: number[]): Kind =>
  numberKind("integer", `one of ${choices.join(", ")}`, (v) => choices.includes(v));
const number = (min: number, max: number): Kind =>
  numberKind("number", `${min} to ${max}`, (v) => v >= min && v <= max);
const positive = (max: number): Kind =>
  numberKind("number", `above 0, at most ${max}`, (v) => v > 0 && v <= max);

const BOOLEAN_TEXTS: ReadonlyMap<string, boolean> = new Map([
  ["true", true],
  ["1", true],
  ["false", false],
  ["0", false],
]);

const boolean: Kind = {
  type: "boolean",
  allowed: "true or false",
  fromText: (text) => BOOLEAN_TEXTS.get(text) ?? text,
  check: (value, reject) => typeof value === "boolean" ? value : reject(value),
};

const choice = (...choices: string[]): Kind => ({
  type: "string",
  allowed: `one of ${choices.join(", ")}`,
  fromText: (text) => text,
  check: (value, reject) => typeof value === "string" && choices.includes(value) ? value : reject(value),
});

/** Longest path. */
const MAX_PATH_LENGTH = 4096;

const text: Kind = {
  type: "text",
  allowed: `1 to ${MAX_PATH_LENGTH} characters`,
  fromText: (text) => text,
  check: (value, reject) =>
    typeof value === "string" && value.length > 0 && value.length <= MAX_PATH_LENGTH ? value : reject(value),
};

const orNull = (kind: Kind): Kind => ({
  type: `${kind.type} or null`,
  allowed: kind.allowed,
  fromText: (text) => text === "" || text === "null" ? null : kind.fromText(text),
  check: (value, reject) => value === null ? null : kind.check(value, reject),
});

function checkName(value: unknown, isPattern: boolean, at: string, reject: Reject): void {
  if (typeof value !== "string" || value.length === 0 || value.length > MAX_NAME_LENGTH) {
    return reject(value, at, `text of 1 to ${MAX_NAME_LENGTH} characters`);
  }
  if (!isPattern) return;
  try {
    compilePattern(value);
  } catch (error) {
    // Engines put the pattern into the message; the reason stands behind the last colon.
    const reason = (error as Error).message.split(": ").at(-1);
    reject(value, at, `a JavaScript regular expression, flag u (${reason})`);
  }
}

const list = (isPattern: boolean): Kind => ({
  type: `list of ${isPattern ? "patterns" : "names"}`,
  allowed: `at most ${MAX_ITEMS}, each of 1 to ${MAX_NAME_LENGTH} characters`,
  fromText(text) {
    if (text.trimStart().startsWith("[")) return jsonFromText(text);
    return text.trim() === "" ? [] : text.split(",").map((item) => item.trim());
  },
  check(value, reject) {
    if (!Array.isArray(value) || value.length > MAX_ITEMS) return reject(value);
    value.forEach((item, i) => checkName(item, isPattern, `[${i}]`, reject));
    return [...value];
  },
});

const layerBits: Kind = {
  type: "map of pattern to bits",
  allowed: `bits one of 2, 3, 4, 8, 16; at most ${MAX_ITEMS} entries`,
  fromText: jsonFromText,
  check(value, reject) {
    if (!isMapping(value) || Object.keys(value).length > MAX_ITEMS) return reject(value);
    for (const [name, bits] of Object.entries(value)) {
      const at = `[${quoted(name.slice(0, MAX_NAME_LENGTH))}]`;
      checkName(name, true, at, (_, __, expected) => reject(name, at, expected));
      integerOf(2, 3, 4, 8, 16).check(bits, () => reject(bits, at, "one of 2, 3, 4, 8, 16"));
    }
    return Object.fromEntries(Object.entries(value)); // own properties only, `__proto__` included
  },
};

// Schema -------------------------------------------------------------------------------------------------------

export interface Key {
  readonly key: string;
  readonly kind: Kind;
  readonly default: unknown;
  readonly description: string;
  readonly unit?: string;
  /** Accepted and validated, without effect in this version. */
  readonly later?: true;
  /** Never changes a byte of the output: results do not depend on it, or it acts only through other keys. */
  readonly neutral?: true;
}

const VALIDATION = "thermodynamic.validation";
const SMOOTHING = "thermodynamic.boundary_smoothing";
const TRANSITION = "thermodynamic.transition_optimization";

const row = (
  key: string,
  kind: Kind,
  value: unknown,
  description: string,
  more: Pick<Key, "unit" | "later" | "neutral"> = {},
): Key => ({ key, kind, default: value, description, ...more });

/** Every key, in the order in which it is printed; the keys of one section stand together. */
export const SCHEMA: readonly Key[] = [
  row(
    "deployment_profile",
    orNull(choice("edge", "local", "cloud")),
    null,
    "Sets `bit_width`, `num_time_groups`, `group_size`: edge 2, 5, 256; local 4, 10, 128; cloud 8, 20, " +
      "64. A key set anywhere else wins",
    { neutral: true },
  ),
  row("bit_width", integerOf(2, 3, 4, 8), 4, "Bits of a quantized weight", { unit: "bits" }),
  row(
    "group_size",
    integerOf(0, 16, 32, 64, 128, 256),
    64,
    "Consecutive weights of a row that share a scale; 0 is a whole row. With two-level scales 16, 32, 64 or 128; " +
      "where it is not set, 16 for 2 and 3 bits, 32 for 4 and 8",
    { unit: "weights" },
  ),
  row(
    "scale_bits",
    integerOf(4, 6, 16),
    16,
    "16: a half-precision scale and zero point for each group. 4 and 6: two-level scales, codes of so many bits under " +
      "half-precision ones for every 256 weights of a row, as ggml's Q2_K and Q4_K; they need `zero_point` real",
    { unit: "bits" },
  ),
  row(
    "num_time_groups",
    integer(1, 100),
    10,
    "Groups into which timesteps or mask ratios are divided, when a phase is enabled and in saved calibration statistics",
  ),
  row(
    "solver",
    choice("clip", "round", "feedback", "best"),
    "clip",
    "How codes and scales are chosen: round to nearest; clip search with least squares; and on calibration data error feedback, or " +
      "that with refits, descent and corrected targets",
  ),
  row(
    "calibration_data",
    orNull(text),
    null,
    "File of calibration data, JSONL or safetensors, or `synthetic`; or of saved statistics, several with commas between them; " +
      "by default what lies beside the checkpoint",
  ),
  row(
    "calibration_samples",
    integer(32, 1024),
    512,
    "Sequences or noised images that are solved on; records are masked or noised again when there are fewer",
    { unit: "samples" },
  ),
  row("calibration_seed", integer(0, 2 ** 31 - 1), 0, "Seed of masks, noise and the choice of records"),
  row(
    "calibration_mode",
    choice("blocks", "once"),
    "blocks",
    "Inputs of a layer: as the quantized layers before it make them, or all as full precision does",
  ),
  row("solver_options.damping", positive(10), 0.01, "Part of a moment's mean diagonal that is added to it"),
  row("solver_options.rounds", integer(0, 100), 4, "Times that `best` refits scales and descends over codes"),
  row("solver_options.refit", boolean, true, "Whether `best` refits scales and zero points"),
  row(
    "solver_options.correction",
    number(0, 1),
    1,
    "How much of the error made before a layer `best` lets it undo",
  ),
  row(
    "solver_options.residual_correction",
    number(0, 1),
    1,
    "The same for the error of the stream that a layer's output is added to",
  ),
  row(
    "solver_options.candidates",
    integer(1, 4),
    2,
    "Settings that `best` tries on the whole model; the least held-out error decides",
  ),
  row(
    "solver_options.low_rank",
    numberKind("integer", "0, or 4 to 64", (v) => v === 0 || (v >= 4 && v <= 64)),
    0,
    "Rank of a correction A B, stored as half floats beside the codes of each layer that `feedback` or `best` solves; 0 for none",
  ),
  row(
    "solver_options.rotation",
    choice("none", "hadamard"),
    "none",
    "Whether `feedback` and `best` solve layers on inputs turned by a randomised Hadamard matrix, as the runtime then turns them",
  ),
  row(
    "zero_point",
    choice("real", "integer", "symmetric"),
    "real",
    "Zero point of a group: any real number, an integer code, or fixed in the middle",
  ),
  row(
    "min_accuracy",
    number(0, 1),
    0,
    "Least cosine between a tensor and its quantized form; below it the tensor is tried again with 3, " +
      "4, then 8 bits. 0 never falls back",
  ),
  row(
    "layer_bit_widths",
    layerBits,
    {},
    "Bits for single tensors, by name or pattern; 16 keeps the tensor as it is. A tensor's own name " +
      "(with or without `.weight`) wins over patterns, and of several patterns the one with most bits",
  ),
  row("skip_sensitive_layers", boolean, false, "Keep the tensors named by the two keys below as they are"),
  row("sensitive_layer_names", list(false), [], "Names of sensitive tensors, with or without `.weight`"),
  row("sensitive_layer_patterns", list(true), [], "Patterns of the names of sensitive tensors"),
  row("keep_patterns", list(true), [], "Patterns of the names of tensors that are always kept as they are"),
  row(
    "non_finite",
    choice("fail", "keep"),
    "fail",
    "A tensor that holds NaN or infinity, kept ones included: stop with an error, or store it unquantized",
  ),
  row(
    "fail_fast",
    boolean,
    false,
    "Stop at the first tensor that fails instead of reporting all of them",
    { neutral: true },
  ),
  row(
    "backend",
    choice(...BACKENDS),
    "auto",
    "What quantizes: a GPU if there is one; only a GPU; the CPU, by its native library or WebAssembly; only one of these two",
    { neutral: true },
  ),
  row(
    "num_threads",
    integer(0, 64),
    0,
    "Threads of the kernels; 0 is one per core",
    { unit: "threads", neutral: true },
  ),
  row(
    "modality",
    choice("auto", "text", "image"),
    "auto",
    "What the model generates; auto asks the checkpoint",
    { later: true },
  ),
  row(
    "enable_time_aware",
    boolean,
    true,
    "When a phase is enabled: write static 8-bit grids of activations per time group beside the model, as `time_parameters.safetensors`",
  ),
  row(
    "time_groups",
    choice("equal", "adaptive"),
    "equal",
    "With `enable_time_aware`: time groups of equal width, or with boundaries where the layers' inputs change, kept if the held-out step KL falls",
  ),
  row(
    "per_token_limit",
    orNull(number(1, 100)),
    1.05,
    "With `enable_time_aware`: layers take a grid of each token's own in place of static ones, those that gain most first, until the held-out step KL " +
      "is at most so many times that of such grids everywhere; null keeps static grids for all",
  ),
  row(
    "output_correction",
    boolean,
    false,
    "With `enable_time_aware`: a gain and a bias for each output and time group in closed form, under `markov_weight`, kept if the held-out step KL falls",
  ),
  row(
    "time_scales",
    choice("shared", "per_group"),
    "shared",
    "With `enable_time_aware`: weight scales of each time group's own over shared codes, kept if the held-out step KL falls; not with `output_correction`",
  ),
  row(
    "sampler_correction",
    boolean,
    false,
    "With `enable_time_aware`, image models: take gain, bias and noise variance of quantized predictions out of the sampler's steps, kept if the held-out step KL falls",
  ),
  row(
    "target_model_size_mb",
    orNull(positive(1e9)),
    null,
    "Size into which the quantized model has to fit, all its tensors together, by choosing bits per layer; needs calibration data",
    { unit: "MB" },
  ),
  row(
    "target_bits_per_weight",
    orNull(number(2, 16)),
    null,
    "Bits per weight that all quantized layers may take together, every stored byte counted, by choosing bits and group sizes " +
      "per layer; needs calibration data",
    { unit: "bits" },
  ),
  row("bit_plan", orNull(text), null, "File of bits and group sizes by layer, as a budget's plan is saved"),
  row(
    `${VALIDATION}.enabled`,
    boolean,
    false,
    "Phase 1: report jumps between neighbouring time groups, and the held-out step KL of each; needs calibration data",
  ),
  row(
    `${VALIDATION}.smoothness_threshold`,
    number(0, 1),
    0.3,
    "Relative jump above which a boundary is a violation",
  ),
  row(`${VALIDATION}.log_violations`, boolean, true, "Tell each violation"),
  row(
    `${SMOOTHING}.enabled`,
    boolean,
    false,
    "Phase 2: blend the time parameters across boundaries where held-out errors do not rise; needs calibration data",
  ),
  row(
    `${SMOOTHING}.window_size`,
    integer(1, 1000),
    5,
    "Distance from a boundary within which parameters blend",
    { unit: "timesteps" },
  ),
  row(
    `${SMOOTHING}.interpolation`,
    choice("linear", "cubic", "sigmoid"),
    "linear",
    "Shape of the blend",
  ),
  row(
    `${TRANSITION}.enabled`,
    boolean,
    false,
    "Phase 3: codes by `best` (or `feedback`, where that is the solver), then gradient refinement of scales, zero points and biases on the step KL, kept if it falls on held-out data; needs calibration data",
  ),
  row(
    `${TRANSITION}.time_weights`,
    choice("auto", "none", "ddpm", "ddim"),
    "auto",
    "Whether calibration samples count by what their step weighs when codes are solved: the KL of DDPM's step or the displacement of " +
      "DDIM's, of masked diffusion the probability of writing a position in both; kept if it helps on held-out data. auto is ddpm for " +
      "image models, none for language models",
  ),
  row(
    `${TRANSITION}.markov_weight`,
    number(0, 100),
    0.1,
    "Weight of the Gauss-Markov prior on output corrections of neighbouring time groups, relative to the data term",
  ),
  row(
    `${TRANSITION}.entropy_weight`,
    number(0, 100),
    0,
    "Temperature at which codes begin to be annealed by `best`, in squared steps of the grid; 0 does not; kept if it helps on held-out data",
  ),
  row(
    `${TRANSITION}.learning_rate`,
    positive(1),
    0.01,
    "Step size of the gradient refinement",
  ),
  row(
    `${TRANSITION}.max_iterations`,
    integer(1, 100_000),
    50,
    "Most iterations of the gradient refinement",
    { unit: "iterations" },
  ),
  row(
    `${TRANSITION}.convergence_threshold`,
    positive(1),
    1e-4,
    "Relative change of the loss below which the refinement has converged",
  ),
  row(
    `${TRANSITION}.beta_schedule`,
    choice("auto", "linear", "cosine"),
    "auto",
    "Noise schedule of Gaussian diffusion that `time_weights` are of; auto is the model's own. Masked diffusion has the same weights with any",
  ),
];

// Names and text -----------------------------------------------------------------------------------------------

/** The variable that sets a key: prefix, then the path in capitals with its dots turned into underscores. */
export function environmentName(key: string): string {
  return ENVIRONMENT_PREFIX + key.replaceAll(".", "_").toUpperCase();
}

/**
 * Compiles a name pattern: a JavaScript regular expression with flag `u`, found anywhere in a tensor's name.
 *
 * @throws {SyntaxError} If it does not compile.
 */
export function compilePattern(pattern: string): RegExp {
  return new RegExp(pattern, "u");
}

export function isMapping(value: unknown): value is Record<string, unknown> {
  if (typeof value !== "object" || value === null) return false;
  const prototype = Object.getPrototypeOf(value);
  return prototype === Object.prototype || prototype === null;
}

/** JSON text is YAML, except for characters that YAML does not allow unescaped. */
export function quoted(text: string): string {
  return JSON.stringify(text).replace(/[\u007f-\u009f\u2028\u2029\ufeff\ufffe\uffff]/g, escapeCharacter);
}

/** A character as `\u` and four digits, which JSON and YAML share. */
export const escapeCharacter = (c: string): string => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`;
