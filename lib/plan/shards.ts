/**
 * Dividing work among tasks that share nothing: which shard a task is, and which pieces of work each shard
 * has. Every task works that out for itself, from the same names and costs, so no task has to tell another.
 */
import { ConfigError } from "../errors.ts";
import type { Shard } from "../output/shard_folders.ts";

/** Most shards of a run. */
export const MAX_SHARDS = 4096;

/** As in `3/8`. */
export const shardText = ({ index, count }: Shard): string => `${index}/${count}`;

/** The shard that a text as `3/8` names. @throws {ConfigError} on anything else */
export function parseShard(text: string, source = "--shard"): Shard {
  const [, index, count] = /^(\d{1,6})\/(\d{1,6})$/.exec(text.trim()) ?? [];
  const shard = { index: Number(index), count: Number(count) };
  if (index !== undefined && shard.index >= 1 && shard.index <= shard.count && shard.count <= MAX_SHARDS) {
    return shard;
  }
  throw new ConfigError(
    `Cannot run a shard: ${source} must be i/n with 1 <= i <= n <= ${MAX_SHARDS}, as in 3/8, got "${text}"`,
  );
}

/** A shard that the environment names, and by which variables. */
export interface ShardFromEnvironment {
  readonly shard: Shard;
  /** As in `SLURM_ARRAY_TASK_ID=5 of _COUNT=8`. */
  readonly source: string;
}

type Environment = Readonly<Record<string, string | undefined>>;

/**
 * The shard that an engine's environment names: Slurm's array task, Kubernetes' indexed Job (with its count
 * in `JOB_COMPLETIONS`, which the manifest has to set), or Grid Engine's array task.
 *
 * @returns undefined where no engine names one
 * @throws {ConfigError} where the variables are not those of a whole array without gaps
 */
export function shardFromEnvironment(environment: Environment): ShardFromEnvironment | undefined {
  return slurmShard(environment) ?? kubernetesShard(environment) ?? gridEngineShard(environment);
}

/** Index of a task in an array of ids from `first` to `last` in steps. */
function arrayShard(
  engine: string,
  { id, first, last, step, count }: {
    readonly id: number;
    readonly first: number;
    readonly last: number;
    readonly step: number;
    readonly count: number;
  },
  source: string,
): ShardFromEnvironment {
  const index = (id - first) / step + 1;
  const isWhole = [id, first, last, step, count].every(Number.isSafeInteger) && step > 0 &&
    Number.isSafeInteger(index) && index >= 1 && index <= count && (last - first) / step + 1 === count;
  if (isWhole) return { shard: parseShard(`${index}/${count}`, source), source };
  throw new ConfigError(
    `Cannot tell the shard from ${engine}: the array must be a range without gaps, as 0-7 or 1-16:2, got ${source}: ` +
      "give --shard i/n, or --shard none for the whole",
  );
}

const numberOf = (text: string | undefined): number =>
  text !== undefined && /^-?\d+$/.test(text) ? Number(text) : NaN;

function slurmShard(environment: Environment): ShardFromEnvironment | undefined {
  const of = (name: string) => environment[`SLURM_ARRAY_TASK_${name}`];
  const id = of("ID"), count = of("COUNT");
  if (id === undefined) return undefined;
  const first = of("MIN") ?? "0", step = of("STEP") ?? "1";
  const last = of("MAX") ?? String(numberOf(first) + (numberOf(count) - 1) * numberOf(step));
  return arrayShard("Slurm", {
    id: numberOf(id),
    first: numberOf(first),
    last: numberOf(last),
    step: numberOf(step),
    count: numberOf(count),
  }, `SLURM_ARRAY_TASK_ID=${id}, _MIN=${first}, _MAX=${last}, _STEP=${step}, _COUNT=${count ?? "(not set)"}`);
}

/** Variable that a manifest sets to an indexed Job's completions: Kubernetes sets only the index. */
const COMPLETIONS = "JOB_COMPLETIONS";

function kubernetesShard(environment: Environment): ShardFromEnvironment | undefined {
  const id = environment["JOB_COMPLETION_INDEX"], count = environment[COMPLETIONS];
  if (id === undefined) return undefined;
  if (count === undefined) {
    throw new ConfigError(
      `Cannot tell the shard from Kubernetes: JOB_COMPLETION_INDEX is ${id}, ${COMPLETIONS} must be the Job's number ` +
        "of completions, got nothing: set it in the manifest, or give --shard i/n or --shard none",
    );
  }
  const own = { id: numberOf(id), first: 0, last: numberOf(count) - 1, step: 1, count: numberOf(count) };
  return arrayShard("Kubernetes", own, `JOB_COMPLETION_INDEX=${id}, ${COMPLETIONS}=${count}`);
}

function gridEngineShard(environment: Environment): ShardFromEnvironment | undefined {
  const id = environment["SGE_TASK_ID"];
  if (id === undefined || id === "undefined") return undefined; // of a job that is no array
  const first = environment["SGE_TASK_FIRST"], last = environment["SGE_TASK_LAST"];
  const step = environment["SGE_TASK_STEPSIZE"];
  const [from, to, by] = [numberOf(first ?? "1"), numberOf(last), numberOf(step ?? "1")];
  return arrayShard(
    "Grid Engine",
    { id: numberOf(id), first: from, last: to, step: by, count: Math.floor((to - from) / by) + 1 },
    `SGE_TASK_ID=${id}, _FIRST=${first ?? "1"}, _LAST=${last ?? "(not set)"}, _STEPSIZE=${step ?? "1"}`,
  );
}

/** A piece of work that one shard does. */
export interface ShardUnit {
  readonly name: string;
  /** In any unit, the same for all. */
  readonly cost: number;
}

/**
 * Names of the units of each shard. The largest goes to the shard that has least so far (Graham 1969, "Bounds
 * on multiprocessing timing anomalies": at most 4/3 of the best possible), with ties by name and index, so
 * that the division depends on nothing but names and costs.
 *
 * @returns a list for each shard, in the order of the units
 */
export function divideUnits(units: readonly ShardUnit[], count: number): string[][] {
  const order = units.map((_, i) => i).sort((a, b) =>
    units[b]!.cost - units[a]!.cost || (units[a]!.name < units[b]!.name ? -1 : 1)
  );
  const loads = new Float64Array(count), owned = Array.from({ length: count }, (): number[] => []);
  for (const unit of order) {
    let least = 0;
    for (let i = 1; i < count; i++) if (loads[i]! < loads[least]!) least = i;
    loads[least]! += units[unit]!.cost;
    owned[least]!.push(unit);
  }
  return owned.map((list) => list.sort((a, b) => a - b).map((i) => units[i]!.name));
}
