/** The machine and process that a measurement was taken on. */
import { readFileSync, writeFileSync } from "node:fs";
import { availableParallelism, cpus, homedir, loadavg, totalmem } from "node:os";
import process from "node:process";
import type { Kernels } from "../native/mod.ts";

/** Machine and process of a measurement. */
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

/** The environment of this process, with these kernels. */
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
  try {
    const kibibytes = /^VmHWM:\s+(\d+) kB$/m.exec(readFileSync(STATUS, "utf8"))?.[1];
    if (kibibytes !== undefined) return Number(kibibytes) * 1024;
  } catch {
    // not Linux, or not permitted: the runtime may know
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

/** Lets the engine free what nothing refers to any more, where it takes the hint. */
export async function collectGarbage(): Promise<void> {
  // From an empty stack: an engine that scans it would find what calls before have left there.
  await new Promise((resolve) => setTimeout(resolve));
  const { Bun: bun, gc } = globalThis as { Bun?: { gc(synchronous: boolean): void }; gc?: () => void };
  if (bun !== undefined) bun.gc(true);
  else gc?.();
}

/** Processor time of all processes, in seconds, undefined where the system does not tell. */
function machineSeconds(): number | undefined {
  try {
    const [, ...ticks] = readFileSync("/proc/stat", "utf8").split("\n")[0]!.trim().split(/\s+/).map(Number);
    const [user = 0, nice = 0, system = 0, , , interrupt = 0, softInterrupt = 0, stolen = 0] = ticks;
    return (user + nice + system + interrupt + softInterrupt + stolen) / 100; // USER_HZ is 100 on every Linux
  } catch {
    return undefined;
  }
}

/** Load of other processes while something ran: a report says so, because it is why its numbers move. */
export class OtherLoad {
  readonly #machine = machineSeconds();
  readonly #own = process.cpuUsage();
  readonly #begin = performance.now();

  /** Cores that other processes kept busy since this was made, undefined where the system does not tell. */
  cores(): number | undefined {
    const machine = machineSeconds();
    if (machine === undefined || this.#machine === undefined) return undefined;
    const { user, system } = process.cpuUsage(this.#own);
    const others = machine - this.#machine - (user + system) / 1e6;
    return Math.max(0, others) / ((performance.now() - this.#begin) / 1e3);
  }
}
