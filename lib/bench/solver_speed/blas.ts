/** OpenBLAS as the peer of this project's own product of matrices, where the machine has it. */
import process from "node:process";
import { cText, openCompiled } from "../compiled.ts";

/** Names under which systems have it; this variable names another file. */
const LIBRARIES = ["libopenblas.so.0", "libopenblas.so", "libopenblas.dylib"];
const OPENBLAS_VARIABLE = "OPENBLAS_LIBRARY";

/** An opened library. */
export interface Blas {
  /** `c[m, n] = a[m, k] · b[k, n]` */
  sgemm(a: Float32Array, b: Float32Array, m: number, k: number, n: number, c: Float32Array): void;
  close(): void;
}

/** Opens OpenBLAS. @returns it, or the reason why it cannot be had */
export async function openBlas(folder: string, threads: number): Promise<Blas | { readonly reason: string }> {
  const library = await openCompiled(folder, "blas_sgemm", {
    blas_open: { parameters: ["buffer", "i32"], result: "i32" },
    blas_sgemm: { parameters: ["buffer", "buffer", "i32", "i32", "i32", "buffer"], result: "void" },
    blas_close: { parameters: [], result: "void" },
  });
  if ("reason" in library) return library;
  const named = process.env[OPENBLAS_VARIABLE];
  const names = named === undefined ? LIBRARIES : [named];
  if (!names.some((name) => library.symbols["blas_open"]!(cText(name), threads) === 0)) {
    library.close();
    return { reason: `no OpenBLAS with cblas_sgemm (${names[0]}; ${OPENBLAS_VARIABLE} names its file)` };
  }
  return {
    sgemm: (a, b, m, k, n, c) => void library.symbols["blas_sgemm"]!(a, b, m, k, n, c),
    close() {
      library.symbols["blas_close"]!();
      library.close();
    },
  };
}
