/**
 * The checkpoint suite: whole checkpoints through the pipeline, read back and compared with what they were. Says what
 * the bytes and the time are; what a quantized model still can do is not measured here.
 */
import { join } from "node:path";
import { resolveConfig } from "../../config/mod.ts";
import { quantizeCheckpoint } from "../../pipeline/mod.ts";
import type { BitWidth, Solver } from "../../quant/mod.ts";
import { peakResidentBytes, resetPeakResident } from "../../eval/environment.ts";
import { pairedRatio, summarize, type Summary } from "../../eval/statistics.ts";
import { measureStored, type StoredCheckpoint } from "../stored.ts";
import type { BenchContext, Section, Suite, SuiteReport } from "../suite.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";

/** One way to quantize one model, and what its runs took. */
interface Cell {
  readonly model: string;
  readonly path: string;
  readonly bits: BitWidth;
  readonly solver: Solver;
  readonly seconds: number[];
  readonly peakBytes: number[];
  stored?: StoredCheckpoint;
  kind?: string;
  threads?: number;
}

const nameOf = (path: string) => path.replace(/[/\\]+$/, "").split(/[/\\]/).at(-1)!;

async function measure(context: BenchContext): Promise<SuiteReport> {
  const { kernels, environment, options } = context;
  const { models, bits, solvers, groupSize, quick } = options;
  const runs = quick ? 1 : 5;
  const cells: Cell[] = models.flatMap((path) =>
    bits.flatMap((width) =>
      solvers.map((solver): Cell => ({
        model: nameOf(path),
        path,
        bits: width,
        solver,
        seconds: [],
        peakBytes: [],
      }))
    )
  );
  let isReset = true;
  await withTemporaryFolder(async (folder) => {
    // One more run comes first, for the engine to compile the pipeline; it counts for nothing.
    for (let run = -1; run < runs; run++) {
      context.progress(run < 0 ? `${cells.length} checkpoints, warm-up` : `run ${run + 1} of ${runs}`);
      for (const cell of cells) {
        const { config } = resolveConfig({
          overrides: {
            bit_width: cell.bits,
            group_size: groupSize,
            solver: cell.solver,
            num_threads: options.threads ?? 0,
          },
        });
        const output = join(folder, "quantized");
        isReset = resetPeakResident() && isReset;
        const begin = performance.now();
        const report = await quantizeCheckpoint({ input: cell.path, output, config, kernels, force: true });
        const seconds = (performance.now() - begin) / 1000;
        if (run < 0) {
          cell.stored = measureStored(kernels, cell.path, output);
          cell.kind = report.modelKind;
          cell.threads = report.threads;
        } else {
          cell.peakBytes.push(peakResidentBytes());
          cell.seconds.push(seconds);
        }
      }
    }
  });
  const rows = cells.map((cell) => {
    const { stored, seconds, peakBytes } = cell;
    return {
      suite: "checkpoint",
      kernel: "quantizeCheckpoint",
      model: cell.model,
      kind: cell.kind,
      bits: cell.bits,
      solver: cell.solver,
      groupSize,
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
      backend: environment.backend,
      isa: environment.isa,
      runtime: environment.runtime,
      processor: environment.processor,
      ratio: clipAgainstRound(cell, cells) ?? null,
    };
  });
  const memory = isReset
    ? "Memory: most resident memory of this process, engine included, during any of the runs."
    : "Memory: most resident memory of this process since it began, which this system cannot reset.";
  const sections = models.map((path): Section => {
    const own = cells.filter((cell) => cell.path === path);
    const { kind, threads, stored } = own[0]!;
    return {
      title: `${nameOf(path)} (${kind}), ${stored!.tensors} matrices with ${
        stored!.weights
      } weights, group size ${groupSize}`,
      notes: [
        `Median of ${runs} run${runs === 1 ? "" : "s"}, ${threads} thread${
          threads === 1 ? "" : "s"
        }: read, quantize, ` +
        "verify, write, sync. Errors are of the files read back.",
        memory,
      ],
      columns: [
        { key: "bits", title: "bits" },
        { key: "solver", title: "solver" },
        { key: "bitsPerWeight", title: "bits/weight", digits: 3 },
        { key: "before", title: "MB before", digits: 3 },
        { key: "after", title: "MB after", digits: 3 },
        { key: "relativeRmsError", title: "rel. RMS error", digits: 5 },
        { key: "cosine", title: "cosine", digits: 6 },
        { key: "rate", title: "Mw/s", digits: 1 },
        { key: "seconds", title: "seconds", digits: 3 },
        { key: "spread", title: "±%", digits: 0 },
        { key: "memory", title: "MB peak", digits: 0 },
      ],
      rows: own.map((cell) => {
        const seconds = summarize(cell.seconds);
        return {
          bits: cell.bits,
          solver: cell.solver,
          bitsPerWeight: cell.stored!.bitsPerWeight,
          before: cell.stored!.fileBytesBefore / 1e6,
          after: cell.stored!.fileBytesAfter / 1e6,
          relativeRmsError: cell.stored!.relativeRmsError,
          cosine: cell.stored!.cosine,
          rate: cell.stored!.weights / seconds.median / 1e6,
          seconds: seconds.median,
          spread: 100 * seconds.medianDeviation / seconds.median,
          memory: Math.max(...cell.peakBytes) / 1e6,
        };
      }),
    };
  });
  return { sections, rows, goals: [], skipped: [] };
}

/** Seconds of clip search in units of round-to-nearest's, from pairs of runs. */
function clipAgainstRound(cell: Cell, cells: readonly Cell[]): Summary | undefined {
  if (cell.solver !== "clip") return undefined;
  const round = cells.find((other) =>
    other.path === cell.path && other.bits === cell.bits && other.solver === "round"
  );
  return round && pairedRatio(cell.seconds, round.seconds);
}

/** The reference models through the pipeline. */
export const checkpointSuite: Suite = {
  name: "checkpoint",
  summary: "whole models through the pipeline: size, weight error, time, memory",
  run: measure,
};
