import { describe, expect, test } from "bun:test";
import { Buffer } from "node:buffer";
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import {
  decodeTable,
  encodeTable,
  layerRowsOf,
  readRun,
  reportText,
  tableFromRows,
  writeRun,
} from "../lib/analysis/mod.ts";
import { loadConfig } from "../lib/config/mod.ts";
import { readPuzzles } from "../lib/eval/mod.ts";
import { readJournal } from "../lib/output/journal.ts";
import { readPlan } from "../lib/plan/budget.ts";
import { checkPlan } from "../lib/plan/plan.ts";
import { readTimeParameters } from "../lib/time/mod.ts";
import * as door from "../mod.ts";
import { randomStream } from "./_kernels.ts";

/** Changed copies of each file; many more by hand. */
const COPIES = Number(process.env["ARROWQUANT_FUZZ"] ?? 8);
const MOST_MILLISECONDS = 5000, MOST_BYTES = 2e9;

const random = randomStream(Number(process.env["ARROWQUANT_FUZZ_SEED"] ?? 5));
const one = <T>(list: readonly T[]): T => list[Math.floor(random() * list.length)]!;
const models = fileURLToPath(new URL("models/", import.meta.url));
const work = mkdtempSync(join(tmpdir(), "arrowquant-hostile-"));
process.on("exit", () => rmSync(work, { recursive: true, force: true }));

const ODD: readonly (() => unknown)[] = [
  ...[null, true, 0, -1, 1.5, 1e300, 2 ** 53, "", "x", "constructor", "__proto__", "\u202e\x1b[2J", [], {}, [
    null,
  ], [[]]]
    .map((value) => () => value),
  () => "a".repeat(5000),
  () => JSON.parse("[".repeat(50) + "]".repeat(50)),
  () => ({ constructor: 1, toString: [], hasOwnProperty: null }),
];

/** A JSON value with something changed somewhere. */
function changed(value: unknown): unknown {
  if (typeof value !== "object" || value === null || random() < 0.05) return one(ODD)();
  const entries = Object.entries(value),
    [key] = one(entries.length === 0 ? [["x", 0]] : entries) as [string, unknown];
  const kind = random();
  if (Array.isArray(value)) {
    if (kind < 0.1) return [...value, ...value];
    return kind < 0.2 ? value.slice(1) : value.map((item, i) => String(i) === key ? changed(item) : item);
  }
  const others = entries.filter(([name]) => kind >= 0.2 || name !== key);
  return Object.fromEntries(others.map(([name, item]) => {
    if (name !== key) return [name, item];
    return kind < 0.3 ? [one(["constructor", "__proto__", "", "toString"]), item] : [name, changed(item)];
  }));
}

/** Bytes with some cut away, overwritten or put in. */
function spoiled(bytes: Uint8Array): Uint8Array {
  const at = Math.floor(random() * bytes.length), count = 1 + Math.floor(random() * 8);
  if (random() < 0.2) return bytes.slice(0, at);
  const more = Uint8Array.from(
    { length: count },
    () => random() < 0.3 ? one([0, 255, 127, 128]) : 256 * random(),
  );
  return Buffer.concat([bytes.subarray(0, at), more, bytes.subarray(at + (random() < 0.7 ? count : 0))]);
}

function mutated(bytes: Uint8Array, isJson: boolean): Uint8Array {
  if (!isJson || random() < 0.2) return spoiled(bytes);
  const lines = new TextDecoder().decode(bytes).split("\n"),
    isLines = lines.length > 2 && lines[0]!.endsWith("}") && lines[1]!.endsWith("}");
  if (!isLines) return new TextEncoder().encode(JSON.stringify(changed(JSON.parse(lines.join("\n")))));
  const at = Math.floor(random() * (lines.length - 1));
  return new TextEncoder().encode(lines.with(at, JSON.stringify(changed(JSON.parse(lines[at]!)))).join("\n"));
}

/** A file of a folder, with what reads it. */
interface Reader {
  readonly from: string;
  readonly file: string;
  readonly read: (folder: string) => unknown;
  readonly isBinary?: boolean;
}

const dream = join(models, "dream-mini"),
  dit = join(models, "glyph-dit"),
  packed = join(work, "packed"),
  run = join(work, "run");
const stopped = join(work, "stopped");
const kernels = await door.openKernels({ threads: 1 });
await door.quantizeCheckpoint(
  {
    input: dit,
    output: packed,
    kernels,
    config: door.resolveConfig({ overrides: { solver: "clip", bit_width: 4 } }).config,
  } as never,
);
const manifest = door.readManifest(packed)!;
const rows = layerRowsOf(manifest.layers, [], { model: "m", setting: "s" });
const layers = await tableFromRows("layers", rows);
const { columns, ...content } = {
  columns: [{ key: "constructor", title: "t" }, { key: "x", title: "x", digits: 2 }],
};
await writeRun(run, {
  ...{
    name: "r",
    title: "t",
    command: "c",
    date: "2026-01-01T00:00:00Z",
    seconds: 1,
    toolVersion: "0.1.0",
    ...content,
  },
  ...{
    environment: { a: "b" },
    configuration: { c: 1 },
    summary: [{ label: "l", value: "v" }],
    skipped: [],
    goals: [],
  },
  sections: [{ title: "s", notes: ["n"], columns, rows: [{ x: 1 }] }],
  tables: { layers },
});
mkdirSync(stopped);
const { identity, layers: [record] } = manifest;
const tensors = [{ name: "a", dtype: "F32", shape: [2], sha256: "0".repeat(64) }];
writeFileSync(
  join(stopped, "journal"),
  [{ journal: 1, identity, sourceTimes: [1], files: ["a"] }, { record, tensors }].map((line) =>
    `${JSON.stringify(line)}\n`
  ).join(""),
);
writeFileSync(
  join(stopped, "plan.json"),
  JSON.stringify({ version: 1, layers: { "a.weight": { bits: 2, group_size: 64, zero_point: "real" } } }),
);
writeFileSync(
  join(stopped, "config.yaml"),
  "bit_width: 2\nlayer_bit_widths: {'a.*b': 3}\nthermodynamic: {validation: {enabled: true}}\n",
);
for (const format of ["csv", "json", "parquet", "arrow"] as const) {
  writeFileSync(join(stopped, `t.${format}`), await encodeTable("layers", layers, format));
}
const tokens = async (folder: string) => {
  const tokenizer = await door.loadTokenizer(folder);
  tokenizer.decode(tokenizer.encode("47+38=<mask>", { special: true }));
};
const tableOf = (format: "csv" | "json" | "parquet" | "arrow") => (folder: string) =>
  decodeTable("layers", new Uint8Array(readFileSync(join(folder, `t.${format}`))), format);
const READERS: readonly Reader[] = [
  {
    from: packed,
    file: "arrowquant.manifest.json",
    read: async (folder) => {
      const found = door.readManifest(folder);
      if (found !== undefined) {
        await door.verifyFiles(folder, found);
        layerRowsOf(found.layers, [], { model: "m", setting: "s" });
      }
    },
  },
  {
    from: packed,
    file: "config.json",
    read: (folder) => {
      using checkpoint = door.openCheckpoint(folder);
      door.packedLayers(checkpoint);
      door.modelRequirements(checkpoint);
    },
  },
  {
    from: packed,
    file: "diffusion_pytorch_model.safetensors",
    isBinary: true,
    read: (folder) => {
      using checkpoint = door.openCheckpoint(folder);
      door.packedLayers(checkpoint);
    },
  },
  { from: stopped, file: "journal", read: (folder) => readJournal(join(folder, "journal")) },
  {
    from: stopped,
    file: "plan.json",
    read: (folder) => readPlan(join(folder, "plan.json"), new Set(["a.weight"])),
  },
  {
    from: stopped,
    file: "config.yaml",
    isBinary: true,
    read: (folder) => loadConfig({ path: join(folder, "config.yaml") }),
  },
  { from: stopped, file: "t.csv", isBinary: true, read: tableOf("csv") },
  { from: stopped, file: "t.json", read: tableOf("json") },
  { from: stopped, file: "t.parquet", isBinary: true, read: tableOf("parquet") },
  { from: stopped, file: "t.arrow", isBinary: true, read: tableOf("arrow") },
  { from: run, file: "run.json", read: async (folder) => reportText([await readRun(folder)]) },
  { from: dream, file: "tokenizer.json", read: tokens },
  { from: dream, file: "tokenizer_config.json", read: tokens },
  { from: dream, file: "config.json", read: (folder) => door.loadModel(folder, kernels) },
  {
    from: dream,
    file: "model.safetensors.index.json",
    read: (folder) => door.openCheckpoint(folder).close(),
  },
  { from: dream, file: "eval.jsonl", read: (folder) => readPuzzles(join(folder, "eval.jsonl")) },
  { from: dit, file: "scheduler_config.json", read: (folder) => door.loadScheduler(folder) },
];
void readTimeParameters;

describe("a file with something changed is read, or refused by a typed error, soon and with little memory", () => {
  for (const { from, file, read, isBinary = false } of READERS) {
    test(`${from.slice(dirname(from).length + 1)}/${file}`, async () => {
      const folder = join(work, "changed"), original = readFileSync(join(from, file));
      rmSync(folder, { recursive: true, force: true });
      cpSync(from, folder, { recursive: true });
      await read(folder);
      // a thread for each takes its time
      const copies = /\.(parquet|arrow)$/.test(file) ? Math.ceil(COPIES / 4) : COPIES;
      for (let i = 0; i < copies; i++) {
        const bytes = mutated(original, !isBinary);
        writeFileSync(join(folder, file), bytes);
        const begin = process.cpuUsage().user, before = process.memoryUsage().rss;
        let outcome = "read";
        try {
          await read(folder);
        } catch (error) {
          const { code, name, message } = error as Error & { code?: string };
          const isTyped = String(code).startsWith("AQ_") ||
            (error instanceof RangeError && message.startsWith("Cannot "));
          outcome = isTyped ? "refused" : `${name}: ${message} ${(error as Error).stack}`;
        }
        const took = (process.cpuUsage().user - begin) / 1000, grown = process.memoryUsage().rss - before;
        const isSoon = took < MOST_MILLISECONDS, isSmall = grown < MOST_BYTES;
        if (!/^(read|refused)$/.test(outcome) || !isSoon || !isSmall) {
          writeFileSync(join(tmpdir(), `arrowquant-fault-${file}`), bytes);
        }
        expect({ outcome, isSoon, isSmall }).toEqual({
          outcome: expect.stringMatching(/^(read|refused)$/),
          isSoon: true,
          isSmall: true,
        });
      }
    }, 120_000);
  }
});

test("a row of more weights than an array can hold is refused before it is read", () => {
  const folder = mkdtempSync(join(work, "wide-")),
    path = join(folder, "model.safetensors"),
    cols = 2 ** 29 + 64;
  const entry = { dtype: "F16", shape: [1, cols], data_offsets: [0, 2 * cols] };
  const header = new TextEncoder().encode(JSON.stringify({ "a.weight": entry }));
  const length = new Uint8Array(new BigUint64Array([BigInt(header.length)]).buffer);
  writeFileSync(path, Buffer.concat([length, header]));
  truncateSync(path, 8 + header.length + 2 * cols); // sparse: no byte is stored
  using checkpoint = door.openCheckpoint(path);
  const plan = door.planQuantization(checkpoint, door.DEFAULT_CONFIG);
  expect(() => checkPlan(plan, checkpoint)).toThrow(/"a.weight".*a row must have at most 536870912 weights/);
});

test("steps without an end are refused", () => {
  const { model } = door.loadModel(dream, kernels);
  const canvas = Int32Array.of(1, 1);
  for (const steps of [1e12, Infinity, NaN, 1.5]) {
    expect(() => door.diffusionGenerate(model as never, canvas, 1, { steps })).toThrow(
      /steps must be a whole number from 1 to/,
    );
  }
});
