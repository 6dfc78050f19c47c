/**
 * What the generations of Dream and LLaDA share: the steps that they hand out, running them to the end, and the checks of
 * their options, all before any work.
 */
import type { MaskedTransformer } from "./transformer.ts";
import { shown } from "../layers/model_config.ts";

/** What a step of a generation left. */
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

/** What a generation that runs to its end takes beside its own options. */
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

// Checks -------------------------------------------------------------------------------------------------------

const DOING = "Cannot generate";

/** @throws {RangeError} unless the option is a whole number of at least `minimum` */
export function checkCount(name: string, value: number, minimum: number): void {
  if (Number.isSafeInteger(value) && value >= minimum) return;
  throw new RangeError(`${DOING}: ${name} must be a whole number ≥ ${minimum}, got ${value}`);
}

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
 * Checks what a generation starts from: whole sequences, every token in the vocabulary, and room for what is to come.
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
