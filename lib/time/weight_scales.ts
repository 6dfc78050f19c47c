/**
 * Weight scales and zero points for each time group over shared codes, by least squares on the group's
 * inputs. An option, to be compared with spending the same bits without time.
 */
import type { Kernels } from "../native/mod.ts";
import { groupCount, type OneLevelTensor, unpackCodes } from "../quant/mod.ts";
import { product } from "../quant/product.ts";
import type { TimeGroupMoments } from "./output_correction.ts";
import type { WeightScaleParameters } from "./parameters.ts";

/** Ridge towards the stored scales, relative to the data: directions without inputs stay as they were. */
const RIDGE = 0.01;
/** Rounds over the weight groups of a row; one is exact where the group is the whole row. */
const SWEEPS = 3;

/**
 * Scales and zero points by time group that bring `Ŵ x` nearest to `W x` with the codes as they are: for each
 * row and weight group the least squares of `s` and `s z` on the group's second moment, with a ridge towards
 * what is stored. Where that gives no positive half float the stored pair stays.
 *
 * **Shapes** `weights: f32[rows, cols]`, `moments` one a time group → `[groups, rows, weight groups]` half
 * floats
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
  const { rows, cols, bits, groupSize, packed } = quantized;
  if (weights.length !== rows * cols) {
    throw new TypeError(`Cannot ${DOING}: weights must be [${rows}, ${cols}], got ${weights.length} numbers`);
  }
  const storedZero = quantized.zeroPoint && halves(quantized.zeroPoint), count = groupCount(cols, groupSize);
  const layer: Layer = {
    weights,
    codes: Float32Array.from(unpackCodes(kernels, packed, rows, cols, bits)),
    rows,
    cols,
    count,
    width: groupSize === 0 ? cols : groupSize,
    stored: halves(quantized.scale),
    storedZero,
    middle: 2 ** (bits - 1),
  };
  const size = rows * count, scale = new Uint16Array(moments.length * size);
  const zeroPoint = storedZero && new Uint16Array(scale.length);
  for (const [g, { second }] of moments.entries()) {
    if (second.length !== cols * cols) {
      throw new TypeError(
        `Cannot ${DOING}: moments must be [${cols}, ${cols}], got ${second.length} numbers`,
      );
    }
    if (!second.every(Number.isFinite)) throw new RangeError(`Cannot ${DOING}: moments must be finite`);
    const part = (values: Uint16Array) => halves(values.subarray(g * size, (g + 1) * size));
    store(layer, fit(kernels, layer, second), part(scale), zeroPoint && part(zeroPoint));
  }
  return { scale, zeroPoint };
}

const DOING = "fit weight scales to time groups";

const halves = (values: Uint16Array): Float16Array =>
  new Float16Array(values.buffer, values.byteOffset, values.length);

/** A layer with its codes and stored parameters. */
interface Layer {
  /** `f32[rows, cols]` each. */
  readonly weights: Float32Array;
  readonly codes: Float32Array;
  readonly rows: number;
  readonly cols: number;
  /** Weight groups of a row, and columns of one. */
  readonly count: number;
  readonly width: number;
  /** `[rows, weight groups]`; no zero points where they are symmetric, at `middle`. */
  readonly stored: Float16Array;
  readonly storedZero: Float16Array | undefined;
  readonly middle: number;
}

/** `ŵ = a q − b` with b = a z; symmetric: `a (q − middle)`. */
interface Pairs {
  readonly a: Float64Array;
  readonly b: Float64Array;
}

/** Least squares on a time group's second moment: sweeps over the weight groups, the others held. */
function fit(kernels: Kernels, layer: Layer, second: Float32Array): Pairs {
  const { weights, codes, rows, cols, count, width, stored, storedZero, middle } = layer;
  const times = (x: Float32Array) =>
    product(kernels, DOING, x, second, { tokens: x.length / cols, rows: cols, cols });
  const a = Float64Array.from(stored), b = a.map((s, i) => s * (storedZero?.[i] ?? middle));
  const difference = new Float32Array(rows * cols);
  for (let sweep = 0; sweep < (count === 1 ? 1 : SWEEPS); sweep++) {
    for (let i = 0; i < count; i++) {
      const begin = i * width, end = Math.min(cols, begin + width);
      const ones = new Float32Array(cols).fill(-1, begin, end), own = new Float32Array(rows * cols);
      for (let row = 0, at = 0; row < rows; row++) {
        for (let k = 0; k < cols; k++, at++) {
          const pair = row * count + Math.floor(k / width);
          difference[at] = weights[at]! - (a[pair]! * codes[at]! - b[pair]!);
          if (k >= begin && k < end) own[at] = codes[at]! - (storedZero === undefined ? middle : 0);
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
        const pair = row * count + i, first = qq * (1 + RIDGE), last = onesOnes * (1 + RIDGE);
        if (storedZero === undefined) {
          if (!(first > 0)) continue;
          const step = qe / first;
          a[pair]! += step;
          b[pair]! += step * middle;
          continue;
        }
        const determinant = first * last - qo * qo;
        if (!(determinant > 0)) continue;
        a[pair]! += (qe * last - oe * qo) / determinant;
        b[pair]! += (oe * first - qe * qo) / determinant;
      }
    }
  }
  return { a, b };
}

/** Rounds to half floats; where those do not hold a pair, or its sign changed, the stored one stays. */
function store(
  { stored, storedZero }: Layer,
  { a, b }: Pairs,
  scale: Float16Array,
  zeroPoint: Float16Array | undefined,
): void {
  for (let at = 0; at < a.length; at++) {
    scale[at] = a[at]!;
    if (zeroPoint !== undefined) zeroPoint[at] = b[at]! / scale[at]!;
    const fits = scale[at]! * stored[at]! > 0 && Number.isFinite(scale[at]!) &&
      (zeroPoint === undefined || Number.isFinite(zeroPoint[at]!));
    if (fits) continue;
    scale[at] = stored[at]!;
    if (zeroPoint !== undefined) zeroPoint[at] = storedZero![at]!;
  }
}
