/** Parts of a bench run for tasks that share nothing: a model at one width, or a packed folder, each. */
import { CALIBRATED_SOLVERS } from "../config/names.ts";
import { ConfigError } from "../errors.ts";
import { nameOfPath } from "../files/whole.ts";
import type { Shard } from "../output/shard_folders.ts";
import { divideUnits } from "../plan/shards.ts";
import { openCheckpoint } from "../tensor/mod.ts";
import { modelFingerprint } from "../time/mod.ts";
import type { BenchOptions } from "./options.ts";

/** Suites that measure models, which can be divided; the others measure the machine. */
export const DIVISIBLE_SUITES: readonly string[] = [
  "accuracy",
  "checkpoint",
  "peers",
  "phases",
  "defaults",
  "solvers",
];

/** The runs that together measure what one run with these options does. */
function unitsOf(options: BenchOptions): BenchOptions[] {
  const { models, packed = [], bits, solvers } = options, fewest = Math.min(...bits);
  if (packed.length > 0) return packed.map((folder) => ({ ...options, packed: [folder] }));
  // Among others a calibrated solver is measured at the fewest bits alone.
  const without = solvers.filter((solver) => solvers.length === 1 || !CALIBRATED_SOLVERS.includes(solver));
  return models.flatMap((model) =>
    bits.map((width) => ({
      ...options,
      models: [model],
      bits: [width],
      solvers: width === fewest ? solvers : without,
    }))
  );
}

/**
 * What a shard of a run measures: a run with each of these options.
 *
 * @throws {ConfigError} where the suite measures no models
 */
export function shardOptions(suite: string, options: BenchOptions, shard: Shard): BenchOptions[] {
  if (!DIVISIBLE_SUITES.includes(suite) || options.modelSize !== undefined) {
    throw new ConfigError(
      `Cannot measure in shards: the suite must be one of ${
        DIVISIBLE_SUITES.join(", ")
      } and measure models, got ${suite}` +
        `${options.modelSize === undefined ? "" : " of a model size"}, which measures this machine`,
    );
  }
  const units = unitsOf(options), names = units.map((_, i) => String(i).padStart(6, "0"));
  const own = new Set(divideUnits(names.map((name) => ({ name, cost: 1 })), shard.count)[shard.index - 1]);
  return units.filter((_, i) => own.has(names[i]!));
}

/** Fingerprints of what is measured: a shard is of one run with others where they are equal. */
export const inputsOf = ({ models, packed = [] }: BenchOptions): string[] =>
  [...models, ...packed].map((path) => {
    using checkpoint = openCheckpoint(path);
    return `${nameOfPath(path)} ${modelFingerprint(checkpoint)}`;
  });

/** What a unit measures, in words. */
export const unitText = ({ models, packed = [], bits }: BenchOptions): string =>
  `${models.map(nameOfPath).join(", ")}, ${
    packed.length > 0 ? packed.map(nameOfPath).join(", ") : `${bits.join(", ")} bits`
  }`;
