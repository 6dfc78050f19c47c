/** Experts that one tensor of three dimensions holds, solved each on what it reads. */
import { afterAll, describe, expect, test } from "bun:test";
import { resolveConfig } from "../../lib/config/mod.ts";
import { CalibrationError } from "../../lib/errors.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { dequantizeCheckpoint, quantizeCheckpoint, type RunEvent } from "../../lib/pipeline/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import {
  CalibrationStatistics,
  equalTimeGroups,
  timestepAxis,
  writeCalibrationStatistics,
} from "../../lib/time/mod.ts";
import { gaussian, matrix, rejection, workplace, writeCheckpoint } from "../_checkpoints.ts";
import { gaussians } from "../_kernels.ts";

const place = workplace(), kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

const E = 3, INNER = 32, K = 64, TOKENS = 512;
const EXPERTS = "model.layers.0.mlp.experts", GATE = `${EXPERTS}.gate_up_proj`, DOWN = `${EXPERTS}.down_proj`;
const SHAPES: Readonly<Record<string, readonly [number, number]>> = {
  [GATE]: [2 * INNER, K],
  [DOWN]: [K, INNER],
};
/** Weights of expert e of a stack. */
const weightsOf = (stack: string, e: number, seed = 0) => {
  const [rows, cols] = SHAPES[stack]!;
  return gaussian(rows * cols, seed + 10 * e + (stack === GATE ? 1 : 2));
};
const joined = (parts: Float32Array<ArrayBuffer>[]) => Float32Array.from(parts.flatMap((part) => [...part]));
const stacks = Object.fromEntries(
  Object.entries(SHAPES).map(([name, shape]) => [name, {
    dtype: "F32",
    shape: [E, ...shape],
    data: joined(Array.from({ length: E }, (_, e) => weightsOf(name, e))),
  }]),
);
const CONFIG = { model_type: "unheard" };
const MODEL = writeCheckpoint(place.fresh("stacks"), stacks, CONFIG);

/** Inputs of an expert: few directions, and others for each. */
function inputs(cols: number, e: number): Float32Array<ArrayBuffer> {
  const rank = cols / 4, directions = gaussians(50 + e, rank * cols), at = gaussians(70 + e, TOKENS * rank);
  const noise = gaussians(90 + e, TOKENS * cols);
  return Float32Array.from({ length: TOKENS * cols }, (_, i) => {
    const row = Math.floor(i / cols), col = i % cols;
    let sum = 0.1 * noise[i]!;
    for (let r = 0; r < rank; r++) sum += at[row * rank + r]! * directions[r * cols + col]!;
    return sum;
  });
}

/** Layers of an expert that read the same, by the names that they have where experts are apart. */
const named = (e: number) =>
  [["gate_proj", "up_proj"], ["down_proj"]].map((names) =>
    names.map((name) => `${EXPERTS}.${e}.${name}.weight`)
  );

/** Statistics as collect_statistics.py writes them. */
function statistics(
  groups: readonly (readonly [names: readonly string[], cols: number, e: number])[],
  down: readonly number[] = SHAPES[DOWN]!,
  sampled?: ReadonlyMap<string, Float32Array>,
): string {
  const rowsOf = (name: string): [number, number] =>
    name.includes("down_proj") ? [down[0]!, down[1]!] : [INNER, K];
  const own = new CalibrationStatistics({
    fingerprint: "",
    groups: equalTimeGroups(timestepAxis(1000), 1),
    model: {
      name: "a mixture",
      layers: new Map(groups.flatMap(([names]) => names).map((name) => [name, rowsOf(name)])),
      ...(sampled === undefined ? {} : { samples: sampled }),
    },
    inputs: new Map(groups.map(([names, cols]) => [names[0]!, { cols, layers: names }])),
    runs: [{ identity: "a", source: "a", isSynthetic: true, samples: 1 }],
  });
  for (const [[first], cols, e] of groups) own.add(kernels, first!, inputs(cols, e), TOKENS, { times: [0] });
  const path = `${place.fresh("statistics")}.safetensors`;
  writeCalibrationStatistics(path, own);
  return path;
}

const all = (experts: readonly number[]) =>
  experts.flatMap((e) => named(e).map((names, i) => [names, i === 0 ? K : INNER, e] as const));

function quantize(input: string, calibration_data: string | undefined, more: Record<string, unknown> = {}) {
  const events: RunEvent[] = [], output = place.fresh();
  const own = { bit_width: 2, group_size: 32, num_threads: 1, solver: "best", ...more };
  const { config } = resolveConfig({
    overrides: calibration_data === undefined ? { ...own, solver: "clip" } : { ...own, calibration_data },
  });
  const run = quantizeCheckpoint({
    ...{ input, output, kernels, config },
    onEvent: (event) => events.push(event),
  });
  return { output, events, run };
}

/** Weights of an expert as they are after quantization. */
async function plain(packed: string): Promise<(stack: string, e: number) => Float32Array> {
  const output = place.fresh("plain");
  await dequantizeCheckpoint({ input: packed, output, kernels, dtype: "F32" });
  using checkpoint = openCheckpoint(output);
  const values = new Map(
    Object.keys(SHAPES).map((name) => [name, new Float32Array(checkpoint.read(name).buffer)]),
  );
  return (stack, e) => {
    const size = values.get(stack)!.length / E;
    return values.get(stack)!.subarray(e * size, (e + 1) * size);
  };
}

/** Σ ‖(W − Ŵ) x‖² / Σ ‖W x‖² over an expert's inputs, in float64. */
function outputError(stack: string, e: number, got: Float32Array): number {
  const [rows, cols] = SHAPES[stack]!, x = inputs(cols, e), own = weightsOf(stack, e);
  let error = 0, power = 0;
  for (let token = 0; token < TOKENS; token++) {
    for (let row = 0; row < rows; row++) {
      let difference = 0, output = 0;
      for (let k = 0; k < cols; k++) {
        difference += (own[row * cols + k]! - got[row * cols + k]!) * x[token * cols + k]!;
        output += own[row * cols + k]! * x[token * cols + k]!;
      }
      error += difference ** 2;
      power += output ** 2;
    }
  }
  return error / power;
}

describe("experts in one tensor", () => {
  test("each is solved on its own inputs, to a third of clip's error in float64", async () => {
    const { output, run } = quantize(MODEL, statistics(all([0, 1, 2])));
    await run;
    const searched = quantize(MODEL, undefined);
    await searched.run;
    const [ours, theirs] = [await plain(output), await plain(searched.output)];
    for (const stack of [GATE, DOWN]) {
      for (const e of [0, 1, 2]) {
        const error = outputError(stack, e, ours(stack, e));
        expect(error).toBeLessThan(outputError(stack, e, theirs(stack, e)) / 3);
      }
    }
  });

  test("are the same weights, and the error is the mean, as experts that are matrices of their own", async () => {
    const apart = writeCheckpoint(
      place.fresh("apart"),
      Object.fromEntries([0, 1, 2].flatMap((e) => {
        const both = weightsOf(GATE, e), half = INNER * K;
        return [
          [`${EXPERTS}.${e}.gate_proj.weight`, matrix(INNER, K, both.slice(0, half))],
          [`${EXPERTS}.${e}.up_proj.weight`, matrix(INNER, K, both.slice(half))],
          [`${EXPERTS}.${e}.down_proj.weight`, matrix(K, INNER, weightsOf(DOWN, e))],
        ];
      })),
      CONFIG,
    );
    const file = statistics(all([0, 1, 2])), stacked = quantize(MODEL, file), own = quantize(apart, file);
    const [whole, parts] = [(await stacked.run).layers, (await own.run).layers];
    const errorOf = (layers: typeof whole, name: string) =>
      layers.find((layer) => layer.name === name)!.solved!.relativeError;
    const errors = [0, 1, 2].map((e) => errorOf(parts, `${EXPERTS}.${e}.down_proj.weight`));
    expect(errorOf(whole, DOWN)).toBeCloseTo(errors.reduce((a, b) => a + b) / E, 9);
    const got = await plain(stacked.output), output = place.fresh("plain");
    await dequantizeCheckpoint({ input: own.output, output, kernels, dtype: "F32" });
    using checkpoint = openCheckpoint(output);
    for (let e = 0; e < E; e++) {
      const [gate, up, down] = ["gate_proj", "up_proj", "down_proj"].map((name) =>
        new Float32Array(checkpoint.read(`${EXPERTS}.${e}.${name}.weight`).buffer)
      );
      expect(got(GATE, e)).toEqual(joined([gate!, up!]));
      expect(got(DOWN, e)).toEqual(down!);
    }
  });

  test("an expert that read nothing is quantized by its weights, and that is said", async () => {
    const { output, events, run } = quantize(MODEL, statistics(all([0, 2])));
    await run;
    const searched = quantize(MODEL, undefined);
    await searched.run;
    const [ours, theirs] = [await plain(output), await plain(searched.output)];
    expect(ours(GATE, 1)).toEqual(theirs(GATE, 1));
    expect(ours(GATE, 2)).not.toEqual(theirs(GATE, 2));
    const warnings = events.filter(({ kind }) => kind === "warning").map(({ message }) => message);
    expect(warnings).toContainEqual(`${GATE}: 1 of 3 experts have no statistics: by their weights alone`);
  });

  test("one moment under the tensor's name is that of all its experts", async () => {
    const { output, run } = quantize(MODEL, statistics([[[`${GATE}.weight`], K, 1]]));
    await run;
    const searched = quantize(MODEL, undefined);
    await searched.run;
    const [ours, theirs] = [await plain(output), await plain(searched.output)];
    expect(outputError(GATE, 1, ours(GATE, 1))).toBeLessThan(outputError(GATE, 1, theirs(GATE, 1)) / 3);
    for (let e = 0; e < E; e++) expect(ours(GATE, e)).not.toEqual(theirs(GATE, e));
  });

  test("a budget chooses their bits by their errors", async () => {
    const { events, run } = quantize(MODEL, statistics(all([0, 1, 2])), {
      bit_width: undefined,
      group_size: undefined,
      target_bits_per_weight: 4,
    });
    const { layers } = await run;
    expect(events.find(({ message }) => message.startsWith("budget: "))!.message)
      .toMatch(/relative output errors of the layers add up to [\d.]*[1-9]/);
    expect(layers.filter(({ solved }) => solved !== undefined).length).toBe(2);
  });

  test("of another model: shapes and weights of an expert are compared", async () => {
    const shapes = quantize(MODEL, statistics(all([0, 1, 2]), [K / 2, INNER]));
    const error = await rejection(shapes.run) as CalibrationError;
    expect(error).toBeInstanceOf(CalibrationError);
    expect(error.message).toContain(`[${K}, ${INNER}]`);
    expect(error.tensor).toBe(`${EXPERTS}.0.down_proj.weight`);
    const samples = new Map(
      all([0, 1, 2]).flatMap(([names]) => names).map((name) => [name, new Float32Array(8).fill(9)]),
    );
    const weights = quantize(MODEL, statistics(all([0, 1, 2]), SHAPES[DOWN], samples));
    expect((await rejection(weights.run)).message)
      .toContain(`statistics of one with other weights in "${DOWN}[0]"`);
  });
});
