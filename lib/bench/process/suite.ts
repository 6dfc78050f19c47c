/**
 * The process suite: a large synthetic checkpoint through the command `scripts/quantize.ts` in a separate
 * process, timed from start to end; the memory that it takes and that running the result takes; and the time
 * until the library is loaded and until a report is written.
 */
import { rmSync } from "node:fs";
import { join } from "node:path";
import { packedLayers } from "../../quant/packed/checkpoint.ts";
import { openCheckpoint } from "../../tensor/mod.ts";
import { commandsOf, runChild } from "../child_process.ts";
import { measureStartUp, type StartUp, startUpGoals, startUpSection } from "./start_up.ts";
import { spreadPercent, summarize } from "../../eval/statistics.ts";
import {
  type BenchContext,
  type CommandOf,
  type Goal,
  type Section,
  type Suite,
  type SuiteReport,
  tableOf,
} from "../suite.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";

/** Size of checkpoint that the goals are about, with room: whole layers do not add up to a round number. */
const GOAL_BYTES = 1.7e9;
const GOAL_WEIGHTS_PER_SECOND = 150e6;
const GOAL_RESIDENT_BYTES = 600e6;
/** Memory that inference may take beside packed weights and activations. */
const GOAL_INFERENCE_BYTES = 64e6;
const BITS = 4;

/** Memory of a process that runs a model once, and of one that only opens the kernels. */
interface InferenceMemory {
  readonly peakResidentBytes: number;
  readonly baselineBytes: number;
  readonly weightBytes: number;
  readonly activationBytes: number;
  /** Beside weights and activations. */
  readonly restBytes: number;
}

/** Measures a forward pass of 64 tokens (or one image) in a separate process. */
export async function measureInferenceMemory(commandOf: CommandOf, model: string): Promise<InferenceMemory> {
  const probe = async (args: readonly string[]) =>
    JSON.parse((await runChild(commandOf("_probes/inference.ts", args))).output) as Record<
      "peakResidentBytes" | "weightBytes" | "scratchBytes",
      number
    >;
  const { peakResidentBytes: baselineBytes } = await probe([]);
  const { peakResidentBytes, weightBytes, scratchBytes: activationBytes } = await probe([model]);
  const restBytes = peakResidentBytes - baselineBytes - weightBytes - activationBytes;
  return { peakResidentBytes, baselineBytes, weightBytes, activationBytes, restBytes };
}

type Measured = Awaited<ReturnType<typeof measureSize>>;

async function measureSize(context: BenchContext, folder: string, bytes: number, runs: number) {
  const { options: { seed, threads, backend }, progress } = context, commandOf = commandsOf(context);
  const input = join(folder, "synthetic"), output = join(folder, "quantized");
  // Below one layer of Dream 7B, narrower layers of the same proportions.
  const layerBytes = 466e6;
  const hidden = bytes >= layerBytes
    ? []
    : ["--hidden", String(Math.max(64, Math.round(3584 * Math.sqrt(bytes / layerBytes) / 64) * 64))];
  progress(`synthetic checkpoint of ${(bytes / 1e6).toFixed(0)} MB`);
  const size = ["--gigabytes", String(bytes / 1e9), "--seed", String(seed), ...hidden];
  await runChild(commandOf("make_checkpoint.ts", [input, ...size]));
  const seconds: number[] = [], ownSeconds: number[] = [], peaks: number[] = [];
  for (let run = 0; run < runs; run++) {
    progress(`quantize ${(bytes / 1e6).toFixed(0)} MB in its own process, run ${run + 1} of ${runs}`);
    rmSync(output, { recursive: true, force: true });
    const kernelArgs = ["--threads", String(threads ?? 2), "--backend", backend];
    const args = ["--bits", String(BITS), "--solver", "round", ...kernelArgs, "--json"];
    const child = await runChild(commandOf("quantize.ts", [input, output, ...args]));
    const report = JSON.parse(child.output) as { seconds: number; peakMemoryBytes?: number };
    seconds.push(child.seconds);
    ownSeconds.push(report.seconds);
    // The process's own figure comes before its very end, the one seen from outside may miss it.
    const peak = Math.max(report.peakMemoryBytes ?? 0, child.peakResidentBytes ?? 0);
    if (peak > 0) peaks.push(peak);
  }
  const inference = await measureInferenceMemory(commandOf, output);
  using before = openCheckpoint(input);
  using after = openCheckpoint(output);
  let weights = 0, packedBytes = 0;
  for (const layer of packedLayers(after).values()) {
    weights += layer.rows * layer.cols;
    packedBytes += layer.bytes;
  }
  rmSync(input, { recursive: true, force: true });
  rmSync(output, { recursive: true, force: true });
  return {
    bytes: before.files.reduce((sum, { file }) => sum + file.fileBytes, 0),
    weights,
    bitsPerWeight: packedBytes * 8 / weights,
    seconds,
    ownSeconds,
    peakResidentBytes: peaks,
    inference,
  };
}

/** Most resident memory of the runs, null where the system does not tell. */
const peakOf = ({ peakResidentBytes: peaks }: Measured) => peaks.length === 0 ? null : Math.max(...peaks);
const megabytes = (bytes: number) => `${(bytes / 1e6).toFixed(0)} MB`;

function goalsOf(measured: readonly Measured[]): Goal[] {
  const large = measured.at(-1)!;
  const isGoalSize = large.bytes >= GOAL_BYTES;
  const reason = `the checkpoint has only ${megabytes(large.bytes)}`;
  const rate = large.weights / summarize(large.seconds).median;
  const peaks = measured.map((each) => Math.max(0, ...each.peakResidentBytes));
  const isKnown = peaks.every((peak) => peak > 0);
  const goal = (text: string, wanted: string, found: string, met: boolean, why?: string): Goal =>
    isGoalSize && why === undefined
      ? { goal: text, wanted, measured: found, met }
      : { goal: text, wanted, measured: null, met: null, reason: why ?? reason };
  return [
    goal(
      "whole process, 4 bits round, 2 GB of warm BF16",
      `≥ ${GOAL_WEIGHTS_PER_SECOND / 1e6} Mw/s`,
      `${(rate / 1e6).toFixed(0)} Mw/s, start to end`,
      rate >= GOAL_WEIGHTS_PER_SECOND,
    ),
    goal(
      "its peak resident memory, whatever the size",
      `≤ ${megabytes(GOAL_RESIDENT_BYTES)}`,
      measured.map((each, i) => `${megabytes(peaks[i]!)} of ${megabytes(each.bytes)}`).join(", "),
      Math.max(...peaks) <= GOAL_RESIDENT_BYTES,
      isKnown ? undefined : "this system does not tell a process's peak memory",
    ),
    goal(
      "memory of running it, beside packed weights and activations",
      `≤ ${megabytes(GOAL_INFERENCE_BYTES)}`,
      measured.map(({ inference: { restBytes, weightBytes } }) =>
        `${megabytes(restBytes)} at ${megabytes(weightBytes)}`
      ).join(", "),
      Math.max(...measured.map(({ inference }) => inference.restBytes)) <= GOAL_INFERENCE_BYTES,
    ),
  ];
}

async function measure(context: BenchContext): Promise<SuiteReport<ProcessRow>> {
  const { options } = context;
  const runs = options.quick ? 1 : 3;
  const sizes = [options.syntheticBytes / 8, options.syntheticBytes];
  const measured = await withTemporaryFolder(async (folder) => {
    const found: Measured[] = [];
    for (const bytes of sizes) found.push(await measureSize(context, folder, bytes, runs));
    return found;
  });
  context.progress("import of mod.ts, and reports");
  const startUp: StartUp = await measureStartUp(commandsOf(context), options.quick ? 1 : 5);
  return {
    sections: [sectionOf(context, measured, runs), startUpSection(startUp)],
    rows: [...measured.map((each) => rowOf(context, each)), startUpRow(context, startUp)],
    goals: [...goalsOf(measured), ...startUpGoals(startUp)],
    skipped: [],
  };
}

const startUpRow = ({ environment: { runtime, processor } }: BenchContext, startUp: StartUp) => ({
  suite: "process" as const,
  kernel: "mod.ts and its reports",
  runtime,
  processor,
  startUp,
});

/** A row of the JSON report: of a checkpoint, or of start-up. */
export type ProcessRow = ReturnType<typeof rowOf> | ReturnType<typeof startUpRow>;

function rowOf({ environment, options }: BenchContext, each: Measured) {
  const { backend, isa, runtime, processor } = environment;
  return {
    suite: "process" as const,
    kernel: "quantize.ts",
    ...{ backend, isa, runtime, processor },
    dtype: `BF16 to ${BITS} bits`,
    shape: null,
    bits: BITS,
    solver: "round",
    threads: options.threads ?? 2,
    samples: each.seconds.length,
    checkpointBytes: each.bytes,
    weights: each.weights,
    bitsPerWeight: each.bitsPerWeight,
    seconds: summarize(each.seconds),
    secondsInPipeline: summarize(each.ownSeconds),
    weightsPerSecond: summarize(each.seconds.map((value) => each.weights / value)),
    peakResidentBytes: peakOf(each),
    inference: each.inference,
    ratio: null,
  };
}

function sectionOf({ options }: BenchContext, measured: readonly Measured[], runs: number): Section {
  const threads = options.threads ?? 2;
  return tableOf(
    `quantize.ts as a process: ${BITS} bits, round to nearest, ${threads} threads`,
    [
      `Synthetic BF16 checkpoints, sharded, Dream's layer shapes, just written. Median of ${runs} run${
        runs === 1 ? "" : "s"
      }, from the`,
      "start of the process to its end: engine, reading, quantizing, verifying, writing, syncing. MB to run: peak of",
      "a process that loads the result and runs 64 tokens, less that of one that only opens the kernels.",
    ],
    measured.map((each) => ({ ...each, seconds: summarize(each.seconds), peak: peakOf(each) })),
    [
      ["before", "MB", ({ bytes }) => bytes / 1e6, 0],
      ["weights", "M weights", ({ weights }) => weights / 1e6, 1],
      ["bitsPerWeight", "bits/weight", ({ bitsPerWeight }) => bitsPerWeight, 3],
      ["seconds", "seconds", ({ seconds }) => seconds.median, 2],
      ["spread", "±%", ({ seconds }) => spreadPercent(seconds), 1],
      ["own", "s in pipeline", ({ ownSeconds }) => summarize(ownSeconds).median, 2],
      ["rate", "Mw/s", ({ weights, seconds }) => weights / seconds.median / 1e6, 0],
      ["read", "GB/s read", ({ bytes, seconds }) => bytes / seconds.median / 1e9, 2],
      ["memory", "MB peak", ({ peak }) => peak === null ? null : peak / 1e6, 0],
      [
        "inference",
        "MB to run",
        ({ inference: run }) => (run.peakResidentBytes - run.baselineBytes) / 1e6,
        0,
      ],
    ],
  );
}

/** The command line tool on a large checkpoint. */
export const processSuite: Suite<ProcessRow> = {
  name: "process",
  summary:
    "quantize.ts on a large synthetic checkpoint: rate and memory of the process, memory to run the result; start-up",
  run: measure,
};
