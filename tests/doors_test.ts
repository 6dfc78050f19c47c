import { describe, expect, test } from "bun:test";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { isDeno } from "./_checkpoints.ts";
import { runIn } from "./_runtimes.ts";

/** Calls of each function, in Deno one: what they check is the same code; many more by hand. */
const CALLS = process.env["ARROWQUANT_DOOR_CALLS"] ?? (isDeno ? "1" : "2");

describe("every function of every door, called with wrong arguments", () => {
  // Arguments are checked before a backend is called, by code that is the same in both runtimes.
  for (const [seed, backend] of (isDeno ? ["native"] : ["native", "wasm"]).entries()) {
    test(`${backend}: throws a typed error or succeeds, and touches nothing outside its arrays`, async () => {
      const folder = mkdtempSync(join(tmpdir(), "arrowquant-doors-"));
      try {
        const args = [backend, String(seed + 1), CALLS, folder], runtime = isDeno ? "deno" : "bun";
        const output = await runIn(runtime, process.execPath, "_doors_walk.ts", args)
          .catch((error) => {
            throw new Error(`in ${readFileSync(join(folder, "last"), "utf8")}: ${error}`);
          });
        const { made, untyped } = JSON.parse(output);
        expect(made).toBeGreaterThan(200 * Number(CALLS));
        expect(untyped).toEqual([]);
      } finally {
        rmSync(folder, { recursive: true });
      }
    }, 120_000);
  }
});
