/** Structure of second moments: how it is chosen, and statistics that are kept, saved and read in it. */
import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { chooseMoment, MAX_FULL_COLUMNS, momentLine } from "../../lib/calibration/moment_structure.ts";
import { resolveConfig } from "../../lib/config/mod.ts";
import { CalibrationError, FormatError } from "../../lib/errors.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { quantizeCheckpoint, type QuantizeCheckpointOptions, type RunEvent } from "../../lib/pipeline/mod.ts";
import { momentBlocks } from "../../lib/quant/solvers/moments.ts";
import {
  CalibrationStatistics,
  equalTimeGroups,
  maskRatioAxis,
  readCalibrationStatistics,
  writeCalibrationStatistics,
} from "../../lib/time/mod.ts";
import { MODELS, rejection, workplace } from "../_checkpoints.ts";
import { gaussians } from "../_kernels.ts";
import { thrown } from "../tensor/_files.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

describe("choosing", () => {
  const auto = { moment: "auto", momentBlock: 1024 } as const, many = 1e6;

  test("by default: full up to a width, where inputs and memory suffice", () => {
    expect(chooseMoment(auto, { cols: 4608, positions: many })).toEqual({ block: 4608 });
    expect(chooseMoment(auto, { cols: MAX_FULL_COLUMNS, positions: many }).block).toBe(MAX_FULL_COLUMNS);
    expect(chooseMoment(auto, { cols: 18_944, positions: many })).toEqual({
      block: 1024,
      reason: `more than ${MAX_FULL_COLUMNS} columns`,
    });
    expect(chooseMoment(auto, { cols: 4096, positions: 4095 })).toEqual({
      block: 1024,
      reason: "only 4095 different positions",
    });
    expect(chooseMoment(auto, { cols: 4096, positions: 2047 })).toEqual({
      block: 1,
      reason: "only 2047 different positions",
    });
    expect(chooseMoment(auto, { cols: 4096, positions: many, memoryBytes: 2 ** 28 })).toEqual({
      block: 1024,
      reason: "memory for a whole one is short",
    });
  });

  test("as it is asked for, in whole groups and superblocks", () => {
    const wide = { cols: 18_944, positions: 10 };
    expect(chooseMoment({ ...auto, moment: "full" }, wide)).toEqual({ block: 18_944 });
    expect(chooseMoment({ ...auto, moment: "diagonal" }, wide)).toEqual({ block: 1 });
    const small = { moment: "block", momentBlock: 32 } as const;
    expect(chooseMoment(small, wide)).toEqual({ block: 32 });
    const group = { groupSize: 128 } as const, levels = { groupSize: 16, scaleBits: 4 } as const;
    expect(chooseMoment(small, { ...wide, formats: [group] })).toEqual({ block: 128 });
    expect(chooseMoment(small, { ...wide, formats: [group, levels] })).toEqual({ block: 256 });
    expect(chooseMoment(small, { ...wide, cols: 24 })).toEqual({ block: 24 });
  });

  test("a line says it by width", () => {
    const few = chooseMoment(auto, { cols: 18_944, positions: many });
    expect(momentLine([{ cols: 18_944, ...few }, { cols: 64, block: 64 }, { cols: 3584, block: 3584 }, {
      cols: 64,
      block: 64,
    }, { cols: 48, block: 1 }])).toBe(
      "second moments: 48 columns diagonal; 64, 3584 columns full; " +
        "18944 columns blocks of 1024 (more than 8192 columns)",
    );
  });
});

const COLS = 70, TOKENS = 40;
const GROUPS = equalTimeGroups(maskRatioAxis(10), 2);

const statisticsOf = (block: number, identity = "a", second: "total" | "groups" = "total") =>
  new CalibrationStatistics({
    fingerprint: "model",
    groups: GROUPS,
    second,
    runs: [{ identity, source: "data", isSynthetic: true, samples: 4 }],
    inputs: new Map([["q.weight", { cols: COLS, block, layers: ["q.weight", "k.weight"] }]]),
  });

function filled(block: number, seed: number, second: "total" | "groups" = "total") {
  const x = gaussians(seed, TOKENS * COLS), statistics = statisticsOf(block, `run ${seed}`, second);
  statistics.add(kernels, "q.weight", x, TOKENS, { times: [0.1, 0.4, 0.6, 0.9] });
  return { x, statistics };
}

/** Σ x xᵀ of a block, float64. */
function sums(xs: readonly Float32Array[], first: number, count: number): number[] {
  return Array.from({ length: count * count }, (_, at) => {
    const i = first + Math.floor(at / count), j = first + at % count;
    let sum = 0;
    for (const x of xs) for (let t = 0; t < TOKENS; t++) sum += x[t * COLS + i]! * x[t * COLS + j]!;
    return sum;
  });
}

describe("statistics", () => {
  for (const block of [1, 32, COLS]) {
    test(`blocks of ${block}: their sums are those of float64, saved, read, merged`, () => {
      const one = filled(block, 3), other = filled(block, 4), path = `${place.fresh("s")}.safetensors`;
      writeCalibrationStatistics(path, one.statistics.merge(other.statistics));
      for (const keptBytes of [undefined, 0]) {
        const { statistics } = readCalibrationStatistics(path, { fingerprint: "model" }, keptBytes);
        const { second, block: read, tokens, cols } = statistics.moments("k.weight");
        expect([read, tokens, cols]).toEqual([block, 2 * TOKENS, COLS]);
        for (const { first, cols: own, at } of momentBlocks(COLS, block)) {
          for (const [i, wanted] of sums([one.x, other.x], first, own).entries()) {
            expect(Math.abs(second[at + i]! - wanted)).toBeLessThan(1e-4);
          }
        }
      }
    });
  }

  test("moments of time groups stay whole", () => {
    const { statistics } = filled(32, 5, "groups"), path = `${place.fresh("g")}.safetensors`;
    writeCalibrationStatistics(path, statistics);
    const read = readCalibrationStatistics(path, { fingerprint: "model" }).statistics;
    expect(read.groupMoments("q.weight", 1).second).toEqual(statistics.groupMoments("q.weight", 1).second);
    expect(read.groupMoments("q.weight", 1).second.length).toBe(COLS * COLS);
    expect(read.moments("q.weight").second.length).toBe(32 * 32 * 2 + 6 * 6);
  });

  test("of other blocks are not merged, and files with impossible ones are refused", () => {
    const error = thrown(() => filled(32, 3).statistics.merge(filled(64, 4).statistics));
    expect(error).toBeInstanceOf(CalibrationError);
    expect(error.message).toMatch(/blocks of 32 and of 64 columns for "q.weight"/);
    const path = `${place.fresh("b")}.safetensors`;
    writeCalibrationStatistics(path, filled(32, 3).statistics);
    const bytes = readFileSync(path, "latin1");
    for (
      const [wrong, message] of [["70", /1 to 69 columns, got 70/], ["16", /must be F32 \[1060\]/], [
        "-3",
        /got -3/,
      ]] as const
    ) {
      const changed = bytes.replace(',32]]"', `,${wrong}]]"`);
      expect(changed).not.toBe(bytes);
      writeFileSync(path, changed, "latin1");
      expect(() => readCalibrationStatistics(path, { fingerprint: "model" })).toThrow(message);
      expect(() => readCalibrationStatistics(path, { fingerprint: "model" })).toThrow(FormatError);
    }
  });
});

const DREAM = join(MODELS, "dream-mini"), DATA = join(DREAM, "calibration.jsonl");

async function quantize(
  output: string,
  overrides: Record<string, unknown>,
  more: Partial<QuantizeCheckpointOptions> = {},
) {
  const events: RunEvent[] = [];
  const { config } = resolveConfig({
    overrides: {
      bit_width: 2,
      group_size: 0,
      solver: "best",
      calibration_data: DATA,
      calibration_samples: 64,
      "solver_options.candidates": 1,
      "solver_options.rounds": 1,
      ...overrides,
    },
  });
  const report = await quantizeCheckpoint({
    input: DREAM,
    output,
    config,
    kernels,
    force: true,
    onEvent: (event) => events.push(event),
    ...more,
  });
  const structures = new Set(
    report.layers.flatMap(({ solved }) => solved === undefined ? [] : [solved.moment]),
  );
  return { report, structures, said: events.map(({ message }) => message).join("\n") };
}

describe("runs", () => {
  test("say the structure in a line and record it for each layer", async () => {
    const heldOut: number[] = [];
    for (
      const [moment, structures, line] of [
        ["auto", ["full"], "second moments: 64, 160 columns full"],
        ["block", ["blocks of 32"], "second moments: 64, 160 columns blocks of 32"],
        ["diagonal", ["diagonal"], "second moments: 64, 160 columns diagonal"],
      ] as const
    ) {
      const settings = { "solver_options.moment": moment, "solver_options.moment_block": 32 };
      const run = await quantize(place.fresh("run"), settings);
      expect([...run.structures]).toEqual([...structures]);
      expect(run.said).toContain(line);
      heldOut.push(run.report.heldOut!.value);
    }
    expect(heldOut[1]!).toBeLessThan(heldOut[2]! / 2);
  }, 120_000);

  test("few different positions: a structure that they fill, and it is said", async () => {
    const few = `${place.fresh("few")}.jsonl`;
    writeFileSync(few, readFileSync(DATA, "utf8").split("\n").slice(0, 8).join("\n"));
    const { said, structures } = await quantize(place.fresh("run"), { calibration_data: few });
    expect(said).toMatch(/160 columns \w+ \(only \d+ different positions\)/);
    expect(structures.size).toBeGreaterThan(1);
  }, 120_000);

  test("saved statistics keep the structure, and give smaller blocks of it but no larger ones", async () => {
    const path = `${place.fresh("saved")}.safetensors`, block = { "solver_options.moment_block": 64 };
    await quantize(place.fresh("run"), {
      ...block,
      "solver_options.moment": "block",
      calibration_mode: "once",
    }, {
      saveCalibration: { path },
    });
    const { statistics } = readCalibrationStatistics(path, {
      fingerprint: readCalibrationFingerprint(path),
    });
    expect([...statistics.inputs.values()].every(({ second }) => second!.length <= 2 * 64 * 64 + 32 * 32))
      .toBe(true);
    const from = { calibration_data: path };
    expect([...(await quantize(place.fresh("run"), from)).structures].sort()).toEqual([
      "blocks of 64",
      "full",
    ]);
    const narrow = { ...from, "solver_options.moment": "block", "solver_options.moment_block": 32 };
    expect([...(await quantize(place.fresh("run"), narrow)).structures]).toEqual(["blocks of 32"]);
    const wide = await rejection(quantize(place.fresh("run"), { ...from, "solver_options.moment": "full" }));
    expect(wide).toBeInstanceOf(CalibrationError);
    expect(wide.message).toMatch(/statistics must have a full moment, got blocks of 64/);
    const groups = await rejection(quantize(place.fresh("run"), { ...from, group_size: 128 }));
    expect(groups.message).toMatch(/blocks of a multiple of 128 columns, got 64/);
    const asScales = { ...from, group_size: 32, scale_bits: 6, bit_width: 4 };
    const superblocks = await rejection(quantize(place.fresh("run"), asScales));
    expect(superblocks.message).toMatch(/blocks of a multiple of 256 columns, got 64/);
  }, 120_000);
});

/** The model's fingerprint in a file. */
const readCalibrationFingerprint = (path: string) =>
  /"fingerprint":"([^"]+)"/.exec(readFileSync(path, "latin1"))![1]!;
