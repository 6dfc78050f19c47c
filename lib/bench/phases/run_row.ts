/** A row of the phases suite through the pipeline, timed, and the model read back from its files. */
import { thatRuns } from "../../calibration/statistics/alone.ts";
import { createHash } from "node:crypto";
import type { Calibrated } from "../../calibration/mod.ts";
import { type Config, resolveConfig } from "../../config/mod.ts";
import { type LoadedModel, modelFrom, storedTimeParameters } from "../../models/mod.ts";
import type { Kernels } from "../../native/mod.ts";
import type { PhasesReport } from "../../phases/mod.ts";
import { openRun, type QuantizeRun, withConfig } from "../../pipeline/open_run.ts";
import { planRun } from "../../pipeline/planned_run.ts";
import { calibrateRun, phasesRun, solveRun } from "../../pipeline/run_stages.ts";
import { requestOutput, withOutput, writeRun } from "../../pipeline/write_run.ts";
import { packedLayers } from "../../quant/packed/checkpoint.ts";
import type { KnownSolutions } from "../../solve/candidates.ts";
import { openCheckpoint, SIDECAR_FILE } from "../../tensor/mod.ts";
import { TimeParameters } from "../../time/mod.ts";
import { readManifest } from "../../output/output_folder.ts";
import type { RowSetting } from "./rows.ts";
import { phaseTimes, type PipelineRun } from "./time.ts";

export interface WrittenRow {
  readonly folder: string;
  readonly bitsPerWeight: number;
  readonly report: PhasesReport | undefined;
  /** Of planning by a budget and the calibrated solver, 0 for rounding. */
  readonly solveSeconds: number;
  readonly times: PipelineRun;
}

/** Rows of one model: its checkpoint is opened, and its calibration data are loaded, once. */
export class RowRunner implements Disposable {
  readonly #run: QuantizeRun;
  readonly #known = new Map<string, KnownSolutions>();

  private constructor(
    readonly calibrated: Calibrated,
    run: QuantizeRun,
    readonly calibrateSeconds: number,
    readonly base: RowSetting["overrides"],
  ) {
    this.#run = run;
  }

  /** @param base keys of all rows */
  static async open(input: string, kernels: Kernels, base: RowSetting["overrides"]): Promise<RowRunner> {
    const run = openRun({ input, kernels, config: configOf({ ...base, solver: "best" }) });
    const { result: calibrated, seconds } = await timed(() => run.calibration.open());
    return new RowRunner(thatRuns(calibrated, "measure phases"), run, seconds, base);
  }

  get checkpoint(): QuantizeRun["checkpoint"] {
    return this.#run.checkpoint;
  }

  configOf({ overrides }: Pick<RowSetting, "overrides">): Config {
    return configOf({ ...this.base, ...overrides });
  }

  /**
   * Writes a row into a folder.
   *
   * @param isFresh calibrates again, for the time; solved candidates are used again with the time that they
   *   took
   */
  async write(row: RowSetting, folder: string, isFresh = false): Promise<WrittenRow> {
    const config = this.configOf(row), { kernels, checkpoint } = this.#run;
    using fresh = isFresh ? openRun({ input: checkpoint.path, kernels, config }) : undefined;
    const run = fresh ?? withConfig(this.#run, config);
    const planning = await timed(() => planRun(run)), planned = planning.result;
    const calibration = await timed(() => calibrateRun(run, planned)), calibrated = calibration.result;
    const bits = JSON.stringify(planned.plan.rows.map(({ bits, groupSize }) => [bits, groupSize]));
    const known = this.#known.get(bits) ?? new Map();
    this.#known.set(bits, known);
    const solved = await solveRun(run, planned, calibrated, { known });
    const phases = await phasesRun(run, planned, calibrated, solved);
    const writing = await timed(async () => {
      const request = await requestOutput(run, planned, { output: folder, force: true });
      return await withOutput(
        run,
        planned,
        request,
        (output) => writeRun(run, planned, { solved, phases }, output),
      );
    });
    const calibrate = isFresh ? calibration.seconds : calibrated === undefined ? 0 : this.calibrateSeconds;
    const report = phases?.report;
    const { activations, ...times } = phaseTimes(report);
    return {
      folder,
      bitsPerWeight: writing.result.totals.bitsPerWeight,
      report,
      solveSeconds: (planned.bitPlan === undefined ? 0 : planning.seconds) +
        (solved?.milliseconds ?? 0) / 1000,
      times: { ...times, calibrate, activations, write: writing.seconds },
    };
  }

  [Symbol.dispose](): void {
    this.#run[Symbol.dispose]();
  }
}

const configOf = (overrides: RowSetting["overrides"]) => resolveConfig({ overrides }).config;

async function timed<T>(run: () => Promise<T>): Promise<{ readonly result: T; readonly seconds: number }> {
  const begin = performance.now(), result = await run();
  return { result, seconds: (performance.now() - begin) / 1000 };
}

/** SHA-256 of the tensors that a run wrote, θ included, and of its weights alone. */
export function outputDigests(folder: string): { readonly all: string; readonly weights: string } {
  const files = Object.entries(readManifest(folder)!.files).filter(([name]) => name.endsWith(".safetensors"))
    .sort(([a], [b]) => a < b ? -1 : 1);
  const digest = (own: typeof files) =>
    createHash("sha256").update(JSON.stringify(own.map(([name, { sha256 }]) => [name, sha256]))).digest(
      "hex",
    );
  return { all: digest(files), weights: digest(files.filter(([name]) => name !== SIDECAR_FILE)) };
}

/**
 * Loads a written model.
 *
 * @param dynamicBits quantizes all activations per token to so many bits, in place of stored time parameters
 */
export function loadRow(
  folder: string,
  kernels: Kernels,
  { dynamicBits, isPlain = false }: {
    readonly dynamicBits?: 4 | 8 | undefined;
    /** Leaves time parameters out. */
    readonly isPlain?: boolean | undefined;
  },
  groups: TimeParameters["groups"],
): LoadedModel {
  using checkpoint = openCheckpoint(folder);
  const names = [...packedLayers(checkpoint).keys()];
  const timeParameters = dynamicBits !== undefined
    ? new TimeParameters(groups, new Map(names.map((name) => [name, { perToken: dynamicBits }])), "")
    : isPlain
    ? undefined
    : storedTimeParameters(checkpoint);
  return modelFrom(checkpoint, kernels, { timeParameters });
}
