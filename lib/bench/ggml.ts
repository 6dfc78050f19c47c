/**
 * ggml as a peer: the shared libraries of the npm package `@node-llama-cpp/linux-x64`, called over FFI with
 * the same buffers as our kernels. An optional dependency: where it is missing the reason is returned for the
 * report.
 */
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

/** Formats that have a public quantizing and dequantizing function. Names as in ggml. */
export const GGML_TYPES = ["q2_0", "tq2_0", "q2_K", "q3_K", "q4_0", "q4_1", "q4_K", "q8_0"] as const;
export type GgmlType = typeof GGML_TYPES[number];

/** Formats with code books, whose tables are made on first use (seconds): name, and ggml's number. */
const GGML_CODEBOOK_TYPES = { iq2_xxs: 16, iq2_xs: 17, iq2_s: 22 } as const;
export type GgmlCodebookType = keyof typeof GGML_CODEBOOK_TYPES;

/** Formats of activations in ggml's dot products; their row quantizers are vectorized by hand. */
const GGML_ACTIVATION_TYPES = ["q8_0", "q8_K"] as const;
export type GgmlActivationType = typeof GGML_ACTIVATION_TYPES[number];

/** Most bytes that a weight takes in any format, for output buffers. */
export const GGML_MAX_BYTES_PER_WEIGHT = 34 / 32;

/** ggml's quantizers and dequantizers; buffers are the caller's. */
export interface Ggml {
  /** File name of the processor's library, as in `libggml-cpu-haswell.so`. */
  readonly processorLibrary: string;
  readonly processorLibraryPath: string;
  /** Folder of all its libraries. */
  readonly folder: string;
  /** `weights: f32[rows, cols]` into `packed`; `cols` a multiple of 256. @returns bytes written */
  quantize(
    type: GgmlType | GgmlCodebookType,
    weights: Float32Array,
    packed: Uint8Array,
    rows: number,
    cols: number,
    /** `f32[cols]`, the weight of each column's squared error; iq2_xxs and iq2_xs end the process without. */
    importance?: Float32Array,
  ): number;
  /** Makes the tables of a code book, unless that was done: {@linkcode quantize} needs them. */
  prepare(type: GgmlCodebookType): void;
  /** The same by the processor's library, for a flat run of `count` weights. */
  quantizeRowSimd(type: GgmlActivationType, weights: Float32Array, packed: Uint8Array, count: number): void;
  dequantizeRow(
    type: GgmlType | GgmlCodebookType,
    packed: Uint8Array,
    weights: Float32Array,
    count: number,
  ): void;
  /** Conversions of the base library and, vectorized, of the processor's. */
  convert(conversion: GgmlConversion, from: ArrayBufferView, to: ArrayBufferView, count: number): void;
  close(): void;
}

/** Library that has each conversion, its symbol, and the types from and to. */
export const CONVERSIONS = {
  "base f16 to f32": ["base", "ggml_fp16_to_fp32_row", "F16", "F32"],
  "base f32 to f16": ["base", "ggml_fp32_to_fp16_row", "F32", "F16"],
  "base bf16 to f32": ["base", "ggml_bf16_to_fp32_row", "BF16", "F32"],
  "base f32 to bf16": ["base", "ggml_fp32_to_bf16_row", "F32", "BF16"],
  "simd f16 to f32": ["processor", "ggml_cpu_fp16_to_fp32", "F16", "F32"],
  "simd f32 to f16": ["processor", "ggml_cpu_fp32_to_fp16", "F32", "F16"],
  "simd bf16 to f32": ["processor", "ggml_cpu_bf16_to_fp32", "BF16", "F32"],
  "simd f32 to bf16": ["processor", "ggml_cpu_fp32_to_bf16", "F32", "BF16"],
} as const;
export type GgmlConversion = keyof typeof CONVERSIONS;

type Kind = "buffer" | "i64" | "i32" | "u64" | "void";
export interface Declaration {
  readonly parameters: readonly Kind[];
  readonly result: Kind;
}

// deno-lint-ignore no-explicit-any -- functions of a foreign library, typed by the table that opened them
type Foreign = (...args: any[]) => any;

export interface Opened {
  readonly symbols: Readonly<Record<string, Foreign>>;
  close(): void;
}

/** Opens libraries and says how the runtime takes a count. */
export interface Opener {
  open(path: string, table: Readonly<Record<string, Declaration>>): Opened;
  count(value: number): number | bigint;
}

interface DenoFfi {
  dlopen(path: string, table: Record<string, { parameters: string[]; result: string }>): Opened;
}

interface BunFfi {
  dlopen(path: string, table: Record<string, { args: string[]; returns: string }>): Opened;
}

/** The runtime's FFI for libraries that are not ours; undefined where it has none. */
export async function opener(): Promise<Opener | undefined> {
  const { Deno, Bun } = globalThis as { Deno?: DenoFfi; Bun?: unknown };
  const mapped = <T>(table: Readonly<Record<string, Declaration>>, as: (declaration: Declaration) => T) =>
    Object.fromEntries(Object.entries(table).map(([name, declaration]) => [name, as(declaration)]));
  if (Deno !== undefined) {
    return {
      open: (path, table) =>
        Deno.dlopen(
          path,
          mapped(table, ({ parameters, result }) => ({ parameters: [...parameters], result })),
        ),
      count: BigInt,
    };
  }
  if (Bun === undefined) return undefined;
  const specifier = ["bun", "ffi"].join(":"); // computed: every other runtime fails on the name itself
  const { dlopen } = await import(specifier) as BunFfi;
  const named = (kind: Kind) => kind === "buffer" ? "ptr" : kind === "u64" ? "u64_fast" : kind;
  const declared = ({ parameters, result }: Declaration) => ({
    args: parameters.map(named),
    returns: named(result),
  });
  return { open: (path, table) => dlopen(path, mapped(table, declared)), count: (value) => value };
}

// void dequantize_row_q4_0(const block *x, float *y, int64_t k); the row quantizers and conversions alike
const ROW: Declaration = { parameters: ["buffer", "buffer", "i64"], result: "void" };
// size_t quantize_q4_0(const float *src, void *dst, int64_t nrows, int64_t n_per_row, const float *imatrix)
const QUANTIZE: Declaration = { parameters: ["buffer", "buffer", "i64", "i64", "buffer"], result: "u64" };
// int ggml_backend_score(void): 0 where the processor lacks what the library was built for
const SCORE: Declaration = { parameters: [], result: "i32" };
// void ggml_cpu_init(void): tables of the half conversions
const INIT: Declaration = { parameters: [], result: "void" };

// void ggml_quantize_init(enum ggml_type type)
const PREPARE: Declaration = { parameters: ["i32"], result: "void" };

const message = (error: unknown) => (error instanceof Error ? error.message : String(error)).split("\n")[0]!;

const LIBRARY_FOLDER = "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64";

/** Opens ggml. @returns its functions, or the reason why it cannot be had */
export async function openGgml(): Promise<Ggml | { readonly reason: string }> {
  if (!import.meta.url.startsWith("file:")) return { reason: "this module was not loaded from a file" };
  const folder = fileURLToPath(new URL(`../../${LIBRARY_FOLDER}`, import.meta.url));
  const basePath = join(folder, "libggml-base.so");
  if (!existsSync(basePath)) return { reason: "the npm package @node-llama-cpp/linux-x64 is not installed" };
  const runtime = await opener();
  if (runtime === undefined) return { reason: "this runtime has no FFI, use Bun or Deno" };
  const named = (names: readonly string[], declaration: Declaration) =>
    Object.fromEntries(names.map((name) => [name, declaration]));
  const conversions = (wanted: string) =>
    named(Object.values(CONVERSIONS).flatMap(([library, symbol]) => library === wanted ? [symbol] : []), ROW);
  const types = [...GGML_TYPES, ...Object.keys(GGML_CODEBOOK_TYPES)];
  let base: Opened;
  try {
    base = runtime.open(basePath, {
      ...named(types.map((type) => `quantize_${type}`), QUANTIZE),
      ...named(types.map((type) => `dequantize_row_${type}`), ROW),
      ggml_quantize_init: PREPARE,
      ...conversions("base"),
    });
  } catch (error) {
    return { reason: `libggml-base.so: ${message(error)}` };
  }
  const found = openProcessorLibrary(runtime, folder, {
    ggml_cpu_init: INIT,
    ...named(GGML_ACTIVATION_TYPES.map((type) => `quantize_row_${type}`), ROW),
    ...conversions("processor"),
  });
  if ("reason" in found) {
    base.close();
    return found;
  }
  const { processor, name } = found;
  processor.symbols["ggml_cpu_init"]!();
  const { count } = runtime;
  return {
    processorLibrary: name,
    processorLibraryPath: join(folder, name),
    folder,
    quantize: (type, weights, packed, rows, cols, importance) =>
      Number(
        base.symbols[`quantize_${type}`]!(weights, packed, count(rows), count(cols), importance ?? null),
      ),
    prepare: (type) => void base.symbols["ggml_quantize_init"]!(GGML_CODEBOOK_TYPES[type]),
    quantizeRowSimd: (type, weights, packed, n) => {
      processor.symbols[`quantize_row_${type}`]!(weights, packed, count(n));
    },
    dequantizeRow: (type, packed, weights, n) => {
      base.symbols[`dequantize_row_${type}`]!(packed, weights, count(n));
    },
    convert: (conversion, from, to, n) => {
      const [library, symbol] = CONVERSIONS[conversion];
      (library === "base" ? base : processor).symbols[symbol]!(from, to, count(n));
    },
    close: () => {
      processor.close();
      base.close();
    },
  };
}

/** The library that ggml itself would take: the one with the highest score on this processor. */
function openProcessorLibrary(
  runtime: Opener,
  folder: string,
  table: Readonly<Record<string, Declaration>>,
): { processor: Opened; name: string } | { reason: string } {
  let best = { name: "", score: 0 };
  let reason = "no libggml-cpu-*.so supports this processor";
  for (const name of readdirSync(folder).filter((file) => /^libggml-cpu-.*\.so$/.test(file)).sort()) {
    try {
      const library = runtime.open(join(folder, name), { ggml_backend_score: SCORE });
      const score = Number(library.symbols["ggml_backend_score"]!());
      if (score > best.score) best = { name, score };
      library.close();
    } catch (error) {
      reason = `${name}: ${message(error)}`;
    }
  }
  if (best.score === 0) return { reason };
  try {
    return { processor: runtime.open(join(folder, best.name), table), name: best.name };
  } catch (error) {
    return { reason: `${best.name}: ${message(error)}` };
  }
}
