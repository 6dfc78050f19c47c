/** A tokenizer in llama.cpp's metadata: byte-level BPE, and vocabularies of single characters. */
import { readTokenizerFiles } from "../../models/mod.ts";
import { templateOf } from "../../models/tokenizer/chat.ts";
import { addedAround } from "../../models/tokenizer/check.ts";
import { Field } from "../../models/tokenizer/fields.ts";
import type { TokenizerFiles } from "../../models/tokenizer/files.ts";
import type { MaskedTransformerConfig } from "../../models/mod.ts";
import { cannotHold, type ExportSource } from "../format.ts";
import { bool, type GgufValue, text, u32 } from "./container.ts";

/** Types of tokens: in llama.cpp's numbers. */
const NORMAL = 1, CONTROL = 3, USER = 4, UNUSED = 5;

/** Parts that several patterns share. */
const SHORT = "'s|'t|'re|'ve|'m|'ll|'d", SPACES = "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const tail = (digits: string, words = "\\p{L}+", not = "\\s\\p{L}\\p{N}") =>
  `(?i:${SHORT})|[^\\r\\n\\p{L}\\p{N}]?${words}|${digits}| ?[^${not}]+[\\r\\n]*|${SPACES}`;
const GPT2 = `${SHORT}| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+`;
const LOWER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]", UPPER = "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]";
const cased = (short: string) =>
  `[^\\r\\n\\p{L}\\p{N}]?${LOWER}*${UPPER}+${short}|[^\\r\\n\\p{L}\\p{N}]?${LOWER}+${UPPER}*${short}`;

/**
 * Names of llama.cpp's pre-tokenizers by the patterns at which tokenizer.json splits, one line each. A name
 * implies whether merges are ignored for whole tokens.
 */
const PRE: readonly { readonly name: string; readonly splits: string; readonly ignoresMerges?: boolean }[] = [
  { name: "qwen2", splits: tail("\\p{N}") },
  { name: "qwen35", splits: tail("\\p{N}", "[\\p{L}\\p{M}]+", "\\s\\p{L}\\p{M}\\p{N}") },
  { name: "llama-bpe", splits: tail("\\p{N}{1,3}"), ignoresMerges: true },
  { name: "smaug-bpe", splits: tail("\\p{N}{1,3}") },
  { name: "gpt-2", splits: GPT2 },
  { name: "starcoder", splits: `\\p{N}\n${GPT2}` },
  {
    name: "gpt-4o",
    splits: `${cased(`(?i:${SHORT})?`)}|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|${SPACES}`,
  },
  {
    name: "tekken",
    splits: `${cased("")}|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|${SPACES}`,
    ignoresMerges: true,
  },
  {
    name: "bailingmoe",
    splits: "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|" +
      "\\s*[\\r\\n]|\\s+(?!\\S)|\\s+",
  },
];

/** Parts of a pre-tokenizer, one after the other. */
function parts(node: Field): Field[] {
  if (node.isAbsent) return [];
  const inner = node.at("pretokenizers");
  return inner.isAbsent ? [node] : inner.list().flatMap(parts);
}

/** Pattern at which a part splits, or its type where it has none. */
const patternOf = (node: Field): unknown =>
  node.at("pattern").isAbsent ? node.at("type").value : node.at("pattern").at("Regex").value;

/** Text that a token of bytes has in the vocabulary: byte-level BPE writes bytes as printable characters. */
const BYTE_TEXTS: readonly string[] = (() => {
  let other = 256;
  const isPrintable = (byte: number) =>
    (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || (byte >= 174 && byte <= 255);
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(isPrintable(byte) ? byte : other++));
})();

/** What the vocabulary of a kind of tokenizer becomes. */
interface Form {
  readonly pre: string;
  readonly merges: readonly string[];
  readonly addsSpace: boolean;
  /** A normal token's text there; undefined where it cannot be said. */
  readonly tokenText: (text: string) => string | undefined;
}

/** @throws {CheckpointError} when llama.cpp has no such tokenizer */
function formOf(source: ExportSource, { json, path }: TokenizerFiles): Form {
  const fail = (got: string) =>
    cannotHold(
      source,
      "gguf",
      "the tokenizer must be byte-level BPE that splits texts as llama.cpp can " +
        `(${PRE.map(({ name }) => name).join(", ")}), or one token a character, got ${got} in ${path}`,
    );
  const root = new Field(path, "", json), model = root.at("model"), type = model.at("type").text();
  const nodes = parts(root.at("pre_tokenizer")), last = nodes.at(-1);
  if (type === "WordLevel") {
    const splits = nodes.map((node) => patternOf(node)).join("\n");
    if (splits !== "[\\s\\S]") throw fail("whole words");
    const tokenText = (token: string) => {
      const bytes = new TextEncoder().encode(token);
      return bytes.length === 1 ? BYTE_TEXTS[bytes[0]!] : undefined;
    };
    return { pre: "gpt-2", merges: [], addsSpace: false, tokenText };
  }
  if (type !== "BPE" || last?.at("type").value !== "ByteLevel") throw fail(`${type} without bytes`);
  const usesRegex = last.at("use_regex").value !== false;
  const splits = [
    ...nodes.slice(0, -1).map((node) => patternOf(node)),
    ...(usesRegex ? [GPT2] : []),
  ]
    .join("\n");
  const ignoresMerges = model.at("ignore_merges").value === true;
  const found = PRE.find((pre) => pre.splits === splits && (pre.ignoresMerges ?? false) === ignoresMerges);
  if (found === undefined) {
    throw fail(`splits at ${JSON.stringify(splits)}${ignoresMerges ? ", merges ignored" : ""}`);
  }
  return {
    pre: found.name,
    merges: model.at("merges").list().map(({ value }) =>
      Array.isArray(value) ? value.join(" ") : String(value)
    ),
    addsSpace: last.at("add_prefix_space").value === true,
    tokenText: (token) => token,
  };
}

/**
 * Metadata of a model's tokenizer; without its files, of none, which llama.cpp loads and feeds tokens alone.
 *
 * @throws {CheckpointError} when llama.cpp has no such tokenizer
 */
export function tokenizerMetadata(
  source: ExportSource,
  config: MaskedTransformerConfig,
  alwaysAddsBos: boolean,
): [string, GgufValue][] {
  const files = readTokenizerFiles(source.checkpoint.folder);
  const { vocabularySize, maskToken, bosToken, eosToken, padToken } = config;
  const ids: [string, number | undefined][] = [
    ["mask", maskToken],
    ["bos", bosToken],
    ["eos", eosToken],
    ["padding", padToken],
  ];
  const special = ids.flatMap(([name, id]): [string, GgufValue][] =>
    id === undefined ? [] : [[`tokenizer.ggml.${name}_token_id`, u32(id)]]
  );
  if (files === undefined) return [["tokenizer.ggml.model", text("none")], ...special];
  const { pre, merges, addsSpace, tokenText } = formOf(source, files);
  const added = new Map(
    (files.json["added_tokens"] as { id: number; content: string; special?: boolean }[]).map((
      token,
    ) => [token.id, token]),
  );
  const tokens: string[] = [], types: number[] = [];
  for (let id = 0; id < vocabularySize; id++) {
    const own = files.vocabulary.texts.get(id), known = added.get(id);
    const shown = known?.content ?? (own === undefined ? `[PAD${id}]` : tokenText(own));
    if (shown === undefined) {
      throw cannotHold(
        source,
        "gguf",
        `a token a character must be one byte each, got ${JSON.stringify(own)}`,
      );
    }
    tokens.push(shown);
    types.push(
      known !== undefined ? known.special === true ? CONTROL : USER : own === undefined ? UNUSED : NORMAL,
    );
  }
  const beyond = [...files.vocabulary.texts.keys()].find((id) => id >= vocabularySize);
  if (beyond !== undefined) {
    const reason = `tokens must be below the ${vocabularySize} rows of the embedding, got ${beyond}`;
    throw cannotHold(source, "gguf", reason);
  }
  const around = [...addedAround(new Field(files.path, "post_processor", files.json["post_processor"]))]
    .map((each) => files.vocabulary.ids.get(each.text()));
  const addsBos = bosToken !== undefined && (alwaysAddsBos || around.includes(bosToken));
  const template = templateOf(files);
  return [
    ["tokenizer.ggml.model", text("gpt2")],
    ["tokenizer.ggml.pre", text(pre)],
    ["tokenizer.ggml.tokens", { type: "texts", value: tokens }],
    ["tokenizer.ggml.token_type", { type: "i32s", value: types }],
    ["tokenizer.ggml.merges", { type: "texts", value: merges }],
    ...special,
    ["tokenizer.ggml.add_bos_token", bool(addsBos)],
    ["tokenizer.ggml.add_eos_token", bool(eosToken !== undefined && around.includes(eosToken))],
    ["tokenizer.ggml.add_space_prefix", bool(addsSpace)],
    ...(template === undefined
      ? []
      : [["tokenizer.chat_template", text(template.text())] as [string, GgufValue]]),
  ];
}
