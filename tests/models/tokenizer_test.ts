import { afterAll, describe, expect, test } from "bun:test";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { CheckpointError } from "../../lib/errors.ts";
import { loadTokenizer } from "../../lib/models/mod.ts";
import { MODELS, rejection, ROOT, workplace } from "../_checkpoints.ts";
import { thrown } from "../tensor/_files.ts";

const place = workplace();
afterAll(() => place.remove());
const DREAM = join(MODELS, "dream-mini");

type Json = Record<string, unknown>;
const readJson = (path: string): Json => JSON.parse(readFileSync(path, "utf8"));

/** A folder with files: objects as JSON, texts as they are. */
function folderOf(files: Readonly<Record<string, unknown>>): string {
  const folder = place.fresh("tokenizer");
  mkdirSync(folder);
  for (const [name, content] of Object.entries(files)) {
    writeFileSync(join(folder, name), typeof content === "string" ? content : JSON.stringify(content));
  }
  return folder;
}

const SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"];

/** A tokenizer in Dream's published files: bytes as GPT-2 writes them, and nine merges. */
function publishedFiles(): Record<string, Json | string> {
  const shown = (byte: number) => byte > 32 && byte < 127 || byte > 160 && byte !== 173 && byte < 256;
  let next = 256;
  const bytes = Array.from({ length: 256 }, (_, i) => String.fromCharCode(shown(i) ? i : next++));
  const merges = ["t h", "th e", "Ġ the", "i n", "in g", "Ċ Ċ", "Ã ¶", "' l", "Ġ Ġ"];
  const vocab = Object.fromEntries(
    [...bytes, ...merges.map((m) => m.replace(" ", ""))].map((t, i) => [t, i]),
  );
  return {
    "vocab.json": vocab,
    "merges.txt": `#version: 0.2\n${merges.join("\n")}\n`,
    "added_tokens.json": Object.fromEntries(SPECIAL.map((text, i) => [text, 265 + i])),
    "special_tokens_map.json": { mask_token: { content: "<|mask|>" }, eos_token: "<|endoftext|>" },
    "tokenizer_config.json": {
      add_bos_token: false,
      bos_token: "<|beginoftext|>",
      additional_special_tokens: ["<|im_start|>", "<|im_end|>"],
      pad_token: "<|endoftext|>",
      tokenizer_class: "DreamTokenizer",
      chat_template:
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + " +
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    },
  };
}

/** Texts with their tokens by Hugging Face tokenizers 0.23.3, with Qwen2's normalizer and pattern. */
const ENCODED: readonly (readonly [string, readonly number[]])[] = [
  [
    "the thing, WE'LL see 12\n\n  it",
    [257, 32, 256, 260, 44, 32, 87, 69, 39, 76, 76, 32, 115, 101, 101, 32, 49, 50, 261, 32, 32, 105, 116],
  ],
  ["Go\u0308the o\u0308", [71, 262, 257, 32, 262]],
  ["<|im_start|>the<|mask|>\n", [266, 257, 269, 10]],
  ["\r\n \tx", [13, 10, 32, 9, 120]],
];

/** tokenizer.json of the same tokenizer, with `<|beginoftext|>` in front of every text, as LLaDA's has. */
function wholeFiles(): Record<string, Json> {
  const { "vocab.json": vocab, "merges.txt": merges, "tokenizer_config.json": config } = publishedFiles();
  return {
    "tokenizer.json": {
      added_tokens: SPECIAL.map((content, i) => ({ id: 265 + i, content, special: true })),
      normalizer: { type: "NFC" },
      pre_tokenizer: { type: "ByteLevel", add_prefix_space: false, use_regex: true },
      post_processor: {
        type: "TemplateProcessing",
        single: [{ SpecialToken: { id: "<|beginoftext|>", type_id: 0 } }, {
          Sequence: { id: "A", type_id: 0 },
        }],
        pair: [],
        special_tokens: {},
      },
      decoder: { type: "ByteLevel" },
      model: { type: "BPE", vocab, merges: (merges as string).trim().split("\n").slice(1) },
    },
    "tokenizer_config.json": { ...(config as Json), tokenizer_class: "PreTrainedTokenizerFast" },
  };
}

describe("the tokenizer of a checkpoint", () => {
  test("turns text into tokens and back", async () => {
    const tokenizer = await loadTokenizer(DREAM);
    const tokens = tokenizer.encode("47+38=<mask>");
    expect([...tokens]).toEqual([8, 11, 14, 7, 12, 15, 1]);
    expect(tokenizer.decode(tokens)).toBe("47+38=");
    expect(tokenizer.decode(tokens, { special: true })).toBe("47+38=<mask>");
    expect([tokenizer.decode(new Int32Array()), tokenizer.decode([8, 99, 11])]).toEqual(["", "47"]);
    expect([tokenizer.tokenOf("<mask>"), tokenizer.tokenText(34), tokenizer.tokenOf("zz")]).toEqual([
      1,
      "p",
      undefined,
    ]);
    expect([...tokenizer.specialTokens]).toEqual([0, 1, 2, 3]);
  });

  test("names what is not in the vocabulary", async () => {
    const tokenizer = await loadTokenizer(DREAM);
    const unknown = thrown(() => tokenizer.encode("4x+Z="));
    expect([unknown instanceof RangeError, unknown.message]).toEqual([
      true,
      expect.stringContaining('got "x", "Z"'),
    ]);
    const files = publishedFiles(), { a: _, ...vocab } = files["vocab.json"] as Json;
    const lacking = await loadTokenizer(folderOf({ ...files, "vocab.json": vocab }));
    expect(thrown(() => lacking.encode("the data")).message).toContain('got "a"');
  });

  test("is read from the files that Dream publishes, as Hugging Face reads them", async () => {
    const files = publishedFiles(), folder = folderOf(files), published = await loadTokenizer(folder);
    for (const [text, tokens] of ENCODED) {
      expect([...published.encode(text, { special: true })]).toEqual([...tokens]);
      expect(published.decode(tokens, { special: true })).toBe(text.normalize("NFC"));
    }
    expect([...published.specialTokens].sort()).toEqual([265, 266, 267, 268, 269]);
    const spaced = {
      ...(files["tokenizer_config.json"] as Json),
      tokenizer_class: "GPT2Tokenizer",
      add_prefix_space: true,
    };
    const gpt2 = await loadTokenizer(folderOf({ ...files, "tokenizer_config.json": spaced }));
    expect([...gpt2.encode("the'll  x1")]).toEqual([258, 263, 108, 32, 32, 120, 49]);
    // the same from tokenizer_config.json alone
    const { "added_tokens.json": added, "special_tokens_map.json": map, ...rest } = files;
    const added_tokens_decoder = Object.fromEntries(
      Object.entries(added as Json).map((
        [content, id],
      ) => [id, { content, special: true, normalized: false }]),
    );
    const config = { ...(map as Json), ...(rest["tokenizer_config.json"] as Json), added_tokens_decoder };
    const decoded = await loadTokenizer(folderOf({ ...rest, "tokenizer_config.json": config }));
    for (const [text, tokens] of ENCODED) expect([...decoded.encode(text)]).toEqual([...tokens]);
  });

  test("puts tokens around a text by tokenizer.json's rule, without one by the configuration's", async () => {
    const files = wholeFiles(), config = files["tokenizer_config.json"]!;
    const ids = async (
      more: Json,
    ) => [...(await loadTokenizer(folderOf({ ...files, ...more }))).encode("the", { special: true })];
    expect(await ids({})).toEqual([268, 257]); // although add_bos_token is false, as in LLaDA's files
    const plain = { "tokenizer.json": { ...files["tokenizer.json"], post_processor: null } };
    expect(await ids(plain)).toEqual([257]);
    const both = { ...config, add_bos_token: true, add_eos_token: true, eos_token: "<|endoftext|>" };
    expect(await ids({ ...plain, "tokenizer_config.json": both })).toEqual([268, 257, 265]);
    const without = await rejection(
      ids({ ...plain, "tokenizer_config.json": { ...both, bos_token: "<s>" } }),
    );
    expect(without.message).toContain('"bos_token" must be a token, because add_bos_token is true');
  });

  test("refuses files that contradict each other", async () => {
    const files = publishedFiles(), whole = wholeFiles();
    const cases: [Record<string, unknown>, string][] = [
      [{ ...files, "added_tokens.json": { "<|mask|>": 257 } }, '"the" for id 257'],
      [
        { ...files, "tokenizer_config.json": { added_tokens_decoder: { 270: { content: "<|mask|>" } } } },
        'id 270 for "<|mask|>", as elsewhere in the tokenizer\'s files, got 269',
      ],
      [{ ...whole, "vocab.json": { the: 3 } }, "id 257"],
      [{
        ...whole,
        "config.json": { mask_token_id: 5 },
        "special_tokens_map.json": { mask_token: "<|mask|>" },
      }, '"mask_token_id" must be 269'],
      [
        { ...files, "tokenizer_config.json": { tokenizer_class: "CLIPTokenizer" } },
        '"tokenizer_class" must be one of DreamTokenizer',
      ],
      [
        { ...files, "merges.txt": "t h\nq zz\n" },
        '"model.merges[1]" must be of tokens, and make one, got "zz"',
      ],
      [{ "vocab.json": {} }, "or vocab.json and merges.txt, got vocab.json alone: save a whole one"],
    ];
    for (const [content, message] of cases) {
      const error = await rejection(loadTokenizer(folderOf(content)));
      expect([error instanceof CheckpointError, error.message]).toEqual([
        true,
        expect.stringContaining(message),
      ]);
    }
  });

  test("is missed where there is none", async () => {
    expect(await rejection(loadTokenizer(folderOf({})))).toBeInstanceOf(CheckpointError);
  });

  test("asks Deno for the versions of package.json", () => {
    const { dependencies } = readJson(join(ROOT, "package.json")) as { dependencies: Json };
    const source = readFileSync(join(ROOT, "lib", "models", "tokenizer", "packages.ts"), "utf8");
    for (const name of ["jinja", "tokenizers"]) {
      expect(new RegExp(`${name}: "(.*?)"`).exec(source)?.[1]).toBe(
        dependencies[`@huggingface/${name}`] as string,
      );
    }
  });
});

describe("odd values in a tokenizer's files", () => {
  /** A tokenizer.json with the value at a place of it replaced. */
  const changed = (json: Json, keys: readonly string[], value: unknown) => {
    const copy = structuredClone(json);
    const holder = keys.slice(0, -1).reduce((at, key) => at[key] as Json, copy);
    holder[keys.at(-1)!] = value;
    return copy;
  };
  const places = (value: unknown, keys: readonly string[] = []): (readonly string[])[] =>
    typeof value !== "object" || value === null ? [keys] : [
      ...(keys.length === 0 ? [] : [keys]),
      ...Object.keys(value).slice(0, 6).flatMap((key) => places((value as Json)[key], [...keys, key])),
    ];

  test("of every type at every place are read or refused with a CheckpointError", async () => {
    const folder = folderOf({});
    let refused = 0;
    for (const json of [readJson(join(DREAM, "tokenizer.json")), wholeFiles()["tokenizer.json"]!]) {
      for (const keys of places(json)) {
        for (const value of [5, -1, "x", [], {}]) {
          writeFileSync(join(folder, "tokenizer.json"), JSON.stringify(changed(json, keys, value)));
          try {
            (await loadTokenizer(folder)).encode("4<mask>", { special: true });
          } catch (error) {
            refused++;
            const isTyped = error instanceof CheckpointError && / must be /.test(error.message);
            const isUnknown = error instanceof RangeError && /must be in the vocabulary/.test(error.message);
            if (!isTyped && !isUnknown) {
              throw new Error(`${keys.join(".")} = ${JSON.stringify(value)}`, { cause: error });
            }
          }
        }
      }
    }
    expect(refused).toBeGreaterThan(150);
  }, 120_000);

  test("are named by their place", async () => {
    const json = readJson(join(DREAM, "tokenizer.json"));
    const regex = (pattern: string) => changed(json, ["pre_tokenizer", "pattern"], { Regex: pattern });
    const cases: [Json, string][] = [
      [
        changed(json, ["pre_tokenizer", "behavior"], 5),
        '"pre_tokenizer.behavior" must be one of Isolated, Removed, got 5',
      ],
      [changed(json, ["added_tokens", "2", "id"], 2 ** 31), '"added_tokens[2]" must be a token\'s id'],
      [changed(json, ["added_tokens", "1", "id"], 2), '"added_tokens[1]" must be id 1 for "<mask>"'],
      [
        changed(json, ["model", "vocab", "a"], -4),
        '"model.vocab" must be a token\'s id from 0 to 16777215, got -4 of "a"',
      ],
      [changed(json, ["model", "vocab", "a"], 20), '"model.vocab" must be "a" for id 20'],
      [changed(json, ["model", "vocab"], null), '"model.vocab" must be an object, got null'],
      [
        changed(json, ["pre_tokenizer"], { type: "FixedLength", length: 0 }),
        '"pre_tokenizer.length" must be a whole number from 1',
      ],
      ...["(a+)+$", "(?:a|aa)*b", "(x+x+)+y", "(?:(?:a{1,20}){1,20})c", "a*a*a*a*b"].map((
        pattern,
      ) =>
        [regex(pattern), '"pre_tokenizer.pattern.Regex" must be a pattern whose repeated groups'] as [
          Json,
          string,
        ]
      ),
    ];
    for (const [content, message] of cases) {
      const error = await rejection(loadTokenizer(folderOf({ "tokenizer.json": content })));
      expect([error.constructor.name, error.message]).toEqual([
        "CheckpointError",
        expect.stringContaining(message),
      ]);
    }
    // patterns of published tokenizers are taken
    for (
      const pattern of [
        "\\p{N}(?=(?:\\p{N}{3})*(?!\\p{N}))|.",
        "[^\\r\\n\\p{L}]?[\\p{Lu}\\p{M}]*[\\p{Ll}]+(?i:'s|'t)?|\\s+(?!\\S)|.",
      ]
    ) {
      await loadTokenizer(folderOf({ "tokenizer.json": regex(pattern) }));
    }
  });
});

test("marks of spaces split texts as Hugging Face tokenizers 0.23.3 splits them", async () => {
  const vocab = Object.fromEntries(["<unk>", "▁", "a", "b", "▁▁", "▁a"].map((token, id) => [token, id]));
  const model = { type: "BPE", vocab, merges: ["▁ ▁", "▁ a"], unk_token: "<unk>" };
  const tokens = async (how: object, text: string) => {
    const pre_tokenizer = { type: "Metaspace", replacement: "▁", ...how };
    const tokenizer = await loadTokenizer(folderOf({ "tokenizer.json": { model, pre_tokenizer } }));
    return [...tokenizer.encode(text)];
  };
  expect(await tokens({ prepend_scheme: "never", split: true }, "b  a  ")).toEqual([3, 1, 5, 1, 1]);
  expect(await tokens({ prepend_scheme: "always" }, "b  a  ")).toEqual([1, 3, 1, 5, 1, 1]);
  expect(await tokens({ prepend_scheme: "never", split: false }, "b  a  ")).toEqual([3, 4, 2, 4]);
  const unigram = { type: "Unigram", unk_id: 0, vocab: [["<unk>", 0], ["a", -1]], byte_fallback: true };
  const error = await rejection(loadTokenizer(folderOf({ "tokenizer.json": { model: unigram } })));
  expect(error.message).toContain('"model.byte_fallback" must be false');
});

describe("chat templates", () => {
  const hi = [{ role: "user", content: "hi" }];
  const chat = async (files: Record<string, unknown>, isAnswerNext = true) =>
    await (await loadTokenizer(folderOf({ ...publishedFiles(), ...files }))).chat(hi, isAnswerNext);
  const config = (chat_template: unknown) => ({
    "tokenizer_config.json": { bos_token: "<|mask|>", chat_template },
  });

  test("come from tokenizer_config.json, a list of named ones, or a file, which comes first", async () => {
    const asked = "<|im_start|>user\nhi<|im_end|>\n";
    expect([await chat({}), await chat({}, false)]).toEqual([`${asked}<|im_start|>assistant\n`, asked]);
    const named = [{ name: "tool_use", template: "no" }, { name: "default", template: "{{ bos_token }}!" }];
    expect(await chat(config(named))).toBe("<|mask|>!");
    expect(await chat(config({ default: "{{ eos_token }}?" }))).toBe("<|endoftext|>?");
    const file = {
      "chat_template.jinja": "{%- for m in messages %}\n  {{- m.content | trim }}\n{%- endfor %}",
    };
    expect(await chat({ ...config("no"), ...file })).toBe("hi");
    expect(await chat({ ...config(null), "chat_template.json": { chat_template: "{{ messages|length }}" } }))
      .toBe("1");
  });

  test("find no tools and no documents, as transformers gives them", async () => {
    const template = "{{ tools is none }} {{ documents is defined }}{% if tools is not none %} tools{% endif %}";
    expect(await chat(config(template))).toBe("True True");
  });

  test("write what jinja2 3.1.6 writes with transformers' settings", async () => {
    const cases: [string, string][] = [
      ["{% for i in range(4) %}{{ i }},{% if i == 2 %}x{% break %}{% endif %};{% endfor %}!", "0,;1,;2,x!"],
      ["{% for i in range(3) %}a{% if i == 1 %}b{% continue %}{% endif %}c{% endfor %}", "acabac"],
      [
        "{% for i in range(2) %}{% for j in range(3) %}{{ j }}{% if j == i %}{% break %}{% endif %}{% endfor %}|{% endfor %}",
        "0|01|",
      ],
      ["{% for i in range(3) %}{% if i == 1 %}{% set x = 'k' %}{% endif %}{{ i }}{{ x }}{% endfor %}", "01k2"],
      [
        "{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
        "3",
      ],
      ["{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}{{ none }}{{ unknown }}{{ 1 == 1 }}", "2NoneTrue"],
      ["{% for m in messages %}{% else %}none{% endfor %}{% for i in [] %}{% else %}none{% endfor %}", "none"],
    ];
    for (const [template, text] of cases) expect(await chat(config(template))).toBe(text);
    for (const template of ["{{ messages }}", "{{ '%s' % 3 }}"]) {
      expect((await rejection(chat(config(template)))).message).toContain("its chat template fails");
    }
  });

  test("that are missing, broken, too long or endless are refused", async () => {
    const cases: [unknown, string][] = [
      [null, "must have a chat template"],
      [5, '"chat_template" must be text, got 5'],
      [[{ name: "other", template: "" }], 'a list with a template named "default"'],
      ["{% if %}", "its chat template fails"],
      ["{{ raise_exception('roles must alternate') }}", 'its chat template fails: "roles must alternate"'],
      [
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "it may have 200000 steps",
      ],
      ["{{ range(1000000) | length }}", "a range may have 100000 items"],
      [
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "it may have 1048576 characters",
      ],
      ["{% macro f(g) %}{{ g(g) }}{% endmacro %}{{ f(f) }}", "it may have 500 parts inside each other"],
      ["x".repeat(2 ** 18 + 1), "a template of at most 262144 characters"],
    ];
    for (const [template, message] of cases) {
      const error = await rejection(chat(config(template)));
      expect([error.constructor.name, error.message]).toEqual([
        "CheckpointError",
        expect.stringContaining(message),
      ]);
    }
  });
});
