/** Commands as child processes, timed from start to end. */
import { spawn } from "node:child_process";
import { readFileSync } from "node:fs";
import process from "node:process";
import type { BenchContext, CommandOf } from "./suite.ts";

const POLL_MILLISECONDS = 10;

/** The commands of a run. @throws {TypeError} when its caller runs none */
export function commandsOf({ commandOf }: BenchContext): CommandOf {
  if (commandOf === undefined) {
    throw new TypeError("Cannot measure processes: the context must have commandOf");
  }
  return commandOf;
}

/** Time, output and memory of a process that ended. */
interface ChildRun {
  readonly seconds: number;
  readonly output: string;
  /** VmHWM as last seen while it ran, undefined where the system does not say. */
  readonly peakResidentBytes: number | undefined;
}

/** Runs a command to its end. @throws Error with the end of its messages when it fails */
export function runChild(command: readonly string[]): Promise<ChildRun> {
  return new Promise((resolve, reject) => {
    const begin = performance.now();
    const child = spawn(command[0]!, command.slice(1), { stdio: ["ignore", "pipe", "pipe"] });
    let output = "", errors = "", peak: number | undefined;
    const stop = () => child.kill("SIGTERM");
    process.once("exit", stop);
    const poll = setInterval(() => {
      try {
        const status = readFileSync(`/proc/${child.pid}/status`, "utf8");
        const kibibytes = /^VmHWM:\s+(\d+) kB$/m.exec(status)?.[1];
        if (kibibytes !== undefined) peak = Math.max(peak ?? 0, Number(kibibytes) * 1024);
      } catch {
        // Ended already, or not Linux: what was seen before counts.
      }
    }, POLL_MILLISECONDS);
    child.stdout.on("data", (chunk) => output += chunk);
    child.stderr.on("data", (chunk) => errors += chunk);
    const done = () => {
      clearInterval(poll);
      process.off("exit", stop);
    };
    child.on("error", (cause) => {
      done();
      reject(new Error(`Cannot run ${command[0]}`, { cause }));
    });
    child.on("close", (code, signal) => {
      const seconds = (performance.now() - begin) / 1000;
      done();
      if (code === 0) return resolve({ seconds, output, peakResidentBytes: peak });
      reject(
        new Error(
          `Cannot measure a process: it must end with 0, got ${code ?? signal}\n${errors.slice(-2000)}`,
        ),
      );
    });
  });
}
