/** Random tokens of a vocabulary. */
import type { RandomStream } from "../models/mod.ts";

/**
 * Random tokens of a vocabulary, all alike but for some that do not occur.
 *
 * @throws {RangeError} when no token is left
 */
export function randomTokens(
  random: RandomStream,
  count: number,
  { vocabularySize, excluded }: { readonly vocabularySize: number; readonly excluded: ReadonlySet<unknown> },
): number[] {
  if (excluded.size >= vocabularySize) {
    throw new RangeError(
      `Cannot make sequences: the vocabulary must have ordinary tokens, got only ${vocabularySize} special ones`,
    );
  }
  return Array.from({ length: count }, () => {
    let token = random.below(vocabularySize);
    while (excluded.has(token)) token = random.below(vocabularySize);
    return token;
  });
}
