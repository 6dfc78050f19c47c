/** Models whose packed layers read inputs of 8 bits, each token by its own range. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { yardstickOf } from "../../lib/eval/yardstick.ts";
import { type LinearLayer, loadDream, loadModel, loadStoredModel } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { dequantize, type OneLevelTensor, quantize } from "../../lib/quant/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { equalTimeGroups, maskRatioAxis, TimeParameters } from "../../lib/time/mod.ts";
import { MODELS, workplace } from "../_checkpoints.ts";
import { gaussians } from "../_kernels.ts";

const kernels = await openKernels({ threads: 1 });
const place = workplace();
afterAll(() => {
  kernels.close();
  place.remove();
});

async function quantized(name: string, overrides: Record<string, unknown>): Promise<string> {
  const input = join(MODELS, name), output = place.fresh();
  await quantizeCheckpoint({
    input,
    output,
    config: resolveConfig({ overrides: { solver: "clip", ...overrides } }).config,
    kernels,
  });
  return output;
}

const dream = await quantized("dream-mini", { bit_width: 4 });
const dreamIds = Int32Array.from({ length: 24 }, (_, i) => 4 + i * 7 % 20);

/** A layer in float64: each token rounded to 256 values from its own minimum, or 0, to its maximum, or 0. */
function expectedOutput(
  { weights, bias }: LinearLayer,
  x: Float32Array,
  count: number,
): Float64Array {
  const { rows, cols } = weights, w = dequantize(kernels, weights as OneLevelTensor);
  const out = new Float64Array(count * rows);
  for (let t = 0; t < count; t++) {
    const token = x.subarray(t * cols, (t + 1) * cols);
    const low = Math.min(0, ...token), high = Math.max(0, ...token), step = (high - low) / 255;
    const zero = Math.round(-low / step);
    const rounded = Array.from(
      token,
      (value) => step * (Math.min(255, Math.max(0, Math.round(value / step) + zero)) - zero),
    );
    for (let n = 0; n < rows; n++) {
      out[t * rows + n] = rounded.reduce((sum, value, k) => sum + value * w[n * cols + k]!, bias?.[n] ?? 0);
    }
  }
  return out;
}

describe("8-bit activations", () => {
  test("a packed layer's output is that of rounded inputs, in float64", () => {
    const { name, weights: { rows, cols } } = loadDream(dream, kernels).parts.head;
    const head = quantize(kernels, { data: gaussians(3, rows * cols), dtype: "F32" }, rows, cols, { bits: 4 });
    const options = { activations: "int8", weights: new Map([[name, head]]) } as const;
    const model = loadDream(dream, kernels, options), seen: [LinearLayer, Float32Array][] = [];
    model.forward(dreamIds, 1, { observe: (layer, x) => void seen.push([layer, x.slice()]) });
    // The logits are what the last layer makes of its input, which came through every other layer.
    const wanted = expectedOutput(...seen.at(-1)!, dreamIds.length), logits = model.forward(dreamIds, 1);
    const scale = Math.max(...wanted.map(Math.abs));
    for (let i = 0; i < wanted.length; i++) {
      expect(Math.abs(logits[i]! - wanted[i]!)).toBeLessThan(2e-3 * scale); // a code apart at a tie
    }
    expect(logits).not.toEqual(loadDream(dream, kernels, { ...options, activations: "f32" }).forward(dreamIds, 1));
  });

  test("layers in full precision stay as they are", () => {
    const path = join(MODELS, "dream-mini");
    const plain = loadDream(path, kernels).forward(dreamIds, 1).slice();
    expect(loadDream(path, kernels, { activations: "int8" }).forward(dreamIds, 1)).toEqual(plain);
  });

  test("layers that time parameters leave in float32 take them too", () => {
    const [layer] = loadDream(dream, kernels).linearLayers;
    const groups = equalTimeGroups(maskRatioAxis(4), 1), theta = new Map([[layer!.name, {}]]);
    const timeParameters = new TimeParameters(groups, theta, "");
    const run = (options: object) => loadDream(dream, kernels, options).forward(dreamIds, 1, { t: 0.5 }).slice();
    const wanted = run({ activations: "int8" });
    expect(run({ activations: "int8", timeParameters })).toEqual(wanted);
    expect(run({ timeParameters })).toEqual(run({}));
  });

  test("cost little of what quantizing the weights costs, on both reference models", async () => {
    const packed = { "dream-mini": dream, "glyph-dit": await quantized("glyph-dit", { bit_width: 4 }) };
    for (const [name, folder] of Object.entries(packed)) {
      using checkpoint = openCheckpoint(join(MODELS, name));
      const yardstick = await yardstickOf(checkpoint, kernels, {
        seed: 1,
        sequences: 8,
        puzzles: 20,
        images: 2,
        trajectories: 2,
      });
      await yardstick.measure(loadModel(join(MODELS, name), kernels));
      const distance = async (activations: "f32" | "int8") =>
        (await yardstick.measure(loadStoredModel(folder, kernels, { activations }))).distance.value;
      expect([name, await distance("int8") < 1.15 * await distance("f32") + 1e-5]).toEqual([name, true]);
    }
  });
});
