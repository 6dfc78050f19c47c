/** The types of opened kernels, and their number of threads. */
import { KernelError } from "../errors.ts";
import { checkWhole } from "./call.ts";
import { limitsOf } from "../files/limits.ts";
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
  avx512_vbmi: 8,
} as const;
export type InstructionSet = keyof typeof INSTRUCTION_SETS;

/** The header's `AQ_MAX_THREADS`. */
export const MAX_THREADS = 64;

/** An array that a kernel reads or writes. */
type View = ArrayBufferView<ArrayBufferLike>;

/** An array that kernels will read. */
export interface ComingArray {
  /** Constant; undefined where the host alone reads it. */
  readonly array: View | undefined;
  /** Bytes that were read from files when it was taken. */
  readonly bytesRead: number;
}

/**
 * Where arrays are between the calls of kernels. On the CPU they stay where they are; a GPU has copies of
 * those that it is told of, so that what one kernel has made does not cross the bus before the next one reads
 * it.
 */
export interface ArrayPlaces {
  /** From now on arrays can be held; none is yet. */
  open(): void;
  /**
   * From now on only kernels touch the array, and all others in its memory, until it is released or dropped.
   * One that is held already stays as it is. Nothing is held outside of {@linkcode open} and
   * {@linkcode drop}.
   *
   * @param isScratch whether what the array holds now does not matter
   */
  hold<T extends View>(array: T, isScratch?: boolean): T;
  /** The array is the host's again, with what kernels have made of it. */
  release<T extends View>(array: T): T;
  /** The array is the host's again, whatever is in it. */
  discard<T extends View>(array: T): T;
  /** All held arrays are the host's again, whatever is in them, and none is held from now on. */
  drop(): void;
  /** The array never changes from now on: a copy may stay as long as there is room. */
  constant<T extends View>(array: T): T;
  /**
   * A block of a model is at work, and what comes will be read behind it, in this order. Where the host would
   * wait for a device it takes one after the other, until {@linkcode drop}, and begins copies where there is
   * room; where nothing is waited for none is taken.
   */
  ahead(block: number, coming: Iterator<ComingArray>): void;
}

/** All arrays are the host's. */
export const HOST_ARRAYS: ArrayPlaces = {
  open() {},
  hold: (array) => array,
  release: (array) => array,
  discard: (array) => array,
  drop() {},
  constant: (array) => array,
  ahead() {},
};

/** Opened kernels. Which ones they are is public, and belongs in every log and measurement. */
export interface Kernels {
  /** What runs on the CPU. */
  readonly backend: "native" | "wasm";
  /** One line about the GPU; undefined where the CPU does all work. */
  readonly device?: string | undefined;
  readonly isa: InstructionSet;
  /** Threads of a call, 1 to 64; 1 with WebAssembly. No result depends on it. */
  readonly threads: number;
  /** Path of the library, or `embedded`. */
  readonly library: string;
  /** Name and version of the runtime, as in `bun 1.4.5`. */
  readonly runtime: string;
  readonly abi: number;
  /** Places that were passed over, and why. */
  readonly attempts: readonly Attempt[];
  /** Where arrays are between calls. */
  readonly arrays: ArrayPlaces;
  /** One line for logs. */
  describe(): string;
  /** Releases the library; no call may follow. */
  close(): void;
  [Symbol.dispose](): void;
}

/** Opened kernels with the library's functions, which check nothing; functions.ts calls them with checks. */
export interface UncheckedKernels extends Kernels {
  readonly calls: NativeCalls;
  /** A count as `calls` take it. */
  size(count: number): NativeSize;
  /** The header's number of `isa`. */
  readonly isaNumber: number;
}

/** The library's functions behind opened kernels; only for lib/native and for timing them. */
export const unchecked = (kernels: Kernels) => kernels as UncheckedKernels;

/** `rest` of an opened library with its functions, which throw after `close` and end no process. */
export function closable<Calls, Rest extends object>(
  path: string,
  calls: Calls,
  release: () => void,
  rest: Rest,
): Rest & { readonly calls: Calls; close(): void; [Symbol.dispose](): void } {
  let isOpen = true;
  const close = () => {
    if (isOpen) release();
    isOpen = false;
  };
  return {
    ...rest,
    close,
    [Symbol.dispose]: close,
    get calls() {
      if (!isOpen) throw new KernelError(`Cannot call a kernel of ${path}: it was closed`);
      return calls;
    },
  };
}
/** Processors that this process may use: asked once. */
let processors: number | undefined;

/**
 * Threads that run where `asked` are wanted: 0 is one per core, and WebAssembly has one.
 *
 * @throws {RangeError} when `asked` is no whole number from 0 to 64
 */
export function threadCount(asked: number, backend: Kernels["backend"]): number {
  checkWhole("open the kernels", "threads", asked, 0, MAX_THREADS);
  if (backend === "wasm") return 1;
  return asked > 0 ? asked : Math.min(MAX_THREADS, processors ??= limitsOf().processors);
}

/** The same kernels with another number of threads, 0 for one per core. Closing either closes both. */
export function withThreads(kernels: Kernels, threads: number): Kernels {
  const count = threadCount(threads, kernels.backend);
  if (count === kernels.threads) return kernels;
  return Object.create(kernels, { threads: { value: count, enumerable: true } });
}
