import { afterAll, describe, expect, test } from "bun:test";
import { Buffer } from "node:buffer";
import { spawnSync } from "node:child_process";
import { cpSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type Calibrated, loadCalibration } from "../../lib/calibration/mod.ts";
import { collectStatistics } from "../../lib/calibration/collect.ts";
import { calibrationGroups } from "../../lib/calibration/saved_statistics.ts";
import { CalibrationError, CheckpointError } from "../../lib/errors.ts";
import { loadModel } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { DEFAULT_SOLVER_SETTINGS } from "../../lib/quant/solvers/settings.ts";
import { solveModel } from "../../lib/solve/solve_model.ts";
import { MODELS, rejection, workplace } from "../_checkpoints.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

const DREAM = join(MODELS, "dream-mini"), DIT = join(MODELS, "glyph-dit");
const PAD = 0, MASK = 1, BOS = 2, EOS = 3;
/** Tokens of dream-mini's characters. */
const tokensOf = (text: string) => [...text].map((c) => 4 + "0123456789+=>S:abcdefghijklmnop".indexOf(c));

/** A copy of a model's folder with other settings in its JSON files. */
function variant(changes: Readonly<Record<string, Readonly<Record<string, unknown>>>>): string {
  const folder = place.fresh("model");
  cpSync(DREAM, folder, { recursive: true });
  for (const [name, change] of Object.entries(changes)) {
    const path = join(folder, name), old = JSON.parse(readFileSync(path, "utf8"));
    writeFileSync(path, JSON.stringify({ ...old, ...change }));
  }
  return folder;
}

type Row = Readonly<Record<string, unknown>>;
const jsonl = (rows: readonly Row[]) => write(rows.map((row) => JSON.stringify(row)).join("\n"));

function write(content: string | Uint8Array, ending = "jsonl"): string {
  const path = `${place.fresh("rows")}.${ending}`;
  writeFileSync(path, content);
  return path;
}

/** A safetensors file of I32 matrices. */
function tensors(matrices: Readonly<Record<string, readonly (readonly number[])[]>>): string {
  const header: Record<string, unknown> = {}, parts: Uint8Array[] = [];
  let at = 0;
  for (const [name, rows] of Object.entries(matrices)) {
    const bytes = new Uint8Array(Int32Array.from(rows.flat()).buffer);
    header[name] = {
      dtype: "I32",
      shape: [rows.length, rows[0]!.length],
      data_offsets: [at, at += bytes.length],
    };
    parts.push(bytes);
  }
  const text = new TextEncoder().encode(JSON.stringify(header));
  const length = new Uint8Array(BigUint64Array.of(BigInt(text.length)).buffer);
  return write(Buffer.concat([length, text, ...parts]), "safetensors");
}

const load = (source: string, model = DREAM, samples = 64) =>
  loadCalibration(loadModel(model, kernels), { source, samples, seed: 3 });

/** What is run: tokens with masks, and weights. */
function runOf({ data, kind }: Calibrated): unknown {
  if (kind !== "sequences") throw new TypeError("must be sequences");
  return [...data.fit, ...data.heldOut].map((
    { batch: { inputIds }, weights },
  ) => [[...inputIds], [...weights]]);
}

/** Tokens that are masked anywhere, found by the unmasked records of one length. */
function masked(calibrated: Calibrated, records: readonly (readonly number[])[]): Set<number> {
  const found = new Set<number>(), length = records[0]!.length;
  if (calibrated.kind !== "sequences") throw new TypeError("must be sequences");
  for (const { batch: { inputIds } } of [...calibrated.data.fit, ...calibrated.data.heldOut]) {
    for (let at = 0; at < inputIds.length; at += length) {
      const own = inputIds.subarray(at, at + length);
      const record = records.find((each) => own.every((token, i) => token === MASK || token === each[i]))!;
      for (const [i, token] of own.entries()) if (token === MASK) found.add(record[i]!);
    }
  }
  return found;
}

const TEXTS = Array.from({ length: 90 }, (_, i) => `${10 + i}${"abcdefgh".slice(i % 5)}`);
const ROWS = TEXTS.map((text) => [BOS, ...tokensOf(text), EOS]);
const LENGTH = Math.max(...ROWS.map((row) => row.length));
const padded = (rows: readonly (readonly number[])[], pad = PAD, side: "left" | "right" = "right") =>
  rows.map((row) => {
    const fill = new Array<number>(LENGTH + 2 - row.length).fill(pad);
    return side === "left" ? [...fill, ...row] : [...row, ...fill];
  });
const ids = (rows: readonly (readonly number[])[], more: Row = {}) =>
  jsonl(rows.map((input_ids) => ({ input_ids, ...more })));

describe("calibration records", () => {
  test("have no padding, whatever form, file and side it is in", async () => {
    const plain = runOf(await load(ids(ROWS)));
    const masks = padded(ROWS).map((row) => row.map((token) => Number(token !== PAD)));
    const forms = [
      ids(padded(ROWS)),
      ids(padded(ROWS, PAD, "left")),
      tensors({ input_ids: padded(ROWS) }),
      tensors({ input_ids: padded(ROWS, PAD, "left") }),
      jsonl(padded(ROWS, 7).map((input_ids, i) => ({ input_ids, attention_mask: masks[i] }))),
      tensors({ input_ids: padded(ROWS, 7), attention_mask: masks }),
    ];
    for (const form of forms) expect(runOf(await load(form))).toEqual(plain);
    // a prompt's length counts what is in front of it
    const asked = runOf(await load(ids(ROWS, { prompt_length: 3 })));
    const left = padded(ROWS, PAD, "left").map((input_ids, i) => ({
      input_ids,
      prompt_length: LENGTH + 2 - ROWS[i]!.length + 3,
    }));
    expect(runOf(await load(jsonl(left)))).toEqual(asked);
  });

  test("predict what labels predict, as a prompt's length says it, in both kinds of file", async () => {
    const asked = runOf(await load(ids(ROWS, { prompt_length: 3 })));
    const labels = padded(ROWS).map((row) => row.map((token, i) => i < 3 || token === PAD ? -100 : token));
    const rows = padded(ROWS).map((input_ids, i) => ({ input_ids, labels: labels[i] }));
    for (const form of [jsonl(rows), tensors({ input_ids: padded(ROWS), labels })]) {
      expect(runOf(await load(form))).toEqual(asked);
    }
    const plain = runOf(await load(ids(ROWS)));
    expect(runOf(await load(ids(ROWS, { labels: 1 })))).toEqual(plain);
    // a second question behind the first answer, with padding on the left: neither is ever masked
    const [QUESTION, ANSWER] = [tokensOf("abcd"), tokensOf("78")];
    const talks = ROWS.map((_, i) => [...tokensOf(`${10 + i}`), ...ANSWER, ...QUESTION, ...ANSWER]);
    const wanted = (row: readonly number[]) => row.map((token) => ANSWER.includes(token) ? token : -100);
    const chats = talks.filter((row) => !ANSWER.includes(row[0]!) && !ANSWER.includes(row[1]!));
    const left = chats.map((row) => [PAD, PAD, ...row]);
    for (
      const form of [
        jsonl(chats.map((row) => ({ input_ids: row, labels: wanted(row) }))),
        jsonl(left.map((row) => ({
          input_ids: row,
          labels: wanted(row),
          attention_mask: row.map((_, i) => i < 2 ? 0 : 1),
        }))),
        tensors({ input_ids: left, labels: left.map(wanted) }),
      ]
    ) expect(masked(await load(form), chats)).toEqual(new Set(ANSWER));
    const none = jsonl([{ input_ids: [4, 5], labels: [-100, -100] }]);
    await expect(load(none)).rejects.toThrow(/line 1 must have 2 labels/);
  });

  test("end once where ends fill them up, whatever the model's padding is", async () => {
    const plain = runOf(await load(ids(ROWS)));
    for (const form of [ids(padded(ROWS, EOS)), tensors({ input_ids: padded(ROWS, EOS, "left") })]) {
      expect(runOf(await load(form))).toEqual(plain);
    }
  });

  test("end once where padding is the end token, as in Dream's and Qwen's vocabulary", async () => {
    const model = variant({ "generation_config.json": { pad_token_id: EOS } });
    const plain = runOf(await load(ids(ROWS), model));
    for (
      const form of [
        ids(padded(ROWS, EOS)),
        tensors({ input_ids: padded(ROWS, EOS) }),
        ids(padded(ROWS, EOS, "left")),
      ]
    ) {
      expect(runOf(await load(form, model))).toEqual(plain);
    }
  });

  test("are padded by the tokenizer's token where config.json names none", async () => {
    const model = variant({
      "config.json": { pad_token_id: null },
      "generation_config.json": { pad_token_id: null },
    });
    expect(runOf(await load(ids(padded(ROWS)), model))).toEqual(runOf(await load(ids(ROWS), model)));
  });

  test("are padded by the tokenizer's token where it is another", async () => {
    const model = variant({ "tokenizer_config.json": { pad_token: "p" } });
    const rows = ROWS.filter((row) => !row.includes(34));
    expect(runOf(await load(ids(padded(rows, 34)), model))).toEqual(runOf(await load(ids(rows), model)));
  });

  test("never have special tokens predicted, but the end of an answer", async () => {
    const rows = TEXTS.map((
      text,
    ) => [BOS, ...tokensOf(text.slice(0, 2)), PAD, 34, ...tokensOf(text.slice(2, 4)), EOS]);
    const { added_tokens } = JSON.parse(readFileSync(join(DREAM, "tokenizer.json"), "utf8"));
    const p = { ...added_tokens[0], id: 34, content: "p" };
    const model = variant({ "tokenizer.json": { added_tokens: [...added_tokens, p] } });
    for (const source of [ids(rows), tensors({ input_ids: rows })]) {
      const found = masked(await load(source, model, 256), rows);
      expect([BOS, PAD, 34].filter((token) => found.has(token))).toEqual([]);
      expect([EOS, ...tokensOf("abcdef")].filter((token) => !found.has(token))).toEqual([]);
    }
  });

  test("have the tokens around a text that the tokenizer puts there, as in generation", async () => {
    const text = (rows: readonly string[]) => jsonl(rows.map((text) => ({ text })));
    expect(runOf(await load(text(TEXTS)))).toEqual(runOf(await load(ids(TEXTS.map(tokensOf)))));
    const special = (id: string) => ({ SpecialToken: { id, type_id: 0 } });
    const single = [special("<bos>"), { Sequence: { id: "A", type_id: 0 } }, special("<eos>")];
    const rule = { type: "TemplateProcessing", single, pair: single, special_tokens: {} };
    for (
      const model of [
        variant({ "tokenizer.json": { post_processor: rule } }),
        variant({ "tokenizer_config.json": { add_bos_token: true, add_eos_token: true } }),
      ]
    ) {
      const around = runOf(await load(ids(ROWS), model));
      expect(runOf(await load(text(TEXTS), model))).toEqual(around);
      expect(runOf(await load(ids(ROWS, { prompt_length: 1 }), model))).toEqual(around);
      const answered = runOf(await load(ids(ROWS, { prompt_length: 3 }), model));
      for (const key of ["answer", "response", "completion"]) {
        const rows = TEXTS.map((each) => ({ prompt: each.slice(0, 2), [key]: each.slice(2) }));
        expect(runOf(await load(jsonl(rows), model))).toEqual(answered);
      }
    }
    // the reference model's puzzles have its protocol, as generate.ts poses them
    const puzzles = [...Array(90).keys()].map((i) => ({ prompt: `${10 + i}+01=`, answer: "011" }));
    const posed = puzzles.map(({ prompt, answer }) => ({
      input_ids: [BOS, ...tokensOf(prompt + answer), EOS],
      prompt_length: 7,
    }));
    expect(runOf(await load(jsonl(puzzles)))).toEqual(runOf(await load(jsonl(posed))));
  });

  test("are chats by the model's template: the last answer is predicted", async () => {
    const chat_template =
      "{% for m in messages %}{{ 'S' if m.role == 'user' else '>' }}{{ m.content }}:{% endfor %}" +
      "{% if add_generation_prompt %}>{% endif %}";
    const model = variant({ "tokenizer_config.json": { chat_template } });
    const chats = TEXTS.map((text) => ({
      messages: [{ role: "user", content: "1" }, { role: "assistant", content: text }],
    }));
    const rows = TEXTS.map((text) => ({ input_ids: tokensOf(`S1:>${text}:`), prompt_length: 4 }));
    expect(runOf(await load(jsonl(chats), model))).toEqual(runOf(await load(jsonl(rows), model)));
    const error = await rejection(load(jsonl(chats)));
    expect([error instanceof CheckpointError, error.message]).toEqual([
      true,
      expect.stringContaining("chat template"),
    ]);
  });

  test("count once however often a file has them, and held-out ones are of no others", async () => {
    const rows = ROWS.slice(0, 80), plain = await load(ids(rows));
    for (
      const copies of [
        ids([...rows, ...rows, ...rows.slice(3, 60)]),
        tensors({ input_ids: padded([...rows, ...rows]) }),
      ]
    ) {
      const calibrated = await load(copies);
      expect(runOf(calibrated)).toEqual(runOf(plain));
      expect(calibrated.data.source).toMatch(/of the (217|160) records, 80 distinct in/);
      expect(calibrated.data.warnings.join()).toMatch(/80 distinct: copies of a record count once/);
    }
    const few = await load(ids(Array.from({ length: 512 }, (_, i) => ROWS[i % 40]!)));
    expect(few.data.warnings.join()).toMatch(/512 records, 40 distinct.*only 40 records/);
    const one = await load(ids(Array.from({ length: 512 }, () => ROWS[0]!)));
    expect([one.data.heldOut.length, one.data.distinctPositions]).toEqual([0, ROWS[0]!.length]);
  });

  test("that are images count once too", async () => {
    const source = join(DIT, "calibration_images.safetensors"), bytes = readFileSync(source);
    const begin = 8 + Number(bytes.readBigUInt64LE(0)),
      header = JSON.parse(bytes.subarray(8, begin).toString());
    const twice = (key: "images" | "labels", count: number, size: number) => {
      const [at] = header[key].data_offsets as [number, number];
      const part = bytes.subarray(begin + at, begin + at + count * size);
      return [part, part];
    };
    const text = Buffer.from(JSON.stringify({
      images: { dtype: "U8", shape: [200, 16, 16], data_offsets: [0, 200 * 256] },
      labels: { dtype: "U8", shape: [200], data_offsets: [200 * 256, 200 * 257] },
    }));
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(text.length));
    const path = write(
      Buffer.concat([length, text, ...twice("images", 100, 256), ...twice("labels", 100, 1)]),
      "safetensors",
    );
    const { data } = await load(path, DIT);
    expect([data.source, data.distinctPositions]).toEqual([
      expect.stringContaining("200 records, 100 distinct"),
      100 * data.fit[0]!.weights.length / data.fit[0]!.samples,
    ]);
  });

  test("are refused with file and line where they cannot be read", async () => {
    const good = '{"text": "12"}\n', bytes = (text: string) => new TextEncoder().encode(text);
    const cases: [string | Uint8Array, RegExp][] = [
      [
        Buffer.concat([bytes(good), bytes('{"text": "1'), Uint8Array.of(0xe9), bytes('"}\n')]),
        /line 2 must be UTF-8, got other/,
      ],
      [Buffer.from(`\ufeff${good}`, "utf16le"), /line 1 must be UTF-8, got UTF-16/],
      [good + `{"text": "${"1".repeat(16 * 2 ** 20)}"}`, /line 2 must have at most 16777216 bytes/],
      ['[\n  {"text": "12"}\n]\n', /line 1 must be JSON, a record, got the beginning of an array/],
      [good + "[1, 2]", /line 2 must be {"prompt", "answer"}/],
      [
        '{"input_ids": [4, 5], "attention_mask": [1]}',
        /line 1 must have an attention_mask of 2 numbers 0 or 1/,
      ],
      ['{"input_ids": [4, "5"]}', /line 1 must have input_ids from 0 to 34, got 5/],
      ['{"input_ids": [0, 1, 0]}', /line 1 must have tokens beside mask and padding/],
      ['{"input_ids": [2, 2]}', /must hold records with tokens to predict/],
      ['{"messages": [{"role": "user"}]}', /line 1 must have messages/],
      [`${"[".repeat(100_000)}${"]".repeat(100_000)}`, /line 1 must be/],
    ];
    for (const [content, message] of cases) {
      const error = await rejection(load(write(content)));
      expect([error instanceof CalibrationError, error.message]).toEqual([
        true,
        expect.stringMatching(message),
      ]);
    }
    const marked = runOf(await load(write(TEXTS.map((text) => `\ufeff{"text": "${text}"}\r\n`).join("\n"))));
    expect(marked).toEqual(runOf(await load(jsonl(TEXTS.map((text) => ({ text }))))));
  });

  test("with special tokens alone are left out, and this is said", async () => {
    const { data } = await load(ids([...ROWS, [BOS, MASK], [BOS, BOS]]));
    expect(data.warnings.join()).toMatch(/2 of 92 records have only special tokens to predict/);
  });

  test("are read from files alone, not from pipes and devices", async () => {
    const folder = place.fresh("pipes");
    mkdirSync(folder);
    const pipe = join(folder, "pipe.jsonl"), tensor = join(folder, "pipe.safetensors");
    expect(spawnSync("mkfifo", [pipe, tensor]).status).toBe(0);
    for (const path of [pipe, tensor, "/dev/zero", folder]) {
      const error = await rejection(load(path));
      expect([error instanceof CheckpointError, error.message]).toEqual([
        true,
        expect.stringContaining("must be a regular file"),
      ]);
    }
  });

  test("may be many: no stack ends, no time grows with the square", async () => {
    const rows = Array.from(
      { length: 130_000 },
      (_, i) => [4 + i % 10, 4 + (i >> 4) % 10, 4 + (i >> 8) % 10, 4 + (i >> 12) % 31, 34],
    );
    const { data } = await load(tensors({ input_ids: rows }));
    expect(data.source).toMatch(/130000 records, \d+ distinct/);
  }, 120_000);
});

test("saved statistics that lack layers are refused before anything is solved, naming them", async () => {
  const calibrated = await load(ids(ROWS), DREAM, 8), solved: string[] = [];
  if (calibrated.kind !== "sequences") throw new TypeError("must be sequences");
  const [first, second] = calibrated.model.stages.map(({ layers }) => layers[0]!.name);
  const statistics = await collectStatistics(calibrated, {
    kernels,
    fingerprint: "",
    groups: calibrationGroups(calibrated.data.axis, 1),
    second: "total",
    run: { identity: "", source: "", isSynthetic: false, samples: 8 },
    names: new Set([first!]),
  });
  const error = await rejection(solveModel({ ...calibrated, statistics }, {
    kernels,
    solver: "feedback",
    mode: "once",
    settings: DEFAULT_SOLVER_SETTINGS,
    gridOf: (name) =>
      [first, second].includes(name) ? { bits: 2, groupSize: 0, zeroPoint: "real" } : undefined,
    onLayer: ({ name }) => solved.push(name),
  }));
  expect([error instanceof CalibrationError, error.message, solved]).toEqual([
    true,
    expect.stringContaining(`got none of "${second}"`),
    [],
  ]);
});
