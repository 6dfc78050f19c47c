/** The rows of the phase suite: full precision, baseline, phases, ablations and rivals, and how each is made. */
import type { PhaseSettings } from "../../phases/mod.ts";
import type { CodesSetting } from "./codes.ts";
import type { PhaseName } from "../options.ts";

/** Phase 2's window and phase 1's threshold: the configuration's defaults. */
const SMOOTHING = { windowSize: 5, interpolation: "linear" } as const;
const VALIDATION = { smoothnessThreshold: 0.3 } as const;
/** Steps of the gradient refinement, by family: an image model's step costs as much as twenty of a small language model's. */
const REFINEMENT = {
  sequences: { learningRate: 0.005, maxIterations: 300, convergenceThreshold: 1e-4 },
  images: { learningRate: 0.004, maxIterations: 60, convergenceThreshold: 1e-4 },
} as const;
const QUICK_ITERATIONS = 6;
/** As the configuration's defaults. */
const PER_TOKEN_LIMIT = 1.05;
const MARKOV_WEIGHT = 0.1;
/** Time groups of the sampler's correction: three numbers each. */
const SAMPLER_GROUPS = 10;
/** Static grids for all layers, and their rival: a grid of each token's own for all layers. */
export const STATIC_ROW = "best, 8 bits, all static", DYNAMIC_ROW = "best, dynamic 8 bits";
/** Static grids but for the layers that they do not suit, as the configuration's default. */
export const MIXED_ROW = "best, 8 bits, mostly static";
/** The row of the sampler's correction, which has tables of its own. */
export const SAMPLER_ROW = "best + sampler correction";

/** Where annealing begins, in squared steps of the grid: the seed system's own value of `entropy_weight`. */
const ANNEALING = 0.05;
const ONE = "best, one candidate";
/** Bits per weight of the budget's rows. */
const BUDGET = 2.25;

/** How a row is made. */
export interface RowSetting {
  readonly name: string;
  readonly phase: PhaseName;
  readonly codes: CodesSetting;
  readonly phases: PhaseSettings;
  /** Name of an earlier row that its step KL is divided by. */
  readonly over?: string;
}

const ROUND: CodesSetting = { solver: "round" }, BEST: CodesSetting = { solver: "best" };
/** Rows that run on one kind of model alone, and why. */
export function rowsLeftOut(
  kind: "sequences" | "images",
): readonly { readonly what: string; readonly reason: string }[] {
  return kind === "images"
    ? [{
      what: `${BUDGET} bits by budget`,
      reason: "measuring what each layer costs takes minutes on images",
    }]
    : [{
      what: "best + time weights, cosine",
      reason: "masked diffusion weighs its steps alike under any schedule",
    }];
}

/** The rows of a run; ablations and rivals come with `all`. */
export function rowSettings(
  groups: number,
  kind: "sequences" | "images",
  phase: PhaseName,
  quick: boolean,
): RowSetting[] {
  const static8 = { groups, bits: 8 } as const, static4 = { groups, bits: 4, range: "mse" } as const;
  const mixed8 = { ...static8, perTokenLimit: PER_TOKEN_LIMIT } as const;
  const refinement = quick ? { ...REFINEMENT[kind], maxIterations: QUICK_ITERATIONS } : REFINEMENT[kind];
  // As the configuration's `time_weights: auto`.
  const optimized: CodesSetting = kind === "images"
    ? { solver: "best", timeWeights: "ddpm", isGuarded: true }
    : BEST;
  const two = { validation: VALIDATION, smoothing: SMOOTHING };
  const main: RowSetting[] = [
    { name: "baseline", phase: "baseline", codes: ROUND, phases: { activations: static8 } },
    {
      name: "phase1",
      phase: "phase1",
      codes: ROUND,
      phases: { activations: static8, validation: VALIDATION },
    },
    {
      name: "phase2",
      phase: "phase2",
      codes: ROUND,
      phases: { activations: static8, ...two },
      over: "baseline",
    },
    {
      name: "phase3_full",
      phase: "phase3_full",
      codes: optimized,
      phases: { activations: mixed8, ...two, refinement },
      over: "baseline",
    },
  ];
  if (phase !== "all") return main.filter((row) => row.phase === phase || row.phase === "baseline");
  const row = (
    name: string,
    codes: CodesSetting,
    phases: PhaseSettings,
    more: Pick<RowSetting, "over"> = {},
  ): RowSetting => ({ name, phase: "all", codes, phases, ...more });
  const overOne = { over: ONE } as const;
  const overBest = { over: "best alone" } as const, overBaseline = { over: "baseline" } as const;
  return [
    ...main,
    row("without refinement", optimized, { activations: mixed8, ...two }),
    row("round alone", ROUND, {}),
    row("round + refinement", ROUND, { refinement }, { over: "round alone" }),
    row("best alone", BEST, {}, { over: "round alone" }),
    row("best + refinement", BEST, { refinement }, overBest),
    // The terms of solving are taken unseen, in one candidate: beside one candidate without them.
    row(ONE, { ...BEST, candidates: 1 }, {}, overBest),
    row("best + time weights", { ...BEST, timeWeights: "ddpm" }, {}, overOne),
    ...(kind === "images"
      ? [
        row(
          "best + time weights, cosine",
          { ...BEST, timeWeights: "ddpm", betaSchedule: "cosine" },
          {},
          overOne,
        ),
      ]
      : []),
    row("best + annealing", { ...BEST, annealing: ANNEALING }, {}, overOne),
    row("best, 8 bits, all static, G 1", BEST, { activations: { groups: 1, bits: 8 } }, overBest),
    row(STATIC_ROW, BEST, { activations: static8 }, overBest),
    row(MIXED_ROW, BEST, { activations: mixed8 }, overBest),
    row(DYNAMIC_ROW, BEST, { activations: { groups, bits: 8, isPerToken: true } }, overBest),
    row("best, static 4 bits, G 1", BEST, { activations: { ...static4, groups: 1 } }, overBest),
    row("best, static 4 bits, G 10", BEST, { activations: { ...static4, groups: 10 } }, overBest),
    row(
      "best, 4 bits, adaptive G 10",
      BEST,
      { activations: { ...static4, groups: 10, grouping: "adaptive" } },
      { over: "best, static 4 bits, G 10" },
    ),
    row("best, dynamic 4 bits", BEST, { activations: { groups, bits: 4, isPerToken: true } }, overBest),
    row(`baseline, static 4 bits, G ${groups}`, ROUND, { activations: static4 }, overBaseline),
    row(`phase 3, static 4 bits, G ${groups}`, optimized, { activations: static4, ...two, refinement }, {
      over: `baseline, static 4 bits, G ${groups}`,
    }),
    ...([128, 64, 32] as const).map((groupSize) =>
      row(`baseline, groups of ${groupSize}`, { ...ROUND, groupSize }, { activations: static8 }, overBaseline)
    ),
    // Measured whether they would be kept or not.
    ...[{ groups: 1 }, { groups }, { groups, markovWeight: MARKOV_WEIGHT }].map((output) =>
      row(
        "markovWeight" in output ? "best + gain, bias, prior" : `best + gain, bias, G ${output.groups}`,
        BEST,
        { output, isGuarded: false },
        overBest,
      )
    ),
    row(`round + gain, bias, G ${groups}`, ROUND, { output: { groups }, isGuarded: false }, {
      over: "round alone",
    }),
    row(
      "best + scales by time",
      BEST,
      { timeScales: { groups }, isGuarded: false },
      overBest,
    ),
    ...(kind === "images"
      ? [row(SAMPLER_ROW, BEST, { sampler: { groups: SAMPLER_GROUPS }, isGuarded: false }, overBest)]
      : []),
    // About as many scales as those by time of five groups. A second candidate takes an image model ten seconds: glyph-dit rejects it.
    row(
      "best, groups of 32",
      kind === "images" ? { ...BEST, groupSize: 32, candidates: 1 } : { ...BEST, groupSize: 32 },
      {},
      overBest,
    ),
    ...(kind === "sequences"
      ? [
        row(`round, ${BUDGET} bits by budget`, { ...ROUND, targetBitsPerWeight: BUDGET }, {}, {
          over: "round alone",
        }),
        row(`best, ${BUDGET} bits by budget`, { ...BEST, targetBitsPerWeight: BUDGET }, {}, {
          over: `round, ${BUDGET} bits by budget`,
        }),
      ]
      : []),
  ];
}
