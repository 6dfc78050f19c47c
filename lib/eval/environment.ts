/** The machine and process that a measurement was taken on. */
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { availableParallelism, cpus, homedir, loadavg, totalmem } from "node:os";
import process from "node:process";
import type { Kernels } from "../native/mod.ts";

export interface Environment {
  /** Name and version, as in `bun 1.4.5`. */
  readonly runtime: string;
  readonly processor: string;
  readonly cores: number;
  readonly memoryBytes: number;
  readonly platform: string;
  /** Processes that wanted a core in the last minute: what else the machine is doing. */
  readonly load: number;
  readonly backend: "native" | "wasm";
  readonly isa: string;
  /** Where the kernels came from; the home folder is written `~`. */
  readonly kernels: string;
  /** ISO 8601. */
  readonly date: string;
}

export function environmentOf(kernels: Kernels): Environment {
  return {
    runtime: kernels.runtime,
    processor: cpus()[0]?.model.trim() ?? "unknown",
    cores: availableParallelism(),
    memoryBytes: totalmem(),
    platform: `${process.platform} ${process.arch}`,
    load: loadavg()[0] ?? 0,
    backend: kernels.backend,
    isa: kernels.isa,
    kernels: kernels.describe().replaceAll(homedir(), "~"),
    date: new Date().toISOString(),
  };
}

const STATUS = "/proc/self/status";

/** Peak resident memory of this process, in bytes, since it began or since the last reset. */
export function peakResidentBytes(): number {
  if (existsSync(STATUS)) {
    const kibibytes = /^VmHWM:\s+(\d+) kB$/m.exec(readFileSync(STATUS, "utf8"))?.[1];
    if (kibibytes !== undefined) return Number(kibibytes) * 1024;
  }
  return process.resourceUsage().maxRSS * 1024;
}

/** Lets the peak begin anew from what is resident now. @returns whether the system can do that */
export function resetPeakResident(): boolean {
  try {
    writeFileSync("/proc/self/clear_refs", "5");
    return true;
  } catch {
    return false; // not Linux, or not permitted: the caller says "since the process began"
  }
}
