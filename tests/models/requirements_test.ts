import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { forwardCost, loadModel, requirementsAt } from "../../lib/models/mod.ts";
import { type Kernels, openKernels } from "../../lib/native/mod.ts";
import { unchecked } from "../../lib/native/kernels.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { MODELS, workplace } from "../_checkpoints.ts";
import {
  ditCheckpoint,
  dreamCheckpoint,
  type ImageSizes,
  type LanguageSizes,
  lladaCheckpoint,
  SMALL_IMAGE,
  SMALL_LANGUAGE,
  store,
} from "../_models.ts";

const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});

/** Kernels that count the multiply-adds of linear layers and attention, from the arguments of their calls. */
function counting(): { kernels: Kernels; multiplyAdds: () => number } {
  let total = 0;
  const calls = { ...unchecked(kernels).calls };
  type Counted = "aq_linear" | "aq_linear_packed" | "aq_linear_trellis" | "aq_linear_two_level" | "aq_attention";
  const count = (name: Counted, of: (args: number[]) => number) => {
    const inner = calls[name] as (...args: never[]) => number;
    Object.assign(calls, {
      [name]: (...args: never[]) => {
        total += of((args as unknown[]).map(Number));
        return inner(...args);
      },
    });
  };
  count("aq_linear", (a) => a[1]! * a[5]! * a[6]!);
  count("aq_linear_packed", (a) => a[1]! * a[6]! * a[7]!);
  count("aq_linear_trellis", (a) => a[1]! * a[6]! * a[7]!);
  count("aq_linear_two_level", (a) => a[1]! * a[8]! * a[9]!);
  count(
    "aq_attention",
    ([, , , , batch, tokens, heads, , size]) => 2 * batch! * tokens! ** 2 * heads! * size!,
  );
  return { kernels: { ...kernels, calls } as Kernels, multiplyAdds: () => total };
}

const made: [string, string, { batch: number; tokens: number; rows?: number }[]][] = [];
const shapes = [
  { batch: 1, tokens: 7 },
  { batch: 3, tokens: 11, rows: 5 },
  { batch: 2, tokens: 5, rows: 10 },
  { batch: 1, tokens: 3, rows: 9 },
];
const wide: LanguageSizes = { ...SMALL_LANGUAGE, width: 64, heads: 8, kvHeads: 1, inner: 40, blocks: 1 };
made.push(["Dream", store(place.fresh(), dreamCheckpoint(SMALL_LANGUAGE, "BF16")), shapes]);
made.push([
  "Dream with a tied head and one block",
  store(place.fresh(), dreamCheckpoint(wide, "F64", true)),
  shapes,
]);
made.push(["LLaDA", store(place.fresh(), lladaCheckpoint(SMALL_LANGUAGE, "F16", true)), shapes]);
const patches: ImageSizes = { ...SMALL_IMAGE, patch: 4, outputChannels: 3, normHasWeights: true };
made.push(["DiT", store(place.fresh(), ditCheckpoint()), [{ batch: 1, tokens: 0 }, { batch: 5, tokens: 0 }]]);
made.push(["DiT of patches of 4", store(place.fresh(), ditCheckpoint(patches, "BF16")), [{
  batch: 3,
  tokens: 0,
}]]);
for (
  const [bits, kind, group] of [[2, "real", 16], [3, "integer", 0], [4, "symmetric", 64], [
    8,
    "real",
    32,
  ]] as const
) {
  for (const input of [made[0]!, made[3]!]) {
    const output = place.fresh();
    const { config } = resolveConfig({ overrides: { solver: "clip", bit_width: bits, zero_point: kind, group_size: group } });
    await quantizeCheckpoint({ input: input[1], output, config, kernels });
    made.push([`${input[0]}, ${bits} bits, ${kind}, groups of ${group}`, output, input[2]]);
  }
}
for (const [bits, scaleBits] of [[2, 4], [4, 6]] as const) {
  for (const input of [made[0]!, made[3]!]) {
    const output = place.fresh();
    const { config } = resolveConfig({ overrides: { solver: "clip", bit_width: bits, scale_bits: scaleBits } });
    await quantizeCheckpoint({ input: input[1], output, config, kernels });
    made.push([`${input[0]}, ${bits} bits, scales of ${scaleBits} bits`, output, input[2]]);
  }
}
for (const scale_bits of [16, 3, 0]) {
  const output = place.fresh(), input = join(MODELS, "dream-mini");
  const form = { codes: "trellis", bit_width: 2, scale_bits, ...(scale_bits === 0 ? { group_size: 0 } : {}) };
  const few = { calibration_samples: 32, calibration_data: "synthetic", solver: "best" };
  const { config } = resolveConfig({ overrides: { ...form, ...few } });
  await quantizeCheckpoint({ input, output, config, kernels });
  made.push([`dream-mini, trellis codes, scales of ${scale_bits} bits`, output, shapes]);
}
const offsets = place.fresh(), { config } = resolveConfig({ overrides: { solver: "clip", zero_point: "offset" } });
await quantizeCheckpoint({ input: made[0]![1], output: offsets, config, kernels });
made.push(["Dream, offsets", offsets, shapes]);

describe("what a model needs, said before it is loaded, is what it then takes", () => {
  for (const [name, path, passes] of made) {
    test(name, () => {
      const needs = requirementsAt(path);
      expect(loadModel(path, kernels).model.weightBytes).toBe(needs.weightBytes);
      for (const shape of passes) {
        const { kernels: counted, multiplyAdds } = counting();
        const { kind, model } = loadModel(path, counted);
        if (kind === "dit") {
          const { batch } = shape;
          model.forward(
            new Float32Array(batch * model.imageElements),
            Array(batch).fill(3),
            Array(batch).fill(0),
          );
        } else {
          const rows = shape.rows === undefined ? undefined : new Int32Array(shape.rows);
          model.forward(new Int32Array(shape.batch * shape.tokens), shape.batch, { rows });
        }
        const cost = forwardCost(needs.model, shape);
        expect([shape, cost]).toEqual([
          shape,
          { activationBytes: model.scratchBytes, multiplyAdds: multiplyAdds() },
        ]);
      }
    });
  }
});
