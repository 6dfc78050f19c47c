/** Trellis codes on every backend: weights, products with float32 and 8-bit activations. */
import { expect, test } from "bun:test";
import { linearPackedInt8, quantizeActivations } from "../../lib/models/layers/int8.ts";
import { linear } from "../../lib/models/layers/linear.ts";
import * as native from "../../lib/native/functions.ts";
import { dequantize, packedErrorStatistics, type TwoLevelTensor } from "../../lib/quant/mod.ts";
import { emptyLevels, packedWords } from "../../lib/quant/packed/layout.ts";
import { allInt8Kernels, gaussians, randomStream } from "../_kernels.ts";

type Trellis = TwoLevelTensor & { readonly codes: "trellis" };

/** A matrix of random codes with its weights by the definition of docs/format.md. */
function matrixOf(bits: 2 | 3, rows: number, cols: number, groupSize: 0 | 64, table: Float32Array) {
  const random = randomStream(rows + cols), words = packedWords(cols, bits);
  const shape = { rows, cols, bits, groupSize, scaleBits: 16, codes: "trellis" } as const;
  const groups = groupSize === 0 ? 1 : Math.ceil(cols / groupSize);
  const halfBits = (factor: number, seed: number) =>
    new Uint8Array(Float16Array.from(gaussians(seed, rows * groups), (value) => factor * value).buffer);
  const tensor: Trellis = {
    ...shape,
    ...emptyLevels(shape),
    packed: new Uint32Array(rows * words),
    subScale: halfBits(0.05, 1),
    subMin: halfBits(0.01, 2),
  };
  const scale = new Float16Array(tensor.subScale.buffer), offset = new Float16Array(tensor.subMin.buffer);
  const weights = new Float32Array(rows * cols);
  for (let row = 0; row < rows; row++) {
    let window = 0; // the code before on top, moved down by its bits for each that comes
    for (let col = 0; col < cols; col++) {
      const code = Math.floor(2 ** bits * random()), bit = bits * col, word = row * words + (bit >> 5);
      tensor.packed[word] = tensor.packed[word]! | code << (bit & 31);
      if ((bit & 31) + bits > 32) tensor.packed[word + 1] = code >> (32 - (bit & 31));
      window = code << 6 | window >> bits;
      const group = row * groups + (groupSize === 0 ? 0 : Math.floor(col / groupSize));
      weights[row * cols + col] = scale[group]! * table[window]! + offset[group]!;
    }
  }
  return { tensor, weights };
}

test("trellis codes have the weights of the definition, and products of those, on every backend", async () => {
  const opened = await allInt8Kernels();
  const scalar = opened[0]!.kernels;
  const sizes = [[5, 3, 0], [3, 100, 64], [18, 129, 0], [33, 640, 64]] as const;
  for (const [bits, [rows, cols, groupSize]] of ([2, 3] as const).flatMap((b) => sizes.map((s) => [b, s] as const))) {
    const table = new Float32Array(2 ** (bits + 6));
    native.trellisTable(scalar, "read the table", bits, table);
    expect(new Set(table).size).toBeGreaterThan(80);
    const { tensor, weights } = matrixOf(bits, rows, cols, groupSize, table);
    const bias = gaussians(3, rows), other = weights.map((value) => value + 0.125);
    for (const tokens of [1, 6]) {
      const x = gaussians(4, tokens * cols);
      const activations = quantizeActivations(scalar, x, tokens, cols);
      const whole = linearPackedInt8(scalar, { weights: tensor, bias }, activations);
      const exact = new Float64Array(tokens * rows), rounded = new Float64Array(tokens * rows);
      for (let at = 0; at < exact.length; at++) {
        const t = Math.floor(at / rows), row = at % rows, { codes, scale, zeroPoint } = activations;
        exact[at] = rounded[at] = bias[row]!;
        for (let k = 0; k < cols; k++) {
          const w = weights[row * cols + k]!;
          exact[at]! += x[t * cols + k]! * w;
          rounded[at]! += scale[t]! * (codes[t * cols + k]! - zeroPoint[t]!) * w;
        }
      }
      const farthest = (a: ArrayLike<number>, b: Float64Array) =>
        b.reduce((most, value, i) => Math.max(most, Math.abs(a[i]! - value)), 0);
      expect(farthest(whole, rounded)).toBeLessThan(2e-5);
      for (const { name, kernels } of opened) {
        const out = new Float32Array(tokens * rows);
        expect([name, dequantize(kernels, tensor)]).toEqual([name, weights]);
        linear(kernels, { weights: tensor, bias }, x, tokens, out);
        expect(farthest(out, exact)).toBeLessThan(2e-5);
        expect([name, linearPackedInt8(kernels, { weights: tensor, bias }, activations)]).toEqual([name, whole]);
      }
    }
    const { sumSquaredError } = packedErrorStatistics(scalar, { data: other, dtype: "F32" }, tensor);
    expect(sumSquaredError / (rows * cols)).toBeCloseTo(0.125 ** 2, 6);
  }
});
