/** Memory of the phases: the peak of a process that quantizes with them, beside one that only calibrates. */
import { rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { runChild } from "../child_process.ts";
import type { CommandOf } from "../suite.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";

/** Samples of both: what calibration itself holds grows with them, and hides what the phases hold. */
const SAMPLES = 32;

/** What is quantized, and how. */
export interface PhaseMemoryOptions {
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
  /** What the phases say that they hold for caches and statistics at most. */
  readonly statistics: number;
}

/** What `quantize.ts --json` prints of a run, as far as it is used. */
interface Measured {
  readonly peakMemoryBytes: number | null;
  readonly phases?: { readonly statisticsBytes: number };
}

/** Measures both in processes of their own; undefined where the system tells no peak. */
export async function phaseMemory(
  commandOf: CommandOf,
  { path, source, bits, groupSize, groups, threads }: PhaseMemoryOptions,
): Promise<PhaseMemory | undefined> {
  return await withTemporaryFolder(async (folder) => {
    const measure = async (hasPhases: boolean): Promise<Measured> => {
      const output = join(folder, "quantized"), config = join(folder, "config.yaml");
      rmSync(output, { recursive: true, force: true });
      // JSON is YAML.
      writeFileSync(
        config,
        JSON.stringify({
          bit_width: bits,
          group_size: groupSize,
          solver: "feedback",
          calibration_data: source,
          calibration_samples: SAMPLES,
          num_time_groups: groups,
          num_threads: threads,
          thermodynamic: { validation: { enabled: hasPhases }, boundary_smoothing: { enabled: hasPhases } },
        }),
      );
      const { output: text } = await runChild(
        commandOf("quantize.ts", [path, output, "--config", config, "--json"]),
      );
      return JSON.parse(text) as Measured;
    };
    const baseline = await measure(false), withPhases = await measure(true);
    if (baseline.peakMemoryBytes === null || withPhases.peakMemoryBytes === null) return undefined;
    return {
      baseline: baseline.peakMemoryBytes,
      phases: withPhases.peakMemoryBytes,
      statistics: withPhases.phases!.statisticsBytes,
    };
  });
}
