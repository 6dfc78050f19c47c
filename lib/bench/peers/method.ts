/**
 * Interface of a quantization method under comparison: a name, how it was made, and a function from the
 * weights of a matrix to what they are after storing.
 */
import { WeightsError } from "../../errors.ts";
import { type BitWidth, type GroupSize, packedBytes } from "../../quant/mod.ts";

/** Statistics of the inputs of a layer, beside its weights. */
export interface LayerInputs {
  readonly cols: number;
  /** `E[x xᵀ]: [cols, cols]`, weighted mean over the positions of the calibration data. */
  readonly secondMoment: Float32Array | Float64Array;
}

export interface MethodResult {
  /** Dequantized: `f32[rows, cols]`. */
  readonly weights: Float32Array;
  /** Every stored byte of the tensor. */
  readonly storedBytes: number;
  /** Something that a reader of the row has to know, as damping that had to be raised. */
  readonly note?: string;
}

/** Why a method cannot store a matrix of this shape. */
export interface Unsupported {
  readonly unsupported: string;
}

/** `peer library`: code of another project; `re-implementation`: written here from its paper and code. */
export type MethodKind = "peer library" | "re-implementation" | "ours";

/** A way to quantize one matrix, its bits and groups already chosen. */
export interface Method {
  /** As it stands in tables, as in `2 GPTQ, g 32`. */
  readonly name: string;
  readonly kind: MethodKind;
  /** Bits of a code, where the method has codes of one width. */
  readonly bits: BitWidth | undefined;
  /** Undefined where the format fixes its own blocks. */
  readonly groupSize: GroupSize | undefined;
  readonly needsInputs: boolean;
  /** Runs once before the first matrix and counts as no matrix's time. */
  prepare?(): void;
  /**
   * **Shapes** `weights: f32[rows, cols]`, not changed.
   *
   * @throws {WeightsError} when a weight or a second moment is NaN or infinite
   * @throws {TypeError} when sizes do not fit each other, or inputs are needed and absent
   */
  quantize(
    weights: Float32Array,
    rows: number,
    cols: number,
    inputs: LayerInputs | undefined,
  ): MethodResult | Unsupported;
}

/** Bits and groups of the methods that store codes with a scale and a zero point a group. */
export interface GridSetting {
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
}

/** Name of a method at a setting in tables: `2 HQQ, row` or `2 HQQ, g 32`. */
export function gridName(name: string, { bits, groupSize }: GridSetting): string {
  return `${bits} ${name}, ${groupSize === 0 ? "row" : `g ${groupSize}`}`;
}

const doing = (name: string) => `Cannot quantize a matrix by ${JSON.stringify(name)}`;

/** @throws {WeightsError} when a value is NaN or infinite */
function checkFinite(name: string, wanted: string, values: Float32Array | Float64Array, cols: number): void {
  const at = values.findIndex((value) => !Number.isFinite(value));
  if (at < 0) return;
  const place = `row ${Math.floor(at / cols)}, column ${at % cols}`;
  throw new WeightsError(`${doing(name)}: ${wanted}, got ${values[at]} at ${place}`);
}

/**
 * Checks a matrix and, where they are given, the moments of its inputs.
 *
 * @throws {TypeError} when sizes do not fit
 * @throws {WeightsError} when a value is NaN or infinite
 */
export function checkLayer(
  name: string,
  weights: Float32Array,
  rows: number,
  cols: number,
  inputs: LayerInputs | undefined,
): void {
  if (!Number.isSafeInteger(rows) || !Number.isSafeInteger(cols) || rows < 1 || cols < 1) {
    throw new TypeError(`${doing(name)}: rows and columns must be whole numbers ≥ 1, got ${rows} × ${cols}`);
  }
  if (!(weights instanceof Float32Array) || weights.length !== rows * cols) {
    throw new TypeError(
      `${doing(name)}: weights must be ${rows * cols} float32 values, got ${weights?.length}`,
    );
  }
  checkFinite(name, "weights must be finite", weights, cols);
  if (inputs === undefined) return;
  const { secondMoment } = inputs;
  if (inputs.cols !== cols || secondMoment.length !== cols * cols) {
    throw new TypeError(
      `${doing(name)}: the second moment must be [${cols}, ${cols}], got ${secondMoment.length} values ` +
        `of ${inputs.cols} columns`,
    );
  }
  checkFinite(name, "the second moment must be finite", secondMoment, cols);
}

/** Checks that a stored matrix can be read back. @throws {WeightsError} when a value is not finite */
export const checkRestored = (name: string, restored: Float32Array, cols: number): void =>
  checkFinite(name, "scales and zero points must fit half precision", restored, cols);

/** The inputs of a method that cannot do without. @throws {TypeError} when they are absent */
export function neededInputs(name: string, inputs: LayerInputs | undefined): LayerInputs {
  if (inputs !== undefined) return inputs;
  throw new TypeError(`${doing(name)}: it needs the second moment of the inputs, got none`);
}

/** A method of codes with a scale and a zero point a group: checked, named, its bytes counted. */
export function reimplementation(
  method: string,
  setting: GridSetting,
  needsInputs: boolean,
  quantize: (...matrix: Parameters<Method["quantize"]>) => Omit<MethodResult, "storedBytes">,
): Method {
  const name = gridName(method, setting);
  return {
    ...{ name, kind: "re-implementation", ...setting, needsInputs },
    quantize(weights, rows, cols, given) {
      const inputs = needsInputs ? neededInputs(name, given) : undefined;
      checkLayer(name, weights, rows, cols, inputs);
      const storedBytes = packedBytes({ rows, cols, ...setting, zeroPoint: "real" });
      return { ...quantize(weights, rows, cols, inputs), storedBytes };
    },
  };
}
