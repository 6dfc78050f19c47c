/**
 * Filling masks step by step, as Dream and LLaDA both do: the loop over steps, the steps that it hands out,
 * and the checks of options, all before any work.
 */
import { checkWhole } from "../../native/call.ts";
import { shown } from "../model_config.ts";
import { RandomStream, type SeedOptions } from "../random.ts";
import type { Proposal } from "./token_sampling.ts";
import type { MaskedTransformer } from "./transformer.ts";

/** The state of a generation behind one of its steps. */
export interface GenerationStep {
  /** Steps done: 0 for the start, then 1 to `steps`. */
  readonly step: number;
  readonly steps: number;
  /** Time, the expected share of masks: 1 at the start. */
  readonly time: number;
  /** `i32[batch, tokens]`; overwritten by the next step. */
  readonly sequences: Int32Array;
  /** Masks left in all sequences. */
  readonly masks: number;
}

/** A finished generation. */
export interface Generation {
  /** `i32[batch, tokens]` */
  readonly sequences: Int32Array<ArrayBuffer>;
  /** All sequences after each step, the start first, when asked for. */
  readonly trace: readonly Int32Array<ArrayBuffer>[] | undefined;
}

/** Options of a generation that runs to its end. */
export interface TraceOptions {
  /** Keeps the sequences after each step. Default false. */
  readonly trace?: boolean | undefined;
  /** Called after each step and once before the first. */
  readonly onStep?: ((step: GenerationStep) => void) | undefined;
}

/** Runs a generation to its end. */
export function runGeneration(
  steps: Generator<GenerationStep, Int32Array>,
  { trace = false, onStep }: TraceOptions = {},
): Generation {
  const kept: Int32Array<ArrayBuffer>[] = [];
  while (true) {
    const { done, value } = steps.next();
    if (done) return { sequences: value.slice(), trace: trace ? kept : undefined };
    if (trace) kept.push(value.sequences.slice());
    onStep?.(value);
  }
}

/** Way to fill masks. Places are flat positions; each sequence has a stream of random numbers. */
export interface Filling {
  readonly steps: number;
  /** Time in front of a step, `steps` for that behind the last. */
  timeOf(step: number): number;
  /** Positions `[begin, end)` of each sequence that a step may write; default all. */
  readonly span?: ((step: number) => readonly [begin: number, end: number]) | undefined;
  /** The masked places of one sequence for which a step makes proposals. */
  look(step: number, places: readonly number[], random: RandomStream): readonly number[];
  /** **Shapes** `rows: i32[n]` flat positions → `f32[n, vocabulary]` */
  logits(step: number, rows: Int32Array): Float32Array;
  /** **Shapes** `logits: f32[vocabulary]` */
  propose(logits: Float32Array, random: RandomStream): Proposal;
  /** Indices of one sequence's proposals that a step writes. */
  choose(step: number, confidences: readonly number[], random: RandomStream): readonly number[];
}

/**
 * Rows of the head for which a tokenizer has no token, as padded vocabularies have them: nothing that is
 * written may hold one.
 */
export function tokensWithoutText(
  tokenizer: { tokenText(token: number): string | undefined },
  vocabularySize: number,
): number[] {
  return [...Array(vocabularySize).keys()].filter((token) => tokenizer.tokenText(token) === undefined);
}

/** Flat positions of the masks in `[begin, end)`. */
export function maskedPlaces(
  sequences: Int32Array,
  maskToken: number,
  begin = 0,
  end = sequences.length,
): number[] {
  const places: number[] = [];
  for (let i = begin; i < end; i++) if (sequences[i] === maskToken) places.push(i);
  return places;
}

/**
 * Fills masks in place, one step a turn: first what is given, then the result of each step.
 *
 * **Shapes** `x: i32[batch, tokens]`
 *
 * @param options seed, and number of the first sequence's stream of random numbers
 */
export function* fillMasks(
  model: MaskedTransformer,
  x: Int32Array,
  batch: number,
  filling: Filling,
  { seed = 0, firstStream = 0 }: SeedOptions,
): Generator<GenerationStep, Int32Array> {
  const { maskToken, vocabularySize } = model.config, { steps } = filling, tokens = x.length / batch;
  const randoms = Array.from({ length: batch }, (_, b) => new RandomStream(seed, firstStream + b));
  const state = (step: number): GenerationStep => {
    const masks = maskedPlaces(x, maskToken).length;
    return { step, steps, time: filling.timeOf(step), sequences: x, masks };
  };
  yield state(0);
  for (let step = 0; step < steps; step++) {
    const [begin, end] = filling.span?.(step) ?? [0, tokens];
    const looked = randoms.map((random, b) =>
      filling.look(step, maskedPlaces(x, maskToken, b * tokens + begin, b * tokens + end), random)
    );
    const rows = Int32Array.from(looked.flat(), (place) => model.logitRow(place, tokens));
    const logits = rows.length === 0 ? undefined : filling.logits(step, rows);
    let row = 0;
    for (const [b, places] of logits === undefined ? [] : looked.entries()) {
      const proposals = places.map(() => {
        const at = row++ * vocabularySize;
        return filling.propose(logits!.subarray(at, at + vocabularySize), randoms[b]!);
      });
      const confidences = proposals.map(({ confidence }) => confidence);
      for (const i of filling.choose(step, confidences, randoms[b]!)) x[places[i]!] = proposals[i]!.token;
    }
    yield state(step + 1);
  }
  return x;
}

// Checks ----------------------------------------------------------------------------------------------------

const DOING = "Cannot generate";

/** @throws {RangeError} unless the option is a whole number of at least `minimum` */
export const checkAtLeast = (name: string, value: number, minimum: number): void =>
  checkWhole("generate", name, value, minimum, MAX_STEPS);

/** Most steps of a generation, and of what is counted in it: more than any model has tokens. */
export const MAX_STEPS = 1_000_000;

/** @throws {RangeError} unless the option is a finite number of at least 0 */
export function checkNotNegative(name: string, value: number): void {
  if (value >= 0 && value < Infinity) return;
  throw new RangeError(`${DOING}: ${name} must be a number ≥ 0, got ${value}`);
}

/** @throws {RangeError} unless the option is one of the names */
export function checkChoice(name: string, value: string, allowed: readonly string[]): void {
  if (allowed.includes(value)) return;
  throw new RangeError(`${DOING}: ${name} must be one of ${allowed.join(", ")}, got ${shown(value)}`);
}

/**
 * Checks what a generation starts from: whole sequences, every token in the vocabulary, and room for what is
 * to come.
 *
 * **Shapes** `tokens: i32[batch, n]`; returns n
 *
 * @param name what the tokens are, as in `prompts`
 * @param generated tokens that each sequence will have more
 * @throws {TypeError} when the shape does not fit
 * @throws {RangeError} when a token is outside the vocabulary or the model takes no sequences of that length
 */
export function checkTokens(
  { config: { vocabularySize, maxTokens } }: MaskedTransformer,
  name: string,
  tokens: Int32Array,
  batch: number,
  generated = 0,
): number {
  const length = tokens?.length / batch;
  const isWhole = Number.isSafeInteger(batch) && batch >= 1 && Number.isInteger(length);
  if (!(tokens instanceof Int32Array) || !isWhole || length + generated < 1) {
    throw new TypeError(`${DOING}: ${name} must be i32[${batch}, tokens], got ${tokens?.length} tokens`);
  }
  if (length + generated > maxTokens) {
    const got = generated === 0 ? `${length}` : `${length} + ${generated}`;
    throw new RangeError(`${DOING}: this model takes ${maxTokens} tokens, got ${got} in ${name}`);
  }
  const bad = tokens.findIndex((token) => token < 0 || token >= vocabularySize);
  if (bad >= 0) {
    throw new RangeError(
      `${DOING}: tokens must be from 0 to ${vocabularySize - 1}, got ${tokens[bad]} at position ${
        bad % length
      } of ${name}`,
    );
  }
  return length;
}
