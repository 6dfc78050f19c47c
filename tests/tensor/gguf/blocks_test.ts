import { describe, expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { opener } from "../../../lib/bench/ggml.ts";
import { DECODED_TYPES, DECODERS } from "../../../lib/tensor/gguf/blocks.ts";
import { ggmlType } from "../../../lib/tensor/gguf/types.ts";
import { ROOT } from "../../_checkpoints.ts";
import { randomIntegers } from "../_files.ts";

const LIBRARY = join(ROOT, "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64/libggml-base.so");

describe("blocks of ggml", () => {
  test("every type reads as ggml's dequantize_row reads it, bit for bit, whatever the bytes are", async () => {
    const runtime = await opener();
    if (runtime === undefined || !existsSync(LIBRARY)) return console.log("skipped: ggml is not installed");
    const symbol = (type: string) => `dequantize_row_${type.toLowerCase().replace(/_k$/, "_K")}`;
    const row = { parameters: ["buffer", "buffer", "i64"], result: "void" } as const;
    const ggml = runtime.open(LIBRARY, Object.fromEntries(DECODED_TYPES.map((type) => [symbol(type), row])));
    const random = randomIntegers(11), blocks = 200;
    for (const name of DECODED_TYPES) {
      const { weights, bytes } = ggmlType(name), count = blocks * weights;
      const packed = Uint8Array.from({ length: blocks * bytes }, () => random(256));
      const theirs = new Float32Array(count), ours = new Float32Array(count);
      ggml.symbols[symbol(name)]!(packed, theirs, runtime.count(count));
      for (let i = 0; i < blocks; i++) DECODERS[name]!(packed, i * bytes, ours, i * weights);
      const bits = (values: Float32Array) =>
        Uint32Array.from(new Uint32Array(values.buffer), (word, i) => Number.isNaN(values[i]!) ? 1 : word);
      expect([name, bits(ours)]).toEqual([name, bits(theirs)]);
    }
    ggml.close();
  });
});
