import { afterAll, describe, expect, test } from "bun:test";
import { withThreads } from "../../lib/native/mod.ts";
import { resolveConfig } from "../../lib/config/mod.ts";
import {
  attentionBackward,
  columnSums,
  geluTanhBackward,
  layerNormBackward,
  packedGradient,
  rmsNormBackward,
  siluBackward,
  siluMultiplyBackward,
  transpose,
} from "../../lib/models/backward/kernels.ts";
import { DitGradients } from "../../lib/models/backward/dit.ts";
import { MaskedTransformerGradients } from "../../lib/models/backward/masked_transformer.ts";
import type { RefinableLinear } from "../../lib/models/backward/linear.ts";
import { loadDit, loadDream, loadLlada } from "../../lib/models/mod.ts";
import { PagedFloats } from "../../lib/output/paged_floats.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { type OneLevelTensor, quantize, unpackCodes } from "../../lib/quant/mod.ts";
import { equalTimeGroups, timestepAxis } from "../../lib/time/mod.ts";
import { workplace } from "../_checkpoints.ts";
import { allKernels, gaussians, randomStream } from "../_kernels.ts";
import {
  ditCheckpoint,
  dreamCheckpoint,
  lladaCheckpoint,
  SMALL_IMAGE,
  SMALL_LANGUAGE,
  store,
} from "../_models.ts";
import {
  type ImageModel,
  imagePrediction,
  languageLogits,
  type LanguageModel,
  readWeights,
  type Weights,
} from "../_reference.ts";

const everywhere = await allKernels();
const kernels = everywhere[0]!.kernels;
const place = workplace();
afterAll(() => {
  for (const { kernels: each } of everywhere) each.close();
  place.remove();
});

/** Central differences of `loss` by each of `x`, everything in float64. */
function differences(x: ArrayLike<number>, loss: (x: Float64Array) => number, step = 1e-5): Float64Array {
  const at = Float64Array.from(x);
  return at.map((value, i) => {
    at[i] = value + step;
    const above = loss(at);
    at[i] = value - step;
    const below = loss(at);
    at[i] = value;
    return (above - below) / (2 * step);
  });
}

/** Each entry to 1e-3 of itself; those that are next to nothing, to 1e-5 of the largest. */
function expectGradient(actual: ArrayLike<number>, wanted: ArrayLike<number>): void {
  expect(actual.length).toBe(wanted.length);
  const largest = Math.max(...Array.from(wanted, Math.abs));
  expect(largest).toBeGreaterThan(0);
  for (let i = 0; i < wanted.length; i++) {
    const error = Math.abs(actual[i]! - wanted[i]!);
    if (!(error <= 1e-3 * Math.abs(wanted[i]!) + 1e-5 * largest)) {
      throw new Error(`gradient ${i} is ${actual[i]}, central differences say ${wanted[i]}`);
    }
  }
}

const dot = (a: ArrayLike<number>, b: ArrayLike<number>) => {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!;
  return sum;
};
const each = (values: ArrayLike<number>, f: (x: number, i: number) => number) => Float64Array.from(values, f);
const sigmoid = (x: number) => 1 / (1 + Math.exp(-x));
const geluTanh = (x: number) => x / 2 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));

/** softmax(q kᵀ / √d) v with grouped heads. */
function attention(
  q: ArrayLike<number>,
  k: ArrayLike<number>,
  v: ArrayLike<number>,
  { batch, tokens, heads, kvHeads, headSize }: Record<
    "batch" | "tokens" | "heads" | "kvHeads" | "headSize",
    number
  >,
  mask?: Uint8Array,
): Float64Array {
  const out = new Float64Array(batch * tokens * heads * headSize);
  for (let b = 0; b < batch; b++) {
    for (let h = 0; h < heads; h++) {
      const kv = Math.floor(h / (heads / kvHeads));
      for (let i = 0; i < tokens; i++) {
        const at = ((b * tokens + i) * heads + h) * headSize;
        const keyAt = (j: number) => ((b * tokens + j) * kvHeads + kv) * headSize;
        const scores = Array.from({ length: tokens }, (_, j) => {
          if (mask?.[b * tokens + j] === 0) return -Infinity;
          let sum = 0;
          for (let d = 0; d < headSize; d++) sum += q[at + d]! * k[keyAt(j) + d]!;
          return sum / Math.sqrt(headSize);
        });
        const peak = Math.max(...scores);
        const p = scores.map((score) => Math.exp(score - peak));
        const sum = p.reduce((x, y) => x + y);
        for (let j = 0; j < tokens; j++) {
          for (let d = 0; d < headSize; d++) out[at + d]! += p[j]! / sum * v[keyAt(j) + d]!;
        }
      }
    }
  }
  return out;
}

/** Cases of attention, and central differences by each of its inputs. */
function makeAttentions() {
  return ([
    [{ batch: 2, tokens: 5, heads: 4, kvHeads: 2, headSize: 6 }, true],
    [{ batch: 1, tokens: 70, heads: 2, kvHeads: 1, headSize: 3 }, false],
    [{ batch: 1, tokens: 3, heads: 1, kvHeads: 1, headSize: 67 }, false],
  ] as const).map(([shape, masked]) => {
    const { batch, tokens, heads, kvHeads, headSize } = shape;
    const queries = batch * tokens * heads * headSize, keys = batch * tokens * kvHeads * headSize;
    const q = gaussians(7, queries), k = gaussians(8, keys), v = gaussians(9, keys), dy = gaussians(10, queries);
    const random = randomStream(11);
    const keyMask = masked
      ? Uint8Array.from({ length: batch * tokens }, () => random() < 0.7 ? 1 : 0)
      : undefined;
    const out = Float32Array.from(attention(q, k, v, shape, keyMask));
    const wanted = {
      dq: differences(q, (q) => dot(attention(q, k, v, shape, keyMask), dy)),
      dk: differences(k, (k) => dot(attention(q, k, v, shape, keyMask), dy)),
      dv: differences(v, (v) => dot(attention(q, k, v, shape, keyMask), dy)),
    };
    return { shape, inputs: { q, k, v, keyMask, out }, dy, wanted };
  });
}

let attentionsMade: ReturnType<typeof makeAttentions> | undefined;
/** Those, made once: they do not depend on kernels. */
const attentions = () => attentionsMade ??= makeAttentions();

for (const { name, kernels: each_ } of everywhere) {
  describe(`${name}: gradients against central differences in float64`, () => {
    const two = withThreads(each_, 2);
    const rows = 5, cols = 23, epsilon = 1e-5;
    const x = gaussians(1, rows * cols), dy = gaussians(2, rows * cols), weight = gaussians(3, cols);

    test("RMS norm", () => {
      const norm = (x: Float64Array) =>
        each(x, (value, i) => {
          const row = x.subarray(i - i % cols, i - i % cols + cols);
          return value / Math.sqrt(dot(row, row) / cols + epsilon) * weight[i % cols]!;
        });
      const dx = new Float32Array(x.length);
      rmsNormBackward(two, x, dy, { rows, cols, weight, epsilon }, dx);
      expectGradient(dx, differences(x, (x) => dot(norm(x), dy)));
    });

    test("layer norm, with and without weights", () => {
      for (const w of [weight, undefined]) {
        const norm = (x: Float64Array) =>
          each(x, (value, i) => {
            const row = x.subarray(i - i % cols, i - i % cols + cols);
            const mean = row.reduce((a, b) => a + b) / cols;
            const variance = row.reduce((sum, v) => sum + (v - mean) ** 2, 0) / cols;
            return (value - mean) / Math.sqrt(variance + epsilon) * (w?.[i % cols] ?? 1);
          });
        const dx = dy.slice();
        layerNormBackward(two, x, dx, { rows, cols, weight: w, epsilon }, dx); // in place
        expectGradient(dx, differences(x, (x) => dot(norm(x), dy)));
      }
    });

    test("SiLU, GELU and SiLU times up, far from 0 too", () => {
      const wide = gaussians(4, 301).map((value) => 4 * value),
        up = gaussians(5, 301),
        dy = gaussians(6, 301);
      const dx = new Float32Array(301), dup = new Float32Array(301);
      siluBackward(two, wide, dy, dx);
      expectGradient(dx, differences(wide, (x) => dot(each(x, (v) => v * sigmoid(v)), dy)));
      geluTanhBackward(two, wide, dy, dx);
      expectGradient(dx, differences(wide, (x) => dot(each(x, geluTanh), dy)));
      siluMultiplyBackward(two, { gate: wide, up }, dy, { dgate: dx, dup });
      expectGradient(dx, differences(wide, (x) => dot(each(x, (v, i) => v * sigmoid(v) * up[i]!), dy)));
      expectGradient(dup, differences(up, (up) => dot(each(wide, (v, i) => v * sigmoid(v) * up[i]!), dy)));
      const far = Float32Array.of(-200, -88, 88, 200);
      siluBackward(two, far, Float32Array.of(1, 1, 1, 1), dx.subarray(0, 4));
      expect([...dx.subarray(0, 4)].map((v) => Math.round(v * 1e6) / 1e6 + 0)).toEqual([0, 0, 1, 1]);
    });

    test("attention: grouped heads, masks, more tokens than a block of either kind", () => {
      for (const { shape, inputs, dy, wanted } of attentions()) {
        const gradients = {
          dq: new Float32Array(inputs.q.length),
          dk: new Float32Array(inputs.k.length),
          dv: new Float32Array(inputs.v.length),
        };
        attentionBackward(two, inputs, dy, shape, gradients);
        for (const name of ["dq", "dk", "dv"] as const) expectGradient(gradients[name], wanted[name]);
      }
    });

    test("scales and zero points of packed weights, at every width and group size", () => {
      for (const bits of [2, 3, 4, 8] as const) {
        for (const [groupSize, cols] of [[16, 40], [32, 70], [64, 100], [0, 300], [256, 530]] as const) {
          for (const zeroPointKind of ["real", "symmetric"] as const) {
            const rows = 3, dw = gaussians(12, rows * cols);
            const packed = quantize(each_, { data: gaussians(13, rows * cols), dtype: "F32" }, rows, cols, {
              bits,
              groupSize,
              zeroPoint: zeroPointKind,
            });
            const dscale = new Float32Array(packed.scale.length);
            const dzero = zeroPointKind === "real" ? new Float32Array(packed.scale.length) : undefined;
            packedGradient(two, dw, packed, dscale, dzero);
            const values = parametersOf(packed);
            const loss = (scale: Float64Array, zero: Float64Array) => dot(weightsOf(packed, scale, zero), dw);
            expectGradient(dscale, differences(values.scale, (scale) => loss(scale, values.zero)));
            if (dzero !== undefined) {
              expectGradient(dzero, differences(values.zero, (zero) => loss(values.scale, zero)));
            }
          }
        }
      }
    });

    test("column sums, by batch item and with a stride; transposition", () => {
      const batch = 2, tokens = 7, cols = 70, stride = 100;
      const a = gaussians(14, batch * tokens * cols), b = gaussians(15, a.length);
      const out = new Float32Array(batch * stride).fill(7);
      columnSums(two, a, b, { batch, tokens, cols, stride }, out);
      for (let item = 0; item < batch; item++) {
        for (let col = 0; col < stride; col++) {
          let sum = 0;
          for (let t = 0; t < tokens; t++) {
            const at = (item * tokens + t) * cols + col;
            sum += a[at]! * b[at]!;
          }
          expect(out[item * stride + col]).toBe(col < cols ? Math.fround(sum) : 7);
        }
      }
      const turned = new Float32Array(a.length);
      transpose(two, a, batch * tokens, cols, turned);
      for (let i = 0; i < a.length; i++) {
        expect(turned[i % cols * batch * tokens + Math.floor(i / cols)]).toBe(a[i]!);
      }
    });
  });
}

test("every instruction set and number of threads gives the same bits", () => {
  const shape = { batch: 3, tokens: 67, heads: 4, kvHeads: 2, headSize: 20 };
  const queries = 3 * 67 * 80, keys = queries / 2;
  const [q, dout, k, v] = [
    gaussians(1, queries),
    gaussians(2, queries),
    gaussians(3, keys),
    gaussians(4, keys),
  ];
  const out = Float32Array.from(attention(q, k, v, shape));
  const digests = everywhere.flatMap(({ name, kernels: each }) =>
    [1, 3].map((threads) => {
      const own = withThreads(each, threads), norm = { rows: 3 * 67, cols: 80, epsilon: 1e-6 };
      const results = Array.from({ length: 5 }, () => new Float32Array(queries));
      rmsNormBackward(own, q, dout, norm, results[0]!);
      layerNormBackward(own, q, dout, norm, results[1]!);
      siluMultiplyBackward(own, { gate: q, up: dout }, out, { dgate: results[2]!, dup: results[3]! });
      geluTanhBackward(own, q, dout, results[4]!);
      const gradients = {
        dq: new Float32Array(queries),
        dk: new Float32Array(keys),
        dv: new Float32Array(keys),
      };
      attentionBackward(own, { q, k, v, out }, dout, shape, gradients);
      return { name, values: [...results, ...Object.values(gradients)] };
    })
  );
  for (const { values } of digests.slice(1)) expect(values).toEqual(digests[0]!.values);
});

/** Memory of as little as there may be: most parameters are in a file. */
const pagedMemory = () => new PagedFloats({ memoryBytes: 0, path: place.fresh() });

/** Scales and zero points of a packed tensor in float64. */
function parametersOf({ scale, zeroPoint, bits }: OneLevelTensor) {
  const halves = (bits: Uint16Array<ArrayBuffer>) =>
    Float64Array.from(new Float16Array(bits.buffer, bits.byteOffset, bits.length));
  return {
    scale: halves(scale),
    zero: zeroPoint === undefined ? new Float64Array(scale.length).fill(2 ** (bits - 1)) : halves(zeroPoint),
  };
}

/** Its weights for other scales and zero points. */
function weightsOf(tensor: OneLevelTensor, scale: Float64Array, zero: Float64Array): Float64Array {
  const { rows, cols, bits, groupSize } = tensor;
  const codes = unpackCodes(kernels, tensor.packed, rows, cols, bits);
  const groups = scale.length / rows, size = groupSize === 0 ? cols : groupSize;
  return each(codes, (code, i) => {
    const group = Math.floor(i / cols) * groups + Math.floor(i % cols / size);
    return scale[group]! * (code - zero[group]!);
  });
}

/** Central differences in the float64 reference model by some of a layer's parameters. */
function check(layer: RefinableLinear, weights: Weights, loss: (weights: Weights) => number): number {
  if (layer.parameters.length === 0) return 0;
  const tensor = layer.layer.weights as OneLevelTensor;
  const values = parametersOf(tensor);
  let checked = 0;
  for (const { name, gradients } of layer.parameters) {
    const picked = [0, Math.floor(gradients.length / 3), gradients.length - 1];
    const wanted = picked.map((i) => {
      const kind = name.split(" ")[1];
      const scale = values.scale.slice(), zero = values.zero.slice();
      const biasName = layer.layer.name.replace(/weight$/, "bias");
      const bias = kind === "bias" ? weights(biasName).slice() : undefined;
      const target = kind === "scale" ? scale : kind === "zero_point" ? zero : bias!;
      const at = target[i]!, step = 1e-4 * (kind === "scale" ? at : 1);
      const changed = (value: number) => {
        target[i] = value;
        const w = weightsOf(tensor, scale, zero);
        return loss((wanted) =>
          wanted === layer.layer.name ? w : wanted === biasName && bias !== undefined ? bias : weights(wanted)
        );
      };
      return (changed(at + step) - changed(at - step)) / (2 * step);
    });
    // Entries next to nothing are held against the largest of their kind, and a key's bias, which softmax
    // takes out, against 1.
    const largest = Math.max(...gradients.map(Math.abs));
    for (const [k, i] of picked.entries()) {
      const error = Math.abs(gradients[i]! - wanted[k]!);
      if (!(error <= 1e-3 * Math.abs(wanted[k]!) + 1e-4 * largest + 1e-6)) {
        throw new Error(`${name} ${i}: ${gradients[i]}, central differences say ${wanted[k]}`);
      }
      checked++;
    }
  }
  return checked;
}

describe("a whole masked transformer, packed", () => {
  const tokens = 7, batch = 2;
  const random = randomStream(21);
  const ids = Int32Array.from(
    { length: batch * tokens },
    () => Math.floor(random() * SMALL_LANGUAGE.vocabulary),
  );
  const rows = Int32Array.of(1, 2, 5, 9, 9, 13);
  const dlogits = gaussians(22, rows.length * SMALL_LANGUAGE.vocabulary);

  const dream: LanguageModel = {
    ...SMALL_LANGUAGE,
    embedding: "model.embed_tokens",
    head: "lm_head",
    finalNorm: "model.norm",
    block: (i) =>
      [
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
      ].map((name) => `model.layers.${i}.${name}`),
    epsilon: 1e-6,
    theta: 1_000_000,
    bias: true,
  };
  const llada: LanguageModel = {
    ...SMALL_LANGUAGE,
    embedding: "model.transformer.wte",
    head: "model.transformer.ff_out",
    finalNorm: "model.transformer.ln_f",
    block: (i) =>
      ["attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out"]
        .map((name) => `model.transformer.blocks.${i}.${name}`),
    epsilon: 1e-5,
    theta: 500_000,
    bias: false,
  };

  for (
    const { name, made, load, model, zeroPoint } of [
      { name: "Dream", made: dreamCheckpoint(), load: loadDream, model: dream, zeroPoint: "real" },
      {
        name: "Dream, symmetric",
        made: dreamCheckpoint(),
        load: loadDream,
        model: dream,
        zeroPoint: "symmetric",
      },
      { name: "LLaDA", made: lladaCheckpoint(), load: loadLlada, model: llada, zeroPoint: "real" },
    ] as const
  ) {
    test(`${name}: scales, zero points and biases of every layer`, async () => {
      const output = place.fresh();
      const { config } = resolveConfig({
        overrides: {
          solver: "clip",
          bit_width: 3,
          group_size: 32,
          zero_point: zeroPoint,
          layer_bit_widths: { [model.head]: 4 },
        },
      });
      await quantizeCheckpoint({ input: store(place.fresh(), made), output, config, kernels });
      const packed = load(output, kernels);
      const loss = (weights: Weights) => {
        let sum = 0;
        for (let b = 0; b < batch; b++) {
          const logits = languageLogits(weights, model, [...ids.subarray(b * tokens, (b + 1) * tokens)]);
          for (const [i, row] of rows.entries()) {
            if (Math.floor(row / tokens) !== b) continue;
            sum += dot(logits[row % tokens]!, dlogits.subarray(i * 50, (i + 1) * 50));
          }
        }
        return sum;
      };
      const weights = readWeights(output, kernels);
      using memory = pagedMemory();
      const results = [false, true].map((recompute) => {
        const gradients = new MaskedTransformerGradients(packed, {
          recompute,
          memory: recompute ? memory : undefined,
        });
        const logits = gradients.forward(ids, batch, rows);
        expect([...logits]).toEqual([...packed.forward(ids, batch, { rows })]);
        gradients.backward(dlogits);
        return gradients;
      });
      expect(results[1]!.scratchBytes).toBeLessThan(results[0]!.scratchBytes);
      for (const [i, layer] of results[0]!.layers.entries()) {
        expect(results[1]!.layers[i]!.parameters.map((p) => p.gradients)).toEqual(
          layer.parameters.map((p) => p.gradients),
        );
      }
      const checked = results[0]!.layers.map((layer) => check(layer, weights, loss));
      const kinds = zeroPoint === "real" ? 2 : 1;
      expect(checked.reduce((a, b) => a + b)).toBe(3 * (kinds * 15 + (model.bias ? 6 : 0)));
    });
  }

  test("gradients add up over calls, and are cleared; bad calls are refused", async () => {
    const output = place.fresh();
    const { config } = resolveConfig({ overrides: { solver: "clip", bit_width: 2, group_size: 0 } });
    await quantizeCheckpoint({ input: store(place.fresh(), dreamCheckpoint()), output, config, kernels });
    const gradients = new MaskedTransformerGradients(loadDream(output, kernels), {
      parts: { biases: false },
    });
    expect(() => gradients.backward(dlogits)).toThrow("a forward pass must come before");
    gradients.forward(ids, batch, rows);
    expect(() => gradients.backward(dlogits.subarray(1))).toThrow("dlogits must be [6, 50]");
    gradients.backward(dlogits);
    const [scale] = gradients.layers[0]!.parameters;
    const once = scale!.gradients.slice();
    expect(once.some((value) => value !== 0)).toBe(true);
    gradients.forward(ids, batch, rows);
    gradients.backward(dlogits);
    expect([...scale!.gradients]).toEqual([...once.map((value) => 2 * value)]);
    gradients.layers[0]!.clearGradients();
    expect(scale!.gradients.every((value) => value === 0)).toBe(true);
    expect(gradients.layers.flatMap((layer) => layer.parameters).some((p) => p.name.endsWith("bias"))).toBe(
      false,
    );
  });
});

/** Bits of the conditioning's layers, which are kept unless they are asked for by name. */
const CONDITIONING = Object.fromEntries(
  [0, 1].flatMap((block) =>
    [1, 2].map((i) => [`transformer_blocks.${block}.norm1.emb.timestep_embedder.linear_${i}`, 4] as const)
  ),
);

test("a whole DiT, packed: scales, zero points and biases of every layer, the conditioning's too", async () => {
  const sizes = { ...SMALL_IMAGE, normHasWeights: true, classes: 3 };
  const output = place.fresh();
  const { config } = resolveConfig({
    overrides: {
      solver: "clip",
      bit_width: 4,
      group_size: 16,
      layer_bit_widths: { ...CONDITIONING, "proj_out_1": 3, "proj_out_2": 3 },
    },
  });
  await quantizeCheckpoint({ input: store(place.fresh(), ditCheckpoint(sizes)), output, config, kernels });
  const packed = loadDit(output, kernels);
  const elements = 3 * 8 * 8, times = [700, 3], labels = [2, 0];
  const samples = gaussians(31, 2 * elements), doutput = gaussians(32, 4 * elements);
  const weights = readWeights(output, kernels);
  const model: ImageModel = { ...sizes, width: sizes.heads * sizes.headSize, epsilon: 1e-5 };
  const loss = (weights: Weights) =>
    times.reduce((sum, time, i) => {
      const image = samples.subarray(i * elements, (i + 1) * elements);
      const out = imagePrediction(weights, model, image, time, labels[i]!);
      return sum + dot(out, doutput.subarray(i * out.length, (i + 1) * out.length));
    }, 0);
  using memory = pagedMemory();
  const results = [false, true].map((recompute) => {
    const gradients = new DitGradients(packed, { recompute, memory: recompute ? memory : undefined });
    expect([...gradients.forward(samples, times, labels)]).toEqual([
      ...packed.forward(samples, times, labels),
    ]);
    gradients.backward(doutput);
    return gradients;
  });
  expect(results[1]!.scratchBytes).toBeLessThan(results[0]!.scratchBytes);
  for (const [i, layer] of results[0]!.layers.entries()) {
    expect(results[1]!.layers[i]!.parameters.map((p) => p.gradients)).toEqual(
      layer.parameters.map((p) => p.gradients),
    );
  }
  const checked = results[0]!.layers.map((layer) => check(layer, weights, loss));
  expect(results[0]!.layers.filter(({ parameters }) => parameters.length > 0).length).toBe(
    results[0]!.layers.filter(({ layer }) => "packed" in layer.weights).length,
  );
  expect(checked.reduce((a, b) => a + b)).toBeGreaterThan(9 * 2 * 6);
});

test("biases by time group, of every layer and of every image's own group", async () => {
  const output = place.fresh();
  const { config } = resolveConfig({
    overrides: { solver: "clip",
      bit_width: 4, group_size: 16, layer_bit_widths: CONDITIONING },
  });
  await quantizeCheckpoint({ input: store(place.fresh(), ditCheckpoint()), output, config, kernels });
  const timeGroups = equalTimeGroups(timestepAxis(1000), 3);
  const gradients = new DitGradients(loadDit(output, kernels), { timeGroups });
  const elements = 3 * 8 * 8, times = [700, 3, 900], labels = [2, 0, 1]; // groups 2, 0, 2
  const samples = gaussians(31, 3 * elements), doutput = gaussians(32, 6 * elements);
  // Away from 0, so that it is seen that they are added.
  for (const [i, { timeBias }] of gradients.layers.entries()) {
    timeBias?.values.set(gaussians(50 + i, timeBias.values.length).map((v) => 0.1 * v));
  }
  const weights = readWeights(output, kernels);
  const model: ImageModel = { ...SMALL_IMAGE, width: 24, epsilon: 1e-5 };
  const byName = new Map(
    gradients.layers.map((layer) => [layer.layer.name.replace(/weight$/, "bias"), layer]),
  );
  const loss = (name: string, values: Float64Array) =>
    times.reduce((sum, time, i) => {
      const group = timeGroups.groupOf(time);
      const own: Weights = (wanted) => {
        const layer = byName.get(wanted);
        if (layer?.timeBias === undefined) return weights(wanted);
        const from = wanted === name ? values : layer.timeBias.values;
        return each(weights(wanted), (bias, row) => bias + from[group * layer.rows + row]!);
      };
      const out = imagePrediction(
        own,
        model,
        samples.subarray(i * elements, (i + 1) * elements),
        time,
        labels[i]!,
      );
      return sum + dot(out, doutput.subarray(i * out.length, (i + 1) * out.length));
    }, 0);
  gradients.forward(samples, times, labels);
  gradients.backward(doutput);
  let checked = 0;
  for (const [name, { timeBias, rows }] of byName) {
    if (timeBias === undefined) continue;
    const largest = Math.max(...timeBias.gradients.map(Math.abs));
    for (const at of [0, rows + 1, 2 * rows + Math.floor(rows / 2)]) {
      const values = Float64Array.from(timeBias.values), start = values[at]!;
      values[at] = start + 1e-4;
      const above = loss(name, values);
      values[at] = start - 1e-4;
      const wanted = (above - loss(name, values)) / 2e-4;
      const error = Math.abs(timeBias.gradients[at]! - wanted);
      if (!(error <= 1e-3 * Math.abs(wanted) + 1e-4 * largest + 1e-6)) {
        throw new Error(`${name} ${at}: ${timeBias.gradients[at]}, central differences say ${wanted}`);
      }
      if (at === rows + 1) expect(timeBias.gradients[at]).toBe(0); // no image is in group 1
      checked++;
    }
  }
  expect(checked).toBeGreaterThan(50);
});
