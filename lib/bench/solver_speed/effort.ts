/** What each further pass of `best` over a layer's second moment gains, and what it costs. */
import type { Kernels } from "../../native/mod.ts";
import { factorMoments } from "../../quant/mod.ts";
import { accumulateMoment, emptyMoments } from "../../quant/solvers/moments.ts";
import { FINE_BITS, type Steps, stepsOf } from "../../quant/solvers/effort.ts";
import { solvePlain } from "../../quant/solvers/plain.ts";
import { DEFAULT_SOLVER_SETTINGS } from "../../quant/solvers/settings.ts";
import { total } from "../../quant/solvers/steps.ts";
import { gaussianWeights } from "../random.ts";
import { type Section, tableOf } from "../suite.ts";
import { secondsOf } from "../timing.ts";

/** A layer to solve with more and more steps. */
export interface EffortShape {
  readonly rows: number;
  readonly cols: number;
  readonly tokens: number;
}

/** Steps that a layer is solved with: seconds, and the objective that is left. */
export interface EffortRow {
  readonly steps: string;
  readonly seconds: number;
  readonly objective: number;
}

const { ratios } = DEFAULT_SOLVER_SETTINGS;
const NONE: Steps = {
  ratios: [],
  starts: Infinity,
  refinesEach: false,
  rounds: 0,
  sweeps: 1,
  refit: true,
  annealing: 0,
};
/** Bits at which efforts have the steps of the table. */
const COARSE_BITS = FINE_BITS - 1;
const effort = (name: "low" | "medium" | "high") =>
  stepsOf({ ...DEFAULT_SOLVER_SETTINGS, effort: name }, COARSE_BITS);

/** From the fewest passes to the most. */
const LADDER: readonly (readonly [steps: string, Steps])[] = [
  ["feedback, the range that clip finds", NONE],
  ["feedback, the best range on a sample", { ...NONE, ratios, starts: 1 }],
  ["+ 1 round of one sweep", { ...effort("low"), sweeps: 1 }],
  ["+ 1 round of two sweeps: effort low", effort("low")],
  ["+ 2 rounds of one sweep", { ...effort("medium"), sweeps: 1 }],
  ["+ 2 rounds of two sweeps: effort medium", effort("medium")],
  ["+ 2 rounds of three sweeps", { ...effort("medium"), sweeps: 3 }],
  ["+ 3 rounds of two sweeps", { ...effort("medium"), rounds: 3 }],
  ["+ 8 rounds of one sweep", { ...effort("medium"), rounds: 8, sweeps: 1 }],
  ["feedback, the best two ranges, 3 rounds of one sweep", {
    ...effort("medium"),
    starts: 2,
    rounds: 3,
    sweeps: 1,
  }],
  ["feedback, all five ranges, 2 rounds of two sweeps", { ...effort("medium"), starts: Infinity }],
  ["each range refined, 4 rounds: effort high", effort("high")],
];

/** Inputs of neighbouring columns that depend on each other, of sizes that differ, as hidden states do. */
function dependentInputs({ tokens, cols }: EffortShape, seed: number): Float32Array<ArrayBuffer> {
  const x = gaussianWeights(tokens * cols, seed, 1);
  for (let t = 0; t < tokens; t++) {
    let last = 0;
    for (let k = 0, at = t * cols; k < cols; k++, at++) {
      last = 0.8 * last + 0.6 * x[at]!;
      x[at] = last * (1 + k % 5);
    }
  }
  return x;
}

/** How the layer is stored; groups of 0 are whole rows. */
export interface EffortForm {
  readonly bits: 2 | 4;
  readonly groupSize: 0 | 64;
}

/** Solves one layer with each rung of the ladder. */
export function measureEffort(
  kernels: Kernels,
  shape: EffortShape,
  form: EffortForm,
  seed: number,
): EffortRow[] {
  const { rows, cols, tokens } = shape, moments = { ...emptyMoments(cols), tokens, weight: tokens };
  accumulateMoment(kernels, dependentInputs(shape, seed), undefined, undefined, tokens, moments.second);
  const moment = factorMoments(kernels, moments, { takesSums: true }),
    weights = gaussianWeights(rows * cols, seed + 1, 1);
  const problem = { kernels, weights, rows, cols, moment, ...form, zeroPoint: "real" } as const;
  return LADDER.map(([name, own]) => {
    const steps = form.bits < FINE_BITS ? name : name.replace(/: effort .*/, "");
    let objective = NaN;
    const seconds = secondsOf(() => objective = total(solvePlain(problem, own).candidate.objective));
    return { steps, seconds, objective };
  });
}

/** The ladder as a table. */
export function effortSection(
  rows: readonly EffortRow[],
  { rows: height, cols }: EffortShape,
  { bits, groupSize }: EffortForm,
): Section {
  const first = rows[0]!.objective;
  return tableOf(
    `What further passes gain, ${height} × ${cols}, ${bits} bits, ${
      groupSize === 0 ? "whole rows" : `groups of ${groupSize}`
    }`,
    [
      "Random weights, inputs that depend on their neighbours. Error: of the layer's outputs, as a share of the first row's.",
      "Gain: points of that for each second more than the row before.",
    ],
    rows,
    [
      ["steps", "steps", ({ steps }) => steps],
      ["seconds", "s", ({ seconds }) => seconds, 2],
      ["error", "error", ({ objective }) => objective / first, 4],
      ["gain", "points / s", ({ objective, seconds }, i) => {
        if (i === 0) return "";
        const before = rows[i - 1]!, points = 100 * (before.objective - objective) / first;
        return seconds > before.seconds ? (points / (seconds - before.seconds)).toFixed(2) : "";
      }],
    ],
  );
}
