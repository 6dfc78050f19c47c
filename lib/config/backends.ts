/** What can run the kernels, by name. How it is found and opened is lib/native's. */

/**
 * `cpu` prefers a native library and says so when it has to take WebAssembly; `native` and `wasm` are one of them only.
 * `cuda` is `cpu` with a GPU that quantizes, and an error without one; `auto` is `cuda` where there is a GPU, else `cpu`.
 */
export type BackendChoice = (typeof BACKENDS)[number];
export const BACKENDS = ["auto", "cuda", "cpu", "native", "wasm"] as const;
