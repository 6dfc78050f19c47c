/** Statistics of synthetic inputs: second moments of a formula, to time solving from statistics. */
import { type InputMoments, momentBlocks } from "../../quant/solvers/moments.ts";
import { momentElements } from "../../native/call_checks.ts";
import { CalibrationStatistics, equalTimeGroups, writeCalibrationStatistics } from "../../time/mod.ts";
import { timestepAxis } from "../../time/axis.ts";

/** An input, and the matrices that read it. */
export interface SyntheticInput {
  readonly cols: number;
  readonly matrices: readonly (readonly [name: string, rows: number])[];
}

/** Part of the inputs' power that all columns share: without it far numbers would be denormal. */
const SHARED = 0.1;
/** Correlation of neighbours in the rest, of the next but one its square, and so on. */
const NEIGHBOURS = 0.8;
/** Inputs for a column of the widest layer: more than a solver asks for. */
const TOKENS_PER_COLUMN = 16;

/** Size of a column's inputs. */
const sizeOf = (column: number) => 1 + column % 5;

/** Σ x xᵀ of inputs whose neighbours depend on each other, of sizes that differ. */
function secondMoment({ cols, block = cols }: Pick<InputMoments, "cols" | "block">, tokens: number) {
  const second = new Float32Array(momentElements(cols, cols, block));
  const shares = Float64Array.from({ length: block }, (_, i) => SHARED + (1 - SHARED) * NEIGHBOURS ** i);
  for (const { first, cols: own, at } of momentBlocks(cols, block)) {
    for (let i = 0; i < own; i++) {
      for (let k = 0; k < own; k++) {
        const share = shares[Math.abs(i - k)]!;
        second[at + i * own + k] = tokens * share * sizeOf(first + i) * sizeOf(first + k);
      }
    }
  }
  return second;
}

/**
 * Writes statistics of a model's inputs, with one input's moments in memory at a time.
 *
 * @param block columns of a block on the diagonal of the moments
 */
export function writeSyntheticStatistics(
  path: string,
  inputs: readonly SyntheticInput[],
  block: number,
): void {
  const tokens = TOKENS_PER_COLUMN * Math.max(...inputs.map(({ cols }) => cols));
  const statistics: CalibrationStatistics = new CalibrationStatistics({
    fingerprint: "",
    model: {
      name: "synthetic",
      layers: new Map(
        inputs.flatMap(({ cols, matrices }) => matrices.map(([name, rows]) => [name, [rows, cols]] as const)),
      ),
    },
    groups: equalTimeGroups(timestepAxis(1000), 1),
    inputs: new Map(inputs.map(({ cols, matrices }) => {
      const layers = matrices.map(([name]) => name);
      return [layers[0]!, { cols, block: Math.min(cols, block), layers }];
    })),
    runs: [{ identity: "synthetic", source: "synthetic", isSynthetic: true, samples: 1 }],
    load: (name) => secondMoment(statistics.inputs.get(name)!, tokens),
  });
  for (const { weight, tokens: counts, samples, squares } of statistics.inputs.values()) {
    weight[0] = counts[0] = tokens;
    samples[0] = 1;
    for (let i = 0; i < squares.length; i++) squares[i] = tokens * sizeOf(i) ** 2;
  }
  writeCalibrationStatistics(path, statistics);
}
