/**
 * Adam's steps (Kingma & Ba, https://arxiv.org/abs/1412.6980), one parameter of a layer after the other, each
 * split over threads. What is kept of parameters may lie in a file.
 */
import { checkFloats } from "../../native/call.ts";
import * as call from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";
import { PagedFloats } from "../../output/paged_floats.ts";
import type { Parameters } from "./problem.ts";

const BETA1 = 0.9;
const BETA2 = 0.999;
const EPSILON = 1e-8;

type Floats = Float32Array<ArrayBuffer>;

/** What is kept of each parameter beside its values: those in units, the best, and Adam's two moments. */
const KINDS = ["in units", "best", "first", "second"] as const;
type Kind = typeof KINDS[number];

/** Parameters in units, and Adam's two moments of each. */
export class AdamState {
  readonly #memory: PagedFloats;
  readonly #lengths: readonly number[];
  #steps = 0;
  #norm = 0;

  constructor(
    readonly kernels: Kernels,
    readonly parameters: readonly Parameters[],
    memory: PagedFloats = new PagedFloats(),
  ) {
    this.#memory = memory;
    this.#lengths = parameters.map((own) => {
      const { name, values: { length }, units } = own, gradients = own.gradients.length;
      if (gradients !== length || (units !== undefined && units.length !== length)) {
        throw new TypeError(
          `Cannot optimize ${
            JSON.stringify(name)
          }: it must have ${length} gradients and units, got ${gradients} and ${units?.length}`,
        );
      }
      const bad = units?.find((unit) => !(unit > 0 && unit < Infinity));
      if (bad !== undefined) {
        throw new RangeError(`Cannot optimize ${JSON.stringify(name)}: units must be above 0, got ${bad}`);
      }
      return length;
    });
    for (const [p, { values, units }] of parameters.entries()) {
      const own = this.#take(p, "in units");
      for (let i = 0; i < values.length; i++) own[i] = values[i]! / (units?.[i] ?? 1);
    }
    this.remember();
  }

  /** Steps of the moments. */
  get steps(): number {
    return this.#steps;
  }

  /** As {@linkcode OptimizerState.pieces}. */
  get pieces(): Iterable<Float32Array> {
    return { [Symbol.iterator]: () => this.#pieces() };
  }

  *#pieces(): Generator<Float32Array> {
    for (const p of this.parameters.keys()) for (const kind of KINDS) yield this.#read(p, kind);
  }

  /** Goes on from what {@linkcode pieces} was. @throws {TypeError} when it was of other parameters */
  goOn(pieces: Iterable<Float32Array>, steps: number): void {
    const count = this.#lengths.reduce((sum, length) => sum + length, 0);
    let given = 0, at = 0, next = 0;
    for (const piece of pieces) {
      given += piece.length;
      for (let from = 0; from < piece.length && next < KINDS.length * this.#lengths.length;) {
        const own = this.#take(Math.floor(next / KINDS.length), KINDS[next % KINDS.length]!);
        const part = piece.subarray(from, from + own.length - at);
        own.set(part, at);
        [from, at] = [from + part.length, at + part.length];
        if (at === own.length) [at, next] = [0, next + 1];
      }
    }
    if (given !== KINDS.length * count) {
      throw new TypeError(
        `Cannot go on optimizing: there must be ${count} parameters, got ${given / KINDS.length}`,
      );
    }
    this.#steps = steps;
    this.#publish("in units");
  }

  clearGradients(): void {
    for (const own of this.parameters) {
      if (own.clearGradients === undefined) own.gradients.fill(0);
      else own.clearGradients();
    }
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
    const share = isClipped ? clipNorm / this.#norm : 1;
    this.#steps++;
    for (const [p, { gradients }] of this.parameters.entries()) {
      for (let i = 0; isClipped && i < gradients.length; i++) gradients[i]! *= share;
      const values = this.#take(p, "in units"),
        first = this.#take(p, "first"),
        second = this.#take(p, "second");
      adamStep(this.kernels, { values, gradients, first, second }, this.#steps, rate);
      this.#publishOne(p, values);
    }
    return Number(isClipped);
  }

  remember(): void {
    for (const p of this.parameters.keys()) this.#take(p, "best").set(this.#read(p, "in units"));
  }

  restore(): void {
    this.#publish("best");
  }

  /** Goes back to the best values and forgets the moments. */
  restart(): void {
    for (const p of this.parameters.keys()) {
      this.#take(p, "in units").set(this.#read(p, "best"));
      for (const kind of ["first", "second"] as const) this.#memory.clear(nameOf(p, kind));
    }
    this.#steps = 0;
    this.restore();
  }

  #publish(kind: Kind): void {
    for (const p of this.parameters.keys()) this.#publishOne(p, this.#read(p, kind));
  }

  #publishOne(p: number, from: Float32Array): void {
    const { values, units } = this.parameters[p]!;
    for (let i = 0; i < values.length; i++) values[i] = from[i]! * (units?.[i] ?? 1);
  }

  #take(p: number, kind: Kind): Floats {
    return this.#memory.take(nameOf(p, kind), this.#lengths[p]!);
  }

  #read(p: number, kind: Kind): Float32Array {
    return this.#memory.read(nameOf(p, kind), this.#lengths[p]!);
  }
}

const nameOf = (p: number, kind: Kind): string => `${p} ${kind}`;

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
