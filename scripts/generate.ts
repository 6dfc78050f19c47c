/** `generate.ts MODEL`: solves a puzzle, continues a text or draws images. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { ConfigError } from "../lib/errors.ts";
import { answerLength, isPuzzleVocabulary, puzzleCanvas } from "../lib/eval/puzzles.ts";
import { checkMemory, forecastMemory, forecastTime, memoryText, timeText } from "../lib/eval/forecast.ts";
import {
  ACTIVATION_PRECISIONS,
  type ActivationPrecision,
  type DitConfig,
  encodePng,
  forwardCost,
  type ForwardShape,
  imageSteps,
  keysWithoutMeaning,
  languageFamily,
  type LanguageKind,
  loadScheduler,
  loadTokenizer,
  type MaskedTransformerConfig,
  modelConfig,
  modelFrom,
  modelRequirements,
  type SamplerName,
  type StoredGeneration,
  storedGeneration,
  storedTimeParameters,
  tileImages,
  type Tokenizer,
  tokensWithoutText,
} from "../lib/models/mod.ts";
import { checkSamplingOptions } from "../lib/models/masked/token_sampling.ts";
import type { Kernels } from "../lib/native/mod.ts";
import { checkReplaceable, MADE_BY, writeResult } from "../lib/files/results.ts";
import { MAX_STEPS } from "../lib/models/masked/generation.ts";
import { readJsonFile } from "../lib/files/json.ts";
import { stepProgress } from "../lib/progress.ts";
import { type Checkpoint, openCheckpoint, SafetensorsWriter } from "../lib/tensor/mod.ts";
import type { TimeParameters } from "../lib/time/mod.ts";
import { type Arguments, type Usage, UsageError, wholeNumber } from "./_command/options.ts";
import { ProgressDisplay, StateDisplay } from "./_command/progress.ts";
import {
  chosenKernels,
  type Context,
  defineCommand,
  KERNEL_OPTIONS,
  MODEL_OPTIONS,
  REPLACE_OPTION,
  stopIfAsked,
} from "./_command/run.ts";
import { openCommandKernels } from "./_command/signals.ts";
import { peakResidentBytes } from "../lib/eval/environment.ts";
import { print, printable, printJson } from "./_command/text.ts";

const USAGE = {
  name: "generate.ts",
  operands: "MODEL",
  about:
    "Runs a checkpoint (a folder or a .safetensors file), full precision or packed. Dream, LLaDA, LLaDA-MoE\nand SDAR write, a DiT draws.",
  options: {
    "Writing (generation_config.json has the defaults, as far as it sets them)": "",
    "--prompt TEXT":
      'a puzzle ("47+38=", "S" + 16 cells + ">", eight letters a-p + ">") or any text; masks in it are filled',
    "--chat": "the prompt is a user's message in the checkpoint's chat template",
    "--length N": "tokens to write; default none if the prompt has masks, a puzzle's answer, else 32",
    "--algorithm NAME": `Dream: origin, maskgit_plus, topk_margin or entropy
LLaDA: low_confidence (default) or random`,
    "--algorithm-temperature X": "of the order in which masks are filled; 0 takes the most confident (Dream)",
    "--temperature X": "0 takes the most probable token",
    "--top-p X": "keep only the most probable tokens that have this probability together (Dream, SDAR)",
    "--top-k N": "keep only so many of the most probable tokens (Dream, SDAR)",
    "--block-length N": "finish so many tokens before the next (LLaDA, LLaDA-MoE)",
    "Drawing": "",
    "--class N[,N…]": "classes; default every one, at most ten",
    "--out FILE":
      "PNG to write; default class-N.png; latents of a pipeline with a VAE go to FILE.safetensors",
    "--sampler NAME": "ddim or ddpm; default scheduler_config.json's",
    "--zoom N": "pixels a pixel; default 8 for images under 64 pixels, else 1",
    "Both": "",
    "--guidance X":
      "classifier-free guidance of a DiT, default 1, none; of LLaDA, default generation_config.json's " +
      "cfg_scale or 0, none",
    "--steps N": "default: one a mask; 50 when drawing, or as many as the training had",
    "--seed N": "default 0",
    "--trace": "show the masks being filled, in place on a terminal and a line a step elsewhere; " +
      "put the way from noise to image into the PNG",
    "--no-time-parameters":
      "leave time_parameters.safetensors, which lies beside a quantized model, out of it",
    "--activations NAME":
      "int8: packed layers multiply inputs of 8 bits, each token by its own range (default on a CPU); " +
      "f32: full precision (default on a GPU)",
    "--time-groups N": "refuse time parameters of another number of time groups",
    "Machine, input and output": "",
    ...MODEL_OPTIONS,
    ...KERNEL_OPTIONS,
    ...REPLACE_OPTION,
    "--ignore-memory": "run although memory looks too small",
    "--quiet": "print nothing but the result and errors",
    "--json": "print JSON",
  },
  examples: {
    'MODEL --prompt "47+38="': "a language model writes",
    'MODEL --chat --prompt "Why is the sky blue?" --length 64': "an instruction model answers",
    "MODEL --class 3,7 --seed 1 --out two.png": "an image model draws",
  },
} as const satisfies Usage;

type Options = Arguments<typeof USAGE>;

/** Options that some families of language models have, with the setting of each. */
const OF_FAMILIES = {
  "algorithm": "algorithm",
  "algorithm-temperature": "algorithmTemperature",
  "top-p": "topP",
  "top-k": "topK",
  "block-length": "blockLength",
} as const;
type FamilyOption = keyof typeof OF_FAMILIES;
const OF_SOME = Object.keys(OF_FAMILIES) as FamilyOption[];
const TEXT_ONLY = ["prompt", "length", "temperature", ...OF_SOME] as const;
const IMAGE_ONLY = ["class", "out", "sampler", "zoom"] as const;

/** Options that a family has not. */
function foreignTo(kind: LanguageKind | "dit") {
  if (kind === "dit") return TEXT_ONLY;
  const { settings } = languageFamily(kind);
  const others = OF_SOME.filter((name) => !settings.includes(OF_FAMILIES[name]));
  return [...IMAGE_ONLY, ...others, ...(settings.includes("guidance") ? [] : ["guidance" as const])];
}

/** Tokens of a text that is no puzzle. */
const DEFAULT_LENGTH = 32;
const DRAWING_STEPS = 50;
/** Stands for a mask where text is shown. */
const MASK_SIGN = "░";
/** Pictures of a trace. */
const TRACE_PICTURES = 10;

interface Task {
  readonly checkpoint: Checkpoint;
  readonly kernels: Kernels;
  readonly parsed: Options;
  readonly timeParameters: TimeParameters | undefined;
  readonly activations: ActivationPrecision;
  readonly signal: AbortSignal;
  readonly log: (line: string) => void;
  /** Shows that a step is done; a trace does so itself. */
  readonly onStep: (done: number, of: number) => void;
  /** Prints a line with `--json` too, where it goes to the standard error. */
  readonly warn: (line: string) => void;
}

/** Names out of a file, the first of many. */
const names = (all: readonly string[]): string =>
  all.slice(0, 10).map((name) => printable(name.slice(0, 100))).join(", ") + (all.length > 10 ? ", …" : "");

async function run(parsed: Options, { signal }: Context): Promise<void> {
  const { positionals, flags, values } = parsed;
  if (positionals.length > 1) {
    throw new UsageError(`one MODEL is needed, got ${positionals.length}; a text is --prompt TEXT`);
  }
  const [path] = parsed.operands("MODEL");
  const display = new ProgressDisplay(flags.quiet || flags.json);
  const chosen = await chosenKernels(values, display.log);
  using checkpoint = openCheckpoint(path, { variant: values.variant });
  for (const note of checkpoint.notes) display.log(`input: ${printable(note)}`);
  const described = modelConfig(checkpoint);
  const misplaced = foreignTo(described.kind).find((name) => values[name] !== undefined) ??
    (flags.chat && described.kind === "dit" ? "chat" : undefined);
  if (misplaced !== undefined) {
    const isDrawn = IMAGE_ONLY.some((name) => name === misplaced);
    const models = described.kind === "dit"
      ? "a model that draws"
      : isDrawn
      ? "a model that writes"
      : languageFamily(described.kind).title;
    throw new UsageError(`--${misplaced} is not for ${models}`);
  }
  using kernels = await openCommandKernels(chosen);
  display.log(`${described.kind}; ${kernels.describe()}, threads ${kernels.threads}`);
  const warn = new ProgressDisplay(flags.quiet).log, unknown = keysWithoutMeaning(checkpoint);
  if (unknown.length > 0) warn(`config.json: not known here, ignored: ${names(unknown)}`);
  const groups = parsed.whole("time-groups", 0);
  const timeParameters = flags["no-time-parameters"]
    ? undefined
    : storedTimeParameters(checkpoint, { groups });
  if (timeParameters !== undefined) {
    const { groups, layers } = timeParameters;
    display.log(`time parameters beside it: ${groups.count} time groups, ${layers.size} layers`);
  }
  // integer products are for CPUs: a GPU has tensor cores for products in full precision
  const activations = parsed.oneOf("activations", ACTIVATION_PRECISIONS) ??
    (kernels.device === undefined ? "int8" : "f32");
  const onStep = (done: number, of: number) => {
    if (done === of) display.clear();
    else if (!flags.trace) {
      display.update(stepProgress(done === 0 ? "opening the model" : "generating", done, of));
    }
  };
  const { log } = display;
  const task: Task = { checkpoint, kernels, parsed, timeParameters, activations, signal, log, onStep, warn };
  try {
    if (described.kind === "dit") await draw(task, described.config);
    else await write(task, described.kind, described.config);
  } catch (error) {
    // A value out of range that the library refuses is one of the command line here.
    if (error instanceof RangeError && !("code" in error)) throw new ConfigError(error.message, [], error);
    throw error;
  }
}

/** Says what the run needs, from sizes alone. @throws {MemoryError} when that is more than there is */
function announce(
  { checkpoint, kernels, parsed, activations, log }: Task,
  shape: ForwardShape,
  /** Rows of a typical pass, whose logits are wanted. */
  typicalRows: number,
  passes: number,
) {
  const needs = modelRequirements(checkpoint);
  const packedCols = needs.matrices.flatMap(({ held, cols }) => typeof held === "number" ? [cols] : []);
  const precision = packedCols.length === 0 ? "f32" : activations;
  const rows = needs.model.kind === "dit"
    ? shape.batch * (needs.model.config.sampleSize / needs.model.config.patchSize) ** 2
    : shape.batch * shape.tokens;
  const codeBytes = precision === "int8" ? rows * Math.max(...packedCols) : 0;
  const activationBytes = forwardCost(needs.model, shape).activationBytes + codeBytes;
  const memory = forecastMemory(kernels, needs, { activationBytes, rows });
  if (!parsed.flags["ignore-memory"]) {
    const wayOut =
      "quantize it to fewer bits (scripts/quantize.ts MODEL OUT --bits 4), ask for less at a time, or try anyway " +
      "with --ignore-memory";
    checkMemory(checkpoint.path, memory, wayOut);
  }
  const { multiplyAdds } = forwardCost(needs.model, { ...shape, rows: typicalRows });
  const time = forecastTime(kernels, needs, passes * multiplyAdds, rows, precision);
  if (precision === "int8") {
    log(
      "activations: 8 bits, each token by its own range, where weights are packed (--activations f32: none)",
    );
  }
  log(`needs ${memoryText(memory)}`);
  log(`takes ${timeText(time)}`);
  return { memory, time, precision };
}

// Writing ---------------------------------------------------------------------------------------------------

/** A prompt made ready to be completed. */
interface Posed {
  readonly tokenizer: Tokenizer;
  readonly prompt: string;
  readonly isPuzzle: boolean;
  readonly canvas: Int32Array;
  readonly places: readonly number[];
  /** Tokens that are added to the prompt. */
  readonly wanted: number;
  readonly stored: StoredGeneration;
}

/** Poses a puzzle to a model that was trained on puzzles, and continues or fills any other text. */
async function pose(
  { checkpoint, parsed }: Task,
  kind: LanguageKind,
  config: MaskedTransformerConfig,
): Promise<Posed> {
  const { prompt } = parsed.values;
  if (prompt === undefined) throw new UsageError("--prompt is needed");
  const tokenizer = await loadTokenizer(checkpoint.folder);
  const { chat } = parsed.flags, mayBePuzzle = !chat && kind === "dream" && isPuzzleVocabulary(tokenizer);
  const answer = mayBePuzzle ? answerLength(prompt) : undefined, isPuzzle = answer !== undefined;
  const asked = chat ? await tokenizer.chat([{ role: "user", content: prompt }], true) : prompt;
  const tokens = tokenizer.encode(asked, { special: !isPuzzle && !chat });
  const stored = storedGeneration(checkpoint.folder, kind), around = tokens.length + (isPuzzle ? 2 : 0);
  const wanted = parsed.whole("length", 0) ?? (tokens.includes(config.maskToken) ? 0 : stored.newTokens) ??
    (stored.allTokens === undefined ? undefined : Math.max(0, stored.allTokens - around)) ??
    answer ?? DEFAULT_LENGTH;
  const total = around + wanted;
  if (total > config.maxTokens) {
    throw new UsageError(
      `prompt and --length may have ${config.maxTokens} tokens with this model, got ${tokens.length} + ${wanted}`,
    );
  }
  const text = new Int32Array(tokens.length + wanted).fill(config.maskToken);
  text.set(tokens);
  const canvas = isPuzzle ? puzzleCanvas({ path: checkpoint.path, config }, tokenizer, prompt, wanted) : text;
  const places = [...canvas.keys()].filter((i) => canvas[i] === config.maskToken);
  if (places.length === 0) {
    const why = parsed.values.length === undefined
      ? `max_length ${stored.allTokens} of generation_config.json has no room behind it`
      : "--length is 0";
    throw new UsageError(`nothing to write: the prompt has no mask and ${why}`);
  }
  return { tokenizer, prompt, isPuzzle, canvas, places, wanted, stored };
}

/** Checks how to sample, says what that needs, and begins: one state a step. */
function startWriting(
  task: Task,
  kind: LanguageKind,
  config: MaskedTransformerConfig,
  { tokenizer, isPuzzle, canvas, places, wanted, stored }: Posed,
) {
  const { checkpoint, kernels, parsed, timeParameters } = task, family = languageFamily(kind);
  const seed = parsed.whole("seed", 0) ?? 0;
  // A puzzle is written one token a step, unless fewer steps are asked for.
  const steps = parsed.whole("steps", 1, MAX_STEPS) ??
    (isPuzzle ? Math.min(places.length, stored.steps ?? Infinity) : stored.steps);
  const sampling = {
    temperature: parsed.number("temperature") ?? stored.temperature,
    topP: parsed.number("top-p") ?? stored.topP,
    topK: parsed.number("top-k") ?? stored.topK,
    excludedTokens: [
      config.maskToken,
      ...tokensWithoutText(tokenizer, config.vocabularySize),
      ...(isPuzzle && config.padToken !== undefined ? [config.padToken] : []),
    ],
  };
  checkSamplingOptions("generate", sampling, config.vocabularySize);
  const algorithm = parsed.oneOf<string>("algorithm", family.algorithms) ??
    stored.algorithm ?? (isPuzzle ? "maskgit_plus" : undefined);
  const algorithmTemperature = parsed.number("algorithm-temperature") ?? stored.algorithmTemperature;
  // Dream's `origin` draws positions as it is.
  const isVain = (algorithm ?? "origin") === "origin" &&
    algorithmTemperature === stored.algorithmTemperature &&
    (algorithmTemperature ?? 0) > 0;
  const notHonoured = [...isVain ? ["alg_temp"] : [], ...stored.notHonoured];
  if (notHonoured.length > 0) {
    task.warn(`warning: generation_config.json: not honoured here: ${names(notHonoured)}`);
  }
  const blockLength = parsed.number("block-length") ?? stored.blockLength;
  const rows = Math.min(blockLength ?? places.length, places.length);
  if (blockLength !== undefined && !(blockLength >= 1 && wanted % blockLength === 0)) {
    const source = parsed.values["block-length"] === undefined ? " (generation_config.json)" : "";
    throw new UsageError(`--block-length must divide --length ${wanted}, got ${blockLength}${source}`);
  }
  const shape = { batch: 1, tokens: canvas.length, rows };
  const needed = announce(task, shape, Math.ceil(rows / 2), Math.min(steps ?? Infinity, places.length));
  const { model } = modelFrom(checkpoint, kernels, { timeParameters, activations: task.activations });
  if ("imageElements" in model) throw new TypeError("Cannot write: the model draws");
  const turns = family.write(model, canvas, 1, {
    ...sampling,
    steps,
    algorithm,
    algorithmTemperature,
    eps: stored.eps,
    threshold: stored.threshold,
    guidance: parsed.number("guidance") ?? stored.guidance,
    blockLength,
    generationLength: wanted,
    seed,
  });
  return { turns, seed, needed, notHonoured };
}

async function write(task: Task, kind: LanguageKind, config: MaskedTransformerConfig): Promise<void> {
  const { flags } = task.parsed, posed = await pose(task, kind, config);
  const { tokenizer, prompt, places } = posed;
  const { turns, seed, needed, notHonoured } = startWriting(task, kind, config, posed);
  const end = Math.max(...places) + 1, trace: string[] = [];
  const states = new StateDisplay(), started = performance.now();
  let sequence = posed.canvas;
  for (const state of turns) {
    sequence = state.sequences;
    task.onStep(state.step, state.steps);
    if (flags.trace) {
      const text = shownText(tokenizer, sequence.subarray(0, end), config);
      trace.push(text);
      if (!flags.json) {
        const step = `${state.step}`.padStart(`${state.steps}`.length);
        states.show(`${step}/${state.steps}  t ${state.time.toFixed(3)}  ${printable(text)}`);
      }
    }
    await stopIfAsked(task.signal);
  }
  states.end();
  const seconds = (performance.now() - started) / 1000;
  const written = sequence.subarray(places[0]!, end);
  const stop = written.findIndex((token) => config.eosTokens.includes(token));
  const text = tokenizer.decode(stop < 0 ? written : written.subarray(0, stop));
  if (!flags.json) {
    print(printable(text));
    return task.log(`${places.length} tokens in ${seconds.toFixed(2)} s`);
  }
  const answer = {
    kind,
    prompt,
    text,
    tokens: [...written],
    masks: places.length,
    seed,
    seconds,
    notHonoured,
  };
  printJson({ ...answer, ...measured(task, needed), ...(flags.trace ? { trace } : {}) });
}

/** Forecast, outcome and kernels of a run, for machines. */
function measured(
  { kernels, timeParameters }: Task,
  { memory, time, precision }: ReturnType<typeof announce>,
) {
  return {
    forecast: { memoryBytes: memory.total, memory, seconds: time.seconds },
    peakMemoryBytes: peakResidentBytes(),
    timeGroups: timeParameters?.groups.count ?? null,
    activations: precision,
    backend: kernels.describe(),
  };
}

/** A sequence as text, special tokens included, masks as signs. */
function shownText(
  tokenizer: Tokenizer,
  sequence: Int32Array,
  { maskToken }: MaskedTransformerConfig,
): string {
  let text = "", begin = 0;
  for (let i = begin; i <= sequence.length; i++) {
    if (i < sequence.length && sequence[i] !== maskToken) continue;
    text += tokenizer.decode(sequence.subarray(begin, i), { special: true });
    if (i < sequence.length) text += MASK_SIGN;
    begin = i + 1;
  }
  return text;
}

// Drawing ---------------------------------------------------------------------------------------------------

const LATENTS_SUFFIX = ".safetensors";

/**
 * Why a model's images are latents, and how they become pictures; undefined where they are pictures. The
 * autoencoder is not run here.
 */
function latentsOf({ root }: Checkpoint, { channels }: DitConfig) {
  const path = join(root, "vae", "config.json"), hasVae = existsSync(path);
  if (!hasVae && (channels === 1 || channels === 3)) return undefined;
  // diffusers' own default, which a configuration may leave out
  const stored = hasVae ? { scaling_factor: 0.18215, ...readJsonFile(path) } as Record<string, unknown> : {};
  const factors = ["scaling_factor", "shift_factor"].filter((key) => typeof stored[key] === "number");
  const which = hasVae ? `the decoder in ${printable(join(root, "vae"))}` : "a decoder (an AutoencoderKL)";
  return {
    why: `the model draws latents of ${channels} channels for ${which}, which does not run here`,
    metadata: {
      format: "pt",
      writer: MADE_BY,
      decode: "vae.decode(latents / scaling_factor + shift_factor), each where it is given",
      ...Object.fromEntries(factors.map((key) => [key, `${stored[key]}`])),
    },
  };
}

function saveLatents(
  path: string,
  shape: readonly number[],
  values: Float32Array,
  metadata: Readonly<Record<string, string>>,
): void {
  const specs = [{ name: "latents", dtype: "F32", shape }] as const;
  const reservedHeaderBytes = SafetensorsWriter.headerBytes(specs, metadata);
  using writer = SafetensorsWriter.create(path, { reservedHeaderBytes, metadata });
  writer.add(specs);
  writer.write("latents", 0, new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
  writer.finish();
}

function classesOf(list: string | undefined, config: DitConfig): readonly number[] {
  const asked = list?.split(",").map((text) => wholeNumber("class", text, 0));
  const classes = asked ?? Array.from({ length: Math.min(10, config.classes) }, (_, i) => i);
  const bad = classes.find((label) => label >= config.classes);
  if (bad === undefined) return classes;
  throw new UsageError(`--class must be from 0 to ${config.classes - 1}, got ${bad}`);
}

async function draw(task: Task, config: DitConfig): Promise<void> {
  const { checkpoint, parsed, log } = task, { flags, values } = parsed;
  const classes = classesOf(values.class, config);
  const zoom = parsed.whole("zoom", 1, 64) ?? (config.sampleSize < 64 ? 8 : 1);
  const seed = parsed.whole("seed", 0) ?? 0, guidance = parsed.number("guidance") ?? 1;
  const sampler = parsed.oneOf<SamplerName>("sampler", ["ddim", "ddpm"]);
  const scheduler = loadScheduler(checkpoint.folder, sampler);
  const steps = parsed.whole("steps", 1, MAX_STEPS) ??
    Math.min(DRAWING_STEPS, scheduler.config.trainTimesteps);
  scheduler.timesteps(steps); // refuses too many
  const batch = guidance === 1 ? classes.length : 2 * classes.length;
  const latents = latentsOf(checkpoint, config), out = values.out ?? `class-${classes.join("-")}.png`;
  const latentsPath = out.replace(/(?:\.png)?$/i, out.endsWith(LATENTS_SUFFIX) ? "" : LATENTS_SUFFIX);
  for (const path of latents === undefined ? [out] : [out, latentsPath]) checkReplaceable(path, flags.force);
  if (latents !== undefined) log(`${latents.why}: they are saved as ${printable(latentsPath)}`);
  const needed = announce(task, { batch, tokens: 0 }, 0, steps);
  task.onStep(0, steps);
  const { kernels, timeParameters, activations } = task;
  const { model } = modelFrom(checkpoint, kernels, { timeParameters, activations });
  if (!("imageElements" in model)) throw new TypeError("Cannot draw: the model writes");
  const turns = imageSteps(model, scheduler, classes, { steps, seed, sampler, guidance });
  const kept: Float32Array<ArrayBuffer>[] = [];
  const started = performance.now();
  for (const { step, steps: all, samples } of turns) {
    const isKept = step === all ||
      (flags.trace &&
        Math.floor(step * (TRACE_PICTURES - 1) / all) > Math.floor((step - 1) * (TRACE_PICTURES - 1) / all));
    if (isKept) kept.push(samples.slice());
    if (flags.trace) log(`step ${step}/${all}`);
    task.onStep(step, all);
    await stopIfAsked(task.signal);
  }
  const seconds = (performance.now() - started) / 1000;
  const elements = model.imageElements;
  if (latents !== undefined) {
    const { channels: depth, sampleSize } = config, shape = [classes.length, depth, sampleSize, sampleSize];
    const values = kept.at(-1)!.subarray(0, classes.length * elements);
    saveLatents(latentsPath, shape, values, {
      ...latents.metadata,
      classes: classes.join(),
      seed: `${seed}`,
    });
  }
  // A row a class: with a trace from noise to image, else all images in one row. Latents have no colours: a
  // tile a channel.
  const channels = config.channels === 3 ? 3 : 1;
  if (config.channels !== channels) log(`${config.channels} channels are no colours: one tile each`);
  const tiles = new Float32Array(kept.length * classes.length * elements);
  for (let i = 0, at = 0; i < classes.length; i++) {
    for (const images of kept) {
      tiles.set(images.subarray(i * elements, (i + 1) * elements), at);
      at += elements;
    }
  }
  const columns = flags.trace ? kept.length * config.channels / channels : Infinity;
  const { pixels, width, height } = tileImages(tiles, channels, config.sampleSize, columns, zoom);
  if (latents === undefined || latentsPath !== out) {
    writeResult(out, encodePng(pixels, width, height, channels), flags.force);
  }
  if (flags.json) {
    const saved = latents === undefined ? {} : { latents: latentsPath };
    const image = { kind: "dit", classes, out, ...saved, width, height, steps, seed, seconds };
    return printJson({ ...image, ...measured(task, needed) });
  }
  print(printable(out));
  log(
    `${classes.length} images of ${width} × ${height} pixels together, ${steps} steps in ${
      seconds.toFixed(2)
    } s`,
  );
}

export const main = defineCommand(USAGE, run);
if (import.meta.main) await main();
