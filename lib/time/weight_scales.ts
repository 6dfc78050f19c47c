/**
 * Own weight scales and zero points of each time group over shared codes: the literal reading of the old system's time groups, as least squares on
 * the group's inputs. An option, to be held against spending the same bits without time.
 */
import type { Kernels } from "../native/mod.ts";
import { groupCount, type OneLevelTensor, unpackCodes } from "../quant/mod.ts";
import { product } from "../quant/product.ts";
import type { TimeGroupMoments } from "./output_correction.ts";
import type { WeightScaleParameters } from "./parameters.ts";

/** Pull towards the stored scales, relative to the data term: a direction that inputs hardly have stays as it was. */
const RIDGE = 0.01;
/** Rounds over the weight groups of a row; one is exact where the group is the whole row. */
const SWEEPS = 3;

/**
 * Scales and zero points by time group that bring `Ŵ x` nearest to `W x`, the codes as they are: for each row and weight group the least squares of
 * `s` and `s z` on the group's second moment, with a ridge towards what is stored. Where that gives no positive half float the stored pair stays.
 *
 * **Shapes** `weights: f32[rows, cols]`, `moments` one a time group → `[groups, rows, weight groups]` half floats
 *
 * @throws {TypeError} when a shape does not fit
 * @throws {RangeError} when a moment is not finite
 *
 * @example
 * ```ts
 * import { openKernels } from "../native/mod.ts";
 * import { quantize } from "../quant/mod.ts";
 * import { timeWeightScales } from "./weight_scales.ts";
 * const kernels = await openKernels(), data = Float32Array.of(0, 1, 2, 3);
 * const packed = quantize(kernels, { data, dtype: "F32" }, 1, 4, { bits: 2, groupSize: 0 });
 * const second = new Float32Array(16).map((_, i) => i % 5 === 0 ? 1 : 0);
 * const moments = { second, mean: new Float32Array(4), samples: 100 };
 * console.log(timeWeightScales(kernels, data.map((v) => 2 * v), packed, [moments]).scale.length); // 1
 * ```
 */
export function timeWeightScales(
  kernels: Kernels,
  weights: Float32Array,
  quantized: OneLevelTensor,
  moments: readonly TimeGroupMoments[],
): WeightScaleParameters {
  const doing = "fit weight scales to time groups";
  const { rows, cols, bits, groupSize, packed } = quantized;
  if (weights.length !== rows * cols) {
    throw new TypeError(`Cannot ${doing}: weights must be [${rows}, ${cols}], got ${weights.length} numbers`);
  }
  const count = groupCount(cols, groupSize), width = groupSize === 0 ? cols : groupSize;
  const codes = Float32Array.from(unpackCodes(kernels, packed, rows, cols, bits));
  const half = (values: Uint16Array) => new Float16Array(values.buffer, values.byteOffset, values.length);
  const stored = half(quantized.scale), middle = 2 ** (bits - 1);
  const storedZero = quantized.zeroPoint && half(quantized.zeroPoint);
  const scale = new Uint16Array(moments.length * rows * count);
  const zeroPoint = storedZero && new Uint16Array(scale.length);
  for (const [g, { second }] of moments.entries()) {
    if (second.length !== cols * cols) {
      throw new TypeError(
        `Cannot ${doing}: moments must be [${cols}, ${cols}], got ${second.length} numbers`,
      );
    }
    if (!second.every(Number.isFinite)) throw new RangeError(`Cannot ${doing}: moments must be finite`);
    const times = (x: Float32Array) =>
      product(kernels, doing, x, second, { tokens: x.length / cols, rows: cols, cols });
    // ŵ = a q − b with b = a z; symmetric: a (q − middle)
    const a = Float64Array.from(stored), b = a.map((s, i) => s * (storedZero?.[i] ?? middle));
    const difference = new Float32Array(rows * cols);
    const valueOf = (row: number, i: number, k: number) =>
      a[row * count + i]! * codes[row * cols + k]! - b[row * count + i]!;
    for (let sweep = 0; sweep < (count === 1 ? 1 : SWEEPS); sweep++) {
      for (let i = 0; i < count; i++) {
        const begin = i * width, end = Math.min(cols, begin + width);
        for (let row = 0; row < rows; row++) {
          for (let k = 0; k < cols; k++) {
            difference[row * cols + k] = weights[row * cols + k]! - valueOf(row, Math.floor(k / width), k);
          }
        }
        const ones = new Float32Array(cols).fill(-1, begin, end), own = new Float32Array(rows * cols);
        for (let row = 0; row < rows; row++) {
          for (let k = begin; k < end; k++) {
            own[row * cols + k] = codes[row * cols + k]! - (storedZero === undefined ? middle : 0);
          }
        }
        const onError = times(difference), onOnes = times(ones), onOwn = times(own);
        let onesOnes = 0;
        for (let k = begin; k < end; k++) onesOnes -= onOnes[k]!;
        for (let row = 0; row < rows; row++) {
          let qq = 0, qo = 0, qe = 0, oe = 0;
          for (let k = begin, at = row * cols + begin; k < end; k++, at++) {
            qq += own[at]! * onOwn[at]!;
            qo += own[at]! * onOnes[k]!;
            qe += own[at]! * onError[at]!;
            oe -= onError[at]!;
          }
          const at = row * count + i, first = qq * (1 + RIDGE), last = onesOnes * (1 + RIDGE);
          if (storedZero === undefined) {
            if (first > 0) {
              const step = qe / first;
              a[at]! += step;
              b[at]! += step * middle;
            }
            continue;
          }
          const determinant = first * last - qo * qo;
          if (!(determinant > 0)) continue;
          a[at]! += (qe * last - oe * qo) / determinant;
          b[at]! += (oe * first - qe * qo) / determinant;
        }
      }
    }
    const outScale = half(scale.subarray(g * rows * count, (g + 1) * rows * count));
    const outZero = zeroPoint && half(zeroPoint.subarray(g * rows * count, (g + 1) * rows * count));
    for (let at = 0; at < rows * count; at++) {
      outScale[at] = a[at]!;
      if (outZero !== undefined) outZero[at] = b[at]! / outScale[at]!;
      // The stored sign, and nothing that half floats do not hold.
      const fits = outScale[at]! * stored[at]! > 0 && Number.isFinite(outScale[at]!) &&
        (outZero === undefined || Number.isFinite(outZero[at]!));
      if (fits) continue;
      outScale[at] = stored[at]!;
      if (outZero !== undefined) outZero[at] = storedZero![at]!;
    }
  }
  return { scale, zeroPoint };
}
