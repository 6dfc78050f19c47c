import { describe, expect, test } from "bun:test";
import { IntegerProducts } from "../../lib/models/layers/integer_products.ts";
import { linear } from "../../lib/models/layers/linear.ts";
import { quantizeActivations } from "../../lib/models/layers/int8.ts";
import { RandomStream } from "../../lib/models/random.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { dequantize, quantize } from "../../lib/quant/mod.ts";

const kernels = await openKernels();
const rows = 24, cols = 96, tokens = 5;

function layerOf(size: number) {
  const values = new Float32Array(rows * cols);
  new RandomStream(1).fillNormal(values);
  const data = Uint16Array.from(new Uint32Array(values.map((value) => value * size).buffer), (bits) => bits >>> 16);
  return { name: "layer", bias: undefined, weights: { rows, cols, dtype: "BF16", data } } as const;
}

function run(layer: ReturnType<typeof layerOf>, x: Float32Array, rounds: boolean): Float32Array {
  const products = new IntegerProducts(kernels, "model"), out = new Float32Array(tokens * rows);
  products.roundsWeights = rounds;
  products.linear(layer, x, tokens, out);
  return out;
}

describe("plain weights that are rounded where they are used", () => {
  const x = new Float32Array(tokens * cols);
  new RandomStream(2).fillNormal(x);

  test("give the products of 8-bit weights and inputs", () => {
    const layer = layerOf(0.1), { data, dtype } = layer.weights;
    const rounded = dequantize(kernels, quantize(kernels, { data, dtype }, rows, cols, {
      bits: 8,
      groupSize: 0,
      solver: "round",
    }));
    const { codes, scale, zeroPoint } = quantizeActivations(kernels, x, tokens, cols);
    const got = run(layer, x, true);
    for (let t = 0; t < tokens; t++) {
      for (let n = 0; n < rows; n++) {
        let sum = 0;
        for (let k = 0; k < cols; k++) {
          sum += scale[t]! * (codes[t * cols + k]! - zeroPoint[t]!) * rounded[n * cols + k]!;
        }
        expect(Math.abs(got[t * rows + n]! - sum)).toBeLessThan(1e-4);
      }
    }
  });

  test("run as they are where their scales cannot be stored, and where nobody asks", () => {
    const large = layerOf(1e8);
    expect(run(large, x, true)).toEqual(linear(kernels, large, x, tokens));
    const small = layerOf(1);
    expect(run(small, x, false)).toEqual(linear(kernels, small, x, tokens));
  });
});
