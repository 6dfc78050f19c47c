/** The processors that a process may run on. */
import { readFileSync } from "node:fs";
import process from "node:process";
import { compilerVersion } from "../../lib/native/build.ts";

/**
 * The processors of this process in so many shares, as `taskset` takes them; undefined where that is not
 * there, or a share would be empty. A program that is held to its share starts no threads that wait for
 * another step's.
 */
export async function processorShares(count: number): Promise<string[] | undefined> {
  if (process.platform !== "linux" || await compilerVersion("taskset") === undefined) return undefined;
  const list = /^Cpus_allowed_list:\s*(\S+)/m.exec(readFileSync("/proc/self/status", "utf8"))?.[1] ?? "";
  const processors = list.split(",").flatMap((range) => {
    const [first, last = first] = range.split("-").map(Number);
    return Array.from({ length: last! - first! + 1 }, (_, i) => first! + i);
  });
  const each = Math.floor(processors.length / count);
  if (each === 0) return undefined;
  return Array.from({ length: count }, (_, i) => processors.slice(i * each, (i + 1) * each).join());
}
