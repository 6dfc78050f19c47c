/** Writing: solves a puzzle, continues a text, or fills its masks. */
import { answerLength, isPuzzleVocabulary, puzzleCanvas } from "../../lib/eval/puzzles.ts";
import { MAX_STEPS } from "../../lib/models/masked/generation.ts";
import { checkSamplingOptions } from "../../lib/models/masked/token_sampling.ts";
import {
  languageFamily,
  type LanguageKind,
  loadTokenizer,
  type MaskedTransformerConfig,
  modelFrom,
  type StoredGeneration,
  storedGeneration,
  type Tokenizer,
  tokensWithoutText,
} from "../../lib/models/mod.ts";
import { UsageError } from "../_command/options.ts";
import { StateDisplay } from "../_command/progress.ts";
import { stopIfAsked } from "../_command/run.ts";
import { print, printable, printJson } from "../_command/text.ts";
import { announce, measured, names, type Task } from "./task.ts";

/** Tokens of a text that is no puzzle. */
const DEFAULT_LENGTH = 32;
/** Stands for a mask where text is shown. */
const MASK_SIGN = "░";
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

export async function write(task: Task, kind: LanguageKind, config: MaskedTransformerConfig): Promise<void> {
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
