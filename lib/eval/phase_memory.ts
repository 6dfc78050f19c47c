/** Memory of the phases: the peak of a process that quantizes with them, beside one that only calibrates. */
import { rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { commandOf, runChild } from "./child_process.ts";
import { median } from "./statistics.ts";
import { withTemporaryFolder } from "./temporary_folder.ts";

/** Samples of both: what calibration itself holds grows with them, and hides what the phases hold. */
const SAMPLES = 32;
/** Runs of each, in turn: when an engine collects its garbage moves a peak by a tenth. */
const RUNS = 3;

/** What is quantized, and how. */
export interface PhaseMemoryOptions {
  readonly path: string;
  readonly source: string;
  readonly bits: number;
  readonly groupSize: number;
  readonly groups: number;
  readonly threads: number;
}

/** Peaks of the two processes, in bytes, medians. */
export interface PhaseMemory {
  /** Calibrates and solves (`feedback`, the quickest solver that does). */
  readonly baseline: number;
  /** The same with static activations and phases 1 and 2. */
  readonly phases: number;
}

/** Measures both in processes of their own; undefined where the system tells no peak. */
export async function phaseMemory(
  { path, source, bits, groupSize, groups, threads }: PhaseMemoryOptions,
): Promise<PhaseMemory | undefined> {
  return await withTemporaryFolder(async (folder) => {
    const peakOf = async (hasPhases: boolean): Promise<number | null> => {
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
      const { peakMemoryBytes } = JSON.parse(text) as { peakMemoryBytes: number | null };
      return peakMemoryBytes;
    };
    const peaks: { readonly baseline: number; readonly phases: number }[] = [];
    for (let run = 0; run < RUNS; run++) {
      const baseline = await peakOf(false), phases = await peakOf(true);
      if (baseline === null || phases === null) return undefined;
      peaks.push({ baseline, phases });
    }
    return {
      baseline: median(peaks.map(({ baseline }) => baseline)),
      phases: median(peaks.map(({ phases }) => phases)),
    };
  });
}
