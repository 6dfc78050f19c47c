import { describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { ABI_VERSION, SYMBOLS } from "../../lib/native/symbols.ts";

const read = (path: string) => readFileSync(new URL(`../../${path}`, import.meta.url), "utf8");
const header = read("kernels/include/arrowquant.h");

/** Parameters that a function reads and writes; C cannot say so. */
const IN_PLACE = new Set([
  "aq_rotary x",
  "aq_quantize_activations scale",
  "aq_quantize_activations zero_point",
  "aq_accumulate_moment out",
  "aq_factor_moment m",
  "aq_solve_moment b",
  "aq_refine_codes codes",
  "aq_refine_codes scale",
  "aq_refine_codes zero_point",
  "aq_adam_step values",
  "aq_adam_step first",
  "aq_adam_step second",
  "aq_projected_gradient_step values",
  "aq_column_sums out", // what lies between its rows stays
]);

/** The header's declarations as name → kinds of its parameters. */
function declarations(): Record<string, string[]> {
  const found: Record<string, string[]> = {};
  for (const [, name, list] of header.matchAll(/AQ_API int32_t (aq_\w+)\(([^)]*)\);/g)) {
    found[name!] = list!.trim() === "void" ? [] : list!.split(",").map((parameter) => {
      if (/^\s*const .*\*/.test(parameter)) return "in";
      if (parameter.includes("*")) {
        return IN_PLACE.has(`${name} ${/\w+$/.exec(parameter)![0]}`) ? "inout" : "out";
      }
      if (/\bsize_t\b/.test(parameter)) return "usize";
      if (/\bint32_t\b/.test(parameter)) return "i32";
      if (/^\s*float /.test(parameter)) return "f32";
      if (/^\s*double /.test(parameter)) return "f64";
      return `unknown: ${parameter}`;
    });
  }
  return found;
}

describe("symbol table", () => {
  test("has exactly the header's functions with its parameters", () => {
    const table = Object.fromEntries(
      Object.entries(SYMBOLS).map(([name, declaration]) => [name, [...declaration.parameters]]),
    );
    expect(Object.keys(table).length).toBeGreaterThan(10);
    expect(table as Record<string, string[]>).toEqual(declarations());
  });

  test("is of the header's ABI number", () => {
    expect(Number(/#define AQ_ABI_VERSION (\d+)/.exec(header)![1])).toBe(ABI_VERSION);
  });

  test("repeats each declaration of the header in its comments", () => {
    const squeeze = (text: string) => text.replaceAll(/\s*\/\/\s*/g, " ").replaceAll(/\s+/g, " ");
    const comments = squeeze(read("lib/native/symbols.ts"));
    for (const [declaration] of header.matchAll(/int32_t aq_\w+\([^)]*\)(?=;)/g)) {
      expect(comments).toContain(squeeze(declaration));
    }
  });
});
