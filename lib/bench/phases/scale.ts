/**
 * Time and memory of phases 1 and 2 at the shapes of a large model: one block with random weights goes
 * through the pipeline, and the times of its phases are multiplied by counts of blocks and tokens. No
 * accuracy. The suite `solver-speed` times solving at these shapes.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../config/mod.ts";
import { collectGarbage, peakResidentBytes, resetPeakResident } from "../../eval/environment.ts";
import { checkMemory, forecastMemory, forecastTime } from "../../eval/forecast.ts";
import { formatBytes, secondsText } from "../../eval/table.ts";
import { RandomStream } from "../../models/random.ts";
import { requirementsAt } from "../../models/mod.ts";
import { quantizeCheckpoint, type RunReport } from "../../pipeline/mod.ts";
import { commandsOf, runChild } from "../child_process.ts";
import { type BenchContext, type SuiteReport, tableOf } from "../suite.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";

/** Dream 7B (https://huggingface.co/Dream-org/Dream-v0-Base-7B). */
const DREAM_7B = { width: 3584, blocks: 28 } as const;
/** Tokens of the synthetic model's vocabulary. */
const VOCABULARY = 512;
/** Calibration sequences of the block, and their tokens. */
const SEQUENCES = 32, TOKENS = 32, QUICK_TOKENS = 8;
/** The whole run's calibration sequences, their tokens, and held-out sequences of phases 1 and 2. */
const WHOLE = { sequences: 512, tokens: 512, phase1: 32, phase2: 10 };
/** Forward passes of a run, about: ranges of activations, held-out step KL of two models, the guard. */
const PASSES = 8;

/**
 * Time and memory of the phases at Dream 7B's shapes.
 *
 * @param width of the model's hidden states; the rest keeps its proportions. Another than 3584 is for tests
 * @throws {MemoryError} when one block does not fit
 */
export async function phaseScale(
  context: BenchContext,
  width: number = DREAM_7B.width,
): Promise<SuiteReport<ScaleRow>> {
  const { options: { seed, quick }, progress } = context, tokens = quick ? QUICK_TOKENS : TOKENS;
  return await withTemporaryFolder(async (folder) => {
    const input = join(folder, "block");
    progress(`synthetic weights of one block, ${width} wide`);
    const size = ["--layers", "1", "--hidden", String(width), "--vocabulary", String(VOCABULARY)];
    await runChild(commandsOf(context)("make_checkpoint.ts", [input, ...size, "--seed", String(seed)]));
    const random = new RandomStream(seed);
    const lines = Array.from({ length: 2 * SEQUENCES }, () =>
      JSON.stringify({
        input_ids: Array.from({ length: tokens }, () => 4 + random.below(VOCABULARY - 4)),
      }));
    writeFileSync(join(input, "calibration.jsonl"), lines.join("\n"));
    sayForecast(context, input, tokens);
    progress("static activations, phases 1 and 2, writing");
    await collectGarbage();
    resetPeakResident();
    const report = await quantizeCheckpoint({
      input,
      output: join(folder, "quantized"),
      config: configOf(context),
      kernels: context.kernels,
    });
    return reportOf(context, report, tokens, width);
  });
}

const configOf = ({ kernels, options: { bits, groupSize, timeGroups } }: BenchContext) =>
  resolveConfig({
    overrides: {
      bit_width: bits[0],
      group_size: groupSize,
      solver: "round",
      num_threads: kernels.threads,
      num_time_groups: timeGroups,
      calibration_samples: SEQUENCES,
      per_token_limit: null,
      "thermodynamic.validation.enabled": true,
      "thermodynamic.boundary_smoothing.enabled": true,
    },
  }).config;

/** Tells time and memory of the block. @throws {MemoryError} when it does not fit */
function sayForecast({ kernels, progress }: BenchContext, path: string, tokens: number): void {
  const needs = requirementsAt(path), positions = SEQUENCES * tokens;
  const weights = needs.matrices.reduce((sum, { rows, cols }) => sum + rows * cols, 0);
  const largest = Math.max(...needs.matrices.map(({ rows, cols }) => rows * cols));
  const memory = forecastMemory(kernels, needs, {
    weightBytes: needs.weightBytes * 1.25, // in BF16 and packed
    activationBytes: 4 * largest, // one matrix as float32 while it is rounded
    rows: positions,
  });
  checkMemory(path, memory, "give the process more memory");
  const { seconds } = forecastTime(kernels, needs, PASSES * positions * weights, positions);
  progress(`forecast: about ${secondsText(seconds)} and ${formatBytes(memory.total)} of memory`);
}

/** Times of one block's parts, and of all blocks by multiplication. */
function partsOf({ phases, layerMilliseconds }: RunReport, tokens: number) {
  const { activationMilliseconds, validation, smoothing } = phases!, { sequences, phase1, phase2 } = WHOLE;
  const writing = layerMilliseconds.reduce<number>((sum, each) => sum + (each ?? 0), 0);
  /** @param count sequences that were run, and of the whole run; none for what needs weights alone */
  const part = (name: string, milliseconds: number, count?: readonly [run: number, whole: number]) => {
    const [run, whole] = count ?? [0, 0], measured = milliseconds / 1000;
    const ratio = count === undefined ? 1 : run === 0 ? 0 : whole * WHOLE.tokens / (run * tokens);
    return {
      part: name,
      measuredSeconds: measured,
      measuredOn: count === undefined ? "1 block" : `1 block, ${run * tokens} tokens`,
      extrapolatedSeconds: DREAM_7B.blocks * measured * ratio,
    };
  };
  const parts = [
    part("round, check, write", writing),
    part("static activations", activationMilliseconds!, [SEQUENCES, sequences]),
    part("phase 1, scores", validation!.milliseconds),
    part("phase 1, held-out step KL", validation!.stepKlMilliseconds, [validation!.samples, phase1]),
    part("phase 2, smoothing and its guards", smoothing!.milliseconds, [smoothing!.samples, phase2]),
  ];
  const round = parts[0]!.extrapolatedSeconds + parts[1]!.extrapolatedSeconds;
  return parts.map((each, i) => ({ ...each, overhead: i < 2 ? null : each.extrapolatedSeconds / round }));
}

function scaleRow({ environment, options: { seed } }: BenchContext, row: Part | Memory) {
  const { backend, isa, runtime, processor } = environment;
  const where = { seed, backend, isa, runtime, processor };
  return { suite: "phases" as const, model: "Dream 7B, synthetic", ...row, ...where };
}
export type ScaleRow = ReturnType<typeof scaleRow>;
type Part = ReturnType<typeof partsOf>[number];
/** Bytes of something that one block holds, and all of them. */
type Memory = Readonly<Record<"countedBytes" | "extrapolatedBytes", number>> & { readonly memory: string };

function reportOf(
  context: BenchContext,
  run: RunReport,
  tokens: number,
  width: number,
): SuiteReport<ScaleRow> {
  const { bits, groupSize } = context.options;
  const { phases, totals: { weights, bitsPerWeight } } = run, { blocks } = DREAM_7B;
  const parts = partsOf(run, tokens), { sequences, phase1, phase2 } = WHOLE;
  const memory = [
    { memory: "weights, packed", countedBytes: weights * bitsPerWeight / 8 },
    { memory: "caches and statistics of the phases", countedBytes: phases!.statisticsBytes },
  ].map((each) => ({ ...each, extrapolatedBytes: blocks * each.countedBytes }));
  const share = memory[1]!.extrapolatedBytes / memory[0]!.extrapolatedBytes;
  const own = width === DREAM_7B.width ? "" : `, ${width} wide`;
  const title = `Phases at Dream 7B's shapes, synthetic weights${own}`;
  return {
    sections: [
      tableOf(
        `${title}: time, no accuracy`,
        [
          `One block through the pipeline: random weights, ${bits[0]} bits, group size ${
            groupSize || "row"
          }, round.`,
          `EXTRAPOLATED: times ${blocks} blocks and the tokens of ${sequences} calibration sequences of ${WHOLE.tokens}, ${phase1} held-out ones in`,
          `phase 1, ${phase2} in the windows of phase 2. The head is not counted. Share: of rounding with static activations.`,
        ],
        parts,
        [
          ["part", "part", ({ part }) => part],
          ["measuredSeconds", "measured, s", ({ measuredSeconds }) => measuredSeconds, 3],
          ["measuredOn", "on", ({ measuredOn }) => measuredOn],
          ["whole", "extrapolated", ({ extrapolatedSeconds }) => secondsText(extrapolatedSeconds)],
          [
            "share",
            "/ round",
            ({ overhead }) => overhead === null ? undefined : `+${(100 * overhead).toFixed(2)} %`,
          ],
        ],
      ),
      tableOf(
        `${title}: memory`,
        [
          `Counted bytes of one block; ${blocks} blocks EXTRAPOLATED. Peak of the process: ${
            formatBytes(peakResidentBytes())
          }.`,
        ],
        memory,
        [
          ["memory", "memory", ({ memory }) => memory],
          ["one block", "one block", ({ countedBytes }) => formatBytes(countedBytes)],
          ["extrapolated", "extrapolated", ({ extrapolatedBytes }) => formatBytes(extrapolatedBytes)],
        ],
      ),
    ],
    rows: [...parts, ...memory].map((row) => scaleRow(context, row)),
    goals: [{
      goal: "Dream 7B's shapes: caches and statistics / packed weights (extrapolated)",
      wanted: "below 15 %",
      measured: `${(100 * share).toFixed(2)} %`,
      met: share < 0.15,
    }],
    skipped: [{ what: "accuracy", reason: "synthetic weights have none" }],
  };
}
