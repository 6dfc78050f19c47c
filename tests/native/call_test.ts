import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { KernelError } from "../../lib/errors.ts";
import { checkArray, checkCounts, checkFloats, checkMember, finish } from "../../lib/native/call.ts";
import { f32 } from "../../lib/native/call_checks.ts";
import * as call from "../../lib/native/functions.ts";
import type { UncheckedKernels } from "../../lib/native/kernels.ts";
import { type Kernels, openKernels } from "../../mod.ts";

/** Members of opened kernels that the public type must not have. */
type Hidden = Exclude<keyof UncheckedKernels, keyof Kernels>;

const lib = fileURLToPath(new URL("../../lib", import.meta.url));
/** Places that may call the library itself: what wraps it, what times it apart from the checks, what counts calls. */
const UNCHECKED = /^(native[/\\]|bench[/\\]kernels[/\\]|bench[/\\]solver_speed[/\\]counted\.ts$)/;

describe("calls of kernels", () => {
  test("are no part of the public type", () => {
    const hidden: Record<Hidden, true> = { calls: true, size: true, isaNumber: true };
    expect(Object.keys(hidden).length).toBe(3);
  });

  test("go through functions.ts, which looks at every status", () => {
    const files = (readdirSync(lib, { recursive: true }) as string[]).filter((file) => file.endsWith(".ts"));
    const direct = files.filter((file) =>
      !UNCHECKED.test(file) &&
      /\baq_\w+\s*\(|\bunchecked\b|\bkernels\.calls\b|\{[^{}]*\bcalls\b[^{}]*\}(: Kernels| = [^;]*\bkernels\b)/
        .test(
          readFileSync(`${lib}/${file}`, "utf8"),
        )
    );
    expect(files.length).toBeGreaterThan(100);
    expect(direct).toEqual([]);
    const functions = readFileSync(`${lib}/native/functions.ts`, "utf8").split("\n").filter((line) =>
      line.startsWith("export")
    );
    expect(functions.length).toBeGreaterThan(40);
    for (const line of functions) {
      expect(line).toMatch(
        /: void => \{ const own = unchecked\(kernels\); ((usize|int32|float)\(doing, "\w+", \w+\); )+finish\(doing, own\.calls\.aq_\w+\(.*\)\); \};$/,
      );
    }
  });

  test("throw for a status, with an explanation where there is one", () => {
    expect(() => finish("take a step", 0)).not.toThrow();
    expect(() => finish("take a step", -2)).toThrow(KernelError);
    expect(() => finish("take a step", -2)).toThrow(
      "Cannot take a step: the kernel reports a size that is not allowed",
    );
    expect(() => finish("take a step", -77)).toThrow("the kernel reports status -77");
    const explain = (status: number) => status === -3 ? new RangeError("too large") : undefined;
    expect(() => finish({ doing: "pack", explain }, -3)).toThrow(new RangeError("too large"));
    expect(() => finish({ doing: "pack", explain }, -1)).toThrow(
      "Cannot pack: the kernel reports a null pointer",
    );
  });

  test("refuse arrays of another type before the kernel sees them, and pass the kernel's refusal on", async () => {
    using kernels = await openKernels({ threads: 1 });
    const x = Float32Array.of(1, 2), out = new Float32Array(2);
    call.add(kernels, "add", x, x, 2, out);
    expect([...out]).toEqual([2, 4]);
    expect(() => call.add(kernels, "add", x, x, 2, new Float64Array(2) as never)).toThrow(
      new TypeError("Cannot add: out must be of Float32Array, got Float64Array"),
    );
    expect(() => call.add(kernels, "add", [1, 2] as never, x, 2, out)).toThrow(
      "a must be of Float32Array, got object",
    );
    expect(() => call.add(kernels, "add", null, x, 2, out)).toThrow("a null pointer");
    expect(f32("add", "bias", undefined, 2)).toBe(null);
  });
});

test("checks of arguments name what is wrong, what was wanted and what was found", () => {
  expect(() => checkCounts("solve", { rows: 2, cols: -1 })).toThrow(
    new RangeError("Cannot solve: cols must be a whole number ≥ 0, got -1"),
  );
  expect(() => checkMember("solve", "bits", 5, [2, 4])).toThrow(
    new RangeError("Cannot solve: bits must be one of 2, 4, got 5"),
  );
  expect(() => checkArray("solve", "packed", new Uint32Array(1), 2, "u32 words")).toThrow(
    new TypeError("Cannot solve: packed must be 2 u32 words, got 1"),
  );
  expect(() => checkArray("solve", "packed", new Uint8Array(2), 2, "u32 words")).toThrow(/got Uint8Array/);
  checkFloats("solve", { x: [new Float32Array(2), 2], bias: [undefined, 3] });
  expect(() => checkFloats("solve", { x: [new Float32Array(2), 3] })).toThrow(
    new TypeError("Cannot solve: x must be 3 float32 values, got 2"),
  );
});
