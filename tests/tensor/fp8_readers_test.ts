/** Scaled FP8 read as its own libraries dequantize it: tests/interop/scaled_fp8.py. */
import { afterAll, describe, expect, test } from "bun:test";
import { cpSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import { openKernels } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { openCheckpoint, SafetensorsFile } from "../../lib/tensor/mod.ts";
import { workplace, writeCheckpoint } from "../_checkpoints.ts";
import { readersPython, runReader } from "../_readers.ts";
import { configOf } from "../pipeline/_runs.ts";

const kernels = await openKernels(), place = workplace();
afterAll(() => {
  kernels.close();
  place.remove();
});
const python = readersPython(), folder = place.fresh("fp8");
const spellings = python === undefined
  ? []
  : await runReader(python, "scaled_fp8.py", ["make", folder]) as string[];
const withPython = python === undefined ? () => {} : describe;

withPython("scaled FP8", () => {
  for (const name of spellings) {
    test(`${name}: the values of its own library, quantized as plain weights with them`, async () => {
      const input = place.fresh("input");
      mkdirSync(input);
      for (const file of ["model.safetensors", "config.json"]) {
        cpSync(join(folder, name, file), join(input, file));
      }
      using checkpoint = openCheckpoint(input);
      using plain = SafetensorsFile.open(join(folder, name, "plain.safetensors"));
      expect([...checkpoint.tensors.keys()]).toEqual([...plain.tensors.keys()]);
      const tensors = [...plain.tensors.values()].map(({ name, shape }) => {
        const own = checkpoint.tensors.get(name)!.info, wanted = new Float32Array(plain.read(name).buffer);
        const bytes = checkpoint.read(name).buffer;
        const read = own.dtype === "F32"
          ? new Float32Array(bytes)
          : Float32Array.from(new Uint16Array(bytes), (word) =>
            new Float32Array(Uint32Array.of(word << 16).buffer)[0]!);
        // a bfloat16 scale makes the library's products bfloat16, and ours too
        const tolerance = own.dtype === "F32" ? 0 : 2 ** -8;
        const bad = wanted.findIndex((value, i) =>
          !(Math.abs(read[i]! - value) <= tolerance * Math.abs(value))
        );
        expect([name, bad]).toEqual([name, -1]);
        return [name, { dtype: "F32", shape, data: read }] as const;
      });
      const same = writeCheckpoint(place.fresh("plain"), Object.fromEntries(tensors), { model_type: "x" });
      const run = async (input: string) => {
        const output = place.fresh();
        await quantizeCheckpoint({ input, output, kernels, config: configOf({ bit_width: 4 }) });
        return SafetensorsFile.open(join(output, "model.safetensors"));
      };
      using ours = await run(input);
      using theirs = await run(same);
      expect([...ours.tensors.keys()]).toEqual([...theirs.tensors.keys()]);
      for (const key of ours.tensors.keys()) expect(ours.read(key)).toEqual(theirs.read(key));
    });
  }
});
