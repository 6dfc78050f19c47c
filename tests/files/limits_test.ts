import { afterAll, describe, expect, test } from "bun:test";
import { mkdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { limitsOf } from "../../lib/files/limits.ts";
import { workplace } from "../_checkpoints.ts";

const place = workplace();
afterAll(() => place.remove());

/** A folder in place of `/` with these files. */
function system(files: Readonly<Record<string, string>>): string {
  const root = place.fresh();
  for (
    const [name, text] of Object.entries({
      "proc/meminfo": "MemFree: 1 kB\nMemAvailable: 8000000 kB\n",
      ...files,
    })
  ) {
    mkdirSync(dirname(join(root, name)), { recursive: true });
    writeFileSync(join(root, name), text);
  }
  return root;
}

const V2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
const v1 = (root: string, at = "/sys/fs/cgroup/memory") =>
  `35 31 0:32 ${root} ${at} rw - cgroup cgroup rw,memory\n`;
const stat = (inactive: number, active: number, prefix = "") =>
  `anon 60\n${prefix}inactive_file ${inactive}\n${prefix}active_file ${active}\nfile 99\n`;
const group2 = (folder: string, max: string, current: number, cached: number) => ({
  [`${folder}/memory.max`]: `${max}\n`,
  [`${folder}/memory.current`]: `${current}\n`,
  [`${folder}/memory.stat`]: stat(cached, 0),
});

describe("memory that a process may take", () => {
  const MACHINE = 8_000_000 * 1024;
  const cases: [string, Record<string, string>, number][] = [
    ["the kernel's own estimate without groups", {}, MACHINE],
    ["page cache of a group is free", {
      "proc/self/cgroup": "0::/\n",
      "proc/self/mountinfo": V2,
      "sys/fs/cgroup/memory.max": "2000000000\n",
      "sys/fs/cgroup/memory.current": "1990000000\n",
      "sys/fs/cgroup/memory.stat": stat(1_900_000_000, 30_000_000),
    }, 1_940_000_000],
    ["groups up to the root count, the one with least room most", {
      "proc/self/cgroup": "0::/a/b\n",
      "proc/self/mountinfo": V2,
      ...group2("sys/fs/cgroup/a/b", "max", 50, 0),
      ...group2("sys/fs/cgroup/a", "3000", 2500, 100),
      ...group2("sys/fs/cgroup", "9000", 100, 0),
    }, 600],
    ["max is no limit", {
      "proc/self/cgroup": "0::/a\n",
      "proc/self/mountinfo": V2,
      ...group2("sys/fs/cgroup/a", "max", 50, 0),
    }, MACHINE],
    ["version 1, seen from inside of a container", {
      "proc/self/cgroup": "4:memory:/docker/c1\n0::/\n",
      "proc/self/mountinfo": v1("/docker/c1"),
      "sys/fs/cgroup/memory/memory.limit_in_bytes": "5000\n",
      "sys/fs/cgroup/memory/memory.usage_in_bytes": "4500\n",
      "sys/fs/cgroup/memory/memory.stat": `inactive_file 1\n${stat(3000, 500, "total_")}`,
    }, 4000],
    ["version 1 without a limit", {
      "proc/self/cgroup": "4:memory:/\n",
      "proc/self/mountinfo": v1("/"),
      "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
      "sys/fs/cgroup/memory/memory.usage_in_bytes": "4500\n",
    }, MACHINE],
    ["both versions at once, memory in version 1, mounted elsewhere", {
      "proc/self/cgroup": "4:cpu,memory:/jobs/7\n1:pids:/other\n0::/x\n",
      "proc/self/mountinfo": v1("/", "/groups\\040here") +
        "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
      "groups here/jobs/7/memory.limit_in_bytes": "7000\n",
      "groups here/jobs/7/memory.usage_in_bytes": "6000\n",
      "groups here/other/memory.limit_in_bytes": "1\n",
    }, 1000],
    ["a group outside of what is mounted", {
      "proc/self/cgroup": "0::/../../outside\n",
      "proc/self/mountinfo": "30 23 0:26 /inside /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
      ...group2("sys/fs/cgroup", "6000", 5000, 100),
    }, 1100],
    ["no list of groups, files where they usually are", group2("sys/fs/cgroup", "6000", 7000, 100), 0],
    ["a limit without its usage", { "sys/fs/cgroup/memory.max": "6000\n" }, 6000],
  ];
  for (const [name, files, wanted] of cases) {
    test(name, () => expect(limitsOf(system(files)).availableBytes).toBe(wanted));
  }

  test("the tightest limit is named", () => {
    const files = { ...group2("sys/fs/cgroup/a", "3000", 0, 0), ...group2("sys/fs/cgroup", "9000", 0, 0) };
    const root = system({ "proc/self/cgroup": "0::/a\n", "proc/self/mountinfo": V2, ...files });
    expect(limitsOf(root).memoryLimit).toEqual({ bytes: 3000, path: "/sys/fs/cgroup/a/memory.max" });
  });
});

describe("processors that a process may use", () => {
  const present = limitsOf(system({})).processors;
  const cases: [string, Record<string, string>, number][] = [
    ["a quota is rounded up", { "sys/fs/cgroup/cpu.max": "50000 100000\n" }, 1],
    ["max is none", { "sys/fs/cgroup/cpu.max": "max 100000\n" }, present],
    ["version 1", {
      "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
      "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }, 1],
    ["version 1 without one", {
      "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
      "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }, present],
    ["the processors that it is bound to", { "proc/self/status": "Cpus_allowed_list:\t0\n" }, 1],
  ];
  for (const [name, files, wanted] of cases) {
    test(name, () => expect(limitsOf(system(files)).processors).toBe(wanted));
  }

  test("the processor time after which the system ends it", () => {
    const file = (limit: string) => ({
      "proc/self/limits": `Max cpu time              ${limit}   unlimited seconds\n`,
    });
    expect(limitsOf(system(file("3600"))).processorSeconds).toBe(3600);
    expect(limitsOf(system(file("unlimited"))).processorSeconds).toBeUndefined();
  });
});
