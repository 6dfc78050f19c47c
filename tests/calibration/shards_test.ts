/** Statistics of parts of the samples, and of all of them. */
import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { mergeStatisticsFiles, saveCalibrationOf } from "../../lib/pipeline/mod.ts";
import { loadStatistics } from "../../lib/calibration/saved_statistics.ts";
import { modelFingerprint } from "../../lib/time/mod.ts";
import { openCheckpoint, SafetensorsFile } from "../../lib/tensor/mod.ts";
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

/**
 * The largest relative difference of each kind of value: of a product's mean to its bound by Cauchy and Schwarz, as sums of
 * both signs may be 0, and of others to the value.
 */
function differencesOf(a: string, b: string): Record<string, number> {
  using left = SafetensorsFile.open(a);
  using right = SafetensorsFile.open(b);
  expect({ ...right.metadata }).toEqual({ ...left.metadata });
  const worst: Record<string, number> = {};
  const read = (file: SafetensorsFile, name: string) => {
    const { dtype, byteLength } = file.tensors.get(name)!, bytes = new Uint8Array(byteLength);
    file.readInto(name, 0, bytes);
    const View = { F64: Float64Array, F32: Float32Array, I32: Int32Array }[dtype as "F64"];
    return [...new View(bytes.buffer)];
  };
  for (const [name, { shape }] of left.tensors) {
    const [x, y] = [read(left, name), read(right, name)],
      kind = name.split(".").at(-1)!,
      cols = shape[1] ?? 1;
    const squares = kind === "sum" ? read(left, name.replace(/sum$/, "squares")) : [];
    const weight = kind === "sum" ? read(left, name.replace(/sum$/, "weight")) : [];
    const scale = (i: number) =>
      kind === "second"
        ? Math.sqrt(x[Math.floor(i / cols) * (cols + 1)]! * x[(i % cols) * (cols + 1)]!)
        : kind === "sum"
        ? Math.sqrt(squares[i]! * weight[Math.floor(i / cols)]!)
        : Math.abs(x[i]!);
    for (const [i, value] of x.entries()) {
      const error = value === y[i] ? 0 : Math.abs(value - y[i]!) / scale(i);
      worst[kind] = Math.max(worst[kind] ?? 0, error);
    }
  }
  return worst;
}

describe("statistics in parts", () => {
  test("merge to those of one pass: metadata and counts equal, sums to 1e-6, moments as far as float32 goes", () => {
    const merged = `${place.fresh()}.safetensors`;
    mergeStatisticsFiles(parts, merged, {});
    const { boundaries, tokens, samples, range, histogram, ...sums } = differencesOf(whole, merged);
    expect([boundaries, tokens, samples, range, histogram]).toEqual([0, 0, 0, 0, 0]);
    expect(Object.keys(sums).sort()).toEqual(["second", "squares", "sum", "weight"]);
    // One pass adds moments up in float32 over all positions, where a token's embedding comes again and again.
    const { second, ...doubles } = sums;
    expect(second).toBeLessThan(5e-5);
    for (const error of Object.values(doubles)) expect(error).toBeLessThan(1e-6);
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
  });

  test("cannot be of more parts than samples", async () => {
    const error = await rejection(save(`${place.fresh()}.safetensors`, { index: 1, count: 100 }));
    expect(error.message).toContain("there must be a sample for each");
  });
});
