/**
 * What a way to quantize one matrix is to the peers' suite: its name, what it is made of, and a function from weights to weights. Ours
 * and our rivals have the same shape, so that all are measured by the same code.
 */
import { WeightsError } from "../../errors.ts";
import type { BitWidth, GroupSize } from "../../quant/mod.ts";

/** What a method may look at beside the weights. */
export interface LayerInputs {
  readonly cols: number;
  /** `E[x xᵀ]: [cols, cols]`, mean over the calibration tokens. */
  readonly secondMoment: Float32Array | Float64Array;
}

/** What became of a matrix. */
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

/** `peer library`: another project's own code; `re-implementation`: written here from its paper and reference code. */
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
  /** What has to be done once, before the first matrix, and counts as no matrix's time. */
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

/** How a grid method is called in tables: `2 HQQ, row` or `2 HQQ, g 32`. */
export function gridName(name: string, { bits, groupSize }: GridSetting): string {
  return `${bits} ${name}, ${groupSize === 0 ? "row" : `g ${groupSize}`}`;
}

/** Half-open column ranges of a row's groups; the last is shorter when the size does not divide `cols`. */
export function groupRanges(cols: number, groupSize: GroupSize): (readonly [number, number])[] {
  const size = groupSize === 0 ? Math.max(1, cols) : groupSize;
  return Array.from({ length: Math.ceil(cols / size) }, (_, i) => [i * size, Math.min(cols, (i + 1) * size)]);
}

/**
 * Checks a matrix and, where they are given, what is known of its inputs.
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
  const doing = `Cannot quantize a matrix by ${JSON.stringify(name)}`;
  if (!Number.isSafeInteger(rows) || !Number.isSafeInteger(cols) || rows < 1 || cols < 1) {
    throw new TypeError(`${doing}: rows and columns must be whole numbers ≥ 1, got ${rows} × ${cols}`);
  }
  if (!(weights instanceof Float32Array) || weights.length !== rows * cols) {
    throw new TypeError(`${doing}: weights must be ${rows * cols} float32 values, got ${weights?.length}`);
  }
  const bad = weights.findIndex((value) => !Number.isFinite(value));
  if (bad >= 0) {
    throw new WeightsError(
      `${doing}: weights must be finite, got ${weights[bad]} at row ${Math.floor(bad / cols)}, column ${
        bad % cols
      }`,
    );
  }
  if (inputs === undefined) return;
  const { secondMoment } = inputs;
  if (inputs.cols !== cols || secondMoment.length !== cols * cols) {
    throw new TypeError(
      `${doing}: the second moment must be [${cols}, ${cols}], got ${secondMoment.length} values of ${inputs.cols} columns`,
    );
  }
  const wrong = secondMoment.findIndex((value) => !Number.isFinite(value));
  if (wrong >= 0) {
    throw new WeightsError(
      `${doing}: the second moment must be finite, got ${secondMoment[wrong]} at ${
        Math.floor(wrong / cols)
      }, ${wrong % cols}`,
    );
  }
}

/**
 * Checks that what a method stores can be read back.
 *
 * @throws {WeightsError} when a value is not finite: a scale or a zero point left the range of half precision
 */
export function checkRestored(name: string, restored: Float32Array, cols: number): void {
  const bad = restored.findIndex((value) => !Number.isFinite(value));
  if (bad < 0) return;
  throw new WeightsError(
    `Cannot quantize a matrix by ${
      JSON.stringify(name)
    }: scales and zero points must fit half precision, got ${restored[bad]} at row ${
      Math.floor(bad / cols)
    }, column ${bad % cols}`,
  );
}

/** The inputs of a method that cannot do without. @throws {TypeError} when they are absent */
export function neededInputs(name: string, inputs: LayerInputs | undefined): LayerInputs {
  if (inputs !== undefined) return inputs;
  throw new TypeError(
    `Cannot quantize a matrix by ${JSON.stringify(name)}: it needs the second moment of the inputs, got none`,
  );
}
