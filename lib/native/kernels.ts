/** Opened kernels: the type that the rest of the package works with. */
import type { Attempt } from "./library.ts";
import type { NativeCalls, NativeSize } from "./symbols.ts";

/** The value is the header's `AQ_ISA_*`. */
export const INSTRUCTION_SETS = {
  scalar: 1,
  avx2: 2,
  avx512: 3,
  neon: 4,
  simd128: 5,
  avx512_vnni: 6,
  neon_dot: 7,
} as const;
export type InstructionSet = keyof typeof INSTRUCTION_SETS;

/** Opened kernels. Which ones they are is public, and belongs in every log and measurement. */
export interface Kernels {
  /** What runs on the CPU. */
  readonly backend: "native" | "wasm";
  /** One line about the GPU that quantizes; undefined where the CPU does. */
  readonly device?: string | undefined;
  readonly isa: InstructionSet;
  /** Path of the library, or `embedded`. */
  readonly library: string;
  /** Name and version of the runtime, as in `bun 1.4.5`. */
  readonly runtime: string;
  readonly abi: number;
  /** Places that were passed over, and why. */
  readonly attempts: readonly Attempt[];
  /** One line for logs. */
  describe(): string;
  /** Releases the library; no call may follow. */
  close(): void;
  [Symbol.dispose](): void;
  /** The header's functions; `lib/quant` and `lib/models` call them, with every argument checked. */
  readonly calls: NativeCalls;
  /** A count as `calls` take it. */
  size(count: number): NativeSize;
  /** The header's number of `isa`. */
  readonly isaNumber: number;
}
