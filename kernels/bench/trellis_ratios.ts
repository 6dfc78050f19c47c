/**
 * The speed of trellis codes in WebAssembly beside uniform codes of as many bits, as trellis_ratios.c has it of
 * the native library: processor time of one thread, the two in turn, medians of paired ratios.
 *
 *     bun kernels/bench/trellis_ratios.ts
 *     deno run --allow-all kernels/bench/trellis_ratios.ts
 */
import process from "node:process";
import { WASM_BASE64 } from "../../lib/native/wasm_binary.ts";

const COLS = 4096, CACHED = 256, ROWS = 1024, MANY = 32768, TOKENS = 64, SAMPLES = 9;
const AQ_F32 = 0, AQ_ACTIVATIONS_PER_TOKEN = 1;

type Kernel = (...args: number[]) => number;

/** Called without the library around them, which would copy all matrices in each call. */
const exports = new WebAssembly.Instance(
  new WebAssembly.Module(Uint8Array.from(atob(WASM_BASE64), (character) => character.charCodeAt(0))),
).exports;
const kernel = (name: string) => exports[name] as unknown as Kernel;
const memory = exports.memory as WebAssembly.Memory;

let end = Math.ceil((exports.__heap_base as WebAssembly.Global).value / 64) * 64;
const take = (bytes: number) => {
  const at = end;
  end += Math.ceil(bytes / 64) * 64;
  return at;
};
const words = MANY * COLS / 32 * 3, groups = MANY * COLS / 64;
const packed = take(4 * words),
  scale = take(2 * groups),
  offset = take(2 * groups),
  out = take(4 * ROWS * COLS);
const x = take(4 * TOKENS * COLS),
  codes = take(TOKENS * COLS),
  xScale = take(4 * TOKENS),
  xZero = take(4 * TOKENS);
memory.grow(Math.ceil((end - memory.buffer.byteLength) / 65536));
new Uint32Array(memory.buffer, packed, words).forEach((_, i, all) =>
  all[i] = Math.imul(i, 2654435761) ^ i << 7
);
new Uint16Array(memory.buffer, scale, groups).fill(0x2c10);
new Uint16Array(memory.buffer, offset, groups).fill(0x2800);
new Float32Array(memory.buffer, x, TOKENS * COLS).forEach((_, i, all) => all[i] = Math.sin(1.7 * i));
const isa = kernel("aq_best_isa")();
kernel("aq_quantize_activations")(x, TOKENS, COLS, 8, AQ_ACTIVATIONS_PER_TOKEN, codes, xScale, xZero, isa, 1);

type Work = "dequantize" | "floats" | "bytes";

function call(
  work: Work,
  codesOf: "uniform" | "trellis",
  rows: number,
  tokens: number,
  bits: number,
  size: number,
) {
  const trellis = codesOf === "trellis", layout = [rows, COLS, bits, size, out] as const;
  const matrix = [packed, scale, offset] as const;
  const status = work === "dequantize"
    ? kernel(trellis ? "aq_dequantize_trellis" : "aq_dequantize")(...matrix, ...layout, AQ_F32, isa, 1)
    : work === "floats"
    ? kernel(trellis ? "aq_linear_trellis" : "aq_linear_packed")(x, tokens, ...matrix, 0, ...layout, isa, 1)
    : kernel(trellis ? "aq_linear_trellis_int8" : "aq_linear_packed_int8")(
      ...[codes, xScale, xZero, tokens, ...matrix, 0, ...layout, isa, 1],
    );
  if (status !== 0) throw new Error(`status ${status}`);
}

function ratio(work: Work, rows: number, tokens: number, bits: number, size: number): string {
  const ratios: number[] = [];
  for (let sample = -2; sample < SAMPLES; sample++) {
    const [uniform, trellis] = (["uniform", "trellis"] as const).map((codesOf) => {
      const begin = process.cpuUsage();
      for (let i = 0; i < (rows <= ROWS ? 3 : 1); i++) call(work, codesOf, rows, tokens, bits, size);
      const { user, system } = process.cpuUsage(begin);
      return user + system;
    });
    if (sample >= 0) ratios.push(uniform! / trellis!); // before, engines compile
  }
  return ratios.sort((a, b) => a - b)[SAMPLES >> 1]!.toFixed(2);
}

console.log(
  "| bits | group | dequantize in cache | from memory | 64 tokens, float32 | 8-bit | one, float32 | 8-bit |",
);
console.log("|---|---|---|---|---|---|---|---|");
for (const bits of [2, 3]) {
  for (const size of [0, 64]) {
    const row = [
      ratio("dequantize", CACHED, 0, bits, size),
      ratio("dequantize", ROWS, 0, bits, size),
      ratio("floats", 128, TOKENS, bits, size),
      ratio("bytes", 128, TOKENS, bits, size),
      ratio("floats", MANY, 1, bits, size),
      ratio("bytes", MANY, 1, bits, size),
    ];
    console.log(`| ${bits} | ${size || "row"} | ${row.join(" | ")} |`);
  }
}
