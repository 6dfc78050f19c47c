/**
 * What the phases take at the shapes of a large model: one block with synthetic weights runs through them, and the whole model is reckoned from
 * that by counts of blocks and tokens. No accuracy: the weights are random.
 */
import { join } from "node:path";
import { resolveConfig } from "../../config/mod.ts";
import { linear, type Matrix } from "../../models/layers/linear.ts";
import { MaskedTransformerGradients } from "../../models/backward/mod.ts";
import { modelFrom, requirementsAt } from "../../models/mod.ts";
import { RandomStream } from "../../models/random.ts";
import type { Calibrated, CalibrationPart } from "../../calibration/mod.ts";
import type { PhaseContext } from "../../phases/context.ts";
import { type PhaseSettings, runPhases } from "../../phases/mod.ts";
import { maskRatioAxis } from "../../time/mod.ts";
import { codesOf } from "./codes.ts";
import { collectGarbage, peakResidentBytes, resetPeakResident } from "../../eval/environment.ts";
import { checkMemory, forecastMemory, forecastTime, secondsText, sizeText } from "../../eval/forecast.ts";
import { writeSeconds } from "./time.ts";
import { commandsOf, runChild } from "../child_process.ts";
import { DREAM_7B, type SolverTime, solverTime } from "../peers/solver_speed.ts";
import { DEFAULT_TIME_GROUPS, type PhaseName, PHASES } from "../options.ts";
import type { BenchContext, SuiteReport } from "../suite.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";
import { openCheckpoint } from "../../tensor/mod.ts";

/** Tokens of the synthetic model: its head is measured by itself, from a part of Dream's. */
const VOCABULARY = 512, HEAD_ROWS = 4096;
/** Sequences that are run, and their tokens. */
const SEQUENCES = 4, TOKENS = 96, QUICK_TOKENS = 8;
/** The run that is reckoned: sequences and tokens of calibration, held-out sequences in a window and of phase 1, refinement's positions a step. */
const WHOLE = {
  samples: 512,
  tokens: 512,
  nearShare: 0.04,
  heldOut: 256,
  looks: 32,
  positions: 1152,
  steps: 50,
};
/** Forward passes that everything below takes, about: activations, three step KLs of two, the guard, gradients. */
const PASSES = 16;
/** Time of solving's sample, in multiply-adds: factor and rows of one width, about. */
const SOLVER_MULTIPLY_ADDS = 2e12;

/** One block of the model, through the phases. */
interface Measured {
  /** Seconds of one block: rounding, checking, writing. */
  readonly write: number;
  /** Seconds of one block and position. */
  readonly activations: number;
  readonly stepKl: number;
  readonly smoothing: number;
  readonly gradients: number;
  /** Seconds of the scores, one block. */
  readonly scores: number;
  /** Seconds of the head's product, one position. */
  readonly head: number;
  /** Bytes: the block in BF16 and packed, statistics of its activations, θ; gradients' scratch at any length, and more for each position. */
  readonly weightBytes: number;
  readonly packedBytes: number;
  readonly statisticsBytes: number;
  readonly thetaBytes: number;
  readonly scratchBytes: number;
  readonly positionBytes: number;
  /** Peak of the process with phases 1 and 2, and with static activations alone; since it began, where the system cannot reset it. */
  readonly peakBytes: number;
  readonly baselinePeakBytes: number;
}

/**
 * Time and memory of the phases at Dream 7B's shapes.
 *
 * @param width of the model's hidden states; the rest keeps its proportions. Another than 3584 is for tests
 * @throws {MemoryError} when one block does not fit
 */
export async function phaseScale(
  context: BenchContext,
  width: number = DREAM_7B.width,
): Promise<SuiteReport> {
  const { options: { quick, seed, phase = "all" }, progress } = context;
  return await withTemporaryFolder(async (folder) => {
    const path = join(folder, "block");
    progress(`synthetic weights of one block, ${width} wide`);
    await runChild(
      commandsOf(context)("make_checkpoint.ts", [
        path,
        "--layers",
        "1",
        "--hidden",
        String(width),
        "--vocabulary",
        String(VOCABULARY),
        "--seed",
        String(seed),
      ]),
    );
    sayForecast(context, path);
    const measured = await measureBlock(context, path);
    progress("solving, rows of one width");
    const solver = solverTime(context, width);
    return report(context, measured, solver, { width, quick, phase });
  });
}

/** Says what is to come before anything takes long. */
function sayForecast(context: BenchContext, path: string): void {
  const { kernels, options: { quick }, progress } = context;
  const needs = requirementsAt(path), positions = SEQUENCES * (quick ? QUICK_TOKENS : TOKENS);
  const weights = needs.matrices.reduce((sum, { rows, cols }) => sum + rows * cols, 0);
  const largest = Math.max(...needs.matrices.map(({ rows, cols }) => rows * cols));
  // The block in BF16 and packed; one matrix as float32 while it is rounded; gradients hold decoded tiles and the tape.
  const memory = forecastMemory(kernels, needs, {
    weightBytes: needs.weightBytes * 1.25,
    activationBytes: 4 * largest + 4 * weights / 2,
    rows: positions,
  });
  checkMemory(path, memory, "give the process more memory");
  const { seconds } = forecastTime(
    kernels,
    needs,
    PASSES * positions * weights + SOLVER_MULTIPLY_ADDS,
    positions,
  );
  progress(`forecast: about ${secondsText(seconds)} and ${sizeText(memory.total)} of memory`);
}

/** Sequences of random tokens, some masked, at given times. */
function part(maskToken: number, tokens: number, times: readonly number[], seed: number): CalibrationPart<{
  readonly inputIds: Int32Array;
  readonly batch: number;
}> {
  const inputIds = new Int32Array(times.length * tokens);
  for (const [i, time] of times.entries()) {
    const random = new RandomStream(seed, i);
    for (let at = 0; at < tokens; at++) {
      const isMasked = at === tokens - 1 || random.uniform() < time;
      inputIds[i * tokens + at] = isMasked ? maskToken : 4 + random.below(VOCABULARY - 4);
    }
  }
  return {
    batch: { inputIds, batch: times.length },
    samples: times.length,
    weights: new Float32Array(inputIds.length).fill(1),
    times: Float64Array.from(times),
  };
}

async function measureBlock(context: BenchContext, path: string): Promise<Measured> {
  const {
    kernels,
    options: { quick, seed, bits, groupSize, timeGroups: groups = DEFAULT_TIME_GROUPS },
    progress,
  } = context;
  const tokens = quick ? QUICK_TOKENS : TOKENS;
  using checkpoint = openCheckpoint(path);
  const full = modelFrom(checkpoint, kernels);
  if (full.kind !== "dream") {
    throw new TypeError(`Cannot measure phases: the model must be Dream's, got ${full.kind}`);
  }
  const { maskToken } = full.model.config;
  const { config } = resolveConfig({
    overrides: { bit_width: bits[0], group_size: groupSize, num_threads: kernels.threads },
  });
  const spread = Array.from({ length: SEQUENCES }, (_, i) => (i + 0.5) / SEQUENCES);
  // Next to the boundaries, so that smoothing changes the grids of all of them.
  const near = Array.from(
    { length: SEQUENCES },
    (_, i) => (1 + i % Math.max(1, groups - 1)) / groups - 0.001,
  );
  const calibrated: Calibrated = {
    kind: "sequences",
    model: full.model,
    shift: 1,
    data: {
      source: "random tokens",
      isSynthetic: true,
      samples: SEQUENCES,
      warnings: [],
      distinctPositions: SEQUENCES * tokens,
      axis: maskRatioAxis(1000),
      fit: [part(maskToken, tokens, spread, seed)],
      heldOut: [part(maskToken, tokens, near, seed + 1)],
    },
  };
  const phaseContext: PhaseContext = {
    checkpoint,
    calibrated,
    kernels,
    source: "synthetic",
    seed,
  };
  progress("rounding");
  const { weights } = await codesOf(phaseContext, config, { solver: "round" }, new Map());
  const peakOf = async (what: string, settings: PhaseSettings) => {
    progress(what);
    await collectGarbage();
    resetPeakResident();
    return { ...await runPhases(phaseContext, weights, settings), peak: peakResidentBytes() };
  };
  const activations = { groups, bits: 8 } as const;
  const baseline = await peakOf("static activations", { activations });
  const { report, model, peak } = await peakOf("phases 1 and 2", {
    activations,
    validation: { smoothnessThreshold: 0.3 },
    smoothing: { windowSize: 5, interpolation: "linear" },
  });
  progress("writing");
  const write = await writeSeconds(phaseContext, config, model);
  progress("gradients");
  const quantized = modelFrom(checkpoint, kernels, { weights });
  if (quantized.kind !== "dream") {
    throw new TypeError("Cannot measure gradients: the model must stay Dream's");
  }
  // A quarter first: of the scratch, what does not grow with the positions.
  const [few, many] = [1, SEQUENCES].map((sequences) => {
    const gradients = new MaskedTransformerGradients(quantized.model);
    const { inputIds, batch } = part(maskToken, tokens, spread.slice(0, sequences), seed + 2).batch;
    const rows = Int32Array.from(inputIds.keys());
    const begin = performance.now();
    full.model.forward(inputIds, batch, { rows });
    const logits = gradients.forward(inputIds, batch, rows);
    gradients.backward(logits.map((value) => value / logits.length));
    return { seconds: (performance.now() - begin) / 1000, bytes: gradients.scratchBytes };
  }) as [{ seconds: number; bytes: number }, { seconds: number; bytes: number }];
  const positionBytes = Math.max(0, many.bytes - few.bytes) / ((SEQUENCES - 1) * tokens);
  const positions = SEQUENCES * tokens;
  return {
    write,
    activations: report.activationMilliseconds! / 1000 / positions,
    stepKl: report.validation!.stepKlMilliseconds / 1000 / positions,
    smoothing: report.smoothing!.milliseconds / 1000 / positions,
    gradients: many.seconds / positions,
    scores: report.validation!.milliseconds / 1000,
    head: headSeconds(context, full.model.config.hiddenSize),
    weightBytes: requirementsAt(path).weightBytes,
    packedBytes: [...weights.values()].reduce((sum, { rows, cols, bits }) => sum + rows * cols * bits / 8, 0),
    statisticsBytes: report.statisticsBytes,
    thetaBytes: model.timeParameters!.bytes,
    scratchBytes: many.bytes - positionBytes * positions,
    positionBytes,
    peakBytes: peak,
    baselinePeakBytes: baseline.peak,
  };
}

/** Seconds of the head's product for one position, from some of its rows. */
function headSeconds(context: BenchContext, cols: number): number {
  const tokens = 32;
  const matrix: Matrix = {
    rows: HEAD_ROWS,
    cols,
    dtype: "BF16",
    data: new Uint16Array(HEAD_ROWS * cols).fill(0x3c00),
  };
  const x = new Float32Array(tokens * cols), out = new Float32Array(tokens * HEAD_ROWS);
  new RandomStream(context.options.seed, 9).fillNormal(x);
  const run = () => void linear(context.kernels, { weights: matrix }, x, tokens, out);
  run();
  const begin = performance.now();
  run();
  return (performance.now() - begin) / 1000 / tokens * DREAM_7B.vocabulary / HEAD_ROWS;
}

function report(
  context: BenchContext,
  measured: Measured,
  solver: SolverTime,
  { width, quick, phase }: { readonly width: number; readonly quick: boolean; readonly phase: PhaseName },
): SuiteReport {
  const { blocks, vocabulary } = DREAM_7B,
    { samples, tokens, nearShare, heldOut, looks, positions, steps } = WHOLE;
  const all = samples * tokens, near = heldOut * nearShare * tokens, looked = looks * tokens;
  const run = quick ? QUICK_TOKENS : TOKENS;
  const whole = (seconds: number, count: number, heads: number) =>
    blocks * seconds * count + measured.head * heads;
  // A forward pass with nothing wanted but the layers' inputs still makes logits; a step KL makes them where tokens are masked, about half.
  const activations = whole(measured.activations, all, all);
  const write = blocks * measured.write;
  const solve = blocks * (solver.block + solver.blockToken * all);
  const parts = [
    { part: "round, check, write", phase: "round, best", one: measured.write, on: "1 block", seconds: write },
    {
      part: "solve, one candidate",
      phase: "best",
      one: solver.measured,
      on: `rows, ${width} columns`,
      seconds: solve,
    },
    {
      part: "static activations",
      phase: "round, best",
      one: measured.activations * SEQUENCES * run,
      on: `1 block, ${SEQUENCES * run} tokens`,
      seconds: activations,
    },
    {
      part: "scores",
      phase: "phase1",
      one: measured.scores,
      on: "1 block",
      seconds: blocks * measured.scores,
    },
    {
      part: "held-out step KL",
      phase: "phase1",
      one: measured.stepKl * SEQUENCES * run,
      on: `1 block, ${SEQUENCES * run} tokens`,
      seconds: whole(measured.stepKl, looked, looked),
    },
    {
      part: "smoothing and its guards",
      phase: "phase2",
      one: measured.smoothing * SEQUENCES * run,
      on: `1 block, ${SEQUENCES * run} tokens`,
      seconds: whole(measured.smoothing, near, 2 * near),
    },
    {
      part: `refinement, ${steps} steps`,
      phase: "phase3_full",
      one: measured.gradients * SEQUENCES * run,
      on: `1 block, ${SEQUENCES * run} tokens`,
      seconds: whole(measured.gradients, positions * steps, 3 * positions * steps),
    },
  ];
  const round = write + activations, best = round + solve;
  // A phase comes with those before it.
  const isWanted = (own: string) =>
    !own.startsWith("phase") || phase === "all" || PHASES.indexOf(own as PhaseName) <= PHASES.indexOf(phase);
  const cost = parts.map((row) => ({
    ...row,
    overRound: row.phase.startsWith("phase") ? row.seconds / round : undefined,
    overBest: row.phase.startsWith("phase") ? row.seconds / best : undefined,
  })).filter((row) => isWanted(row.phase));
  const cache = Math.min(2 ** 28, looked / 2 * vocabulary * 4);
  const head = vocabulary * width * 2;
  const memory = [
    { what: "weights, BF16", one: measured.weightBytes, bytes: blocks * measured.weightBytes + 2 * head },
    { what: "weights, packed", one: measured.packedBytes, bytes: blocks * measured.packedBytes },
    {
      what: "activations' statistics",
      one: measured.statisticsBytes,
      bytes: blocks * measured.statisticsBytes,
    },
    { what: "θ", one: measured.thetaBytes, bytes: blocks * measured.thetaBytes },
    { what: "full-precision logits kept", one: undefined, bytes: cache },
    {
      what: `gradients' scratch, ${positions} positions`,
      one: measured.scratchBytes + measured.positionBytes * SEQUENCES * run,
      bytes: measured.scratchBytes + blocks * measured.positionBytes * positions,
    },
  ];
  const held = memory[0]!.bytes + memory[1]!.bytes;
  const kept = memory[2]!.bytes + memory[3]!.bytes + memory[4]!.bytes;
  const { environment, options: { seed, bits, groupSize } } = context;
  const title = `Phases at Dream 7B's shapes, synthetic weights${
    width === DREAM_7B.width ? "" : `, ${width} wide`
  }`;
  return {
    sections: [{
      title: `${title}: time, no accuracy`,
      notes: [
        `One block measured: random weights, ${bits[0]} bits, group size ${
          groupSize === 0 ? "row" : groupSize
        }.`,
        `All ${blocks} and the head of ${vocabulary} tokens EXTRAPOLATED by counts, for ${samples} calibration sequences of ${tokens} tokens,`,
        `${looks} held-out ones in phase 1, ${
          Math.round(heldOut * nearShare)
        } in the windows of phase 2, refinement steps of ${positions} positions.`,
        "Shares: of rounding with static activations, and of solving with them.",
      ],
      columns: [
        { key: "part", title: "part" },
        { key: "phase", title: "of" },
        { key: "one", title: "measured, s", digits: 3 },
        { key: "on", title: "on" },
        { key: "whole", title: "extrapolated" },
        { key: "round", title: "/ round" },
        { key: "best", title: "/ best" },
      ],
      rows: cost.map(({ overRound, overBest, seconds, ...row }) => ({
        ...row,
        whole: secondsText(seconds),
        round: overRound === undefined ? undefined : `+${(100 * overRound).toFixed(2)} %`,
        best: overBest === undefined ? undefined : `+${(100 * overBest).toFixed(3)} %`,
      })),
    }, {
      title: `${title}: memory`,
      notes: [
        `Counted bytes of one block, ${blocks} EXTRAPOLATED. Statistics, θ and logits kept over the weights held: ${
          (100 * kept / held).toFixed(2)
        } %.`,
        `Peak of the process on one block: ${sizeText(measured.peakBytes)} with phases 1 and 2, ${
          sizeText(measured.baselinePeakBytes)
        } with static activations alone.`,
      ],
      columns: [
        { key: "what", title: "what" },
        { key: "one", title: "one block" },
        { key: "bytes", title: "extrapolated" },
      ],
      rows: memory.map(({ what, one, bytes }) => ({
        what,
        one: one === undefined ? undefined : sizeText(one),
        bytes: sizeText(bytes),
      })),
    }],
    rows: [
      ...cost.map(({ part, phase, one, on, seconds, overRound, overBest }) => ({
        suite: "phases",
        model: "Dream 7B, synthetic",
        part,
        phase,
        measuredSeconds: one,
        measuredOn: on,
        extrapolatedSeconds: seconds,
        overhead: overRound ?? null,
        overheadOverBest: overBest ?? null,
      })),
      ...memory.map(({ what, one, bytes }) => ({
        suite: "phases",
        model: "Dream 7B, synthetic",
        memory: what,
        countedBytes: one ?? null,
        extrapolatedBytes: bytes,
      })),
    ].map((row) => ({
      ...row,
      seed,
      backend: environment.backend,
      isa: environment.isa,
      runtime: environment.runtime,
      processor: environment.processor,
    })),
    goals: [{
      goal: "Dream 7B's shapes: caches and statistics / weights (extrapolated)",
      wanted: "below 15 %",
      measured: `${(100 * kept / held).toFixed(2)} %`,
      met: kept / held < 0.15,
    }],
    skipped: [{ what: "accuracy", reason: "synthetic weights have none" }],
  };
}
