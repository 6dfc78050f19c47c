/**
 * What solving from saved statistics costs: a block of FLUX's single-stream shape with random weights and
 * second moments in blocks, quantized to Q4_K by the two-level search of the weights alone and from
 * statistics.
 */
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { loadStatistics } from "../../calibration/saved_statistics.ts";
import { MOMENTS } from "../../calibration/moment_structure.ts";
import { resolveConfig } from "../../config/mod.ts";
import type { Kernels } from "../../native/mod.ts";
import { quantizeCheckpoint } from "../../pipeline/mod.ts";
import { SafetensorsWriter } from "../../tensor/mod.ts";
import { gaussianWeights } from "../random.ts";
import { type BenchContext, type Goal, type Section, tableOf } from "../suite.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";
import { toBfloat16 } from "../../tensor/bfloat16.ts";
import { percent } from "./scale.ts";
import { type SyntheticInput, writeSyntheticStatistics } from "./synthetic_statistics.ts";

/** Processor time of one way to quantize a block. */
export interface StatisticsRow {
  readonly solver: string;
  readonly weights: number;
  readonly processorSeconds: number;
  /** Speed as a share of the search without statistics, by processor time. */
  readonly ofClip: number;
}

/** Speed that is wanted, as a share of the search without statistics. */
const WANTED_SHARE = 1 / 3;
/** Weights of a published FLUX. */
const PUBLISHED_WEIGHTS = 12e9;
/** Columns of a block of the moments at the published width, as the collector writes them by default. */
const BLOCK = 1024, PUBLISHED_WIDTH = 3072;
/** Q4_K. */
const FORM = { bit_width: 4, group_size: 32, scale_bits: 6 } as const;
/** The search, and the default solver. */
const SOLVERS = ["clip", "best"] as const;

/** Matrices of FLUX's single-stream block by the input that they read. */
function inputsOf(width: number): SyntheticInput[] {
  const named = (name: string, rows: number) => [`single_transformer_blocks.0.${name}.weight`, rows] as const;
  const same = ["attn.to_q", "attn.to_k", "attn.to_v"].map((name) => named(name, width));
  return [
    { cols: width, matrices: [...same, named("proj_mlp", 4 * width)] },
    { cols: 5 * width, matrices: [named("proj_out", width)] },
  ];
}

function writeBlock(folder: string, width: number, seed: number): void {
  mkdirSync(folder);
  const specs = inputsOf(width).flatMap(({ cols, matrices }) =>
    matrices.map(([name, rows]) => ({ name, dtype: "BF16" as const, shape: [rows, cols] }))
  );
  const path = join(folder, "diffusion_pytorch_model.safetensors");
  using writer = SafetensorsWriter.create(path, {
    reservedHeaderBytes: SafetensorsWriter.headerBytes(specs),
  });
  writer.add(specs);
  const some = gaussianWeights(width * width, seed, 0.02), bytes = new Uint8Array(toBfloat16(some).buffer);
  for (const { name, shape: [rows, cols] } of specs) {
    const total = 2 * rows! * cols!;
    for (let at = 0; at < total; at += bytes.length) {
      writer.write(name, at, bytes.subarray(0, Math.min(bytes.length, total - at)));
    }
  }
  writer.finish();
}

const processorSeconds = () => {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1e6;
};

/**
 * Quantizes the block with each solver. From statistics their reading counts, and what follows the forecast,
 * which takes some seconds whatever the model's size.
 *
 * @param width of the published 3072
 */
export function measureFromStatistics(
  { options: { seed }, progress }: BenchContext,
  kernels: Kernels,
  width: number,
): Promise<StatisticsRow[]> {
  return withTemporaryFolder(async (folder) => {
    const input = join(folder, "flux"), output = join(folder, "out"), force = true;
    const statistics = join(folder, "statistics.safetensors"), weights = 12 * width * width;
    writeBlock(input, width, seed);
    const block = Math.ceil(BLOCK * width / PUBLISHED_WIDTH / 256) * 256;
    writeSyntheticStatistics(statistics, inputsOf(width), block);
    const rows: StatisticsRow[] = [];
    for (const solver of SOLVERS) {
      progress(`a block of FLUX's shape, width ${width}: ${solver}`);
      const isSearch = solver === "clip";
      const overrides = { ...FORM, solver, num_threads: kernels.threads };
      const { config } = resolveConfig({
        overrides: isSearch ? overrides : { ...overrides, calibration_data: statistics },
      });
      let begin = processorSeconds(), reading = 0;
      if (!isSearch) {
        loadStatistics([statistics], "");
        reading = processorSeconds() - begin;
      }
      begin = processorSeconds();
      await quantizeCheckpoint({
        ...{ input, output, config, kernels, force },
        onEvent({ message }) {
          if (message.startsWith(MOMENTS)) begin = processorSeconds();
        },
      });
      const seconds = reading + processorSeconds() - begin;
      const ofClip = (rows[0]?.processorSeconds ?? seconds) / seconds;
      rows.push({ solver, weights, processorSeconds: seconds, ofClip });
    }
    return rows;
  });
}

/** The rates as a table. */
export const statisticsSection = (rows: readonly StatisticsRow[]): Section =>
  tableOf(
    "Q4_K from saved statistics, a block of FLUX's shape",
    [
      "Runs without the forecast before them, random weights, moments in blocks; clip: the search without statistics.",
      "12 B: minutes of processor time for as many weights, at this rate. Shares are of processor time.",
    ],
    rows,
    [
      ["solver", "solver", ({ solver }) => solver],
      ["weights", "M weights", ({ weights }) => weights / 1e6, 0],
      ["processorSeconds", "processor s", ({ processorSeconds }) => processorSeconds, 2],
      ["rate", "M weights/s", ({ weights, processorSeconds }) => weights / 1e6 / processorSeconds, 1],
      [
        "minutes",
        "12 B, min",
        ({ weights, processorSeconds }) => processorSeconds * PUBLISHED_WEIGHTS / weights / 60,
        1,
      ],
      ["ofClip", "of clip", ({ ofClip }) => percent(ofClip)],
    ],
  );

/** What is wanted of the default solver. @param isPublished whether the width is the published one */
export const statisticsGoals = (rows: readonly StatisticsRow[], isPublished: boolean): Goal[] =>
  rows.slice(-1).map(({ solver, ofClip }): Goal => {
    const goal = `${solver} from statistics, Q4_K, FLUX's shape`,
      wanted = `≥ ${percent(WANTED_SHARE)} of clip`;
    return isPublished
      ? { goal, wanted, measured: percent(ofClip), met: ofClip >= WANTED_SHARE }
      : { goal, wanted, measured: null, met: null, reason: "its width is measured without --quick" };
  });
