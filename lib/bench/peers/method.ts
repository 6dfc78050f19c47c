/**
 * Interface of a quantization method under comparison: a name, how it was made, and a function from the
 * weights of a matrix to what they are after storing.
 */
import { WeightsError } from "../../errors.ts";
import type { BitWidth, GroupSize } from "../../quant/mod.ts";

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

/** The first value that is NaN or infinite, and its place; undefined where all are finite. */
function nonfinite(values: Float32Array | Float64Array, cols: number) {
  const at = values.findIndex((value) => !Number.isFinite(value));
  return at < 0 ? undefined : { value: values[at], row: Math.floor(at / cols), column: at % cols };
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
  const bad = nonfinite(weights, cols);
  if (bad !== undefined) {
    const place = `row ${bad.row}, column ${bad.column}`;
    throw new WeightsError(`${doing(name)}: weights must be finite, got ${bad.value} at ${place}`);
  }
  if (inputs === undefined) return;
  const { secondMoment } = inputs;
  if (inputs.cols !== cols || secondMoment.length !== cols * cols) {
    throw new TypeError(
      `${doing(name)}: the second moment must be [${cols}, ${cols}], got ${secondMoment.length} values ` +
        `of ${inputs.cols} columns`,
    );
  }
  const wrong = nonfinite(secondMoment, cols);
  if (wrong === undefined) return;
  const place = `${wrong.row}, ${wrong.column}`;
  throw new WeightsError(`${doing(name)}: the second moment must be finite, got ${wrong.value} at ${place}`);
}

/** Checks that a stored matrix can be read back. @throws {WeightsError} when a value is not finite */
export function checkRestored(name: string, restored: Float32Array, cols: number): void {
  const bad = nonfinite(restored, cols);
  if (bad === undefined) return;
  throw new WeightsError(
    `${doing(name)}: scales and zero points must fit half precision, got ${bad.value} at row ${bad.row}, ` +
      `column ${bad.column}`,
  );
}

/** The inputs of a method that cannot do without. @throws {TypeError} when they are absent */
export function neededInputs(name: string, inputs: LayerInputs | undefined): LayerInputs {
  if (inputs !== undefined) return inputs;
  throw new TypeError(`${doing(name)}: it needs the second moment of the inputs, got none`);
}
