/**
 * Adam's steps (Kingma & Ba, https://arxiv.org/abs/1412.6980). The parameters of all layers lie in one array,
 * of which a kernel call updates those of a layer, split over threads.
 */
import { checkFloats } from "../../native/call.ts";
import * as call from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";
import type { Parameters } from "./problem.ts";

const BETA1 = 0.9;
const BETA2 = 0.999;
const EPSILON = 1e-8;

type Floats = Float32Array<ArrayBuffer>;

/** All parameters in one array, in units, and Adam's two moments. */
export class AdamState {
  readonly #values: Float32Array<ArrayBuffer>;
  readonly #first: Float32Array<ArrayBuffer>;
  readonly #second: Float32Array<ArrayBuffer>;
  readonly #best: Float32Array<ArrayBuffer>;
  #steps = 0;
  #norm = 0;

  constructor(readonly kernels: Kernels, readonly parameters: readonly Parameters[]) {
    for (const { name, values, gradients, units } of parameters) {
      if (gradients.length !== values.length || (units !== undefined && units.length !== values.length)) {
        throw new TypeError(
          `Cannot optimize ${
            JSON.stringify(name)
          }: it must have ${values.length} gradients and units, got ${gradients.length} and ${units?.length}`,
        );
      }
      const bad = units?.find((unit) => !(unit > 0 && unit < Infinity));
      if (bad !== undefined) {
        throw new RangeError(`Cannot optimize ${JSON.stringify(name)}: units must be above 0, got ${bad}`);
      }
    }
    const n = parameters.reduce((sum, { values }) => sum + values.length, 0);
    this.#values = new Float32Array(n);
    this.#first = new Float32Array(n);
    this.#second = new Float32Array(n);
    this.#best = new Float32Array(n);
    let at = 0;
    for (const { values, units } of parameters) {
      for (let i = 0; i < values.length; i++) this.#values[at++] = values[i]! / (units?.[i] ?? 1);
    }
    this.remember();
  }

  /** Steps of the moments. */
  get steps(): number {
    return this.#steps;
  }

  /** Present and best values, and the moments. */
  get arrays(): readonly Floats[] {
    return [this.#values, this.#best, this.#first, this.#second];
  }

  /** Goes on from what {@linkcode arrays} was. @throws {TypeError} when it was of other parameters */
  goOn(arrays: readonly Float32Array[], steps: number): void {
    for (const [i, own] of this.arrays.entries()) {
      if (arrays[i]?.length !== own.length) {
        throw new TypeError(
          `Cannot go on optimizing: there must be ${own.length} parameters, got ${arrays[i]?.length}`,
        );
      }
      own.set(arrays[i]);
    }
    this.#steps = steps;
    this.#publish(this.#values);
  }

  clearGradients(): void {
    for (const { gradients } of this.parameters) gradients.fill(0);
  }

  /** Gradients in units, in the arrays that the loss has filled. @returns their length */
  scaleGradients(): number {
    let squares = 0;
    for (const { gradients, units } of this.parameters) {
      for (let i = 0; i < gradients.length; i++) {
        const gradient = gradients[i]! * (units?.[i] ?? 1);
        gradients[i] = gradient;
        squares += gradient * gradient;
      }
    }
    return this.#norm = Math.sqrt(squares);
  }

  /** One step of Adam. @returns 1 where the gradient was longer than `clipNorm` and shortened, else 0 */
  step(rate: number, clipNorm: number | undefined): number {
    const isClipped = clipNorm !== undefined && this.#norm > clipNorm;
    if (isClipped) {
      const share = clipNorm / this.#norm;
      for (const { gradients } of this.parameters) {
        for (let i = 0; i < gradients.length; i++) gradients[i]! *= share;
      }
    }
    this.#steps++;
    let at = 0;
    for (const { gradients } of this.parameters) {
      const [values, first, second] = [this.#values, this.#first, this.#second].map((array) =>
        array.subarray(at, at + gradients.length)
      ) as [Floats, Floats, Floats];
      adamStep(this.kernels, { values, gradients, first, second }, this.#steps, rate);
      at += gradients.length;
    }
    this.#publish(this.#values);
    return Number(isClipped);
  }

  remember(): void {
    this.#best.set(this.#values);
  }

  restore(): void {
    this.#publish(this.#best);
  }

  /** Goes back to the best values and forgets the moments. */
  restart(): void {
    this.#values.set(this.#best);
    this.#first.fill(0);
    this.#second.fill(0);
    this.#steps = 0;
    this.restore();
  }

  #publish(from: Float32Array): void {
    let at = 0;
    for (const { values, units } of this.parameters) {
      for (let i = 0; i < values.length; i++) values[i] = from[at++]! * (units?.[i] ?? 1);
    }
  }
}

/** Arrays of equal length that a step of Adam works on. */
export interface AdamArrays {
  readonly values: Float32Array<ArrayBuffer>;
  readonly gradients: Float32Array;
  /** Running means of the gradients and of their squares, 0 before the first step. */
  readonly first: Float32Array<ArrayBuffer>;
  readonly second: Float32Array<ArrayBuffer>;
}

/**
 * One step of Adam, in place: number `step`, from 1 on.
 *
 * @throws {TypeError} when an array has another type or length
 * @throws {KernelError} when `step` is below 1
 */
export function adamStep(
  kernels: Kernels,
  { values, gradients, first, second }: AdamArrays,
  step: number,
  rate: number,
): void {
  const doing = "take a step", n = values.length;
  checkFloats(doing, {
    values: [values, n],
    gradients: [gradients, n],
    first: [first, n],
    second: [second, n],
  });
  call.adamStep(kernels, doing, values, gradients, first, second, n, rate, BETA1, BETA2, EPSILON, step);
}
