/**
 * Checks tokenizer.json before the library reads it: types and ranges of all fields, tokens that contradict
 * each other, patterns that may run for ever. What the library does otherwise than Hugging Face's own is
 * rewritten into what it does alike, or refused.
 */
import { shown } from "../model_config.ts";
import type { Field } from "./fields.ts";

/** Largest id of a token: the largest published vocabularies have under 300 000. */
const MAX_TOKEN_ID = 2 ** 24 - 1;
/** Largest word that WordPiece looks at; its time grows with the cube. */
const MAX_WORD_LENGTH = 1000;
/** Repetitions in a row in a pattern, each a power of the text's length; published ones have 2. */
const MAX_REPEATS = 3;
/** A part that may come more often than this counts as one of them. */
const MAX_COUNT = 8;

/** Tokens with their ids, as all files of a tokenizer have them. */
export class Vocabulary {
  readonly ids = new Map<string, number>();
  readonly texts = new Map<number, string>();

  /** Adds a token. @throws {CheckpointError} when its text has another id, or its id another text */
  add(field: Field, text: string, id: unknown): void {
    if (typeof id !== "number" || !Number.isInteger(id) || id < 0 || id > MAX_TOKEN_ID) {
      throw field.fault(`a token's id from 0 to ${MAX_TOKEN_ID}`, `${shown(id)} of ${shown(text)}`);
    }
    const known = this.ids.get(text), other = this.texts.get(id);
    if (known !== undefined && known !== id) {
      throw field.fault(`id ${known} for ${shown(text)}, as elsewhere in the tokenizer's files`, `${id}`);
    }
    if (other !== undefined && other !== text) {
      throw field.fault(`${shown(other)} for id ${id}, as elsewhere in the tokenizer's files`, shown(text));
    }
    this.ids.set(text, id);
    this.texts.set(id, text);
  }
}

/** A text as a pattern that matches it. */
const escaped = (text: string) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

type Check = (field: Field) => unknown;
type Kind = "normalizer" | "pre_tokenizer" | "post_processor" | "decoder";

const text: Check = (field) => field.text();
const count: Check = (field) => field.count(0, MAX_TOKEN_ID);
const pattern: Check = (field) => {
  const regex = field.at("Regex");
  if (regex.isAbsent) return field.at("String").text();
  if (mayRunForEver(regex.text())) {
    throw regex.fault("a pattern whose repeated groups match a text in one way only, or it may run for ever");
  }
};
const optional = (check: Check): Check => (field) => field.isAbsent || check(field);
const flags = (...names: string[]) =>
  Object.fromEntries(names.map((name) => [name, optional((field) => field.flag())]));
const plain = (...types: string[]) => Object.fromEntries(types.map((type) => [type, {}]));
const nodes = (kind: Kind): Check => (field) => field.list().forEach((each) => checkNode(kind, each));
const pair: Check = (field) => {
  const [token, id] = field.list();
  if (token === undefined || id === undefined) throw field.fault("a token and its id");
  token.text();
  count(id);
};

/** Replaces a pre-tokenizer by one that splits at a pattern, and drops what is between if it is `Removed`. */
const splitAt = (Regex: string, behavior: "Isolated" | "Removed"): Check => ({ value }) =>
  Object.assign(value!, { type: "Split", pattern: { Regex }, behavior, invert: behavior === "Removed" });

/** Splits before every mark of a space, as `split` (by default) asks for and the library does not. */
const splitAtSpaces: Check = (field) => {
  const { split, replacement, str_rep, prepend_scheme } = field.object();
  if (split === false) return;
  const mark = escaped(String(replacement ?? str_rep ?? "▁"));
  const pattern = { Regex: `${mark}(?:(?!${mark})[\\s\\S])*|(?:(?!${mark})[\\s\\S])+` };
  const pretokenizers = [
    {
      type: "Metaspace",
      replacement: replacement ?? str_rep ?? "▁",
      prepend_scheme: prepend_scheme ?? "always",
    },
    { type: "Split", pattern, behavior: "Isolated", invert: false },
  ];
  Object.assign(field.object(), { type: "Sequence", pretokenizers });
};

/** Fields of every kind of part, by its type; an empty name stands for the whole part. */
const PARTS: Readonly<Record<Kind, Readonly<Record<string, Readonly<Record<string, Check>>>>>> = {
  normalizer: {
    ...plain("Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Precompiled", "StripAccents"),
    BertNormalizer: flags("clean_text", "handle_chinese_chars", "lowercase", "strip_accents"),
    Prepend: { prepend: text },
    Replace: { pattern, content: text },
    Sequence: { normalizers: nodes("normalizer") },
    Strip: flags("strip_left", "strip_right"),
  },
  pre_tokenizer: {
    ...plain("BertPreTokenizer", "WhitespaceSplit"),
    ByteLevel: flags("add_prefix_space", "trim_offsets", "use_regex"),
    Digits: {
      "": (field) =>
        splitAt(field.at("individual_digits").value === true ? "\\p{N}" : "\\p{N}+", "Isolated")(field),
    },
    FixedLength: { length: (field) => field.count(1, MAX_TOKEN_ID) },
    Metaspace: {
      replacement: optional(text),
      str_rep: optional(text),
      prepend_scheme: optional((field) => field.choice(["always", "first", "never"])),
      ...flags("split"),
      "": splitAtSpaces,
    },
    Punctuation: {
      behavior: (field) => field.choice(["Isolated", "Contiguous"]),
      "": (field) =>
        field.at("behavior").value === "Isolated" && splitAt("[!-/:-@\\[-`{-~\\p{P}]", "Isolated")(field),
    },
    Replace: { pattern, content: text },
    Sequence: { pretokenizers: nodes("pre_tokenizer") },
    Split: {
      pattern,
      behavior: (field) => field.choice(["Isolated", "Removed"]),
      ...flags("invert"),
      "": (field) => {
        if (field.at("behavior").value === "Isolated") Object.assign(field.object(), { invert: false });
        const literal = field.at("pattern").at("String"); // the library would keep what is to be removed
        if (!literal.isAbsent) {
          Object.assign(field.object(), { pattern: { Regex: escaped(literal.text()) } });
        }
      },
    },
    Whitespace: { "": splitAt("\\w+|[^\\w\\s]+", "Removed") },
  },
  post_processor: {
    ...plain("ByteLevel"),
    BertProcessing: { cls: pair, sep: pair },
    RobertaProcessing: { cls: pair, sep: pair },
    Sequence: { processors: nodes("post_processor") },
    TemplateProcessing: { single: template, pair: optional(template) },
  },
  decoder: {
    ...plain("ByteFallback", "ByteLevel", "Fuse"),
    BPEDecoder: { suffix: text },
    Metaspace: { replacement: optional(text) },
    Replace: { pattern, content: text },
    Sequence: { decoders: nodes("decoder") },
    Strip: { content: text, start: count, stop: count },
    WordPiece: { prefix: text, ...flags("cleanup") },
  },
};

function template(field: Field): void {
  for (const item of field.list()) {
    const special = item.at("SpecialToken");
    if (special.isAbsent) item.at("Sequence").at("id").choice(["A", "B"]);
    else special.at("id").text();
  }
}

function checkFields(field: Field, checks: Readonly<Record<string, Check>>): void {
  for (const [key, check] of Object.entries(checks)) check(key === "" ? field : field.at(key));
}

function checkNode(kind: Kind, field: Field): void {
  checkFields(field, PARTS[kind][field.at("type").choice(Object.keys(PARTS[kind]))]!);
}

/** Tokens that a post-processor puts around a text, with the places that name them. */
export function* addedAround(field: Field): Generator<Field> {
  const type = field.isAbsent ? undefined : field.at("type").value;
  if (type === "Sequence") {
    for (const each of field.at("processors").list()) yield* addedAround(each);
  } else if (type === "TemplateProcessing") {
    for (const item of field.at("single").list()) {
      if (!item.at("SpecialToken").isAbsent) yield item.at("SpecialToken").at("id");
    }
  } else if (type === "BertProcessing" || type === "RobertaProcessing") {
    for (const key of ["cls", "sep"]) yield field.at(key).list()[0]!;
  }
}

function addWords(model: Field, vocabulary: Vocabulary): void {
  const field = model.at("vocab"), entries = Object.entries(field.object());
  if (entries.length === 0) throw field.fault("an object of tokens and their ids", "none");
  for (const [token, id] of entries) vocabulary.add(field, token, id);
}

/** Merges of BPE: their parts and what they make must be tokens, else nothing can come of them. */
function checkMerges(model: Field, { ids }: Vocabulary): void {
  let kind: string | undefined;
  for (const merge of model.at("merges").list()) {
    const { value } = merge,
      parts: readonly unknown[] = typeof value === "string"
        ? value.split(" ")
        : merge.list().map(({ value }) => value);
    const [left, right] = parts;
    if (
      parts.length !== 2 || typeof left !== "string" || typeof right !== "string" ||
      (kind ??= typeof value) !== typeof value
    ) {
      throw merge.fault("two tokens, written as all merges are");
    }
    const missing = [left, right, left + right].find((token) => !ids.has(token));
    if (missing !== undefined) {
      throw merge.fault("of tokens, and make one", `${shown(missing)}, which is none`);
    }
  }
}

/** Checks of the models by their type; each fills the vocabulary. */
const MODELS: Readonly<Record<string, (model: Field, vocabulary: Vocabulary) => void>> = {
  BPE(model, vocabulary) {
    addWords(model, vocabulary);
    checkFields(model, {
      unk_token: optional(text),
      end_of_word_suffix: optional(text),
      continuing_subword_prefix: optional((field) => field.choice([""])),
      ...flags("fuse_unk", "byte_fallback", "ignore_merges"),
    });
    checkMerges(model, vocabulary);
  },
  WordPiece(model, vocabulary) {
    addWords(model, vocabulary);
    checkFields(model, {
      unk_token: text,
      continuing_subword_prefix: text,
      max_input_chars_per_word: optional((field) => field.count(1, MAX_WORD_LENGTH)),
    });
  },
  WordLevel(model, vocabulary) {
    addWords(model, vocabulary);
    checkFields(model, { unk_token: optional(text) });
  },
  Unigram(model, vocabulary) {
    const pieces = model.at("vocab").list();
    if (pieces.length === 0) throw model.at("vocab").fault("a list of tokens and their scores", "none");
    for (const [id, piece] of pieces.entries()) {
      const [token, score] = piece.list();
      if (typeof token?.value !== "string" || typeof score?.value !== "number") {
        throw piece.fault("a token and its score");
      }
      vocabulary.add(piece, token.value, id);
    }
    checkFields(model, {
      unk_id: optional((field) => field.count(0, pieces.length - 1)),
      ...flags("byte_fallback"),
    });
    if (model.at("byte_fallback").value === true) {
      throw model.at("byte_fallback").fault("false: bytes in place of unknown parts are not supported here");
    }
  },
};

/** Type of a model, which old files leave out. */
function typeOf(model: Field): string {
  if (!model.at("type").isAbsent) return model.at("type").choice(Object.keys(MODELS));
  if (Array.isArray(model.at("vocab").value)) return "Unigram";
  if (!model.at("merges").isAbsent) return "BPE";
  return model.at("continuing_subword_prefix").isAbsent ? "WordLevel" : "WordPiece";
}

/** Checks an added token, puts it into the vocabulary, and returns its text. */
export function checkAddedToken(token: Field, id: unknown, vocabulary: Vocabulary): string {
  const content = token.at("content"), whole = token.at("single_word");
  if (content.text() === "") throw content.fault("a text of at least one character");
  vocabulary.add(token, content.text(), id);
  checkFields(token, flags("special", "normalized", "lstrip", "rstrip", "single_word"));
  if (whole.value === true) throw whole.fault("false: tokens of whole words only are not supported");
  return content.text();
}

/**
 * Checks a tokenizer.json, and completes it with what may be left out.
 *
 * @throws {CheckpointError} that names the field
 */
export function checkTokenizer(root: Field): Vocabulary {
  const json = root.object(), vocabulary = new Vocabulary();
  const model = root.at("model"), type = typeOf(model);
  MODELS[type]!(model, vocabulary);
  Object.assign(model.object(), { type });
  json["added_tokens"] ??= [];
  for (const token of root.at("added_tokens").list()) {
    checkAddedToken(token, token.at("id").value, vocabulary);
  }
  for (const kind of ["normalizer", "pre_tokenizer", "post_processor", "decoder"] as const) {
    json[kind] ??= null;
    if (json[kind] !== null) checkNode(kind, root.at(kind));
  }
  for (const added of addedAround(root.at("post_processor"))) {
    if (!vocabulary.ids.has(added.text())) throw added.fault("a token of the vocabulary");
  }
  return vocabulary;
}

/** Parts of a pattern: escapes, classes, the beginnings of groups, quantifiers, characters. */
const PATTERN_TOKEN =
  /\\[pPxu]\{[^}]*\}|\\[^]|\[\^?\]?(?:\\[^]|[^\]\\])*\]|\((?:\?(?:<[=!]|<\w+>|[a-z]*:|[=!>]))?|\{\d+(?:,\d*)?\}|[^]/g;

/**
 * Whether the time that a pattern takes may grow exponentially, or with a high power of the text's length:
 * where a group that repeats without bound holds a choice or another repetition, or where many follow each
 * other.
 */
function mayRunForEver(source: string): boolean {
  // Of each open group: whether it matches in several ways, repeats in front of it, and most of a choice in
  // it.
  const groups = [{ varies: false, before: 0, most: 0 }];
  let repeats = 0, isInnerVaried = false, isQuantified = false;
  for (const [token] of source.matchAll(PATTERN_TOKEN)) {
    const [, least, comma, most] = /^\{(\d+)(,?)(\d*)\}$/.exec(token) ?? [], group = groups.at(-1)!;
    const isQuantifier = /^[*+?]$/.test(token) || least !== undefined;
    if (!isQuantifier) {
      if (token === "|" || token === ")") group.most = Math.max(group.most, repeats);
      isInnerVaried = token === ")" && group.varies;
      if (token === "|") [group.varies, repeats] = [true, group.before];
      else if (token.startsWith("(")) groups.push({ varies: false, before: repeats, most: repeats });
      else if (token === ")" && groups.length > 1) {
        groups.pop();
        groups.at(-1)!.varies ||= isInnerVaried;
        repeats = group.most;
      }
    } else if (!isQuantified) { // one behind another makes it lazy
      const minimum = token === "+" ? 1 : Number(least ?? 0);
      const unbounded = least === undefined ? Infinity : comma === "" ? minimum : Number(most || Infinity);
      const maximum = token === "?" ? 1 : unbounded;
      if (isInnerVaried && maximum > 1) return true;
      if (maximum > minimum) group.varies = true;
      if (maximum > MAX_COUNT && ++repeats > MAX_REPEATS) return true;
    }
    isQuantified = isQuantifier && !isQuantified;
  }
  return false;
}
