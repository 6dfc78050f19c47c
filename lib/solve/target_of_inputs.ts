/**
 * The corrected target of a layer of whose moment only the diagonal, or blocks on it, are known. What inputs
 * and stream lost before the layer is seen by all of its columns together, which those cannot tell: the
 * equations of the whole moment are solved by conjugate gradients, the products with it made from the inputs
 * themselves, what is known as preconditioner.
 */
import type { Kernels } from "../native/mod.ts";
import { giveBack } from "../quant/array_memory.ts";
import { product } from "../quant/product.ts";
import { MomentSums, type PartPlace } from "../quant/solvers/moment_sums.ts";
import { diagonalOf } from "../quant/solvers/moments.ts";
import { type FactoredMoment, timesInverse } from "../quant/solvers/factored_moment.ts";
import type { Correction } from "../quant/solvers/settings.ts";

/** Steps of conjugate gradients: each takes as long as two forward passes through the layer. */
export const TARGET_STEPS = 2;

/** A part of a layer's inputs. */
export interface InputPart {
  /** `f32[tokens, cols]`: what the layer reads. */
  readonly x: Float32Array;
  readonly tokens: number;
  /** `f32[tokens]`; 1 by default. */
  readonly weights: Float32Array | undefined;
}

/** With what was lost before the layer. */
export interface LostPart extends InputPart {
  /** `f32[tokens, cols]`: x° − x, x° of full precision. */
  readonly lost: Float32Array;
  /** `f32[tokens, rows]`: r° − r of the stream that the output is added to. */
  readonly lostStream: Float32Array | undefined;
}

/** A layer's inputs, which are gone through several times; arrays are valid until the next call. */
export interface LayerInputs {
  readonly parts: number;
  /** Σ of the weights of all inputs. */
  readonly weight: number;
  inputs(part: number): InputPart;
  lost(part: number): LostPart;
  /** Where a part lies in the pass; by default all are one chunk. */
  place?(part: number): PartPlace;
  /** Sums over all tasks, rounded; by default these alone. @param pass number of the pass over inputs */
  total?(sums: MomentSums, pass: number): Promise<Float32Array<ArrayBuffer>>;
  /** Called between parts, with the done share. */
  pause(share: number): Promise<void>;
}

/** A layer to correct. */
export interface LayerToCorrect {
  /** `f32[rows, cols]` */
  readonly weights: Float32Array;
  readonly rows: number;
  /** In blocks: the preconditioner, and what damps the equations. */
  readonly moment: FactoredMoment;
}

/**
 * `W + G M⁻¹`, G the mean of w (correction · W (x° − x) + residualCorrection · (r° − r)) xᵀ and M that of w x
 * xᵀ, damped; rows are independent. `correctedTarget` of lib/quant with a whole moment has the same limit.
 *
 * **Shapes** → `f32[rows, cols]`
 */
export async function targetOfInputs(
  kernels: Kernels,
  { weights, rows, moment }: LayerToCorrect,
  data: LayerInputs,
  { correction, residualCorrection }: Correction,
  steps: number = TARGET_STEPS,
): Promise<Float32Array<ArrayBuffer>> {
  const { cols } = moment, doing = "correct a layer's target", passes = steps + 1;
  let pass = 0;
  /** Mean of w y xᵀ over all inputs, y made of each part. */
  const mean = async <Part extends InputPart>(
    partAt: (i: number) => Part,
    outputs: (part: Part) => Float32Array<ArrayBuffer>,
  ) => {
    const parts = new MomentSums({ rows, cols, isSymmetric: false });
    for (let i = 0; i < data.parts; i++) {
      const part = partAt(i), place = data.place?.(i) ?? { before: i, samples: 1 };
      const y = outputs(part);
      parts.addPart(kernels, { ...part, y }, place);
      giveBack(y);
      await data.pause((pass + (i + 1) / data.parts) / passes);
    }
    const sums = await data.total?.(parts, pass) ?? parts.rounded();
    pass++;
    for (let i = 0; i < sums.length; i++) sums[i]! /= data.weight;
    return sums;
  };
  const outputsOf = (x: Float32Array, w: Float32Array, tokens: number) =>
    product(kernels, doing, x, w, { tokens, rows, cols });
  const rest = await mean((i) => data.lost(i), ({ lost, lostStream, tokens }) => {
    const outputs = outputsOf(lost, weights, tokens);
    for (let k = 0; k < outputs.length; k++) {
      outputs[k] = correction * outputs[k]! +
        (lostStream === undefined ? 0 : residualCorrection * lostStream[k]!);
    }
    return outputs;
  });
  const target = weights.slice() as Float32Array<ArrayBuffer>, damping = addedTo(moment);
  let ahead = timesInverse(kernels, doing, moment, rest, rows), products = dots(rest, ahead, rows);
  const direction = ahead.slice();
  for (let step = 0; step < steps; step++) {
    const along = await mean((i) => data.inputs(i), ({ x, tokens }) => outputsOf(x, direction, tokens));
    for (let k = 0; k < along.length; k++) along[k]! += damping * direction[k]!;
    const curvature = dots(direction, along, rows);
    const lengths = products.map((value, row) => curvature[row]! > 0 ? value / curvature[row]! : 0);
    for (let k = 0; k < target.length; k++) {
      const length = lengths[Math.floor(k / cols)]!;
      target[k]! += length * direction[k]!;
      rest[k]! -= length * along[k]!;
    }
    giveBack(along, ahead);
    if (step + 1 === steps) break;
    ahead = timesInverse(kernels, doing, moment, rest, rows);
    const next = dots(rest, ahead, rows);
    const turns = next.map((value, row) => products[row]! > 0 ? value / products[row]! : 0);
    for (let k = 0; k < direction.length; k++) {
      direction[k] = ahead[k]! + turns[Math.floor(k / cols)]! * direction[k]!;
    }
    products = next;
  }
  giveBack(rest, direction);
  return target;
}

/** What was added to a moment's diagonal. */
function addedTo({ moment, cols, block, damping }: FactoredMoment): number {
  const power = diagonalOf(moment, cols, block).reduce((sum, value) => sum + value, 0) / cols;
  return power * damping / (1 + damping);
}

/** Σ a b of each row, in float64. */
function dots(a: Float32Array, b: Float32Array, rows: number): Float64Array {
  const cols = a.length / rows, sums = new Float64Array(rows);
  for (let row = 0, k = 0; row < rows; row++) {
    let sum = 0;
    for (const end = k + cols; k < end; k++) sum += a[k]! * b[k]!;
    sums[row] = sum;
  }
  return sums;
}
