/** Runs of the pipeline on small checkpoints. */
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import {
  type Plan,
  planQuantization,
  quantizeCheckpoint,
  type QuantizeCheckpointOptions,
} from "../../lib/pipeline/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import {
  gaussian,
  matrix,
  MODELS,
  type TestTensor,
  type workplace,
  writeCheckpoint,
  writeTensors,
} from "../_checkpoints.ts";
import type { Kernels } from "../../lib/native/mod.ts";

export const DREAM = join(MODELS, "dream-mini");
export const DIT = join(MODELS, "glyph-dit");

export function configOf(overrides: Record<string, unknown> = {}) {
  return resolveConfig({ overrides: { solver: "clip", num_threads: 1, ...overrides } }).config;
}

export type Options = Partial<Omit<QuantizeCheckpointOptions, "config" | "dryRun" | "kernels">> & {
  config?: Record<string, unknown>;
};

/** Runs of the pipeline on small checkpoints, for the tests of a file. */
export function pipelineRuns(kernels: Kernels, place: ReturnType<typeof workplace>) {
  function quantizeTo(output: string, input: string, { config, ...options }: Options = {}) {
    return quantizeCheckpoint({ kernels, ...options, input, output, config: configOf(config) });
  }

  /** A plan of tensors that exist in name and shape only. */
  function planOf(tensors: Record<string, [string, number[]]>, config: Record<string, unknown> = {}): Plan {
    const bytes: Record<string, number> = { F32: 4, BF16: 2, I64: 8 };
    const folder = writeCheckpoint(
      place.fresh("plan"),
      Object.fromEntries(
        Object.entries(tensors).map(([name, [dtype, shape]]): [string, TestTensor] => [name, {
          dtype,
          shape,
          data: new Uint8Array(shape.reduce((a, b) => a * b, 1) * bytes[dtype]!),
        }]),
      ),
    );
    using checkpoint = openCheckpoint(folder);
    return planQuantization(checkpoint, configOf(config));
  }

  /** Three matrices and what is kept, in two shards with an index. */
  function twoShards(): string {
    const folder = place.fresh("input");
    mkdirSync(folder);
    const first = {
      "model.embed_tokens.weight": matrix(10, 64, gaussian(640, 1)),
      "model.layers.0.a.weight": matrix(33, 96, gaussian(33 * 96, 2)),
      "model.layers.0.a.bias": { dtype: "F32", shape: [33], data: gaussian(33, 3) },
      "model.layers.0.b.weight": matrix(48, 64, gaussian(48 * 64, 4)),
    };
    const second = {
      "model.layers.1.a.weight": matrix(70, 100, gaussian(7000, 5)),
      "model.norm.weight": { dtype: "F32", shape: [64], data: gaussian(64, 6) },
      "lm_head.weight": matrix(10, 64, gaussian(640, 7)),
    };
    const files = { "model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second };
    const map = Object.entries(files).flatMap(([file, tensors]) => {
      writeTensors(join(folder, file), tensors);
      return Object.keys(tensors).map((name) => [name, file]);
    });
    writeFileSync(
      join(folder, "model.safetensors.index.json"),
      JSON.stringify({
        metadata: { total_size: 1, note: "kept" },
        weight_map: Object.fromEntries(map),
        exporter: ["kept"],
      }),
    );
    writeFileSync(join(folder, "config.json"), '{\n  "model_type": "Dream",\n  "rope_theta": 10000.0\n}\n');
    writeFileSync(join(folder, "tokenizer.json"), "{}");
    writeFileSync(join(folder, "LICENSE"), "MIT");
    writeFileSync(join(folder, "eval.jsonl"), "{}");
    mkdirSync(join(folder, "onnx"));
    return folder;
  }

  return { quantizeTo, planOf, twoShards };
}
