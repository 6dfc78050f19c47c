import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { openKernels } from "../../lib/native/mod.ts";
import { dequantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { withoutQuantizationConfig, withQuantizationConfig } from "../../lib/output/config_file.ts";
import { gaussian, matrix, workplace, writeCheckpoint } from "../_checkpoints.ts";
import { DREAM, pipelineRuns } from "../pipeline/_runs.ts";

const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});
const { quantizeTo, twoShards } = pipelineRuns(kernels, place);

describe("quantization_config in config.json", () => {
  const texts = [
    '{\n  "a": 1e-06,\n  "b": [1, {"c": "}"}],\n  "d": "x, \\"y\\""\n}\n',
    '{"a": 10000.0, "quantization_config_not": {"x": 1}}',
    '{\n    "a": 1\n}',
    "{}",
    "{ }\n",
    "{\n}\n",
    '\n {\t"a":{"quantization_config":{"b":2}} } ',
  ];
  for (const text of texts) {
    test(`goes into ${JSON.stringify(text)} and comes out again`, () => {
      const value = { quant_method: "arrowquant", list: [1, "}"], nested: { key: null } };
      const changed = withQuantizationConfig(text, value);
      expect(JSON.parse(changed)).toEqual({ ...JSON.parse(text), quantization_config: value });
      expect(withoutQuantizationConfig(changed)).toBe(text);
    });
  }

  test("comes out of the front and the middle too", () => {
    expect(JSON.parse(withoutQuantizationConfig('{"quantization_config": {"a": [1, 2]}, "b": 1}'))).toEqual({
      b: 1,
    });
    expect(JSON.parse(withoutQuantizationConfig('{"a": 1, "quantization_config": "x,y", "b": 1}')))
      .toEqual({ a: 1, b: 1 });
  });
});

describe("a quantization_config of null in config.json", () => {
  for (
    const text of [
      '{"quantization_config": null}',
      '{"quantization_config":null,\n"a": 1}',
      '{"a": 1, "quantization_config": null }',
    ]
  ) {
    test(`is replaced in ${text}, and gone after the way back`, async () => {
      const input = writeCheckpoint(place.fresh("input"), { "a.weight": matrix(4, 64, gaussian(256, 1)) });
      writeFileSync(join(input, "config.json"), text);
      const output = place.fresh();
      await quantizeTo(output, input);
      const written = readFileSync(join(output, "config.json"), "utf8");
      expect(written.split('"quantization_config"').length).toBe(2);
      await dequantizeCheckpoint({ kernels, input: output, output: `${output}-plain` });
      const { quantization_config: _, ...rest } = JSON.parse(text);
      expect(JSON.parse(readFileSync(join(`${output}-plain`, "config.json"), "utf8"))).toEqual(rest);
    });
  }
});

describe("compressed-tensors", () => {
  test("is named for symmetric and integer zero points, with exact targets", async () => {
    const output = place.fresh();
    await quantizeTo(output, twoShards(), {
      config: {
        zero_point: "symmetric",
        group_size: 32,
        layer_bit_widths: { "layers.0.b": 8 },
        keep_patterns: ["1.a"],
      },
    });
    const { quantization_config: config } = JSON.parse(readFileSync(join(output, "config.json"), "utf8"));
    expect(config.quant_method).toBe("compressed-tensors");
    expect(config.format).toBe("pack-quantized");
    expect(config.ignore).toEqual(["model.layers.1.a", "lm_head"]);
    expect(Object.values(config.config_groups).map((group) => (group as { targets: string[] }).targets))
      .toEqual([
        ["model.layers.0.a"],
        ["model.layers.0.b"],
      ]);
    expect(config.config_groups.group_0.weights).toEqual({
      num_bits: 4,
      type: "int",
      symmetric: true,
      strategy: "group",
      group_size: 32,
      dynamic: false,
      actorder: null,
      block_structure: null,
      observer: "minmax",
      observer_kwargs: {},
    });
    expect(config.config_groups.group_1.weights.num_bits).toBe(8);
  });

  test("has whole rows as channels", async () => {
    const output = place.fresh();
    await quantizeTo(output, DREAM, { config: { zero_point: "integer", group_size: 0 } });
    const { quantization_config: config } = JSON.parse(readFileSync(join(output, "config.json"), "utf8"));
    expect(config.config_groups.group_0.weights.strategy).toBe("channel");
    expect(config.config_groups.group_0.weights.symmetric).toBe(false);
  });

  test("is not claimed where it cannot say what was done", async () => {
    for (const config of [{ zero_point: "real" }, { zero_point: "symmetric", group_size: 64 }]) {
      const output = place.fresh();
      await quantizeTo(output, twoShards(), { config }); // 96 columns are no whole groups of 64
      const { quantization_config: written } = JSON.parse(readFileSync(join(output, "config.json"), "utf8"));
      expect(written.quant_method).toBe("arrowquant");
      expect(written.config_groups).toBe(undefined);
    }
  });
});
