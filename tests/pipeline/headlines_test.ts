/** What a summary says first: bits of all weights, the error that counts, the programs that read the result. */
import { afterAll, expect, test } from "bun:test";
import { WeightsError } from "../../lib/errors.ts";
import { loadModel } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { dequantizeCheckpoint, opensIn, outputErrors } from "../../lib/pipeline/mod.ts";
import { openRun } from "../../lib/pipeline/open_run.ts";
import { unwrittenTokens } from "../../lib/thermo/mod.ts";
import { gaussian, matrix, workplace, writeCheckpoint } from "../_checkpoints.ts";
import { configOf, DREAM, pipelineRuns } from "./_runs.ts";

const kernels = await openKernels();
const place = workplace();
afterAll(() => {
  kernels.close();
  place.remove();
});
const { quantizeTo } = pipelineRuns(kernels, place);

/** Probabilities of the tokens that can be written, in float64. */
function probabilities(logits: Float32Array, left: ReadonlySet<number>): number[] {
  const top = Math.max(...logits.filter((_, token) => !left.has(token)));
  const powers = [...logits].map((value, token) => left.has(token) ? 0 : Math.exp(value - top));
  const sum = powers.reduce((total, value) => total + value, 0);
  return powers.map((value) => value / sum);
}

test("the held-out error is the KL of the written model, its packed embedding and head included", async () => {
  const config = {
    bit_width: 2,
    solver: "feedback",
    calibration_samples: 32,
    embedding_bits: 3,
    head_bits: 4,
  };
  const output = place.fresh();
  const report = await quantizeTo(output, DREAM, { config });
  using run = openRun({ input: DREAM, config: configOf(config), kernels });
  const calibrated = await run.calibration.open();
  const packed = loadModel(output, kernels), full = loadModel(DREAM, kernels);
  if (calibrated.kind !== "sequences" || packed.kind === "dit" || full.kind === "dit") {
    throw new Error("text");
  }
  const { vocabularySize, maskToken } = full.model.config, left = new Set(unwrittenTokens(full.model.config));
  let sum = 0, count = 0;
  for (const { batch, samples } of calibrated.data.heldOut) {
    const { inputIds, attentionMask } = batch, tokens = inputIds.length / samples;
    const logits = [full, packed].map(({ model }) =>
      model.forward(inputIds, samples, { attentionMask }).slice()
    );
    for (const [place, token] of inputIds.entries()) {
      if (token !== maskToken) continue;
      const row = full.model.logitRow(place, tokens) * vocabularySize;
      const [p, q] = logits.map((all) => probabilities(all.subarray(row, row + vocabularySize), left));
      sum += p!.reduce((kl, value, i) => kl + (value > 0 ? value * Math.log(value / q![i]!) : 0), 0);
      count++;
    }
  }
  expect(report.heldOut!.metric).toBe("KL at masked positions, nats");
  expect(report.heldOut!.value / (sum / count)).toBeCloseTo(1, 3);
  const errors = outputErrors(report.layers);
  expect(errors.length).toBe(4 * 7);
  expect(errors.map(({ error }) => error)).toEqual(
    errors.map(({ error }) => error).toSorted((a, b) => b - a),
  );
});

test("without calibration there is none; bits of all weights count kept tensors", async () => {
  const { heldOut, totals, layers } = await quantizeTo(place.fresh(), DREAM, { config: { bit_width: 2 } });
  expect(heldOut).toBeUndefined();
  const weights = layers.reduce((sum, { shape }) => sum + shape.reduce((a, b) => a * b, 1), 0);
  const bytes = layers.reduce((sum, { bytesAfter }) => sum + bytesAfter, 0);
  expect(totals.bitsPerWeightOfAll).toBe(bytes * 8 / weights);
  expect(totals.bitsPerWeightOfAll).toBeGreaterThan(totals.bitsPerWeight);
});

test("what opens a result, and what would make others", async () => {
  const own = await quantizeTo(place.fresh(), DREAM, { config: {} });
  expect(own.opensIn).toMatch(/^ArrowQuant \(.*arrowquant export/);
  const shared = place.fresh();
  expect((await quantizeTo(shared, DREAM, { config: { zero_point: "symmetric", group_size: 16 } })).opensIn)
    .toMatch(
      /compressed-tensors' pack-quantized/,
    );
  const plain = await dequantizeCheckpoint({ input: shared, output: place.fresh(), kernels });
  expect(plain.opensIn).toMatch(/^transformers/);
  expect(opensIn("dit", undefined)).toMatch(/^diffusers/);
  expect(opensIn("unknown", "gptq")).toBe("programs that read gptq; not ArrowQuant");
});

test("weights beyond a type's range are no infinities after dequantizing", async () => {
  const input = writeCheckpoint(place.fresh(), {
    "a.weight": matrix(8, 128, gaussian(1024, 3, 6e4)),
  });
  const packed = place.fresh();
  await quantizeTo(packed, input, { config: { bit_width: 8 } });
  const refused = dequantizeCheckpoint({ input: packed, output: place.fresh(), kernels, dtype: "F16" });
  await expect(refused).rejects.toThrow(WeightsError);
  await expect(refused).rejects.toThrow(/"a\.weight".*got at least \d{3} beyond ±65504/);
  await dequantizeCheckpoint({ input: packed, output: place.fresh(), kernels, dtype: "BF16" });
});
