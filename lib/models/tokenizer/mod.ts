/**
 * Text to tokens and back by a checkpoint's own tokenizer, and chats by its template. The library that reads
 * it is loaded on the first call.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import type { Tokenizer as LibraryTokenizer } from "@huggingface/tokenizers";
import { CheckpointError } from "../../errors.ts";
import { shown } from "../model_config.ts";
import { type ChatMessage, chatText } from "./chat.ts";
import { readTokenizerFiles, type TokenizerFiles } from "./files.ts";
import { importPackage } from "./packages.ts";

export type { ChatMessage } from "./chat.ts";

/** Longest text that is encoded: beyond any model's limit, and tokenizers may take quadratic time. */
const MAX_TEXT_LENGTH = 4_000_000;
/** Stands for what the vocabulary lacks, where the tokenizer itself would drop it. */
const UNKNOWN = "\0unknown";

/** A checkpoint's tokenizer. */
export class Tokenizer {
  readonly #library: LibraryTokenizer;
  readonly #files: TokenizerFiles;

  constructor(library: LibraryTokenizer, files: TokenizerFiles) {
    this.#library = library;
    this.#files = files;
  }

  /** Tokens that the tokenizer's files call special. */
  get specialTokens(): ReadonlySet<number> {
    return specialTokens(this.#files).all;
  }

  /**
   * Tokens of a text; special tokens may stand in it, as `<mask>`. Those that the tokenizer puts around a
   * text are added with `special`.
   *
   * @throws {RangeError} when a part of the text is not in the vocabulary, naming it
   */
  encode(text: string, options: { readonly special?: boolean } = {}): Int32Array<ArrayBuffer> {
    if (text.length > MAX_TEXT_LENGTH) {
      throw new RangeError(
        `Cannot encode the text: it may have ${MAX_TEXT_LENGTH} characters, got ${text.length}`,
      );
    }
    const ids = this.#encode(text, options.special === true);
    if (!ids.includes(undefined)) return Int32Array.from(ids as readonly number[]);
    const { path } = this.#files, how = { add_special_tokens: false };
    let unknown = this.#library.tokenize(text, how)
      .filter((token) => token !== UNKNOWN && this.#library.token_to_id(token) === undefined);
    if (unknown.length === 0) {
      unknown = [...new Set(text)].filter((character) => this.#encode(character, false).includes(undefined));
    }
    throw new RangeError(
      `Cannot encode ${shown(text)}: every part must be in the vocabulary of ${shown(path)}, got ${
        [...new Set(unknown)].slice(0, 10).map(shown).join(", ") || "others"
      }`,
    );
  }

  #encode(text: string, special: boolean): readonly (number | undefined)[] {
    return this.#attempt(() => this.#library.encode(text, { add_special_tokens: special }).ids);
  }

  /** A call of the library. */
  #attempt<T>(run: () => T): T {
    try {
      return run();
    } catch (cause) {
      throw unreadable(this.#files.path, cause);
    }
  }

  /** Text of tokens; special ones are left out unless asked for, and those that have no text always. */
  decode(tokens: ArrayLike<number>, options: { readonly special?: boolean } = {}): string {
    const ids = Array.from(tokens), bad = ids.find((token) => !Number.isSafeInteger(token));
    if (bad !== undefined) {
      throw new RangeError(`Cannot decode tokens: they must be whole numbers, got ${bad}`);
    }
    const known = ids.filter((token) => this.tokenText(token) !== undefined);
    if (known.length === 0) return "";
    const how = { skip_special_tokens: options.special !== true, clean_up_tokenization_spaces: false };
    return this.#attempt(() => this.#library.decode(known, how));
  }

  /** Text of one token as the vocabulary has it, undefined outside it. */
  tokenText(token: number): string | undefined {
    return this.#library.id_to_token(token);
  }

  /** The token that is exactly this text, undefined when there is none. */
  tokenOf(text: string): number | undefined {
    return this.#library.token_to_id(text);
  }

  /**
   * Text of a conversation by the checkpoint's chat template, with what begins the assistant's answer if
   * `isAnswerNext`. Its special tokens are in it: it is encoded without `special`.
   *
   * @throws {CheckpointError} when there is no template, it is broken, or it refuses the messages
   */
  chat(messages: readonly ChatMessage[], isAnswerNext: boolean): Promise<string> {
    return chatText(this.#files, messages, isAnswerNext);
  }
}

/** Special tokens of a tokenizer's files, and the one that fills up short rows. */
export function specialTokens(
  { json, vocabulary, named }: TokenizerFiles,
): { readonly all: ReadonlySet<number>; readonly pad: number | undefined } {
  const added = json["added_tokens"] as readonly { readonly id: number; readonly special?: boolean }[];
  const all = new Set(added.filter(({ special }) => special === true).map(({ id }) => id));
  return { all, pad: vocabulary.ids.get(named.get("pad_token") ?? "") };
}

const unreadable = (path: string, cause: unknown) =>
  new CheckpointError(
    `Cannot use the tokenizer ${shown(path)}: ${
      shown(cause instanceof Error ? cause.message : String(cause))
    }`,
    { path, cause },
  );

/**
 * Loads the tokenizer of a checkpoint's folder: tokenizer.json, or vocab.json and merges.txt.
 *
 * @throws {CheckpointError} when there is none, files contradict each other, or it is of a kind that is not
 * known
 * @throws {FormatError} when a file is not JSON
 *
 * @example
 * ```ts
 * import { loadTokenizer } from "./mod.ts";
 * const tokenizer = await loadTokenizer("tests/models/dream-mini");
 * console.log(tokenizer.encode("47+38=<mask>")); // 8, 11, 14, 7, 12, 15, 1
 * ```
 */
export async function loadTokenizer(folder: string): Promise<Tokenizer> {
  const files = readTokenizerFiles(folder);
  if (files !== undefined) return await openTokenizer(files);
  const found = ["vocab.json", "merges.txt", "tokenizer.model"].filter((name) =>
    existsSync(join(folder, name))
  );
  throw new CheckpointError(
    `Cannot load ${shown(folder)}: must have tokenizer.json, or vocab.json and merges.txt, got ${
      found.length === 0
        ? "none: copy the tokenizer's files from where the model came from"
        : `${found.join(", ")} alone: save a whole one with transformers' save_pretrained`
    }`,
    { path: folder },
  );
}

/** The tokenizer of files that were read. @throws {CheckpointError} when the library refuses them */
export async function openTokenizer(files: TokenizerFiles): Promise<Tokenizer> {
  const { json, config, path } = files, model = json["model"] as Record<string, unknown>;
  const { Tokenizer: Library } = await importPackage("tokenizers");
  try {
    const complete = { ...json, model: { ...model, unk_token: model["unk_token"] ?? UNKNOWN } };
    // The special tokens that the configuration lists are among the added ones already.
    const settings = { ...config.object(), additional_special_tokens: [] };
    return new Tokenizer(new Library(complete, settings), files);
  } catch (cause) {
    throw unreadable(path, cause);
  }
}
