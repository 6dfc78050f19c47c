/**
 * The files of a tokenizer as they are published: tokenizer.json, or vocab.json with merges.txt as Dream has
 * them, and the special tokens that added_tokens.json, special_tokens_map.json and tokenizer_config.json
 * name.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { readJsonFile } from "../../files/json.ts";
import { readWhole } from "../../files/whole.ts";
import { addedAround, checkAddedToken, checkTokenizer, type Vocabulary } from "./check.ts";
import { Field } from "./fields.ts";

/** Largest merges.txt that is read: published ones stay under 10 MB. */
const MAX_MERGES_BYTES = 64 * 2 ** 20;

/** A tokenizer's files, checked. */
export interface TokenizerFiles {
  readonly folder: string;
  /** File that the vocabulary comes from. */
  readonly path: string;
  /** In the form of tokenizer.json. */
  readonly json: Record<string, unknown>;
  /** tokenizer_config.json, over special_tokens_map.json. */
  readonly config: Field;
  readonly vocabulary: Vocabulary;
  /** Texts of special tokens by name, as `bos_token`. */
  readonly named: ReadonlyMap<string, string>;
}

const MERGES = "merges.txt";

/** Qwen2's pattern of the parts of a text. */
const QWEN2_PATTERN =
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|" +
  "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/** The `tokenizer_class` of vocab.json and merges.txt, and whether texts are split as GPT-2's are. */
const CLASSES: Readonly<Record<string, boolean>> = {
  DreamTokenizer: false,
  Qwen2Tokenizer: false,
  Qwen2TokenizerFast: false,
  GPT2Tokenizer: true,
  GPT2TokenizerFast: true,
};

/**
 * Reads the files of a checkpoint's tokenizer; undefined where there are none.
 *
 * @throws {CheckpointError} when a field is not what it must be, or two files contradict each other
 * @throws {FormatError} when a file is not JSON
 */
export function readTokenizerFiles(folder: string): TokenizerFiles | undefined {
  const read = (name: string) => {
    const path = join(folder, name);
    return new Field(path, "", existsSync(path) ? readJsonFile(path) : {});
  };
  const [hasWhole, hasWords, hasMerges] = ["tokenizer.json", "vocab.json", MERGES]
    .map((name) => existsSync(join(folder, name)));
  if (!hasWhole && !(hasWords && hasMerges)) return undefined;
  const words = read("vocab.json"), added = read("added_tokens.json"), own = read("tokenizer_config.json");
  const config = new Field(own.path, "", { ...read("special_tokens_map.json").object(), ...own.object() });
  const root = hasWhole
    ? read("tokenizer.json")
    : new Field(words.path, "", assembled(folder, words, config));
  const vocabulary = checkTokenizer(root);
  if (hasWhole) { for (const [text, id] of Object.entries(words.object())) vocabulary.add(words, text, id); }
  const tokens = new Map(
    root.at("added_tokens").list().map((token) => [token.at("content").text(), token.value]),
  );
  const add = (content: string, token: Record<string, unknown>) => {
    if (!tokens.has(content)) tokens.set(content, { ...token, id: vocabulary.ids.get(content), content });
  };
  const decoder = config.at("added_tokens_decoder");
  for (const id of Object.keys(decoder.isAbsent ? {} : decoder.object())) {
    const token = decoder.at(id);
    add(checkAddedToken(token, Number(id), vocabulary), token.object());
  }
  for (const [content, id] of Object.entries(added.object())) vocabulary.add(added, content, id);
  const named = new Map<string, string>();
  for (const [name, text] of namedTokens(config)) {
    named.set(name, text);
    if (vocabulary.ids.has(text)) add(text, { special: true });
  }
  for (const content of Object.keys(added.object())) add(content, {});
  root.object()["added_tokens"] = [...tokens.values()];
  addAround(root, config, named, vocabulary);
  const maskToken = vocabulary.ids.get(named.get("mask_token") ?? "");
  const mask = ["generation_config.json", "config.json"].map((name) => read(name).at("mask_token_id"))
    .find(({ value }) => typeof value === "number");
  if (mask !== undefined && maskToken !== undefined && mask.value !== maskToken) {
    throw mask.fault(`${maskToken}, the id of the tokenizer's mask_token`);
  }
  return { folder, path: root.path, json: root.object(), config, vocabulary, named };
}

/** The tokenizer.json that says the same as vocab.json and merges.txt. */
function assembled(folder: string, words: Field, config: Field): Record<string, unknown> {
  const name = config.at("tokenizer_class");
  if (!name.isAbsent && !Object.hasOwn(CLASSES, name.text())) {
    throw name.fault(`one of ${Object.keys(CLASSES).join(", ")} where there is no tokenizer.json`);
  }
  const isGpt2 = !name.isAbsent && CLASSES[name.text()] === true;
  const path = join(folder, MERGES), field = new Field(path, "", undefined);
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(readWhole(path, MAX_MERGES_BYTES));
  } catch (cause) {
    throw cause instanceof TypeError ? field.fault("UTF-8", "other bytes") : cause;
  }
  const merges = text.split("\n").map((line) => line.trim())
    .filter((line, i) => line !== "" && !(i === 0 && line.startsWith("#version")));
  const split = { type: "Split", pattern: { Regex: QWEN2_PATTERN }, behavior: "Isolated", invert: false };
  const space = config.at("add_prefix_space"), add_prefix_space = !space.isAbsent && space.flag();
  const bytes = { type: "ByteLevel", add_prefix_space, trim_offsets: false, use_regex: isGpt2 };
  return {
    normalizer: isGpt2 ? null : { type: "NFC" },
    pre_tokenizer: { type: "Sequence", pretokenizers: isGpt2 ? [bytes] : [split, bytes] },
    decoder: { type: "ByteLevel" },
    model: { type: "BPE", vocab: words.value, merges },
  };
}

/** Special tokens by the names that tokenizer_config.json and special_tokens_map.json give them. */
function* namedTokens(config: Field): Generator<readonly [name: string, text: string]> {
  const textOf = (field: Field) => typeof field.value === "string" ? field.value : field.at("content").text();
  for (const key of Object.keys(config.object())) {
    const field = config.at(key);
    if (field.isAbsent || typeof field.value === "boolean") continue;
    if (key.endsWith("_token")) yield [key, textOf(field)];
    else if (/^(?:additional|extra)_special_tokens$/.test(key)) {
      const all = Array.isArray(field.value)
        ? field.list()
        : Object.keys(field.object()).map((name) => field.at(name));
      for (const each of all) yield [each.place, textOf(each)];
    }
  }
}

/**
 * Puts the tokens that `add_bos_token` and `add_eos_token` ask for around a text, where tokenizer.json has no
 * rule for that.
 */
function addAround(
  root: Field,
  config: Field,
  named: ReadonlyMap<string, string>,
  { ids }: Vocabulary,
): void {
  if (!addedAround(root.at("post_processor")).next().done) return;
  const token = (key: "bos_token" | "eos_token") => {
    const flag = config.at(`add_${key}`);
    if (flag.isAbsent || !flag.flag()) return [];
    const id = named.get(key);
    if (id === undefined || !ids.has(id)) throw config.at(key).fault(`a token, because add_${key} is true`);
    return [{ SpecialToken: { id, type_id: 0 } }];
  };
  const single = [...token("bos_token"), { Sequence: { id: "A", type_id: 0 } }, ...token("eos_token")];
  if (single.length === 1) return;
  root.object()["post_processor"] = { type: "TemplateProcessing", single, pair: single, special_tokens: {} };
}
