/** A part of a checkpoint that one of several tasks quantizes: which tensors, and what divides at all. */
import { join } from "node:path";
import { candidateCount } from "../solve/candidates.ts";
import { calibrationSource } from "../calibration/source.ts";
import { statisticsFiles } from "../calibration/saved_statistics.ts";
import type { Solvable } from "../calibration/statistics/alone.ts";
import { type ConfigInForce, hasBudget, wantsPhases } from "../config/mod.ts";
import { CALIBRATED_SOLVERS } from "../config/names.ts";
import { ConfigError } from "../errors.ts";
import type { Plan, PlanRow } from "../plan/plan.ts";
import type { Shard } from "../output/shard_folders.ts";
import { divideUnits, shardText } from "../plan/shards.ts";
import { isTokenTable } from "../plan/plan.ts";
import { sha256 } from "../files/whole.ts";
import type { Rewrite } from "../output/rewrite.ts";
import { formatBytes } from "../progress.ts";
import { isRounded } from "../solve/by_weights.ts";
import { layerCost } from "../solve/layer_cost.ts";
import { EXCHANGE_PREFIX, type TeamPlace } from "../solve/team.ts";
import type { Checkpoint } from "../tensor/mod.ts";
import type { OutputPlace } from "./checkpoint_run.ts";

/** A plan divided into shards. */
export interface DividedPlan {
  /** Rows of each shard, in the order of the plan. */
  readonly shards: readonly (readonly PlanRow[])[];
  /** Nominal seconds of each; only their relations matter. */
  readonly costs: readonly number[];
  /** Bytes that each reads of the checkpoint's tensors, and writes of the packed ones. */
  readonly bytesRead: readonly number[];
  readonly bytesWritten: readonly number[];
}

/**
 * Divides a plan by forecast cost. It depends on names, shapes and settings alone, so every task of an array
 * comes to the same division.
 *
 * @example
 * ```ts
 * import { resolveConfig } from "../config/mod.ts";
 * import { openCheckpoint } from "../tensor/mod.ts";
 * import { dividePlan, planQuantization } from "./mod.ts";
 * using checkpoint = openCheckpoint("tests/models/dream-mini");
 * const { config } = resolveConfig({ overrides: { solver: "clip" } });
 * const { shards, costs } = dividePlan(planQuantization(checkpoint, config), { ...config, solver: "clip" }, 4);
 * console.log(shards.map((rows) => rows.length), costs);
 * ```
 */
export function dividePlan({ rows }: Plan, config: ConfigInForce, count: number): DividedPlan {
  const byName = new Map(rows.map((row) => [row.name, { row, cost: layerCost(config, row) }]));
  const units = [...byName].map(([name, { cost }]) => ({ name, cost }));
  const shards = divideUnits(units, count).map((names) => names.map((name) => byName.get(name)!));
  const sums = (of: (unit: { row: PlanRow; cost: number }) => number) =>
    shards.map((own) => own.reduce((sum, unit) => sum + of(unit), 0));
  return {
    shards: shards.map((own) => own.map(({ row }) => row)),
    costs: sums(({ cost }) => cost),
    bytesRead: sums(({ row }) => row.bytesBefore),
    bytesWritten: sums(({ row }) => row.bytesAfter),
  };
}

/** A shard's part of a plan in a line. */
export function shardSummary(shard: Shard, { shards, costs, bytesRead, bytesWritten }: DividedPlan) {
  const i = shard.index - 1, total = costs.reduce((a, b) => a + b, 0), slowest = Math.max(...costs);
  const mean = total / costs.length, percent = (part: number) => `${(100 * part).toPrecision(3)} %`;
  const tensors = shards[i]!.length, all = shards.reduce((sum, rows) => sum + rows.length, 0);
  return {
    message: `${shardText(shard)}: ${tensors} of ${all} tensors, ${
      percent(total === 0 ? 0 : costs[i]! / total)
    } of the forecast work, reads ${formatBytes(bytesRead[i]!)} and writes ${
      formatBytes(bytesWritten[i]!)
    } of weights; the slowest shard has ${
      percent(mean === 0 ? 0 : slowest / mean - 1)
    } more work than the mean`,
    data: {
      ...shard,
      tensors,
      cost: costs[i]!,
      meanCost: mean,
      slowestCost: slowest,
      bytesRead: bytesRead[i]!,
      bytesWritten: bytesWritten[i]!,
    },
  };
}

/** Whether layers of a plan are solved on calibration data. */
const isSolved = (config: ConfigInForce, { rows }: Plan): boolean =>
  CALIBRATED_SOLVERS.includes(config.solver) &&
  rows.some((row) => row.action === "quantize" && !isTokenTable(row) && !isRounded(config, row));

const cannot = (reason: string) => new ConfigError(`Cannot quantize in shards: ${reason}`);

const FROM_STATISTICS =
  "save statistics of what layers read (--save-calibration FILE, which itself runs in shards), and give them as --calibrate FILE";

/** What a task of an array may compute alone. @throws {ConfigError} with the way to what can be divided */
export function checkDivisible(
  checkpoint: Checkpoint,
  config: ConfigInForce,
  plan: Plan,
  isTogether = false,
): void {
  if (wantsPhases(config)) {
    throw cannot(
      "phases measure the whole quantized model, got some that are enabled: run without --phases, or as one task",
    );
  }
  if (config.bitPlan === null && hasBudget(config)) {
    throw cannot(
      "a budget measures every layer in the whole model: give the plan that one run with it made " +
        "(arrowquant.plan.json) as --plan FILE",
    );
  }
  const isBlockwise = isSolved(config, plan) && !readsStatistics(checkpoint, config) &&
    config.calibrationMode === "blocks";
  if (isBlockwise === isTogether) return;
  if (isTogether) {
    throw cannot(
      "--together is for layers that are solved on data with calibration_mode: blocks, got others, whose shards share " +
        "nothing: leave it out",
    );
  }
  throw cannot(
    "with calibration_mode: blocks every block is solved on what the quantized blocks before it give, so that none can " +
      "begin before they are done: give --together MINUTES where all shards run at the same time and see one OUT, set " +
      `calibration_mode: once, or ${FROM_STATISTICS}; weights alone (--solver clip or round) divide as well`,
  );
}

/** @throws {ConfigError} where the whole model would have to be measured to choose among solutions */
export function checkOneCandidate(calibrated: Solvable, config: ConfigInForce): void {
  const count = candidateCount(calibrated, config);
  if (count === 1) return;
  throw cannot(
    `${count} solutions of the whole model are compared on held-out data: set solver_options.candidates: 1, or ${FROM_STATISTICS}`,
  );
}

/** Whether what layers read is known from saved statistics, so that no other layer's weights matter. */
export const readsStatistics = (checkpoint: Checkpoint, config: ConfigInForce): boolean =>
  statisticsFiles(calibrationSource(checkpoint, config)) !== undefined;

/** Where shards of one run meet, and what identifies that run. */
export type TeamOfRun = TeamPlace & { readonly identity: string };

/** Where shards of one run meet; undefined where they do not. */
export function teamOf(
  { output: parts, togetherMilliseconds }: Pick<OutputPlace, "output"> & {
    readonly togetherMilliseconds?: number | undefined;
  },
  shard: Shard,
  { identity }: Rewrite,
): TeamOfRun | undefined {
  if (togetherMilliseconds === undefined) return undefined;
  const { shard: _, ...settings } = JSON.parse(identity.settings);
  const own = sha256(JSON.stringify([{ ...identity, settings }, shard.count]));
  const folder = join(parts, `${EXCHANGE_PREFIX}${own.slice(0, 16)}`);
  return { shard, folder, waitMilliseconds: togetherMilliseconds, identity: own };
}
