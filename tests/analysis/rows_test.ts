import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { benchRun } from "../../lib/analysis/make_run.ts";
import { activationRows, benchTables, layerKind, thetaRows } from "../../lib/analysis/rows.ts";
import { chartsOf } from "../../lib/analysis/run_charts.ts";
import { columnsOf, TABLE_NAMES } from "../../lib/analysis/schema.ts";
import { rowsOf } from "../../lib/analysis/tables.ts";
import { accuracySuite, benchOptions, checkpointSuite, type Suite } from "../../lib/bench/mod.ts";
import type { SuiteRow } from "../../lib/bench/rows.ts";
import { environmentOf } from "../../lib/eval/environment.ts";
import { kernelSuiteOf } from "../../lib/bench/kernels/suite.ts";
import { QUICK_SCALE } from "../../lib/bench/kernels/bench.ts";
import { type Kernels, openKernels } from "../../lib/native/mod.ts";
import { equalTimeGroups, TimeParameters, timestepAxis } from "../../lib/time/mod.ts";
import { MODELS, ROOT } from "../_checkpoints.ts";

let kernels: Kernels;
beforeAll(async () => void (kernels = await openKernels()));
afterAll(() => kernels.close());

async function measured<Row extends SuiteRow>(suite: Suite<Row>, models: readonly string[], limit: number) {
  const options = benchOptions(models.map((name) => join(MODELS, name)), { bits: [2], limit, quick: true });
  const environment = environmentOf(kernels);
  const report = await suite.run({ kernels, environment, options, progress: () => {} });
  const run = await benchRun("test", {
    suite: suite.name,
    command: "a test",
    environment,
    options,
    seconds: 1,
    otherCores: undefined,
    report,
  });
  return { report, run };
}

describe("tables of the suites", () => {
  test(
    "accuracy: layers, time, peers, drift and samples of both models, with the numbers of its rows",
    async () => {
      const { report, run } = await measured(accuracySuite, ["dream-mini", "glyph-dit"], 4);
      expect(Object.keys(run.tables).sort()).toEqual(["drift", "layers", "peers", "samples", "time"]);
      const peers = rowsOf("peers", run.tables.peers!);
      const clip = report.rows.find((row) => row["model"] === "dream-mini" && row["setting"] === "2 clip")!;
      const all = peers.find((row) =>
        row.model === "dream-mini" && row.method === "2 clip" && row.task === "all"
      )!;
      expect(all.bitsPerWeight).toBe(clip["bitsPerWeight"] as number);
      const { value, low, high } = ((clip as Record<string, unknown>)["exactMatch"] as {
        task: string;
        exactMatch: { value: number; low: number; high: number };
      }[])
        .find(({ task }) => task === "all")!.exactMatch;
      expect([all.accuracy, all.accuracyLow, all.accuracyHigh]).toEqual([value, low, high]);
      expect(peers.filter((row) => row.method === "full" && row.bitsPerWeight !== null)).toEqual([]);

      const time = rowsOf("time", run.tables.time!);
      expect(new Set(time.map((row) => row.tUnit))).toEqual(new Set(["mask ratio", "timestep"]));
      expect(time.filter((row) => row.tEnd <= row.tBegin || row.setting === "full")).toEqual([]);
      const layers = rowsOf("layers", run.tables.layers!);
      expect(new Set(layers.map((row) => row.setting))).toEqual(new Set(["2 round", "2 clip"]));
      expect(layers.every((row) => typeof row.milliseconds === "number" && row.milliseconds > 0)).toBe(true);
      expect(layers.some((row) => row.action === "kept" && row.relativeRmsError === null)).toBe(true);
      const samples = rowsOf("samples", run.tables.samples!);
      expect(
        samples.filter((row) => row.model === "glyph-dit").every((row) =>
          row.image!.startsWith("data:image/png;base64,iVBOR")
        ),
      ).toBe(true);
      expect(
        samples.some((row) => row.model === "dream-mini" && row.answer !== null && row.expected !== null),
      ).toBe(true);
      expect(run.summary.map(({ label }) => label)).toContain("dream-mini, full precision");
      expect(new Set(chartsOf(run.tables).map(({ id }) => id)).size).toBe(chartsOf(run.tables).length);
    },
    120_000,
  );

  test("checkpoint and kernels", async () => {
    const { run } = await measured(checkpointSuite, ["dream-mini"], 1);
    expect(rowsOf("peers", run.tables.peers!).map((row) => [row.method, row.task, typeof row.seconds]))
      .toEqual([
        ["2 round", null, "number"],
        ["2 clip", null, "number"],
      ]);
    const short = { samples: 2, warmUpMilliseconds: 1, sampleMilliseconds: 1 };
    const suite = kernelSuiteOf({
      ...QUICK_SCALE,
      inCacheRows: 1,
      fromMemoryRows: 2,
      threadedRows: 2,
      productSide: 48,
      vectorRows: 32,
      poolRows: 2,
      inCache: short,
      fromMemory: short,
      wasmWarmUpMilliseconds: 1,
    });
    const { report, run: kernelRun } = await measured(suite, [], 1);
    const rows = rowsOf("kernels", kernelRun.tables.kernels!);
    expect(rows.length).toBe(report.rows.length);
    expect(rows.some((row) => row.library === "memcpy" && row.bytesPerSecond! > 0)).toBe(true);
    expect(chartsOf(kernelRun.tables).map(({ id }) => id)).toEqual(["roofline", "throughput"]);
  }, 120_000);

  test("a suite's own tables are taken, and checked", async () => {
    const { drift } = await benchTables({
      rows: [],
      tables: { drift: [{ model: "m", setting: "s", step: 3 }] },
    });
    expect(rowsOf("drift", drift!)[0]!.step).toBe(3);
    const message = (tables: Record<string, object[]>) =>
      benchTables({ rows: [], tables: tables as Record<string, Record<string, unknown>[]> }).then(
        String,
        (error) => error.message,
      );
    // The phase suite's times at a large model's sizes are of no table.
    const sizes = { suite: "phases", model: "m", phase: "phase1", extrapolatedSeconds: 3 };
    expect(await benchTables({ rows: [sizes as unknown as SuiteRow] })).toEqual({});
    expect(await message({ drfit: [] })).toContain('there is no table "drfit"');
    expect(await message({ drift: [{ model: "m" }] })).toContain(
      "setting of row 0 must be a text, got undefined",
    );
  });
});

test("time parameters: equal neighbours are one row, and the range follows from the grid", () => {
  const source = { model: "m", setting: "s", layer: "l", tUnit: "timestep", stage: "after" } as const;
  const rows = activationRows({
    boundaries: [0, 5, 7, 9],
    scale: [0.5, 0.5, 1],
    zeroPoint: [3, 3, 3],
    bits: 4,
  }, source);
  expect(
    rows.map((
      { tBegin, tEnd, activationLow, activationHigh },
    ) => [tBegin, tEnd, activationLow, activationHigh]),
  ).toEqual([
    [0, 7, -1.5, 6],
    [7, 9, -3, 12],
  ]);
  expect(() => activationRows({ boundaries: [0, 5], scale: [], zeroPoint: [1], bits: 4 }, source)).toThrow(
    "got 0 and 1",
  );
});

test("θ: grids by group or by bin, and output corrections by group", () => {
  const groups = equalTimeGroups(timestepAxis(8), 2);
  const source = { model: "m", setting: "s" };
  const output = {
    gain: Float32Array.of(1, 3, 2, 2),
    bias: Float32Array.of(3, 4, 0, 0),
  };
  const grid = (scale: number[]) => ({
    bits: 4 as const,
    scale: Float32Array.from(scale),
    zeroPoint: Int32Array.from(scale, () => 8),
  });
  const rows = thetaRows(
    new TimeParameters(
      groups,
      new Map([
        ["both", { activation: grid([1, 2]), output }],
        ["smooth", { activation: grid([1, 1, 1, 1.5, 2, 2, 2, 2]) }],
      ]),
      "",
    ),
    source,
  );
  const of = (layer: string) =>
    rows.filter((row) => row.layer === layer).map((row) => [
      row.stage ?? null,
      row.tBegin,
      row.tEnd,
      row.scale ?? row.gain,
      row.bias ?? null,
    ]);
  expect(of("both")).toEqual([
    ["before", 0, 4, 1, null],
    ["before", 4, 8, 2, null],
    [null, 0, 4, 2, Math.sqrt(12.5)],
    [null, 4, 8, 2, 0],
  ]);
  expect(of("smooth")).toEqual([
    ["after", 0, 3, 1, null],
    ["after", 3, 4, 1.5, null],
    ["after", 4, 8, 2, null],
  ]);
});

test("kinds of layers by their names", () => {
  for (
    const [name, kind] of [
      ["model.layers.0.self_attn.q_proj.weight", "attention"],
      ["model.layers.3.mlp.down_proj.weight", "feed-forward"],
      ["model.embed_tokens.weight", "embedding"],
      ["model.layers.0.input_layernorm.weight", "norm"],
      ["lm_head.weight", "head"],
      ["transformer_blocks.0.attn1.to_q.weight", "attention"],
      ["transformer_blocks.0.ff.net.0.proj.weight", "feed-forward"],
      ["transformer_blocks.0.norm1.linear.weight", "modulation"],
      ["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight", "modulation"],
      ["something", "other"],
    ]
  ) expect([name, layerKind(name!)]).toEqual([name!, kind!]);
});

test("docs/tables.md is the schema", () => {
  // The formatter pads the tables' cells.
  const text = readFileSync(join(ROOT, "docs", "tables.md"), "utf8").replaceAll("\\|", "|").replace(
    / +/g,
    " ",
  ).replace(/-+/g, "-");
  for (const name of TABLE_NAMES) {
    expect(text).toContain(`### ${name}`);
    for (const [column, { type, unit, required, doc }] of Object.entries(columnsOf(name))) {
      expect(text).toContain(
        `| \`${column}\` | ${type}${required === true ? "" : "?"} | ${
          unit === undefined ? "" : `${unit} `
        }| ${doc} |`.replace(/-+/g, "-"),
      );
    }
  }
});
