/** The form of the puzzles that the Dream reference model was trained on (tests/models/README.md). */
import type { RandomStream } from "../random.ts";
import type { Tokenizer } from "../tokenizer/mod.ts";

/** Form of a prompt of each task, length of its answer, and a prompt at random. */
const FORMS = [
  {
    task: "add",
    prompt: /^\d\d\+\d\d=$/,
    answer: 3,
    draw: (random: RandomStream) => `${drawn(random, 2, DIGITS)}+${drawn(random, 2, DIGITS)}=`,
  },
  {
    task: "sudoku",
    prompt: /^S[0-4]{16}>$/,
    answer: 16,
    draw: (random: RandomStream) => `S${drawnGrid(random)}>`,
  },
  {
    task: "sort",
    prompt: /^[a-p]{8}>$/,
    answer: 8,
    draw: (random: RandomStream) => `${drawn(random, 8, "abcdefghijklmnop")}>`,
  },
] as const;

const DIGITS = "0123456789";
/** Part of a grid's cells that are left empty, at least and at most. */
const EMPTY = [0.3, 0.7] as const;

const drawn = (random: RandomStream, count: number, from: string): string =>
  Array.from({ length: count }, () => from[random.below(from.length)]).join("");

/** A 4 × 4 grid that has a solution, some of its cells 0: rows, columns and digits of one exchanged. */
function drawnGrid(random: RandomStream): string {
  const digits = shuffled([1, 2, 3, 4], random);
  const order = () =>
    shuffled([0, 1], random).flatMap((pair) => shuffled([0, 1], random).map((i) => 2 * pair + i));
  const rows = order(),
    cols = order(),
    [least, most] = EMPTY,
    empty = least + (most - least) * random.uniform();
  const solved = rows.flatMap((row) => cols.map((col) => digits[(2 * row + (row >> 1) + col) % 4]!));
  return solved.map((digit) => random.uniform() < empty ? 0 : digit).join("");
}

function shuffled<T>(values: T[], random: RandomStream): T[] {
  for (let i = values.length - 1; i > 0; i--) {
    const j = random.below(i + 1);
    [values[i], values[j]] = [values[j]!, values[i]!];
  }
  return values;
}

/** A prompt of each task in turn, with the characters of its answer. */
export function drawPuzzle(
  random: RandomStream,
  turn: number,
): { readonly prompt: string; readonly answer: number } {
  const { draw, answer } = FORMS[turn % FORMS.length]!;
  return { prompt: draw(random), answer };
}

/** Tokens of a puzzle's sequence, padding included: those of the longest, with what begins and ends it. */
export const PUZZLE_TOKENS = 36;

/** Characters of all prompts and answers. */
const CHARACTERS = "0123456789+=>S:abcdefghijklmnop";
/** `<pad>`, `<mask>`, `<bos>`, `<eos>` */
const SPECIAL_TOKENS = 4;

/** Whether a vocabulary has the puzzles' characters, the special tokens, and no other token. */
export function isPuzzleVocabulary(tokenizer: Tokenizer): boolean {
  return tokenizer.tokenText(CHARACTERS.length + SPECIAL_TOKENS) === undefined &&
    [...CHARACTERS].every((character) => tokenizer.tokenOf(character) !== undefined);
}

/** Characters of the answer to a puzzle's prompt, undefined for text that is no puzzle. */
export function answerLength(prompt: string): number | undefined {
  return FORMS.find(({ prompt: form }) => form.test(prompt))?.answer;
}
