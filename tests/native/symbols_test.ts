import { describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { ABI_VERSION, CUDA_ABI_VERSION, CUDA_SIGNATURES, SIGNATURES } from "../../lib/native/signatures.ts";
import { kindsOf, type SymbolTable } from "../../lib/native/symbols.ts";
import { functionsSource, signaturesOf, signaturesSource } from "../../scripts/_build/signatures.ts";

const path = (relative: string) => fileURLToPath(new URL(`../../${relative}`, import.meta.url));
const read = (relative: string) => readFileSync(path(relative), "utf8");

const LIBRARIES: readonly (readonly [string, SymbolTable, number, RegExp])[] = [
  ["kernels/include/arrowquant.h", SIGNATURES, ABI_VERSION, /#define AQ_ABI_VERSION (\d+)/],
  [
    "kernels/include/arrowquant_cuda.h",
    CUDA_SIGNATURES,
    CUDA_ABI_VERSION,
    /#define AQ_CUDA_ABI_VERSION (\d+)/,
  ],
];

/** Parameters that a function reads and writes, written down apart from the header's own marks. */
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
  "aq_settle_trellis codes",
  "aq_settle_trellis scale",
  "aq_settle_trellis offset",
  "aq_choose_experts logits",
  "aq_scale_rows x",
  "aq_add_rows out",
  "aq_multiply c",
  "aq_adam_step values",
  "aq_adam_step first",
  "aq_adam_step second",
  "aq_column_sums out", // what lies between its rows stays
]);

/** A header's declarations as name → kinds of its parameters, read another way than the generator reads them. */
function declarations(header: string): Record<string, string[]> {
  const found: Record<string, string[]> = {};
  for (const [, name, list] of header.matchAll(/AQ_API int32_t (aq_\w+)\(([^)]*)\);/g)) {
    found[name!] = list!.trim() === "void" ? [] : list!.split(",").map((parameter) => {
      if (/^\s*const .*\*/.test(parameter)) return "in";
      if (parameter.includes("*")) {
        return IN_PLACE.has(`${name} ${/\w+$/.exec(parameter)![0]}`) ? "inout" : "out";
      }
      if (/\baq_cuda_(buffer|stream)\b/.test(parameter)) return "handle";
      if (/\bsize_t\b/.test(parameter)) return "usize";
      if (/\bint32_t\b/.test(parameter)) return "i32";
      if (/^\s*float /.test(parameter)) return "f32";
      if (/^\s*double /.test(parameter)) return "f64";
      return `unknown: ${parameter}`;
    });
  }
  return found;
}

describe("signatures", () => {
  for (const [file, table, version, pattern] of LIBRARIES) {
    test(`are ${file}'s functions, parameters and ABI number`, () => {
      const header = read(file);
      const kinds = Object.fromEntries(
        Object.entries(table).map(([name, signature]) => [name, kindsOf(signature) as string[]]),
      );
      expect(Object.keys(kinds).length).toBeGreaterThan(10);
      expect(kinds).toEqual(declarations(header));
      expect(Number(pattern.exec(header)![1])).toBe(version);
    });
  }

  test("are the ones that the headers give now", () => {
    expect(read("lib/native/signatures.ts")).toBe(signaturesSource(path("kernels")));
    expect(read("lib/native/functions.ts")).toBe(functionsSource(path("kernels")));
  });

  test("of the kernels that quantize are the CPU's with handles for pointers and a stream at the end", () => {
    for (const name of ["quantize_round", "quantize_clip", "quantize_two_level"] as const) {
      const cpu = kindsOf(SIGNATURES[`aq_${name}`]);
      expect(cpu.slice(-2)).toEqual(["i32", "i32"]); // isa, threads
      const wanted = cpu.slice(0, -2).map((kind) => kind === "in" || kind === "out" ? "handle" : kind);
      expect(kindsOf(CUDA_SIGNATURES[`aq_cuda_${name}`])).toEqual([...wanted, "handle"]);
    }
  });

  test("say what a pointer points at", () => {
    const header = `
      /* AQ_API int32_t aq_commented(void); */
      AQ_API int32_t aq_one(const void *weights, AQ_INOUT float *scale, uint16_t *out, size_t n,
                            int32_t bits, double rate);
      AQ_API int32_t aq_none(void);`;
    expect([...signaturesOf(header)]).toEqual([
      ["aq_one", "in:any inout:f32 out:u16 usize i32 f64"],
      ["aq_none", ""],
    ]);
  });

  test("refuse a result of 64 bits and a parameter that no FFI type stands for", () => {
    expect(() => signaturesOf("AQ_API int64_t aq_wide(void);")).toThrow(/aq_wide.*no int32_t/);
    expect(() => signaturesOf("AQ_API int32_t aq_odd(const aq_job *job);")).toThrow(
      /aq_odd.*"const aq_job \*job"/,
    );
    expect(() => signaturesOf("AQ_API int32_t aq_odd(const size_t n);")).toThrow(/aq_odd.*"const size_t n"/);
  });
});
