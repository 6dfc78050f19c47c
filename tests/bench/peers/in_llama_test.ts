import { describe, expect, test } from "bun:test";
import { openGgml } from "../../../lib/bench/ggml.ts";
import { llamaContenders, llamaGoals } from "../../../lib/bench/peers/in_llama.ts";
import { type QuantizedModel, targetOf } from "../../../lib/bench/peers/quantized_model.ts";
import { modelFrom } from "../../../lib/models/mod.ts";
import { openKernels } from "../../../lib/native/mod.ts";
import { openCheckpoint } from "../../../lib/tensor/mod.ts";
import { workplace, writeCheckpoint } from "../../_checkpoints.ts";
import { dreamCheckpoint } from "../../_models.ts";

describe("files that llama.cpp runs", () => {
  test("are those of its own quantizers and ours, with forward passes near full precision", async () => {
    const ggml = await openGgml();
    if ("reason" in ggml) return console.log(`skipped: ${ggml.reason}`);
    const place = workplace(), kernels = await openKernels({ threads: 1 });
    const sizes = { width: 256, inner: 256, blocks: 1, heads: 4, kvHeads: 2, vocabulary: 40 };
    const { tensors, config } = dreamCheckpoint(sizes, "F32"),
      path = writeCheckpoint(place.fresh(), tensors, config);
    using checkpoint = openCheckpoint(path);
    const full = modelFrom(checkpoint, kernels);
    const found = await llamaContenders(ggml, await targetOf({ path, checkpoint, full, kernels }, true));
    if ("reason" in found) return console.log(`skipped: ${found.reason}`);
    try {
      expect(found.contenders.map(({ name }) => name.replace("llama.cpp: ", ""))).toEqual([
        ...["its Q2_K + imatrix", "its IQ2_XS + imatrix", "its IQ2_S + imatrix", "its Q3_K + imatrix"],
        ...["its Q4_K + imatrix", "our Q2_K, best", "our Q2_0, best", "our Q3_K, best", "our Q4_K, best"],
      ]);
      const { forward } = full.model as {
        forward: (ids: Int32Array, batch: number, how?: object) => Float32Array;
      };
      const ids = Int32Array.from({ length: 12 }, (_, i) => (i * 5) % 40), rows = Int32Array.of(1, 9);
      const wanted = forward.call(full.model, ids, 2, { rows }).slice();
      const theirs = await found.contenders[4]!.quantize(undefined!) as QuantizedModel;
      const logits = (theirs.model.model as unknown as { forward: typeof forward }).forward(ids, 2, { rows });
      const difference = logits.reduce((sum, value, i) => sum + (value - wanted[i]!) ** 2, 0);
      expect(difference / wanted.reduce((sum, value) => sum + value ** 2, 0)).toBeLessThan(0.05);
      expect(theirs.storedBytes).toBeGreaterThan(theirs.weights * 4.5 / 8);
    } finally {
      found.close();
      ggml.close();
      kernels.close();
      place.remove();
    }
  }, 120_000);

  test("have goals beside each other", () => {
    const distances = new Map([["llama.cpp: its Q2_K + imatrix", 0.4], ["llama.cpp: our Q2_K, best", 0.2]]);
    expect(llamaGoals("m", distances)).toMatchObject([{ met: false, measured: "0.500 × (0.200 / 0.400)" }]);
  });
});
