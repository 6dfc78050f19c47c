/**
 * The puzzles of the Dream reference model: posing and solving them, exact match by task, and masking them as
 * in training. The protocol is that of tests/models/README.md.
 */
import { CheckpointError, FormatError } from "../errors.ts";
import { jsonLines } from "../files/jsonl.ts";
import { quote } from "../files/whole.ts";
import {
  diffusionGenerate,
  type DreamGenerationOptions,
  type MaskedTransformer,
  PUZZLE_TOKENS,
  RandomStream,
  type Tokenizer,
  tokensWithoutText,
} from "../models/mod.ts";
import { type Interval, wilsonInterval } from "./intervals.ts";
import type { MaskedSequence } from "./masked.ts";

export { answerLength, isPuzzleVocabulary, PUZZLE_TOKENS } from "../models/mod.ts";

/** A prompt with its answer. */
export interface Puzzle {
  readonly task: string;
  readonly prompt: string;
  readonly answer: string;
}

/**
 * Reads puzzles, one JSON object `{task, prompt, answer}` a line.
 *
 * @throws {CheckpointError} when the file cannot be read
 * @throws {FormatError} when a line is not such an object, naming it
 */
export function readPuzzles(path: string): Puzzle[] {
  const fail = (reason: string, cause?: unknown) =>
    new FormatError(`Cannot read ${quote(path)}: ${reason}`, { path, cause });
  return [...jsonLines(path, fail)].map(([line, value]) => {
    const { task, prompt, answer } = (value ?? {}) as Partial<Record<keyof Puzzle, unknown>>;
    if (typeof task === "string" && typeof prompt === "string" && typeof answer === "string") {
      return { task, prompt, answer };
    }
    throw fail(`line ${line} must be {"task", "prompt", "answer"} as text`);
  });
}

/** Model properties that a puzzle's sequence depends on. */
type PosedModel = Pick<MaskedTransformer, "path" | "config">;

/** The special tokens that a puzzle needs. @throws {CheckpointError} when config.json has not all of them */
function specialTokens(model: PosedModel): { bos: number; eos: number; pad: number; mask: number } {
  const { bosToken: bos, eosToken: eos, padToken: pad, maskToken: mask } = model.config;
  if (bos !== undefined && eos !== undefined && pad !== undefined) return { bos, eos, pad, mask };
  throw new CheckpointError(
    `Cannot pose puzzles to ${
      quote(model.path)
    }: config.json must have bos_token_id, eos_token_id and pad_token_id`,
    { path: model.path },
  );
}

/**
 * The sequence of a prompt: `<bos>`, the prompt, as many masks as the answer and its `<eos>` need, `<pad>` to
 * the end.
 *
 * @throws {RangeError} when it does not fit in `length` tokens, or a part of it is not in the vocabulary
 */
export function puzzleCanvas(
  model: PosedModel,
  tokenizer: Tokenizer,
  prompt: string,
  answerTokens: number,
  length: number = PUZZLE_TOKENS,
): Int32Array<ArrayBuffer> {
  const { bos, pad, mask } = specialTokens(model);
  const tokens = tokenizer.encode(prompt);
  const end = 1 + tokens.length + answerTokens + 1;
  if (end > length) {
    throw new RangeError(
      `Cannot pose ${quote(prompt)}: prompt and answer may have ${length - 2} tokens, got ${end - 2}`,
    );
  }
  const canvas = new Int32Array(length).fill(pad);
  canvas[0] = bos;
  canvas.set(tokens, 1);
  canvas.fill(mask, 1 + tokens.length, end);
  return canvas;
}

/** A puzzle with a model's answer. */
export interface SolvedPuzzle {
  readonly puzzle: Puzzle;
  readonly answer: string;
  readonly isCorrect: boolean;
}

/** How puzzles are solved. */
export interface SolveOptions {
  /** Default: the protocol's, `maskgit_plus` with one step a mask and neither mask nor pad proposed. */
  readonly generation?:
    | Pick<DreamGenerationOptions, "algorithm" | "temperature" | "topP" | "topK" | "steps" | "seed">
    | undefined;
  /** Sequences of one forward pass. Default 100. */
  readonly batch?: number | undefined;
  /** Called after each batch. */
  readonly onProgress?: ((done: number, of: number) => void) | undefined;
}

/**
 * Solves puzzles, those with equally many masks together; the results come in the order of the puzzles.
 *
 * @throws as {@linkcode puzzleCanvas} and {@linkcode diffusionGenerate}
 */
export function solvePuzzles(
  model: MaskedTransformer,
  tokenizer: Tokenizer,
  puzzles: readonly Puzzle[],
  { generation = {}, batch = 100, onProgress }: SolveOptions = {},
): SolvedPuzzle[] {
  const { pad, mask } = specialTokens(model);
  const excludedTokens = [mask, pad, ...tokensWithoutText(tokenizer, model.config.vocabularySize)];
  const entries = puzzles.map((puzzle, index) => {
    const answerTokens = tokenizer.encode(puzzle.answer).length;
    const canvas = puzzleCanvas(model, tokenizer, puzzle.prompt, answerTokens);
    return { puzzle, index, answerTokens, canvas };
  });
  const groups = Map.groupBy(entries, ({ answerTokens }) => answerTokens);
  const solved: SolvedPuzzle[] = new Array(puzzles.length);
  let done = 0;
  for (const group of groups.values()) {
    for (let begin = 0; begin < group.length; begin += batch) {
      const part = group.slice(begin, begin + batch);
      const canvas = new Int32Array(part.length * PUZZLE_TOKENS);
      for (const [i, entry] of part.entries()) canvas.set(entry.canvas, i * PUZZLE_TOKENS);
      const { sequences } = diffusionGenerate(model, canvas, part.length, {
        algorithm: "maskgit_plus",
        ...generation,
        excludedTokens,
        firstStream: part[0]!.index,
      });
      for (const [i, { puzzle, index, answerTokens, canvas: own }] of part.entries()) {
        const start = i * PUZZLE_TOKENS + own.indexOf(mask);
        const answer = tokenizer.decode(sequences.subarray(start, start + answerTokens), { special: true });
        solved[index] = { puzzle, answer, isCorrect: answer === puzzle.answer };
      }
      done += part.length;
      onProgress?.(done, puzzles.length);
    }
  }
  return solved;
}

/** How many puzzles of a task were solved. */
export interface TaskScore {
  readonly task: string;
  readonly solved: number;
  readonly prompts: number;
  /** Share of exact matches with Wilson's interval. */
  readonly exactMatch: Interval;
}

/** Exact match of each task, in the order in which the tasks come, and of all together as `all`. */
export function scoreTasks(solved: readonly SolvedPuzzle[], confidence?: number): TaskScore[] {
  const score = (task: string, part: readonly SolvedPuzzle[]): TaskScore => {
    const solved = part.filter(({ isCorrect }) => isCorrect).length, prompts = part.length;
    return { task, solved, prompts, exactMatch: wilsonInterval(solved, prompts, confidence) };
  };
  const byTask = Map.groupBy(solved, ({ puzzle }) => puzzle.task);
  return [...[...byTask].map(([task, part]) => score(task, part)), score("all", solved)];
}

/** A puzzle with some of its answer masked, as in training. */
export interface MaskedPuzzle extends MaskedSequence {
  readonly task: string;
  readonly targets: readonly number[];
}

/**
 * Sequences as the reference model was trained on: prompt, answer, `<eos>`, pads; each position of the answer
 * masked with a probability drawn from (0.001, 1). Sequences where chance masked nothing are left out.
 */
export function maskedSequences(
  model: PosedModel,
  tokenizer: Tokenizer,
  puzzles: readonly Puzzle[],
  { seed = 0, repeats = 1 }: { readonly seed?: number | undefined; readonly repeats?: number | undefined } =
    {},
): MaskedPuzzle[] {
  const { eos, mask } = specialTokens(model);
  return Array.from({ length: repeats }, (_, repeat) =>
    puzzles.flatMap((puzzle, index): MaskedPuzzle[] => {
      const answer = tokenizer.encode(puzzle.answer);
      const tokens = puzzleCanvas(model, tokenizer, puzzle.prompt, answer.length);
      const start = tokens.indexOf(mask);
      const random = new RandomStream(seed, repeat * puzzles.length + index);
      const maskRatio = 0.001 + 0.999 * random.uniform();
      const places: number[] = [], targets: number[] = [];
      for (const [i, target] of [...answer, eos].entries()) {
        if (random.uniform() < maskRatio) {
          places.push(start + i);
          targets.push(target);
        } else tokens[start + i] = target;
      }
      return places.length === 0 ? [] : [{ task: puzzle.task, maskRatio, tokens, places, targets }];
    })).flat();
}
