/** What a suite runs with when it is called from a program: everything that is not said has the command's default. */
import type { BenchOptions } from "./suite.ts";

/**
 * Options of a suite for these models.
 *
 * @example
 * ```ts
 * import { benchOptions } from "./options.ts";
 * console.log(benchOptions(["tests/models/dream-mini"], { bits: [2], quick: true }).bits); // [2]
 * ```
 */
export function benchOptions(models: readonly string[], changes: Partial<BenchOptions> = {}): BenchOptions {
  return {
    models,
    bits: [8, 4, 3, 2],
    groupSize: changes.groupSizes?.[0] ?? 64,
    groupSizes: [changes.groupSize ?? 64],
    solvers: ["round", "clip"],
    threads: undefined,
    backend: "auto",
    isa: undefined,
    seed: 1,
    tasks: undefined,
    limit: undefined,
    syntheticBytes: 2e9,
    quick: false,
    ...changes,
  };
}
