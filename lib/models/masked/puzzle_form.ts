/** The form of the puzzles that the Dream reference model was trained on (tests/models/README.md). */
import type { Tokenizer } from "../tokenizer/mod.ts";

/** Form of a prompt of each task, and length of its answer. */
const FORMS = [
  { task: "add", prompt: /^\d\d\+\d\d=$/, answer: 3 },
  { task: "sudoku", prompt: /^S[0-4]{16}>$/, answer: 16 },
  { task: "sort", prompt: /^[a-p]{8}>$/, answer: 8 },
] as const;

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
