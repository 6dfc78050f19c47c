/**
 * Solving against a moment of which only the blocks on the diagonal are known: columns of one block are solved
 * together, those of different blocks know nothing of each other. Groups within a block make it a layer by itself;
 * whole rows share their scales across blocks, which a joint refit chooses.
 */
import { halfBits, halves, mapLevels, type PackedTensor } from "../packed/layout.ts";
import { addProduct } from "../product.ts";
import { columnsOf, type FactoredMoment } from "./factored_moment.ts";
import { type MomentBlock, momentBlocks } from "./moments.ts";
import type { MomentProblem } from "./problem.ts";
import type { Solution, SolverSettings } from "./settings.ts";
import {
  anneal,
  type Candidate,
  clipped,
  type GroupScales,
  keepBetterRows,
  packed,
  rangeScales,
  scalesOf,
  solveWithScales,
  total,
} from "./steps.ts";

type Steps = Pick<SolverSettings, "ratios" | "rounds" | "refit" | "annealing">;

/** The columns of a block as a layer. */
function layerOf(problem: MomentProblem, { first, cols, at }: MomentBlock): MomentProblem {
  const { moment, rows } = problem, end = at + cols * cols;
  const own: FactoredMoment = {
    ...moment,
    cols,
    block: cols,
    moment: moment.moment.subarray(at, end),
    factor: moment.factor.subarray(at, end),
    pivots: moment.pivots.subarray(first, first + cols),
    order: moment.order.slice(first, first + cols).map((column) => column - first),
  };
  return { ...problem, weights: columnsOf(problem.weights, rows, first, cols), cols, moment: own };
}

/** Reports the done part of a block as one of all columns. */
const shareOf = (problem: MomentProblem, { first, cols }: MomentBlock) => (share: number) =>
  problem.onShare?.((first + share * cols) / problem.cols);

/**
 * Solves a layer a block of columns at a time.
 *
 * @param solve solves a layer whose moment is one block
 */
export function solveBlocks(
  problem: MomentProblem,
  steps: Steps,
  solve: (problem: MomentProblem, steps: Steps) => Solution,
): Solution {
  if (problem.groupSize === 0) return solveWholeRows(problem, steps);
  const solutions = [...momentBlocks(problem.cols, problem.moment.block)].map((block) =>
    solve({ ...layerOf(problem, block), onShare: shareOf(problem, block) }, steps)
  );
  const sum = (of: (solution: Solution) => number) => solutions.reduce((all, each) => all + of(each), 0);
  return {
    tensor: besideEachOther(problem, solutions.map(({ tensor }) => tensor)),
    objective: sum(({ objective }) => objective),
    firstObjective: sum(({ firstObjective }) => firstObjective),
  };
}

/** Matrices of the same rows as one. */
function besideEachOther({ rows, cols }: MomentProblem, parts: readonly PackedTensor[]): PackedTensor {
  const [first] = parts as [PackedTensor];
  /** An array with the rows of several ones after each other. */
  const joined = <T extends Uint8Array | Uint16Array | Uint32Array>(arrays: readonly T[]): T => {
    const length = arrays.reduce((sum, array) => sum + array.length, 0), width = length / rows;
    const out = new (arrays[0]!.constructor as new (length: number) => T)(length);
    let at = 0;
    for (const array of arrays) {
      const own = array.length / rows;
      for (let row = 0; row < rows; row++) {
        out.set(array.subarray(row * own, (row + 1) * own), row * width + at);
      }
      at += own;
    }
    return out;
  };
  const words = joined(parts.map(({ packed }) => packed));
  if (first.scaleBits === undefined) {
    const plain = parts as (typeof first)[];
    return {
      ...first,
      cols,
      packed: words,
      scale: joined(plain.map(({ scale }) => scale)),
      zeroPoint: first.zeroPoint && joined(plain.map(({ zeroPoint }) => zeroPoint!)),
    };
  }
  const others = parts as (typeof first)[];
  const keys = ["subScale", "subMin", "superScale", "superMin"] as const;
  let at = 0;
  const levels = mapLevels(first, (array) => {
    const key = keys[at++]!;
    return joined(others.map((part) => part[key])) as unknown as typeof array;
  });
  return { ...levels, cols, packed: words };
}

/**
 * Rows of one scale each: the blocks' codes by feedback and descent at a given scale, and between rounds the scale and
 * zero point that are best for all blocks together.
 */
function solveWholeRows(problem: MomentProblem, steps: Steps): Solution {
  const blocks = [...momentBlocks(problem.cols, problem.moment.block)];
  const { rounds, refit, annealing, ratios } = steps, refits = refit ? rounds : 0;
  const own = { rounds: refit ? Math.min(1, rounds) : rounds, refit: false };
  const count = 1 + ratios.length + refits + (annealing > 0 ? 1 : 0);
  let done = 0;
  const inBlocks = (solve: (part: MomentProblem, block: MomentBlock) => Candidate, scales: GroupScales) => {
    const { rows, cols } = problem, objective = new Float64Array(rows), codes = new Uint8Array(rows * cols);
    for (const block of blocks) {
      const onShare = (share: number) => problem.onShare?.((done + share) / count);
      const part = { ...problem, onShare };
      const found = solve({ ...layerOf(part, block), onShare: shareOf(part, block) }, block);
      for (let row = 0; row < rows; row++) {
        objective[row]! += found.objective[row]!;
        const from = row * block.cols;
        codes.set(found.codes.subarray(from, from + block.cols), row * cols + block.first);
      }
    }
    done++;
    return { ...copyOf(scales), codes, objective };
  };
  const from = (scales: GroupScales) =>
    inBlocks((part) => solveWithScales(part, copyOf(scales), own), scales);
  const best: Candidate = from(scalesOf(clipped(problem))), firstObjective = total(best.objective);
  for (const ratio of ratios) keepBetterRows(best, from(rangeScales(problem, ratio)));
  for (let round = 0; round < refits; round++) keepBetterRows(best, from(refitted(problem, blocks, best)));
  if (annealing > 0) {
    const { rows, cols } = problem, found = { ...best, codes: best.codes.slice() };
    const annealed = inBlocks((part, { first, cols: width }) => {
      const codes = new Uint8Array(rows * width);
      for (let row = 0; row < rows; row++) {
        codes.set(found.codes.subarray(row * cols + first, row * cols + first + width), row * width);
      }
      return anneal(part, { ...found, codes }, { ...own, annealing });
    }, best);
    keepBetterRows(best, annealed);
  }
  return { tensor: packed(problem, best), objective: total(best.objective), firstObjective };
}

const copyOf = ({ scale, zeroPoint }: GroupScales): GroupScales => ({
  scale: scale.slice(),
  zeroPoint: zeroPoint.slice(),
});

/**
 * Scales and zero points of whole rows that are best for their codes: least squares over all blocks, rounded to half
 * floats. A row whose codes do not determine them keeps its own.
 */
export function refitted(
  { kernels, rows, cols, bits, zeroPoint: kind, weights, moment }: MomentProblem,
  blocks: Iterable<MomentBlock>,
  { codes, scale, zeroPoint }: Pick<Candidate, "codes" | "scale" | "zeroPoint">,
): GroupScales {
  // u = code − zero point, r = w − scale · u: sums u M u, u M 1, u M r; 1 M 1 and 1 M r.
  const uu = new Float64Array(rows), u1 = new Float64Array(rows), ur = new Float64Array(rows);
  const r1 = new Float64Array(rows);
  let ones = 0;
  for (const { first, cols: own, at } of blocks) {
    const own2 = moment.moment.subarray(at, at + own * own);
    const u = new Float32Array(rows * own), products = new Float32Array(rows * own);
    for (let row = 0; row < rows; row++) {
      for (let k = 0; k < own; k++) u[row * own + k] = codes[row * cols + first + k]! - zeroPoint[row]!;
    }
    addProduct(kernels, "refit scales", u, own2, { rows, k: own, cols: own }, products);
    const sums = new Float64Array(own);
    for (let i = 0; i < own; i++) {
      for (let j = 0; j < own; j++) sums[j]! += own2[i * own + j]!;
    }
    for (const value of sums) ones += value;
    for (let row = 0; row < rows; row++) {
      for (let k = 0; k < own; k++) {
        const value = u[row * own + k]!, product = products[row * own + k]!;
        const rest = weights[row * cols + first + k]! - scale[row]! * value;
        uu[row]! += product * value;
        ur[row]! += product * rest;
        u1[row]! += sums[k]! * value;
        r1[row]! += sums[k]! * rest;
      }
    }
  }
  const found = copyOf({ scale, zeroPoint });
  for (let row = 0; row < rows; row++) {
    const old = scale[row]!, a = uu[row]!, b = u1[row]!;
    const determinant = a * ones - b * b;
    if (kind === "symmetric") {
      store(found, row, old + ur[row]! / a, zeroPoint[row]!);
      continue;
    }
    if (!(determinant > 1e-9 * a * ones)) continue;
    const step = (ones * ur[row]! - b * r1[row]!) / determinant,
      offset = (a * r1[row]! - b * ur[row]!) / determinant;
    const next = zeroPoint[row]! - offset / (old + step);
    if (kind === "real") {
      store(found, row, old + step, next);
      continue;
    }
    const whole = Math.min(2 ** bits - 1, Math.max(0, Math.round(next))), shift = zeroPoint[row]! - whole;
    const square = a + shift * (2 * b + shift * ones);
    store(found, row, (ur[row]! + old * a + shift * (r1[row]! + old * b)) / square, whole);
  }
  return found;
}

/** Stores half floats, unless they are none that a scale and a zero point can be. */
function store({ scale, zeroPoint }: GroupScales, row: number, newScale: number, newZero: number): void {
  const [s, z] = halves(halfBits(Float32Array.of(newScale, newZero)));
  if (s === 0 || !Number.isFinite(s) || !Number.isFinite(z)) return;
  scale[row] = s!;
  zeroPoint[row] = z!;
}
