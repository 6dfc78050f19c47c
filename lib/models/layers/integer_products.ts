/**
 * Linear layers of packed weights by integer products, with scratch for the codes of their inputs, which
 * kernels alone touch during a pass.
 */
import { KernelError, WeightsError } from "../../errors.ts";
import { DTYPE_NUMBERS, E_NONFINITE, E_RANGE, ZERO_POINT_NUMBERS } from "../../native/call.ts";
import * as native from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";
import { type OneLevelTensor, packedWords } from "../../quant/packed/layout.ts";
import { shown } from "../model_config.ts";
import {
  type ActivationPrecision,
  encodeActivations,
  giveGrid,
  type IntegerWeights,
  multiplyCodes,
  type QuantizeActivationsOptions,
  type QuantizedActivations,
  roundActivations,
  type RoundActivationsOptions,
  takesIntegers,
} from "./int8.ts";
import { type DenseMatrix, linear } from "./linear.ts";
import type { LinearLayer } from "./tensors.ts";
import { Workspace } from "./workspace.ts";

type Floats = Float32Array<ArrayBuffer>;

/** The products of one model, whose layers take turns with the scratch. */
export class IntegerProducts {
  #codeBytes = new Uint8Array(0);
  #scales = new Float32Array(0);
  #zeroPoints = new Int32Array(0);
  readonly #views = new Map<number, QuantizedActivations>();
  /** Scratch for rounded weights. */
  #packed = new Uint32Array(0);
  #rowScales = new Uint16Array(0);
  #rowZeroPoints = new Uint16Array(0);
  /** Scratch for rotated inputs. */
  readonly #rotated = new Workspace();
  /** Whether plain weights are rounded to 8 bits whenever they are used, for integer products. */
  roundsWeights = false;

  /** @param path of the checkpoint, for messages */
  constructor(
    readonly kernels: Kernels,
    readonly path: string,
    readonly activations: ActivationPrecision = "f32",
  ) {}

  /** Lets the scratch go. */
  release(): void {
    this.#codeBytes = new Uint8Array(0);
    this.#scales = new Float32Array(0);
    this.#zeroPoints = new Int32Array(0);
    this.#views.clear();
    this.#rotated.release();
    this.#packed = new Uint32Array(0);
    this.#rowScales = this.#rowZeroPoints = new Uint16Array(0);
  }

  /** A layer in the model's own precision. **Shapes** `x: f32[count, cols]` → `out: f32[count, rows]` */
  linear(layer: LinearLayer, x: Float32Array, count: number, out: Floats): void {
    const { weights } = layer;
    const rounded = this.roundsWeights && !("packed" in weights) ? this.#rounded(weights) : undefined;
    if (rounded !== undefined) this.multiply(layer, rounded, x, count, out);
    else if (this.activations === "f32" || !takesIntegers(weights)) {
      this.inFloats(layer, x, count, out);
    } else this.multiply(layer, weights, x, count, out);
  }

  /** A layer by products of float32. */
  inFloats(layer: LinearLayer, x: Float32Array, count: number, out: Floats): void {
    linear(this.kernels, layer, x, count, out, this.#rotated);
  }

  /** A layer by integer products. @throws {WeightsError} when its input is not finite */
  multiply(
    { name, bias }: LinearLayer,
    weights: IntegerWeights,
    x: Float32Array,
    count: number,
    out: Floats,
    { bits = 8, grid }: Pick<QuantizeActivationsOptions, "bits" | "grid"> = {},
  ): void {
    const codes = this.#codes(count, weights.cols, bits), { arrays } = this.kernels;
    const parameters = [codes.scale, codes.zeroPoint];
    if (grid !== undefined) {
      for (const array of parameters) arrays.discard(array);
      giveGrid(grid, codes);
    }
    arrays.hold(codes.codes, true);
    for (const array of parameters) arrays.hold(array, grid === undefined);
    this.#reading(name, () => encodeActivations(this.kernels, x, codes, grid !== undefined));
    multiplyCodes(this.kernels, { weights, bias }, codes, out);
  }

  /** A layer's input rounded in float32. @throws {WeightsError} when it is not finite */
  round(name: string, x: Float32Array, count: number, options: RoundActivationsOptions, out: Floats): Floats {
    return this.#reading(name, () => roundActivations(this.kernels, x, count, options, out));
  }

  #reading<Result>(name: string, run: () => Result): Result {
    try {
      return run();
    } catch (error) {
      if (!(error instanceof KernelError && error.status === E_NONFINITE)) throw error;
      throw new WeightsError(
        `Cannot run ${shown(this.path)}: every value must be finite, got NaN or infinity in what ${
          shown(name)
        } reads`,
        { path: this.path, tensor: name },
      );
    }
  }

  /** Weights of 8 bits, a scale and a zero point a row; undefined where those cannot be stored. Scratch. */
  #rounded({ rows, cols, data, dtype }: DenseMatrix): OneLevelTensor | undefined {
    const words = rows * packedWords(cols, 8);
    if (this.#packed.length < words) this.#packed = new Uint32Array(words);
    if (this.#rowScales.length < rows) {
      this.#rowScales = new Uint16Array(rows);
      this.#rowZeroPoints = new Uint16Array(rows);
    }
    const packed = this.#packed.subarray(0, words), scale = this.#rowScales.subarray(0, rows);
    const zeroPoint = this.#rowZeroPoints.subarray(0, rows), bytes = bytesOf(data);
    const grids = [ZERO_POINT_NUMBERS.real, packed, scale, zeroPoint] as const;
    for (const array of [packed, scale, zeroPoint]) this.kernels.arrays.hold(array, true);
    try {
      native.quantizeRound(this.kernels, "round", bytes, DTYPE_NUMBERS[dtype], rows, cols, 8, 0, ...grids);
    } catch (error) {
      const isUnfit = error instanceof KernelError && [E_RANGE, E_NONFINITE].includes(error.status!);
      if (!isUnfit) throw error;
      return undefined;
    }
    return { rows, cols, bits: 8, groupSize: 0, zeroPointKind: "real", packed, scale, zeroPoint };
  }

  /** Scratch for codes, the same object while sizes stay. */
  #codes(tokens: number, cols: number, bits: number): QuantizedActivations {
    const last = this.#views.get(cols);
    if (last?.tokens === tokens && last.bits === bits) return last;
    if (this.#codeBytes.length < tokens * cols) this.#codeBytes = new Uint8Array(tokens * cols);
    if (this.#scales.length < tokens) {
      this.#scales = new Float32Array(tokens);
      this.#zeroPoints = new Int32Array(tokens);
    }
    const view: QuantizedActivations = {
      tokens,
      cols,
      bits,
      codes: this.#codeBytes.subarray(0, tokens * cols),
      scale: this.#scales.subarray(0, tokens),
      zeroPoint: this.#zeroPoints.subarray(0, tokens),
    };
    this.#views.set(cols, view);
    return view;
  }
}

const bytesOf = ({ buffer, byteOffset, byteLength }: Float32Array | Uint16Array) =>
  new Uint8Array(buffer, byteOffset, byteLength);
