/**
 * Quantizing a checkpoint, in five stages that hand values on. `quantizeCheckpoint` runs them one after the
 * other in an output folder that can be resumed; the bench calls them with several configurations of the same
 * bits (`withConfig`). The files are the same, byte for byte.
 */
import { join } from "node:path";
import { partOf } from "../calibration/statistics/parts.ts";
import { type Solvable, thatRuns } from "../calibration/statistics/alone.ts";
import { HELD_OUT_METRICS, HeldOutMeter } from "../calibration/held_out.ts";
import { hasStatistics, type SaveCalibration } from "../calibration/source.ts";
import { CalibrationError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import { checkOutput } from "../output/output_folder.ts";
import type { PhaseResult } from "../phases/mod.ts";
import type { SolvedModel } from "../solve/candidates.ts";
import { quantizedByWeights } from "../solve/by_weights.ts";
import { releaseMemory } from "../quant/array_memory.ts";
import { checkPaths, type CheckpointRun } from "./checkpoint_run.ts";
import { checkOneCandidate, readsStatistics, teamOf } from "./sharded_run.ts";
import { shardFolder } from "../output/shard_folders.ts";
import { type HeldOutError, type RunReport, sum, totalsOf } from "./run_report.ts";
import { openRun, type OpenRunOptions, type QuantizeRun } from "./open_run.ts";
import { firstPlan, measuresBits, type PlannedRun, planRun } from "./planned_run.ts";
import { calibrateRun, phasesRun, solveRun, solveWhileWriting } from "./run_stages.ts";
import { reportOf, requestOutput, withOutput, writeRun } from "./write_run.ts";
import { calibrationWarnings } from "./calibration_run.ts";

/** How to quantize a checkpoint. */
export type QuantizeCheckpointOptions =
  & CheckpointRun
  & Omit<OpenRunOptions, "kernels">
  & (
    | { readonly kernels: Kernels; readonly dryRun?: false | undefined }
    /** Only plan; write nothing. */
    | { readonly kernels?: Kernels | undefined; readonly dryRun: true }
  );

/**
 * Quantizes a checkpoint into a folder.
 *
 * Equal input, configuration and version give equal bytes, whatever the threads and the runtime and however
 * often the run was stopped; without calibration also whatever the backend.
 *
 * @throws {CheckpointError | FormatError} when the input is incomplete, broken or quantized already
 * @throws {WeightsError} when weights are NaN, infinite or too large; nothing is left behind
 * @throws {OutputError} when the output exists, is the input, or cannot be written
 * @throws {IntegrityError} when what is read back is not what was written
 * @throws {InterruptedError} when `signal` stopped it; `resume` goes on
 * @throws {ConfigError} when a shard is asked for of what cannot be divided
 *
 * @example
 * ```ts
 * import { mkdtempSync } from "node:fs";
 * import { tmpdir } from "node:os";
 * import { DEFAULT_CONFIG } from "../config/mod.ts";
 * import { openKernels } from "../native/mod.ts";
 * import { quantizeCheckpoint } from "./mod.ts";
 *
 * using kernels = await openKernels();
 * const { totals } = await quantizeCheckpoint({
 *   input: "tests/models/dream-mini",
 *   output: `${mkdtempSync(`${tmpdir()}/example-`)}/packed`,
 *   config: DEFAULT_CONFIG,
 *   kernels,
 * });
 * console.log(totals.bitsPerWeight, totals.cosine);
 * ```
 */
export async function quantizeCheckpoint(given: QuantizeCheckpointOptions): Promise<RunReport> {
  checkPaths(given);
  const { shard } = given, folder = shard && shardFolder(shard);
  const options = folder === undefined ? given : { ...given, output: join(given.output, folder) };
  if (options.dryRun) return await planOnly(options);
  using _memory = { [Symbol.dispose]: releaseMemory };
  using run = openRun(options);
  const first = await firstPlan(run);
  const request = await requestOutput(run, first, options);
  if (options.saveCalibration !== undefined || hasStatistics(run.config)) {
    checkOutput(request); // before minutes of work that it would make useless, and files that do not fit before it
    await run.calibration.open();
  }
  if (!measuresBits(run.config)) warn(run, first);
  return await withOutput(run, first, request, async (output) => {
    const planned = measuresBits(run.config) ? await planRun(run, output) : first;
    if (planned !== first) warn(run, planned);
    const whole = await calibrateRun(run, planned, output);
    if (whole !== undefined && shard !== undefined) checkOneCandidate(whole, run.config);
    const team = shard && teamOf(given, shard, output);
    const calibrated = whole !== undefined && team !== undefined
      ? partOf(thatRuns(whole, "solve together"), team.shard)
      : whole;
    const onDemand = team === undefined ? solveWhileWriting(run, planned, calibrated) : undefined;
    const solved = onDemand === undefined
      ? await solveRun(run, planned, calibrated, { output, team })
      : undefined;
    const phases = await phasesRun(run, planned, calibrated, solved, output);
    run.calibration.memory.held.release(); // tensors are read for themselves
    const report = await writeRun(run, planned, { solved, onDemand, phases }, output);
    return { ...report, heldOut: await heldOutError(run, planned, calibrated, { solved, phases }) };
  });
}

function warn({ config, options: { onEvent } }: QuantizeRun, { plan, bitPlan }: PlannedRun): void {
  for (const message of [...plan.warnings, ...calibrationWarnings(plan, config, bitPlan)]) {
    onEvent?.({ kind: "warning", message });
  }
}

/** Held-out error of what was written; after a refinement its own metric, which counts biases too. */
async function heldOutError(
  { config, kernels, options: { shard } }: QuantizeRun,
  { plan }: PlannedRun,
  calibrated: Solvable | undefined,
  { solved, phases }: { readonly solved: SolvedModel | undefined; readonly phases: PhaseResult | undefined },
): Promise<HeldOutError | undefined> {
  const { refinement } = phases?.report ?? {};
  if (refinement?.kept === true) return { metric: "step KL, nats", value: refinement.heldOutAfter };
  if (calibrated === undefined || calibrated.kind === "layers" || shard !== undefined) return undefined;
  if (calibrated.data.heldOut.length === 0) {
    return undefined;
  }
  const metric = HELD_OUT_METRICS[calibrated.kind];
  if (solved !== undefined) return { metric, value: solved.distances[solved.chosen]! };
  const packed = quantizedByWeights(calibrated.model, plan.rows, config, kernels);
  return { metric, value: await new HeldOutMeter(calibrated).distance(packed) };
}

/** The report of a run that writes nothing. */
async function planOnly(options: QuantizeCheckpointOptions): Promise<RunReport> {
  using run = openRun({ ...options, kernels: options.kernels, saveCalibration: undefined });
  checkOutput(await requestOutput(run, await firstPlan(run), options));
  const planned = await planRun(run);
  const { rows } = planned.plan;
  return {
    ...reportOf(run, planned, options.output),
    dryRun: true,
    layers: [],
    layerMilliseconds: [],
    totals: totalsOf(run.checkpoint, rows, sum(rows.map(({ bytesAfter }) => bytesAfter))),
    tensorsResumed: 0,
    backend: undefined,
  };
}

/**
 * Saves statistics of what a model's layers read, and quantizes nothing; of a part of the samples where
 * `saveCalibration.shard` says so, into a file of its own. A stopped pass goes on.
 *
 * @throws {CalibrationError} when there are no data, or statistics instead of them
 * @throws {OutputError} when there is another file
 */
export async function saveCalibrationOf(
  options: OpenRunOptions & { readonly saveCalibration: SaveCalibration },
): Promise<void> {
  using run = openRun(options);
  if (options.saveCalibration.shard !== undefined && readsStatistics(run.checkpoint, run.config)) {
    throw new CalibrationError(
      "Cannot calibrate in shards: calibration data must be samples, got saved statistics: merge.ts brings those together",
    );
  }
  await run.calibration.open();
}
