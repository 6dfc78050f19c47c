/**
 * Golden outputs: SHA-256 of packed bytes, scales and zero points for seeded weights. They move only when the
 * method changes, and then on purpose: `ARROWQUANT_UPDATE_GOLDEN=1 bun test tests/quant/golden_test.ts`.
 */
import { describe, expect, test } from "bun:test";
import { createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import { openKernels } from "../../lib/native/mod.ts";
import { BIT_WIDTHS, GROUP_SIZES, quantize, WEIGHT_SOLVERS, ZERO_POINT_KINDS } from "../../lib/quant/mod.ts";
import { gaussians } from "../_kernels.ts";

const path = new URL("./golden.json", import.meta.url);

function outputs(kernels: Awaited<ReturnType<typeof openKernels>>): Record<string, string> {
  const found: Record<string, string> = {};
  const rows = 24, cols = 328;
  // rounded, so that the last bits of an engine's Math.log and Math.cos do not show
  const data = gaussians(2026, rows * cols).map((w) => Math.round(w * 4096) / 4096);
  for (const solver of WEIGHT_SOLVERS) {
    for (const bits of BIT_WIDTHS) {
      for (const groupSize of GROUP_SIZES) {
        for (const zeroPoint of ZERO_POINT_KINDS) {
          const options = { solver, bits, groupSize, zeroPoint };
          const tensor = quantize(kernels, { data, dtype: "F32" }, rows, cols, options);
          const hash = createHash("sha256");
          for (const part of [tensor.packed, tensor.scale, tensor.zeroPoint ?? new Uint16Array(0)]) {
            hash.update(new Uint8Array(part.buffer, part.byteOffset, part.byteLength));
          }
          found[`${solver} ${bits} bits, group ${groupSize}, ${zeroPoint}`] = hash.digest("hex").slice(0, 32);
        }
      }
    }
  }
  return found;
}

describe("golden outputs", () => {
  test("are what they were, native or WebAssembly", async () => {
    using best = await openKernels();
    if (process.env["ARROWQUANT_UPDATE_GOLDEN"] === "1") {
      writeFileSync(path, JSON.stringify(outputs(best), null, 2) + "\n");
    }
    const golden = JSON.parse(readFileSync(path, "utf8"));
    expect(Object.keys(golden).length).toBe(144);
    expect(outputs(best)).toEqual(golden);
    using wasm = await openKernels({ backend: "wasm" });
    expect(outputs(wasm)).toEqual(golden);
  });
});
