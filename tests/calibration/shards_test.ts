/** Statistics of parts of the samples, and of all of them. */
import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { mergeStatisticsFiles, saveCalibrationOf } from "../../lib/pipeline/mod.ts";
import { loadStatistics } from "../../lib/calibration/saved_statistics.ts";
import { modelFingerprint } from "../../lib/time/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { MODELS, rejection, workplace } from "../_checkpoints.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

const INPUT = join(MODELS, "dream-mini");
const { config } = resolveConfig({ overrides: { calibration_samples: 64, solver: "feedback" } });

async function save(
  path: string,
  shard?: { readonly index: number; readonly count: number },
): Promise<string> {
  await saveCalibrationOf({ input: INPUT, config, kernels, saveCalibration: { path, shard } });
  return shard === undefined
    ? path
    : path.replace(".safetensors", `.shard-${shard.index}-of-${shard.count}.safetensors`);
}

const whole = await save(`${place.fresh()}.safetensors`);
const path = `${place.fresh()}.safetensors`;
const parts: string[] = [];
for (const index of [2, 3, 1]) parts.push(await save(path, { index, count: 3 }));

describe("statistics in parts", () => {
  test("merge to the bytes of one pass, in two, three and seven parts", async () => {
    const one = readFileSync(whole);
    for (const count of [2, 3, 7]) {
      const path = `${place.fresh()}.safetensors`, own: string[] = [];
      for (let index = count; index >= 1; index--) {
        own.push(count === 3 ? parts[index % 3]! : await save(path, { index, count }));
      }
      const merged = `${place.fresh()}.safetensors`;
      mergeStatisticsFiles(own, merged, {});
      expect(readFileSync(merged).equals(one)).toBe(true);
    }
  });

  test("merge to equal bytes in any order", () => {
    const outputs = [parts, parts.toReversed(), [parts[1]!, parts[0]!, parts[2]!]].map((own) => {
      const output = `${place.fresh()}.safetensors`;
      mergeStatisticsFiles(own, output, {});
      return readFileSync(output);
    });
    for (const output of outputs) expect(output.equals(outputs[0]!)).toBe(true);
  });

  test("that are merged already are left, and other statistics are not replaced", async () => {
    const output = `${place.fresh()}.safetensors`, messages: string[] = [];
    mergeStatisticsFiles(parts, output, {});
    const before = readFileSync(output);
    mergeStatisticsFiles(parts, output, { onEvent: ({ message }) => messages.push(message) });
    expect(messages.join()).toContain("has these statistics");
    expect(readFileSync(output).equals(before)).toBe(true);
    const other = await save(`${place.fresh()}.safetensors`, { index: 1, count: 1 });
    expect(() => mergeStatisticsFiles(parts, other, {})).toThrow("must not exist");
  });

  test("are solved on as one, and not without a part", () => {
    using checkpoint = openCheckpoint(INPUT);
    const fingerprint = modelFingerprint(checkpoint);
    expect(loadStatistics(parts, fingerprint).samples).toBe(64);
    expect(() => loadStatistics(parts.slice(0, 2), fingerprint)).toThrow("missing: 1/3");
  });

  test("are refused where one is there twice, or of another division", async () => {
    const merge = (own: readonly string[]) => () =>
      mergeStatisticsFiles(own, `${place.fresh()}.safetensors`, {});
    expect(merge([...parts, parts[0]!])).toThrow("got twice: 2/3");
    const other = await save(`${place.fresh()}.safetensors`, { index: 1, count: 2 });
    expect(merge([...parts, other])).toThrow("of one division");
    const seeded = { ...config, calibrationSeed: 9 }, path = `${place.fresh()}.safetensors`;
    const saveCalibration = { path, shard: { index: 1, count: 3 } };
    await saveCalibrationOf({ input: INPUT, config: seeded, kernels, saveCalibration });
    const mixed = [parts[0]!, parts[1]!, path.replace(".safetensors", ".shard-1-of-3.safetensors")];
    expect(merge(mixed)).toThrow(/missing: 1\/3; 1\/3 are of another pass: .*seed/);
  });

  test("cannot be of more parts than there are chunks of samples", async () => {
    const error = await rejection(save(`${place.fresh()}.safetensors`, { index: 1, count: 100 }));
    expect(error.message).toContain("there must be at most 8 shards");
  });
});
