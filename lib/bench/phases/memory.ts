/** Memory of the phases: the peak of a process that quantizes with them, beside one without. */
import { join } from "node:path";
import { runChild } from "../child_process.ts";
import type { CommandOf } from "../suite.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";

/** Samples of both: what calibration itself holds grows with them, and hides what the phases hold. */
const SAMPLES = 32;

/** Model and settings of the two runs. */
interface PhaseMemoryOptions {
  readonly path: string;
  readonly source: string;
  readonly bits: number;
  readonly groupSize: number;
  readonly groups: number;
  readonly threads: number;
}

/** In bytes: peaks of the two processes, one run of each, and what the phases count. */
export interface PhaseMemory {
  /** Calibrates and solves (`feedback`, the quickest solver that does). */
  readonly baseline: number;
  /** The same with static activations and phases 1 and 2. */
  readonly phases: number;
  /** Bytes that the phases count for caches and statistics, at most. */
  readonly statistics: number;
}

/** Output of `quantize.ts --json`, as far as it is used. */
interface Measured {
  readonly peakMemoryBytes: number;
  readonly phases?: { readonly statisticsBytes: number };
}

/** Measures both in processes of their own. */
export async function phaseMemory(
  commandOf: CommandOf,
  { path, source, bits, groupSize, groups, threads }: PhaseMemoryOptions,
): Promise<PhaseMemory> {
  const settings = { bits, "group-size": groupSize, "time-groups": groups, threads, samples: SAMPLES };
  const options = Object.entries(settings).flatMap(([name, value]) => [`--${name}`, String(value)]);
  return await withTemporaryFolder(async (folder) => {
    const measure = async (phases: string): Promise<Measured> => {
      const args = ["--solver", "feedback", "--calibrate", source, "--phases", phases, "--force", "--json"];
      const run = await runChild(
        commandOf("quantize.ts", [path, join(folder, "quantized"), ...options, ...args]),
      );
      return JSON.parse(run.output) as Measured;
    };
    const baseline = await measure("none"), phases = await measure("1,2");
    return {
      baseline: baseline.peakMemoryBytes,
      phases: phases.peakMemoryBytes,
      statistics: phases.phases!.statisticsBytes,
    };
  });
}
