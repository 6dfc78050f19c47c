/** Kernels that count: floating-point operations and time of the solver's kernels, call by call. */
import { type Kernels, unchecked } from "../../native/kernels.ts";

/** Operations and time of one kernel's calls. */
export interface KernelTotals {
  /** A multiply-add is two. */
  flops: number;
  seconds: number;
}

type Argument = unknown;

const numbers = (args: readonly Argument[], ...at: readonly number[]) => at.map((i) => Number(args[i]));
/** Numbers of an array: of a moment those of all its blocks, Σ block². */
const elements = (args: readonly Argument[], at: number) => (args[at] as Float32Array).length;

/**
 * Floating-point operations that a call cannot do without, from its arguments as in
 * kernels/include/arrowquant.h:
 *
 * ```text
 * aq_multiply           2 · rows · k · cols
 * aq_linear             2 · tokens · rows · cols
 * aq_accumulate_moment  tokens · Σ block², symmetric: half of a product; with y twice as many
 * aq_factor_moment      n³ / 3
 * aq_solve_moment       2 · rows · n²: two triangles
 * aq_quantize_feedback  rows · Σ block²: each column's error reaches those after it
 * aq_refine_codes       2 · rows · Σ block² · (1 + rounds): the gradient of all codes, and once a round what the
 *                       changed codes mean for it; refits ride along
 * ```
 */
const FLOPS: Readonly<Record<string, (args: readonly Argument[]) => number>> = {
  aq_multiply(args) {
    const [rows, k, cols] = numbers(args, 2, 3, 4);
    return 2 * rows! * k! * cols!;
  },
  aq_linear(args) {
    const [tokens, rows, cols] = numbers(args, 1, 5, 6);
    return 2 * tokens! * rows! * cols!;
  },
  aq_accumulate_moment(args) {
    const [tokens] = numbers(args, 3);
    return (args[1] === null ? 1 : 2) * tokens! * elements(args, 7);
  },
  aq_factor_moment(args) {
    const [n] = numbers(args, 1);
    return n! ** 3 / 3;
  },
  aq_solve_moment(args) {
    const [n, rows] = numbers(args, 2, 4);
    return 2 * rows! * n! ** 2;
  },
  aq_quantize_feedback(args) {
    const [rows] = numbers(args, 1);
    return rows! * elements(args, FEEDBACK_FACTOR);
  },
  aq_refine_codes(args) {
    const [rows, rounds] = numbers(args, 1, REFINE_ROUNDS);
    return 2 * rows! * elements(args, REFINE_ROUNDS - 2) * (1 + rounds!);
  },
};

/** Places of arguments of the row solvers' kernels. */
const FEEDBACK_FACTOR = 8, REFINE_ROUNDS = 9;

/** Kernels whose calls are counted. */
export interface CountedKernels {
  readonly kernels: Kernels;
  /** What was counted since the last call, by the kernel's name without its prefix. */
  take(): Map<string, KernelTotals>;
}

/** Kernels that count their calls; the same results. */
export function countedKernels(kernels: Kernels): CountedKernels {
  const own = unchecked(kernels);
  let totals = new Map<string, KernelTotals>();
  const calls = Object.create(own.calls) as Record<string, unknown>;
  for (const [name, flopsOf] of Object.entries(FLOPS)) {
    const call = own.calls[name as keyof typeof own.calls] as (...args: Argument[]) => number;
    calls[name] = (...args: Argument[]) => {
      const begin = performance.now(), status = call(...args);
      const seconds = (performance.now() - begin) / 1000, key = name.slice("aq_".length);
      const known = totals.get(key) ?? { flops: 0, seconds: 0 };
      totals.set(key, known);
      known.flops += flopsOf(args);
      known.seconds += seconds;
      return status;
    };
  }
  return {
    kernels: Object.create(kernels, { calls: { value: calls } }) as Kernels,
    take() {
      const taken = totals;
      totals = new Map();
      return taken;
    },
  };
}
