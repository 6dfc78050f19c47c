import { describe, expect, test } from "bun:test";
import { ConfigError } from "../../lib/errors.ts";
import { divideUnits, parseShard, shardFromEnvironment, shardText } from "../../lib/plan/shards.ts";

const shardOf = (environment: Record<string, string>) => {
  const found = shardFromEnvironment(environment);
  return found && shardText(found.shard);
};
const slurm = (id: number, min: number, max: number, step: number, count: number) => ({
  SLURM_ARRAY_TASK_ID: `${id}`,
  SLURM_ARRAY_TASK_MIN: `${min}`,
  SLURM_ARRAY_TASK_MAX: `${max}`,
  SLURM_ARRAY_TASK_STEP: `${step}`,
  SLURM_ARRAY_TASK_COUNT: `${count}`,
});

describe("the shard of a task", () => {
  test("by Slurm, whatever the array begins with and its step", () => {
    expect(shardOf(slurm(0, 0, 7, 1, 8))).toBe("1/8");
    expect(shardOf(slurm(8, 1, 8, 1, 8))).toBe("8/8");
    expect(shardOf(slurm(7, 1, 15, 2, 8))).toBe("4/8");
  });
  test("of a Slurm array with gaps is not guessed", () => {
    expect(() => shardOf(slurm(3, 1, 7, 1, 3))).toThrow("without gaps");
    expect(() => shardOf({ SLURM_ARRAY_TASK_ID: "1" })).toThrow(ConfigError);
  });
  test("by an indexed Job of Kubernetes, with its count", () => {
    expect(shardOf({ JOB_COMPLETION_INDEX: "0", JOB_COMPLETIONS: "4" })).toBe("1/4");
    expect(shardOf({ JOB_COMPLETION_INDEX: "3", JOB_COMPLETIONS: "4" })).toBe("4/4");
    expect(() => shardOf({ JOB_COMPLETION_INDEX: "4", JOB_COMPLETIONS: "4" })).toThrow(ConfigError);
    expect(() => shardOf({ JOB_COMPLETION_INDEX: "0" })).toThrow("JOB_COMPLETIONS");
  });
  test("by Grid Engine, of an array alone", () => {
    const array = { SGE_TASK_FIRST: "2", SGE_TASK_LAST: "8", SGE_TASK_STEPSIZE: "2" };
    expect(shardOf({ SGE_TASK_ID: "6", ...array })).toBe("3/4");
    expect(shardOf({ SGE_TASK_ID: "undefined" })).toBeUndefined();
    expect(() => shardOf({ SGE_TASK_ID: "1" })).toThrow(ConfigError);
  });
  test("is none elsewhere", () => expect(shardOf({ PATH: "/bin" })).toBeUndefined());
  test("as a text", () => {
    expect(parseShard("3/8")).toEqual({ index: 3, count: 8 });
    for (const text of ["0/8", "9/8", "3", "a/b", "1/5000", "-1/2", ""]) {
      expect(() => parseShard(text)).toThrow(ConfigError);
    }
  });
});

describe("dividing", () => {
  const units = [8, 7, 6, 5, 4].map((cost, i) => ({ name: `u${i}`, cost }));
  test("gives the largest to whoever has least, worked by hand", () => {
    expect(divideUnits(units, 2)).toEqual([["u0", "u3", "u4"], ["u1", "u2"]]);
  });
  test("gives every unit to exactly one, in any order of the units", () => {
    const shuffled = [units[3]!, units[0]!, units[4]!, units[2]!, units[1]!];
    for (const count of [1, 2, 3, 7]) {
      const own = divideUnits(units, count), other = divideUnits(shuffled, count);
      expect(own.flat().sort()).toEqual(units.map(({ name }) => name));
      expect(other.map((names) => names.toSorted())).toEqual(own.map((names) => names.toSorted()));
    }
  });
});
