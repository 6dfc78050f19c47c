/**
 * Peers of matrix products: the core's own fused multiply-adds, and ggml's dot products called row by row
 * from C, as ggml's own product calls them. Both need a little C (kernels/bench/product_peers.c), compiled
 * when the bench runs; it is no part of the kernels' library.
 */
import { cText, openCompiled } from "../compiled.ts";
import type { Ggml, GgmlActivationType, GgmlType } from "../ggml.ts";
import { INSTRUCTION_SETS } from "../../native/kernels.ts";
import type { Kernels } from "../../native/mod.ts";
import { type KernelCase, relativeDifference } from "./cases.ts";
import { ggmlCase } from "./peers.ts";
import type { ProductOperands } from "./product_cases.ts";

export interface ProductPeers {
  /** Runs rounds of multiply-adds. @returns those of a round, 0 where the instruction set has none */
  fmaChains(isaNumber: number, rounds: number): number;
  /** `out[row] = dot(row, activations)` by a function of a library. */
  ggmlRows(
    library: string,
    symbol: string,
    cols: number,
    rows: number,
    weights: Uint8Array,
    rowBytes: number,
    activations: Uint8Array,
    out: Float32Array,
  ): void;
  close(): void;
}

/** Compiles and opens the peers in `folder`. @returns them, or why they cannot be had */
export async function openProductPeers(folder: string): Promise<ProductPeers | { readonly reason: string }> {
  const library = await openCompiled(folder, "product_peers", {
    // int32_t fma_chains(int32_t isa, int64_t rounds)
    fma_chains: { parameters: ["i32", "i64"], result: "i32" },
    // int32_t ggml_rows(const char *path, const char *symbol, int32_t cols, int64_t rows, const void *x,
    //                   int64_t row_bytes, const void *y, float *out)
    ggml_rows: {
      parameters: ["buffer", "buffer", "i32", "i64", "buffer", "i64", "buffer", "buffer"],
      result: "i32",
    },
  });
  if ("reason" in library) return library;
  const { count } = library;
  return {
    fmaChains: (isa, rounds) => Number(library.symbols["fma_chains"]!(isa, count(rounds))),
    ggmlRows(libraryPath, symbol, cols, rows, weights, rowBytes, activations, out) {
      const names = [cText(libraryPath), cText(symbol)], matrix = [weights, count(rowBytes)];
      const status = library.symbols["ggml_rows"]!(...names, cols, count(rows), ...matrix, activations, out);
      if (status !== 0) throw new Error(`Cannot call ${symbol} of ${libraryPath}`);
    },
    close: () => library.close(),
  };
}

const FMA_ROUNDS = 200_000;
export const FMA_PEAK = "fused multiply-adds alone";

/** The core's multiply-adds as fast as they go; undefined where the instruction set has none to measure. */
export function fmaPeakCase(peers: ProductPeers, { isa }: Kernels): KernelCase | undefined {
  const isaNumber = INSTRUCTION_SETS[isa];
  const each = peers.fmaChains(isaNumber, 1);
  if (each === 0) return undefined;
  return {
    name: FMA_PEAK,
    library: "none",
    backend: "native",
    isa,
    dtype: "F32",
    shape: [0, 0],
    threads: 1,
    weights: FMA_ROUNDS * each,
    bytes: 0,
    contender: { run: () => void peers.fmaChains(isaNumber, FMA_ROUNDS) },
    check: () => {}, // numbers that nobody reads
  };
}

/** Formats of ggml's weights, of the activations with them, and the largest relative error of a product. */
const GGML_DOTS = {
  q2_K: { activations: "q8_K", limit: 0.5 },
  q3_K: { activations: "q8_K", limit: 0.25 },
  q4_0: { activations: "q8_0", limit: 0.12 },
  q4_K: { activations: "q8_K", limit: 0.12 },
  q8_0: { activations: "q8_0", limit: 0.02 },
} as const satisfies Partial<Record<GgmlType, { activations: GgmlActivationType; limit: number }>>;
export type GgmlDotType = keyof typeof GGML_DOTS;

export const GGML_DOT = (type: GgmlDotType) => `ggml vec_dot_${type}_${GGML_DOTS[type].activations}`;

/** A matrix in a ggml format times one vector, its quantizing to ggml's 8 bits left out as in ours. */
export function ggmlVectorCase(
  ggml: Ggml,
  peers: ProductPeers,
  operands: ProductOperands,
  type: GgmlDotType,
): KernelCase {
  const { rows, cols, weights, x } = operands, { activations, limit } = GGML_DOTS[type];
  const packed = new Uint8Array(Math.ceil(rows * cols * 34 / 32));
  const bytes = ggml.quantize(type, weights, packed, rows, cols), rowBytes = bytes / rows;
  const y = new Uint8Array(2 * cols);
  ggml.quantizeRowSimd(activations, x, y, cols);
  const out = new Float32Array(rows);
  const symbol = `ggml_vec_dot_${type}_${activations}`;
  const run = () => peers.ggmlRows(ggml.processorLibraryPath, symbol, cols, rows, packed, rowBytes, y, out);
  return {
    ...ggmlCase(ggml, GGML_DOT(type), operands, `${activations} × ${type}`),
    bytes,
    contender: { run },
    check() {
      run();
      const error = relativeDifference(out, operands.expected());
      if (!(error < limit)) {
        throw new Error(`Cannot time ${symbol}: its relative error must be below ${limit}, got ${error}`);
      }
    },
  };
}
