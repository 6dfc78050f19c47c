/**
 * The checkpoint suite: whole checkpoints through the pipeline, read back and compared with the originals.
 * Bytes, weight error and time; the accuracy of a quantized model is not measured here.
 */
import { join } from "node:path";
import type { Solver } from "../../config/names.ts";
import { resolveConfig } from "../../config/mod.ts";
import { peakResidentBytes, resetPeakResident } from "../../eval/environment.ts";
import { pairedRatio, spreadPercent, summarize, type Summary } from "../../eval/statistics.ts";
import { quantizeCheckpoint } from "../../pipeline/mod.ts";
import type { BitWidth } from "../../quant/mod.ts";
import { nameOfPath } from "../../files/whole.ts";
import { measureStored, type StoredCheckpoint } from "../stored.ts";
import { type BenchContext, type Section, type Suite, type SuiteReport, tableOf } from "../suite.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";

/** One way to quantize one model, and the measurements of its runs. */
interface Cell {
  readonly path: string;
  readonly bits: BitWidth;
  readonly solver: Solver;
  readonly seconds: number[];
  readonly peakBytes: number[];
  /** Of the first run, which counts for nothing else. */
  stored?: StoredCheckpoint;
  kind?: string;
  threads?: number;
}

const runsOf = ({ options: { quick } }: BenchContext): number => quick ? 1 : 5;

/** Quantizes every cell in turn, first once unmeasured: the engine then compiles the pipeline. */
async function runCells(context: BenchContext, cells: readonly Cell[], folder: string): Promise<boolean> {
  const { kernels, options: { groupSize, threads } } = context;
  const runs = runsOf(context), output = join(folder, "quantized");
  let isReset = true;
  for (let run = -1; run < runs; run++) {
    context.progress(run < 0 ? `${cells.length} checkpoints, warm-up` : `run ${run + 1} of ${runs}`);
    for (const cell of cells) {
      const { path: input, bits, solver } = cell;
      const overrides = { bit_width: bits, group_size: groupSize, solver, num_threads: threads ?? 0 };
      const { config } = resolveConfig({ overrides });
      isReset = resetPeakResident() && isReset;
      const begin = performance.now();
      const report = await quantizeCheckpoint({ input, output, config, kernels, force: true });
      const seconds = (performance.now() - begin) / 1000;
      if (run < 0) {
        cell.stored = measureStored(kernels, input, output);
        cell.kind = report.modelKind;
        cell.threads = report.threads;
      } else {
        cell.peakBytes.push(peakResidentBytes());
        cell.seconds.push(seconds);
      }
    }
  }
  return isReset;
}

async function measure(context: BenchContext): Promise<SuiteReport<CheckpointRow>> {
  const { models, bits, solvers } = context.options;
  const cells: Cell[] = models.flatMap((path) =>
    bits.flatMap((width) =>
      solvers.map((solver) => ({ path, bits: width, solver, seconds: [], peakBytes: [] }))
    )
  );
  const isReset = await withTemporaryFolder((folder) => runCells(context, cells, folder));
  return {
    sections: models.map((path) => sectionOf(context, cells.filter((cell) => cell.path === path), isReset)),
    rows: cells.map((cell) => rowOf(context, cell, cells, isReset)),
    goals: [],
    skipped: [],
  };
}

export type CheckpointRow = ReturnType<typeof rowOf>;

function rowOf({ environment, options }: BenchContext, cell: Cell, cells: readonly Cell[], isReset: boolean) {
  const { stored, seconds, peakBytes } = cell, { backend, isa, runtime, processor } = environment;
  return {
    suite: "checkpoint" as const,
    kernel: "quantizeCheckpoint",
    model: nameOfPath(cell.path),
    kind: cell.kind,
    bits: cell.bits,
    solver: cell.solver,
    groupSize: options.groupSize,
    zeroPoint: "real",
    dtype: `checkpoint to ${cell.bits} bits`,
    shape: null,
    ...stored!,
    seconds: summarize(seconds),
    weightsPerSecond: summarize(seconds.map((value) => stored!.weights / value)),
    samples: seconds.length,
    peakResidentBytes: Math.max(...peakBytes),
    peakIsOfRun: isReset,
    threads: cell.threads,
    ...{ backend, isa, runtime, processor },
    ratio: clipBesideRound(cell, cells) ?? null,
  };
}

function sectionOf(context: BenchContext, cells: readonly Cell[], isReset: boolean): Section {
  const { path, kind, threads, stored } = cells[0]!, runs = runsOf(context);
  const { tensors, weights } = stored!;
  return tableOf(
    `${nameOfPath(path)} (${kind}), ${tensors} matrices with ${weights} weights, group size ` +
      `${context.options.groupSize}`,
    [
      `Median of ${runs} run${runs === 1 ? "" : "s"}, ${threads} thread${threads === 1 ? "" : "s"}: ` +
      "read, quantize, verify, write, sync. Errors are of the files read back.",
      isReset
        ? "Memory: most resident memory of this process, engine included, during any of the runs."
        : "Memory: most resident memory of this process since it began, which this system cannot reset.",
    ],
    cells.map((cell) => ({ ...cell, ...cell.stored!, seconds: summarize(cell.seconds) })),
    [
      ["bits", "bits", ({ bits }) => bits],
      ["solver", "solver", ({ solver }) => solver],
      ["bitsPerWeight", "bits/weight", ({ bitsPerWeight }) => bitsPerWeight, 3],
      ["bitsPerWeightOfAll", "of all", ({ bitsPerWeightOfAll }) => bitsPerWeightOfAll, 3],
      ["before", "MB before", ({ fileBytesBefore }) => fileBytesBefore / 1e6, 3],
      ["after", "MB after", ({ fileBytesAfter }) => fileBytesAfter / 1e6, 3],
      ["relativeRmsError", "rel. RMS error", ({ relativeRmsError }) => relativeRmsError, 5],
      ["cosine", "cosine", ({ cosine }) => cosine, 6],
      ["rate", "Mw/s", ({ weights, seconds }) => weights / seconds.median / 1e6, 1],
      ["seconds", "seconds", ({ seconds }) => seconds.median, 3],
      ["spread", "±%", ({ seconds }) => spreadPercent(seconds), 0],
      ["memory", "MB peak", ({ peakBytes }) => Math.max(...peakBytes) / 1e6, 0],
    ],
  );
}

/** Seconds of clip search in units of round-to-nearest's, from pairs of runs. */
function clipBesideRound({ path, bits, solver, seconds }: Cell, cells: readonly Cell[]): Summary | undefined {
  if (solver !== "clip") return undefined;
  const round = cells.find((other) => other.path === path && other.bits === bits && other.solver === "round");
  return round && pairedRatio(seconds, round.seconds);
}

/** The reference models through the pipeline. */
export const checkpointSuite: Suite<CheckpointRow> = {
  name: "checkpoint",
  summary: "whole models through the pipeline: size, weight error, time, memory",
  run: measure,
};
