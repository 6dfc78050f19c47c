/**
 * Calibration data that a model makes itself (`--calibrate self`): sequences that a language model writes
 * with its sampler, and states on an image model's own trajectories. Seeded; what it costs is bounded and
 * said.
 */
import {
  drawPuzzle,
  forwardCost,
  type GenerationStep,
  imageSteps,
  isPuzzleVocabulary,
  languageFamily,
  type LoadedModel,
  loadScheduler,
  openTokenizer,
  PUZZLE_TOKENS,
  RandomStream,
  readTokenizerFiles,
  specialTokens,
  type Tokenizer,
  tokensWithoutText,
} from "../models/mod.ts";
import { pause, type RunOptions, secondsText, stepProgress } from "../progress.ts";
import type { KeptSamples } from "./kept_samples.ts";
import { randomTokens } from "./random_tokens.ts";

/** How much a model makes of its own; null is as much as {@linkcode RecordBounds} allow. */
export interface OwnSampleSettings {
  /** Sequences, or trajectories of images. */
  readonly records: number | null;
  /** Tokens of the longest sequences. */
  readonly tokens: number;
  /** Steps of the sampler. */
  readonly steps: number | null;
}

/** Sequences that a model wrote, and from where on each may be masked. */
export interface OwnSequences {
  readonly kind: "sequences";
  readonly rows: readonly { readonly tokens: Int32Array; readonly answerStart: number }[];
}

/** Noisy images on trajectories, with their timesteps from the noisiest on. */
export interface OwnTrajectories {
  readonly kind: "trajectories";
  /** `[trajectories]`; the number of classes is none. */
  readonly labels: Int32Array;
  /** `[trajectories][steps]` */
  readonly timesteps: readonly (readonly number[])[];
  /** `[trajectories]: f32[steps, elements]` */
  readonly states: readonly Float32Array<ArrayBuffer>[];
}

export type OwnSamples = OwnSequences | OwnTrajectories;

/** Records where none are asked for, and what bounds the work of a large model. */
export interface RecordBounds {
  readonly records: number;
  /** Where the bound allows so many with all steps. */
  readonly many: number;
  /** Multiplications with an addition. */
  readonly multiplyAdds: number;
  /** The fewest records and steps, whatever they cost. */
  readonly least: { readonly records: number; readonly steps: number };
}
/** Ten seconds at 10¹¹ multiplications a second. */
export const SEQUENCES: RecordBounds = {
  records: 256,
  many: 512, // as many as samples to solve on: with half of them a calibration seed now and then does far worse
  multiplyAdds: 1e12,
  least: { records: 32, steps: 4 },
};
/** Each trajectory has samples at all times. */
export const TRAJECTORIES: RecordBounds = {
  records: 128,
  many: 128,
  multiplyAdds: 1e13,
  least: { records: 16, steps: 6 },
};
/** Part of the bound from which on sequences are written at 8 bits: what is bounded takes minutes. */
const ROUNDED_SHARE = 0.5;
/** Steps where none are asked for. */
const STEPS = 32;
/** Positions that run together: the same for any memory, as sums depend on them. */
export const OWN_BATCH_POSITIONS = 2048;
/** Logits that they may have: weights are rounded again for each batch, so few sequences take long. */
export const OWN_BATCH_LOGITS = 2 ** 27;
/** Work that is shorter is not announced. */
const ANNOUNCED_SECONDS = 2;
/** Part of an image model's trajectories that have no class. */
const UNCONDITIONAL = 0.1;

/**
 * Records and steps within the bound: fewer steps first, then fewer records.
 *
 * @param usual records where none are asked for, and the least of both
 * @param cost multiplications with an addition of a record's step
 */
export function withinBound(
  { records, steps }: Pick<OwnSampleSettings, "records" | "steps">,
  usual: RecordBounds,
  cost: number,
): { readonly records: number; readonly steps: number } {
  const atMost = (count: number, most: number, least: number) =>
    Math.min(most, Math.max(least, Math.floor(usual.multiplyAdds / (count * cost))));
  const isSmall = usual.many * (steps ?? STEPS) * cost <= usual.multiplyAdds;
  const wanted = isSmall ? usual.many : usual.records;
  const own = steps ?? atMost(records ?? wanted, STEPS, usual.least.steps);
  return { steps: own, records: records ?? atMost(own, wanted, usual.least.records) };
}

/** Counts the steps of all batches, says how long they take, and lets a signal through. */
class Work {
  readonly #begun = performance.now();
  #done = 0;
  #kept = 0;
  /** Work and time of the first step, which also reads the weights. */
  #first: { readonly done: number; readonly seconds: number } | undefined;
  #isSaid = false;

  /** @param total work of all steps, in any unit */
  constructor(readonly what: string, readonly total: number, readonly options: RunOptions) {
    options.onEvent?.({ kind: "stage", message: what });
  }

  /** Done so much more. @throws when the run is stopped */
  async step(work: number): Promise<void> {
    this.#done += work;
    const { onEvent, onProgress, signal } = this.options, done = this.#done - this.#kept;
    const seconds = (performance.now() - this.#begun) / 1000;
    if (this.#first === undefined) this.#first = { done, seconds };
    else if (!this.#isSaid) {
      this.#isSaid = true;
      const rate = (done - this.#first.done) / (seconds - this.#first.seconds);
      const all = seconds + (this.total - this.#done) / rate;
      const message = `${this.what}: about ${secondsText(all)} by its second step`;
      if (all > ANNOUNCED_SECONDS) onEvent?.({ kind: "calibrate", message, data: { seconds: all } });
    }
    onProgress?.(stepProgress(this.what, this.#done, this.total));
    await pause(signal);
  }

  /** So much was done by an earlier run. */
  resume(work: number): void {
    if (this.#kept === 0) {
      const message = `${this.what}: those of the stopped run are taken`;
      this.options.onEvent?.({ kind: "resume", message });
    }
    this.#kept += work;
    this.#done += work;
  }
}

/** Options of the making: with `kept`, batches of a run that was stopped are taken from there. */
export interface OwnSampleOptions extends RunOptions {
  readonly kept?: KeptSamples | undefined;
}

/** Makes a model's own samples. @throws {InterruptedError} when stopped, through {@linkcode stoppable} */
export async function makeOwnSamples(
  loaded: LoadedModel,
  settings: OwnSampleSettings,
  seed: number,
  options: OwnSampleOptions,
): Promise<OwnSamples> {
  const samples = loaded.kind === "dit"
    ? await ownTrajectories(loaded, settings, seed, options)
    : await ownSequences(loaded, settings, seed, options);
  loaded.model.releaseScratch(); // logits of whole batches, and a rounded head
  return samples;
}

/** What making samples takes, without those that a stopped run has kept. */
export interface OwnSampleWork {
  /** Of all steps. */
  positions: number;
  /** Forward passes that they are divided into. */
  passes: number;
  /** Whether the model's linear layers run at 8 bits. */
  isRounded: boolean;
}

/** Samples in the form of a model's own that it has not made, and what making them takes. */
export interface OwnSampleDraft extends Readonly<OwnSampleWork> {
  readonly samples: OwnSamples;
}

/**
 * What {@linkcode makeOwnSamples} would make, with random tokens or nothing instead: for a forecast.
 *
 * @param kept batches of a run that was stopped: they are taken
 */
export async function draftOwnSamples(
  loaded: LoadedModel,
  settings: OwnSampleSettings,
  seed: number,
  kept?: KeptSamples,
): Promise<OwnSampleDraft> {
  const draft: OwnSampleWork = { positions: 0, passes: 0, isRounded: false };
  const samples = loaded.kind === "dit"
    ? await ownTrajectories(loaded, settings, seed, { kept }, draft)
    : await ownSequences(loaded, settings, seed, { kept }, draft);
  return { samples, ...draft };
}

// Sequences -------------------------------------------------------------------------------------------------

type LanguageModel = Exclude<LoadedModel, { readonly kind: "dit" }>;

/** A sequence to be written: masks where the model writes. */
interface Canvas {
  readonly tokens: Int32Array;
  /** Where a mask may stand when calibrating. */
  readonly answerStart: number;
}

/**
 * Sequences out of openings, by what is known of the model: prompts of the puzzles that the reference model
 * reads; conversations, of which the model writes both sides (Magpie, https://arxiv.org/abs/2406.08464); or
 * random tokens, from none to half of the sequence.
 */
async function ownSequences(
  loaded: LanguageModel,
  settings: OwnSampleSettings,
  seed: number,
  options: OwnSampleOptions,
  draft?: OwnSampleWork,
): Promise<OwnSequences> {
  const { model, kind } = loaded, { config } = model, { maskToken, padToken, vocabularySize } = config;
  const length = Math.min(settings.tokens, config.maxTokens);
  const cost =
    forwardCost({ kind, config } as Parameters<typeof forwardCost>[0], { batch: 1, tokens: length })
      .multiplyAdds;
  const { records, steps } = withinBound(settings, SEQUENCES, cost);
  const files = readTokenizerFiles(loaded.folder);
  const tokenizer = files && await openTokenizer(files);
  const never = new Set([maskToken, padToken, ...files ? specialTokens(files).all : []]);
  for (const token of config.eosTokens) never.delete(token);
  if (tokenizer !== undefined) {
    for (const token of tokensWithoutText(tokenizer, vocabularySize)) never.add(token);
  }
  const excludedTokens = [...never].filter((token) => token !== undefined);
  const vocabulary = { vocabularySize, excluded: never };
  const isLong = settings.records === null && records <= SEQUENCES.least.records;
  const openings = await openingsOf(loaded, tokenizer, length, isLong);
  const canvases = Array.from(
    { length: records },
    (_, i) => openings(new RandomStream(seed + 3, i), i, vocabulary),
  );
  // Sequences of a length run together; each has a stream of random numbers.
  const groups = [...Map.groupBy(canvases, ({ tokens }) => tokens.length)].sort(([a], [b]) => b - a);
  const masksOf = ({ tokens }: Canvas) => tokens.reduce((n, token) => n + (token === maskToken ? 1 : 0), 0);
  const stepsOf = (own: readonly Canvas[]) => Math.min(steps, Math.max(1, ...own.map(masksOf)));
  const total = groups.reduce((sum, [tokens, own]) => sum + tokens * own.length * stepsOf(own), 0);
  const most = groups[0]?.[0] ?? 0;
  const isRounded = records * steps * cost >= ROUNDED_SHARE * SEQUENCES.multiplyAdds;
  if (draft !== undefined) draft.isRounded = isRounded;
  const work = new Work(`${records} sequences of up to ${most} tokens written by the model`, total, options);
  const rows: OwnSequences["rows"][number][] = [];
  let batch = 0;
  for (const [tokens, group] of groups) {
    const atOnce = Math.floor(
      Math.min(OWN_BATCH_POSITIONS / tokens, OWN_BATCH_LOGITS / (tokens * vocabularySize)),
    );
    const size = Math.max(1, atOnce), count = stepsOf(group);
    for (let begin = 0; begin < group.length; begin += size) {
      const part = group.slice(begin, begin + size), flat = new Int32Array(part.length * tokens);
      for (const [i, canvas] of part.entries()) flat.set(canvas.tokens, i * tokens);
      const common = {
        seed: seed + 4,
        firstStream: rows.length,
        steps: count,
        temperature: 1,
        excludedTokens,
        algorithm: loaded.kind === "dream" ? "entropy" : undefined,
      };
      const written = new Int32Array(flat.length), index = batch++;
      if (options.kept?.load(index, written) === true) work.resume(part.length * tokens * count);
      else if (draft !== undefined) {
        const random = randomTokens(new RandomStream(seed + 4, rows.length), flat.length, vocabulary);
        written.set(flat.map((token, at) => token === maskToken ? random[at]! : token));
        draft.positions += part.length * tokens * count;
        draft.passes += count;
      } else {
        const run = () => languageFamily(loaded.kind).write(model, flat, part.length, common);
        written.set(await runSampler(model, run, isRounded, () => work.step(part.length * tokens)));
        options.kept?.save(index, written);
      }
      for (const [i, { answerStart }] of part.entries()) {
        rows.push({ tokens: written.slice(i * tokens, (i + 1) * tokens), answerStart });
      }
    }
  }
  return { kind: "sequences", rows };
}

/** Runs a sampler to its end, the model at 8 bits where asked for. */
async function runSampler(
  model: LanguageModel["model"],
  sampler: () => Generator<GenerationStep, Int32Array>,
  isRounded: boolean,
  onStep: () => Promise<void>,
): Promise<Int32Array> {
  model.roundsWeights = isRounded;
  try {
    const run = sampler();
    let state = run.next();
    for (; state.done !== true; state = run.next()) if (state.value.step > 0) await onStep();
    return state.value;
  } finally {
    model.roundsWeights = false;
  }
}

type Opening = (
  random: RandomStream,
  record: number,
  vocabulary: Parameters<typeof randomTokens>[2],
) => Canvas;

/** How a model's sequences begin. @param isLong whether all have the whole length: there are few */
async function openingsOf(
  { model, kind }: LanguageModel,
  tokenizer: Tokenizer | undefined,
  length: number,
  isLong: boolean,
): Promise<Opening> {
  const { maskToken, bosToken, maxTokens } = model.config;
  if (kind === "dream" && tokenizer !== undefined && isPuzzleVocabulary(tokenizer)) {
    const { padToken, eosToken } = model.config;
    if (
      padToken !== undefined && eosToken !== undefined && bosToken !== undefined && maxTokens >= PUZZLE_TOKENS
    ) {
      return (random, record) => {
        const { prompt, answer } = drawPuzzle(random, record),
          known = [bosToken, ...tokenizer.encode(prompt)];
        const tokens = new Int32Array(PUZZLE_TOKENS).fill(padToken);
        tokens.set(known);
        tokens.fill(maskToken, known.length, known.length + answer + 1);
        return { tokens, answerStart: known.length };
      };
    }
  }
  const free: Opening = (random, record, vocabulary) => {
    // Long and short ones; the random beginning ends before the middle.
    const tokens = new Int32Array(Math.max(2, isLong ? length : length >> (record % 3))).fill(maskToken);
    const known = random.below(Math.max(1, tokens.length >> 1));
    tokens.set(randomTokens(random, known, vocabulary));
    if (bosToken !== undefined) tokens[0] = bosToken;
    return { tokens, answerStart: 0 };
  };
  const chat = tokenizer && await chatFrame(tokenizer);
  if (chat === undefined || chat.before.length + chat.after.length + 8 > length) return free;
  return (random, record, vocabulary) => {
    if (record % 2 === 1) return free(random, record >> 1, vocabulary);
    const { before, after } = chat, room = length - before.length - after.length;
    const asked = 1 + random.below(room >> 1);
    const tokens = new Int32Array(length).fill(maskToken);
    tokens.set(before);
    tokens.set(after, before.length + asked);
    return { tokens, answerStart: before.length };
  };
}

/** Tokens before a question, and between it and the answer, by the chat template, if there is one. */
async function chatFrame(tokenizer: Tokenizer) {
  const question = "Question";
  let text: string;
  try {
    text = await tokenizer.chat([{ role: "user", content: question }], true);
  } catch {
    return undefined; // no template, or one that wants more than a question
  }
  const at = text.indexOf(question);
  if (at < 0) return undefined;
  return {
    before: [...tokenizer.encode(text.slice(0, at))],
    after: [...tokenizer.encode(text.slice(at + question.length))],
  };
}

// Images ----------------------------------------------------------------------------------------------------

/** Trajectories of all classes, whose steps together visit all timesteps. */
async function ownTrajectories(
  { model, folder, kind }: Extract<LoadedModel, { readonly kind: "dit" }>,
  settings: OwnSampleSettings,
  seed: number,
  options: OwnSampleOptions,
  draft?: OwnSampleWork,
): Promise<OwnTrajectories> {
  const { config, imageElements: elements } = model, { classes, sampleSize, patchSize } = config;
  const scheduler = loadScheduler(folder, "ddim"), { trainTimesteps } = scheduler.config;
  const positions = (sampleSize / patchSize) ** 2;
  const { multiplyAdds } = forwardCost({ kind, config }, { batch: 1, tokens: positions });
  const bound = withinBound(settings, TRAJECTORIES, multiplyAdds),
    steps = Math.min(bound.steps, trainTimesteps);
  const { records } = bound, size = Math.max(1, Math.floor(OWN_BATCH_POSITIONS / positions));
  const labels = Int32Array.from({ length: records }, (_, i) => {
    const isFree = new RandomStream(seed + 5, i).uniform() < UNCONDITIONAL;
    return isFree ? classes : records < classes ? Math.floor(i * classes / records) : i % classes;
  });
  const all = new Float32Array(records * steps * elements), stateElements = steps * elements;
  const states = Array.from(
    { length: records },
    (_, i) => all.subarray(i * stateElements, (i + 1) * stateElements),
  );
  const timesteps: number[][] = [], batches = Math.ceil(records / size);
  const work = new Work(`${records} images drawn by the model in ${steps} steps`, records * steps, options);
  for (let batch = 0; batch < batches; batch++) {
    const begin = batch * size, own = labels.subarray(begin, begin + size);
    const offset = (batch + 0.5) / batches;
    const visited = Array.from(
      { length: steps },
      (_, k) => Math.floor((steps - k - offset) * trainTimesteps / steps),
    );
    for (let i = 0; i < own.length; i++) timesteps.push(visited);
    const part = all.subarray(begin * stateElements, (begin + own.length) * stateElements);
    if (options.kept?.load(batch, part) === true) {
      work.resume(own.length * steps);
      continue;
    }
    if (draft !== undefined) {
      draft.positions += own.length * steps * positions;
      draft.passes += steps;
      continue;
    }
    const run = imageSteps(model, scheduler, own, {
      seed: seed + 6,
      firstStream: begin,
      timesteps: visited,
      sampler: "ddim",
    });
    for (let state = run.next(); state.done !== true; state = run.next()) {
      const { step, timestep, samples } = state.value;
      if (timestep === undefined) continue;
      for (let i = 0; i < own.length; i++) {
        states[begin + i]!.set(samples.subarray(i * elements, (i + 1) * elements), step * elements);
      }
      await work.step(own.length);
    }
    options.kept?.save(batch, part);
  }
  return { kind: "trajectories", labels, timesteps, states };
}
