/** The kernels that this machine can open, each once, for tests that must hold on all of them. */
import { type InstructionSet, type Kernels, openKernels } from "../lib/native/mod.ts";

/** mulberry32: a seeded stream of numbers in [0, 1). */
export function randomStream(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

/** Standard normal float32 values. */
export function gaussians(seed: number, n: number): Float32Array<ArrayBuffer> {
  const random = randomStream(seed);
  return Float32Array.from({ length: n }, () => {
    const radius = Math.sqrt(-2 * Math.log(1 - random()));
    return radius * Math.cos(2 * Math.PI * random());
  });
}

const INSTRUCTION_SETS: InstructionSet[] = ["scalar", "avx2", "avx512", "neon", "simd128"];
/** Sets that are others with products of 8-bit activations of their own, and with trellis codes of their own. */
const INT8_INSTRUCTION_SETS: InstructionSet[] = ["avx512_vnni", "avx512_vbmi", "neon_dot"];

/**
 * Every backend and instruction set that opens here; a native library only where there is one. In Deno those
 * that it takes by default, and the first one's scalar kernels: what the others compute, no runtime changes.
 */
export function allKernels(): Promise<{ name: string; kernels: Kernels }[]> {
  return kernelsOf(INSTRUCTION_SETS);
}

/** Those, and the ones that are others but for products of 8-bit activations and trellis codes. */
export function allInt8Kernels(): Promise<{ name: string; kernels: Kernels }[]> {
  return kernelsOf([...INSTRUCTION_SETS, ...INT8_INSTRUCTION_SETS]);
}

async function kernelsOf(sets: readonly InstructionSet[]): Promise<{ name: string; kernels: Kernels }[]> {
  const found: { name: string; kernels: Kernels }[] = [];
  for (const backend of ["native", "wasm"] as const) {
    const first = found.length;
    for (const isa of sets) {
      try {
        if ("Deno" in globalThis) found.splice(Math.max(first, 1)).forEach(({ kernels }) => kernels.close());
        found.push({ name: `${backend} ${isa}`, kernels: await openKernels({ backend, isa, threads: 1 }) });
      } catch (error) {
        // expected for what this processor or build lacks; anything else is a fault
        if ((error as { code?: string }).code !== "AQ_KERNELS") throw error;
      }
    }
  }
  return found;
}
