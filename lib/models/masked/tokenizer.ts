/**
 * Text to tokens and back by the checkpoint's tokenizer.json. The library that reads it is loaded on the
 * first call.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import type { Tokenizer as LibraryTokenizer } from "@huggingface/tokenizers";
import { CheckpointError } from "../../errors.ts";
import { readJsonFile } from "../../files/json.ts";
import { shown } from "../model_config.ts";

/** Longest text that is encoded: beyond any model's limit, and tokenizers may take quadratic time. */
const MAX_TEXT_LENGTH = 4_000_000;

/** A checkpoint's tokenizer. */
export class Tokenizer {
  readonly #library: LibraryTokenizer;
  readonly #path: string;

  constructor(library: LibraryTokenizer, path: string) {
    this.#library = library;
    this.#path = path;
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
    const how = { add_special_tokens: options.special === true };
    const ids: readonly (number | undefined)[] = this.#attempt(
      "encode the text",
      () => this.#library.encode(text, how).ids,
    );
    if (!ids.includes(undefined)) return Int32Array.from(ids as readonly number[]);
    const unknown = this.#library.tokenize(text, { add_special_tokens: false })
      .filter((token) => this.#library.token_to_id(token) === undefined);
    throw new RangeError(
      `Cannot encode ${shown(text)}: every part must be in the vocabulary of ${shown(this.#path)}, got ${
        [...new Set(unknown)].slice(0, 10).map(shown).join(", ") || "others"
      }`,
    );
  }

  /** A call of the library, which trusts that the file holds what belongs there. */
  #attempt<T>(doing: string, run: () => T): T {
    try {
      return run();
    } catch (cause) {
      const message = cause instanceof Error ? cause.message : String(cause);
      throw new CheckpointError(`Cannot ${doing} with ${shown(this.#path)}: ${message}`, {
        path: this.#path,
        cause,
      });
    }
  }

  /** Text of tokens; special ones are left out unless asked for. */
  decode(tokens: ArrayLike<number>, options: { readonly special?: boolean } = {}): string {
    if (tokens.length === 0) return "";
    const ids = Array.from(tokens), bad = ids.find((token) => !Number.isSafeInteger(token));
    if (bad !== undefined) {
      throw new RangeError(`Cannot decode tokens: they must be whole numbers, got ${bad}`);
    }
    const how = { skip_special_tokens: options.special !== true, clean_up_tokenization_spaces: false };
    return this.#attempt("decode tokens", () => this.#library.decode(ids, how));
  }

  /** Text of one token as the vocabulary has it, undefined outside it. */
  tokenText(token: number): string | undefined {
    return this.#library.id_to_token(token);
  }

  /** The token that is exactly this text, undefined when there is none. */
  tokenOf(text: string): number | undefined {
    return this.#library.token_to_id(text);
  }
}

/**
 * Loads `tokenizer.json` of a checkpoint's folder.
 *
 * @throws {CheckpointError} when there is none, or it is of a kind that the library does not know
 * @throws {FormatError} when it is not JSON
 *
 * @example
 * ```ts
 * import { loadTokenizer } from "./tokenizer.ts";
 * const tokenizer = await loadTokenizer("tests/models/dream-mini");
 * console.log(tokenizer.encode("47+38=<mask>")); // 8, 11, 14, 7, 12, 15, 1
 * ```
 */
export async function loadTokenizer(folder: string): Promise<Tokenizer> {
  const path = join(folder, "tokenizer.json");
  if (!existsSync(path)) {
    throw new CheckpointError(`Cannot load ${shown(folder)}: must have tokenizer.json, got none`, {
      path: folder,
    });
  }
  const configPath = join(folder, "tokenizer_config.json");
  const json = readJsonFile(path);
  const config = existsSync(configPath) ? readJsonFile(configPath) : {};
  const { Tokenizer: Library } = await importLibrary();
  try {
    return new Tokenizer(new Library(json, config), path);
  } catch (cause) {
    throw new CheckpointError(
      `Cannot load ${shown(path)}: ${cause instanceof Error ? cause.message : String(cause)}`,
      { path, cause },
    );
  }
}

/** Version that Deno fetches where no package.json names one; the same as there. */
const LIBRARY_VERSION = "0.2.0";

async function importLibrary(): Promise<typeof import("@huggingface/tokenizers")> {
  try {
    return await import("@huggingface/tokenizers");
  } catch (cause) {
    try {
      // A Deno program that took this module from a URL has no package.json. Computed, because others fail on
      // the name.
      if ("Deno" in globalThis) {
        return await import(["npm:@huggingface", `tokenizers@${LIBRARY_VERSION}`].join("/"));
      }
    } catch {
      // The first failure says what to install.
    }
    throw new Error(
      'Cannot load a tokenizer: the package "@huggingface/tokenizers" must be installed, got none',
      { cause },
    );
  }
}
