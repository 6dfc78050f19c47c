/**
 * Quantizing a checkpoint, in five stages that hand values on. `quantizeCheckpoint` runs them one after the
 * other in an output folder that can be resumed; the bench calls them with several configurations of the same
 * bits (`withConfig`). The files are the same, byte for byte.
 */
import { join } from "node:path";
import process from "node:process";
import { packedTensorSpecs } from "../quant/packed/entries.ts";
import { matrixSizes } from "../quant/mod.ts";
import { partOf } from "../calibration/statistics/parts.ts";
import { type Solvable, thatRuns } from "../calibration/statistics/alone.ts";
import { HELD_OUT_METRICS, HeldOutMeter } from "../calibration/held_out.ts";
import type { OwnSampleWork } from "../calibration/own_samples.ts";
import { hasStatistics, type SaveCalibration } from "../calibration/source.ts";
import {
  canonicalConfig,
  checkConfig,
  type Config,
  type ConfigInForce,
  hasBudget,
  isCalibrated,
  wantsPhases,
} from "../config/mod.ts";
import { CALIBRATED_SOLVERS } from "../config/names.ts";
import { CalibrationError, CheckpointError } from "../errors.ts";
import { isJsonObject } from "../files/json.ts";
import { limitsOf } from "../files/limits.ts";
import { quote } from "../files/positional.ts";
import { sha256 } from "../files/whole.ts";
import {
  loraEvents,
  type LoraReport,
  type LoraSource,
  type MergedCheckpoint,
  mergeLoras,
} from "../lora/mod.ts";
import { checkGradients, runLimits } from "../models/mod.ts";
import { type Kernels, threadCount, withThreads } from "../native/mod.ts";
import { opensIn } from "../output/readers.ts";
import { quantizationConfig, withQuantizationConfig } from "../output/config_file.ts";
import { checkOutput, type OutputRequest } from "../output/output_folder.ts";
import {
  type Rewrite,
  type RewriteContent,
  type RewriteJob,
  type SmallFile,
  withRewrite,
} from "../output/rewrite.ts";
import type { LayerRecord, RefinementRecord } from "../output/record.ts";
import { runConfiguredPhases, sidecarContent } from "../phases/configured.ts";
import type { PhaseResult, PhasesReport } from "../phases/mod.ts";
import type { TensorSink } from "../output/tensor_sink.ts";
import { type BitPlan, planText } from "../plan/budget.ts";
import { checkPlan, formatOf, type Plan, planQuantization, type PlanRow } from "../plan/plan.ts";
import { pause, type RunOptions, stoppable } from "../progress.ts";
import { EXCHANGE_PREFIX, type TeamPlace } from "../solve/team.ts";
import { KEPT, type KnownSolutions, type SolvedModel, solvePlan } from "../solve/candidates.ts";
import { isRounded, quantizedByWeights } from "../solve/by_weights.ts";
import { MeasuredLayers } from "../solve/measured_layers.ts";
import { budgetBytes, isChosen, planByBudget } from "../solve/sensitivity.ts";
import {
  type Checkpoint,
  CONFIG_KEY,
  openCheckpoint,
  refuseForeign,
  SECTION_KEY,
  SIDECAR_FILE,
  type TensorSpec,
} from "../tensor/mod.ts";
import {
  type Beside,
  configText,
  copies,
  digestBeside,
  filesBeside,
  indexFiles,
  namesBeside,
  outputName,
} from "./beside.ts";
import { calibrationWarnings, PLAN_FILE, type RunCalibration, runCalibration } from "./calibration_run.ts";
import {
  checkPaths,
  checkpointFiles,
  type CheckpointRun,
  growingBuffer,
  type OutputPlace,
  outputRequest,
  reservedHeaderBytes,
} from "./checkpoint_run.ts";
import { choiceText, chooseSolver, configuredPlan } from "./choose_solver.ts";
import { GRADIENT_SHARE } from "./memory_shares.ts";
import { announce } from "./forecast.ts";
import {
  checkDivisible,
  checkOneCandidate,
  dividePlan,
  readsStatistics,
  shardSummary,
} from "./sharded_run.ts";
import { type Shard, shardFolder } from "../output/shard_folders.ts";
import { rewriteTensor } from "./quantize_tensor.ts";
import { type HeldOutError, type RunReport, sum, totalsOf, writtenReport } from "./run_report.ts";
import { digestTensors, HashingReader } from "../output/source_digest.ts";

/** Input and settings of a run. */
export interface OpenRunOptions<K extends Kernels | undefined = Kernels> extends RunOptions {
  /** A checkpoint: a folder or a `.safetensors` file. */
  readonly input: string;
  /** Its `numThreads` goes before the kernels' own number of threads; 0 leaves theirs. */
  readonly config: Config;
  readonly kernels: K;
  /** Save statistics of the full-precision model's inputs; also where the solver needs no calibration. */
  readonly saveCalibration?: SaveCalibration | undefined;
  /** Replace such a file of other statistics. */
  readonly force?: boolean | undefined;
  /** Weights of this name where a folder has several, as `fp16`. */
  readonly variant?: string | undefined;
  /** LoRAs that are merged into the weights, in float32, before anything else. */
  readonly loras?: readonly LoraSource[] | undefined;
  /**
   * Quantize a part of the tensors only, into the folder `shard-i-of-n` of the output; {@linkcode mergeCheckpoint} brings
   * all shards together.
   */
  readonly shard?: Shard | undefined;
  /**
   * Shards of `calibration_mode: blocks` run at the same time and solve the model together, through a folder in the output
   * that all of them see: each runs its part of the samples. So long one waits for another.
   */
  readonly togetherMilliseconds?: number | undefined;
  /**
   * Bytes that the process may take for calibrated work, which is refused where it would take more; default what it has
   * and three quarters of what is available.
   */
  readonly maxMemoryBytes?: number | undefined;
}

/** How to quantize a checkpoint. */
export type QuantizeCheckpointOptions =
  & CheckpointRun
  & Omit<OpenRunOptions, "kernels">
  & (
    | { readonly kernels: Kernels; readonly dryRun?: false | undefined }
    /** Only plan; write nothing. */
    | { readonly kernels?: Kernels | undefined; readonly dryRun: true }
  );

/** A checkpoint that is being quantized; {@linkcode openRun} opens one. */
export interface QuantizeRun<K extends Kernels | undefined = Kernels> extends Disposable {
  readonly checkpoint: Checkpoint;
  readonly config: ConfigInForce;
  readonly kernels: K;
  readonly calibration: RunCalibration;
  /** Bytes that the process may take for calibrated work. */
  readonly memoryBytes: number;
  /** What became of LoRAs. */
  readonly loras: readonly LoraReport[];
  readonly options: RunOptions & Pick<OpenRunOptions, "shard" | "togetherMilliseconds">;
}

/** The plan of a run. */
export interface PlannedRun {
  /** The tensors of this run: of a shard its own. */
  readonly plan: Plan;
  /** All tensors of the checkpoint. */
  readonly whole: Plan;
  /** Undefined where neither a plan nor a budget chooses the bits. */
  readonly bitPlan: BitPlan | undefined;
  readonly beside: Beside;
}

/**
 * Quantizes a checkpoint into a folder.
 *
 * Equal input, configuration and version give equal bytes, whatever the threads and the runtime and however often
 * the run was stopped; without calibration also whatever the backend.
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
    const solved = await solveRun(run, planned, calibrated, { output, team });
    const phases = await phasesRun(run, planned, calibrated, solved, output);
    run.calibration.memory.held.release(); // tensors are read for themselves
    const report = await writeRun(run, planned, { solved, phases }, output);
    return { ...report, heldOut: await heldOutError(run, planned, calibrated, { solved, phases }) };
  });
}

/** Where shards of one run meet; undefined where they do not. */
function teamOf(
  { output: parts, togetherMilliseconds }: QuantizeCheckpointOptions,
  shard: Shard,
  { identity }: Rewrite,
): (TeamPlace & { readonly identity: string }) | undefined {
  if (togetherMilliseconds === undefined) return undefined;
  const { shard: _, ...settings } = JSON.parse(identity.settings);
  const own = sha256(JSON.stringify([{ ...identity, settings }, shard.count]));
  const folder = join(parts, `${EXCHANGE_PREFIX}${own.slice(0, 16)}`);
  return { shard, folder, waitMilliseconds: togetherMilliseconds, identity: own };
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

/** Opens a checkpoint. @throws {CheckpointError | FormatError} when it is broken or quantized already */
export function openRun<K extends Kernels | undefined>(options: OpenRunOptions<K>): QuantizeRun<K> {
  const { input } = options;
  checkConfig(options.config);
  const { numThreads } = options.config;
  const kernels = numThreads > 0 && options.kernels
    ? withThreads(options.kernels, numThreads) as K
    : options.kernels;
  const { variant, onEvent, loras = [] } = options, stored = openCheckpoint(input, { variant });
  let config: ConfigInForce, checkpoint = stored, merged: MergedCheckpoint | undefined;
  const close = () => {
    merged?.[Symbol.dispose]();
    stored.close();
  };
  try {
    checkPlain(stored);
    merged = loras.length === 0 ? undefined : mergeLoras(stored, loras);
    if (merged !== undefined) ({ checkpoint } = merged);
    for (const event of loraEvents(merged?.reports ?? [])) onEvent?.(event);
    config = chooseSolver(checkpoint, options.config);
    const isRun = isCalibrated(config) || config.calibrationData !== null ||
      options.saveCalibration !== undefined;
    const limits = runLimits(checkpoint), isSolved = hasStatistics(config);
    if (config.thermodynamic.transitionOptimization.enabled) checkGradients(checkpoint);
    if (isRun && limits !== undefined && !isSolved) throw withoutCalibration(limits);
    const messages = [
      ...checkpoint.notes,
      ...(limits === undefined ? [] : [isSolved ? statisticsAlone(limits) : weightsAlone(limits)]),
    ];
    for (const message of messages) onEvent?.({ kind: "input", message });
    const choice = choiceText(options.config, config);
    if (choice !== undefined) onEvent?.({ kind: "solver", message: choice });
  } catch (error) {
    close();
    throw error;
  }
  const memoryBytes = options.maxMemoryBytes ?? process.memoryUsage().rss + 0.75 * limitsOf().availableBytes;
  const calibration = runCalibration(checkpoint, { ...options, kernels, config, memoryBytes });
  return {
    checkpoint,
    config,
    kernels,
    calibration,
    memoryBytes,
    loras: merged?.reports ?? [],
    options,
    [Symbol.dispose]: close,
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

/** @throws {CheckpointError} when the weights are quantized already, by this tool or another one */
export function checkPlain(checkpoint: Checkpoint): void {
  refuseForeign(checkpoint, "quantize");
  if (!isJsonObject(checkpoint.config?.[CONFIG_KEY])) return;
  if (!(SECTION_KEY in checkpoint.config[CONFIG_KEY])) return; // scaled FP8, which reads as plain weights
  const { path, folder } = checkpoint;
  throw new CheckpointError(
    `Cannot quantize ${
      quote(path)
    }: weights must be plain, got config.json with a ${CONFIG_KEY} of this tool: ` +
      "dequantize it first",
    { path: join(folder, "config.json") },
  );
}

const withoutCalibration = ({ message, path, cause }: CheckpointError): CheckpointError =>
  new CheckpointError(
    `${message}; the solvers clip and round need no run of the model and quantize it all the same`,
    {
      path,
      cause,
    },
  );

const shortened = ({ message }: CheckpointError): string =>
  message.length > 300 ? `${message.slice(0, 300)}…` : message;

const weightsAlone = (limits: CheckpointError): string =>
  `weights alone are quantized, by names and shapes; the model cannot run or calibrate here: ${
    shortened(limits)
  }`;

const statisticsAlone = (limits: CheckpointError): string =>
  `layers are solved on saved statistics, by names and shapes; the model cannot run here: ${
    shortened(limits)
  }`;

/** The same open checkpoint with another configuration; the same calibration data are not opened again. */
export function withConfig(run: QuantizeRun, given: Config): QuantizeRun {
  const { checkpoint, kernels, options } = run, config = chooseSolver(checkpoint, given);
  const keys = ["calibrationData", "calibrationSamples", "calibrationSeed"] as const;
  const own = (each: Config) => JSON.stringify(each.selfCalibration);
  const calibration = keys.every((key) => config[key] === run.config[key]) && own(config) === own(run.config)
    ? run.calibration
    : runCalibration(checkpoint, { ...options, kernels, config, memoryBytes: run.memoryBytes });
  return { ...run, config, calibration };
}

/** Whether a budget chooses the bits. */
const measuresBits = (config: Config): boolean => config.bitPlan === null && hasBudget(config);

/**
 * Plan: which tensors are quantized, and to how many bits. With a budget it calibrates.
 *
 * @param output keeps what a budget measures, for a run that is stopped
 * @throws {CheckpointError} when names leave no room for those of packed parts
 * @throws {CalibrationError} when calibration data are needed and there are none, or no plan fits the budget
 */
export async function planRun(
  run: QuantizeRun<Kernels | undefined>,
  output?: Rewrite,
): Promise<PlannedRun> {
  const first = await firstPlan(run);
  if (!measuresBits(run.config)) return first;
  const bitPlan = await planOfBudget(run, output);
  const plan = planQuantization(run.checkpoint, run.config, bitPlan);
  return { ...first, bitPlan, plan, whole: plan };
}

/** The part of a plan that a run does: all of it, or its shard's. @throws as {@linkcode checkDivisible} */
function shardPlan(
  { checkpoint, config, options: { shard, togetherMilliseconds, onEvent } }: QuantizeRun<Kernels | undefined>,
  whole: Plan,
): Plan {
  if (shard === undefined) return whole;
  checkDivisible(checkpoint, config, whole, togetherMilliseconds !== undefined);
  const divided = dividePlan(whole, config, shard.count);
  onEvent?.({ kind: "shard", ...shardSummary(shard, divided) });
  return { rows: divided.shards[shard.index - 1]!, warnings: whole.warnings };
}

/** What is known of the plan before a budget has measured anything. @throws as {@linkcode planRun} */
async function firstPlan(run: QuantizeRun<Kernels | undefined>): Promise<PlannedRun> {
  const { checkpoint, config, calibration, options } = run;
  if (isCalibrated(config)) await calibration.digest(); // an error at once where data are missing
  const bitPlan = configuredPlan(checkpoint, config);
  const whole = planQuantization(checkpoint, config, bitPlan);
  checkPlan(whole, checkpoint);
  if (measuresBits(config)) budgetBytes(whole.rows, config);
  return { plan: shardPlan(run, whole), whole, bitPlan, beside: filesBeside(checkpoint, options) };
}

/** Bits by layer of a budget: measured, or those of an output that is complete. */
async function planOfBudget(
  { checkpoint, config, kernels, calibration, options }: QuantizeRun<Kernels | undefined>,
  output: Rewrite | undefined,
): Promise<BitPlan> {
  if (output?.manifest !== undefined) {
    return new Map(
      output.manifest.layers.flatMap(({ name, bits, groupSize, zeroPoint }) =>
        bits === undefined ? [] : [[name, { bits, groupSize: groupSize!, zeroPoint: zeroPoint! }] as const]
      ),
    );
  }
  const calibrated = await calibration.open(output), { memory } = calibration;
  const { rows } = planQuantization(checkpoint, config), folder = output?.work;
  const kept = output && new MeasuredLayers(output.work, JSON.stringify(output.identity));
  const known = kept?.layers.size ?? 0, of = rows.filter(isChosen).length;
  if (known > 0) {
    const message = `sensitivities of ${known} of ${of} layers were measured before`;
    options.onEvent?.({ kind: "resume", message });
  }
  return await stoppable(
    options.signal,
    output === undefined ? "give the same command again; sensitivities are measured anew" : KEPT,
    () => {
      const measuredShare = known / Math.max(1, of);
      announce(
        { checkpoint, config, kernels: kernels!, memory, folder, options, measuredShare },
        calibrated,
        rows,
      );
      return planByBudget(checkpoint, calibrated, config, kernels!, { ...options, kept });
    },
  );
}

const quantizedRows = ({ rows }: Plan) => rows.filter(({ action }) => action === "quantize");

/**
 * Calibrate: the model with its calibration data, undefined where neither solver nor phases need them.
 *
 * @param output what an earlier run has finished needs no calibration
 * @throws {CalibrationError} when data cannot be used
 */
export async function calibrateRun(
  run: QuantizeRun,
  { plan, whole, bitPlan }: PlannedRun,
  output?: Rewrite,
): Promise<Solvable | undefined> {
  const { checkpoint, config, kernels, calibration, options } = run, { onEvent } = options;
  if (output?.isComplete) return undefined;
  // Others need this task's samples whatever it writes.
  const rows = quantizedRows(options.togetherMilliseconds === undefined ? plan : whole);
  if (wantsPhases(config) && rows.length === 0) {
    onEvent?.({ kind: "warning", message: "the phases have nothing to do: no layer is quantized" });
    return undefined;
  }
  const isSolved = CALIBRATED_SOLVERS.includes(config.solver) &&
    rows.some((row) => !isRounded(config, row) && !output?.isDone(row.name));
  if (!isSolved && !wantsPhases(config)) return undefined;
  const { memory } = calibration;
  const say = (data: Solvable, ownSamples?: OwnSampleWork) =>
    announce(
      { checkpoint, config, kernels, memory, folder: output?.work, options },
      data,
      plan.rows,
      ownSamples,
    );
  const calibrated = await calibration.open(output, say);
  if (bitPlan === undefined || !measuresBits(config)) {
    await stoppable(options.signal, KEPT, () => say(calibrated));
  }
  return calibrated;
}

/**
 * Solve: codes on calibration data, undefined where the solver looks at weights alone.
 *
 * @param output keeps what is solved, for a run that is stopped
 * @param known candidates that need not be solved again; those that are solved are added
 */
export async function solveRun(
  { config, kernels, calibration, memoryBytes, options }: QuantizeRun,
  { plan, whole }: PlannedRun,
  calibrated: Solvable | undefined,
  { output, known, team }: {
    readonly output?: Rewrite | undefined;
    readonly known?: KnownSolutions;
    readonly team?: ReturnType<typeof teamOf>;
  } = {},
): Promise<SolvedModel | undefined> {
  if (calibrated === undefined || !CALIBRATED_SOLVERS.includes(config.solver)) return undefined;
  const identity = team?.identity ?? (output === undefined ? "" : JSON.stringify(output.identity));
  const only = options.shard && new Set(plan.rows.map(({ name }) => name));
  return await solvePlan(
    {
      ...{
        calibrated,
        plan: whole,
        only,
        team,
        config,
        kernels,
        memoryBytes,
        folder: output?.work,
        identity,
        known,
      },
      statesBytes: calibration.memory.statesBytes,
    },
    options,
  );
}

/** Phases: what the configuration asks for on those codes, undefined where it asks for none. */
export async function phasesRun(
  { checkpoint, config, kernels, calibration: { memory }, memoryBytes, options }: QuantizeRun,
  { plan }: PlannedRun,
  calibrated: Solvable | undefined,
  solved: SolvedModel | undefined,
  output?: Rewrite,
): Promise<PhaseResult | undefined> {
  if (calibrated === undefined || !wantsPhases(config)) return undefined;
  const { validation, boundarySmoothing } = config.thermodynamic;
  if (calibrated.kind === "layers" && !validation.enabled && !boundarySmoothing.enabled) {
    const message =
      "phase 3 solves codes with its weights by time and annealing; refinement needs a model that runs here";
    options.onEvent?.({ kind: "warning", message });
    return undefined;
  }
  const phases = {
    checkpoint,
    calibrated: thatRuns(calibrated, "run the phases"),
    plan,
    config,
    kernels,
    held: memory.held,
    gradientBytes: GRADIENT_SHARE * memoryBytes,
    place: output && { folder: output.work, identity: sha256(JSON.stringify(output.identity)) },
    solved: solved?.layers,
  };
  return await stoppable(options.signal, KEPT, () => runConfiguredPhases(phases, options));
}

/**
 * Write: every tensor read, quantized or taken from what was solved, stored and verified; then the files
 * beside them.
 *
 * @throws as {@linkcode Rewrite.write}
 */
export async function writeRun(
  run: QuantizeRun,
  planned: PlannedRun,
  { solved, phases }: {
    readonly solved?: SolvedModel | undefined;
    readonly phases?: PhaseResult | undefined;
  },
  output: Rewrite,
): Promise<RunReport> {
  const { checkpoint, config, kernels, options: { onEvent } } = run;
  const { weights: refined, biases } = phases?.model ?? {};
  const layers = solved &&
    new Map(
      [...solved.layers].map((
        [name, layer],
      ) => [name, { ...layer, tensor: refined?.get(name) ?? layer.tensor }]),
    );
  const context = { config, kernels, onEvent, solved: layers, refined, biases, buffer: growingBuffer() };
  const content: RewriteContent = {
    files: filesOf(checkpoint, planned),
    steps: new Map(planned.plan.rows.map((row) => {
      const { info: { name, elements, byteLength: bytes }, file } = checkpoint.tensors.get(row.name)!;
      const weights = row.action === "quantize" ? elements : 0;
      const placed = { ...row, file: outputName(checkpoint, row.file) };
      const digest = (between?: () => Promise<void>) => digestTensors(checkpoint, [name], between);
      const run = async (sink: TensorSink) => {
        const reader = new HashingReader(file);
        const record = await rewriteTensor(placed, reader, sink, context);
        return { ...record, sourceSha256: reader.digest(bytes) ?? await digest() };
      };
      return [name, { name, weights, bytes, run, digest }];
    })),
    solver: config.chosen && { name: config.solver, ...config.chosen },
    refinement: refinementRecord(phases?.report.refinement),
    *smallFiles(records, tensorFiles) {
      if (run.options.shard !== undefined) return; // the merged checkpoint has them
      yield* filesOfModel(run, planned, records, tensorFiles);
      // Last: it carries the fingerprint of what is beside it.
      if (phases?.model.timeParameters === undefined) return;
      const folder = join(output.work, checkpoint.subfolder ?? "");
      yield { name: outputName(checkpoint, SIDECAR_FILE), content: sidecarContent(folder, phases.model) };
    },
  };
  const written = await output.write(content);
  return {
    ...reportOf(run, planned, output.path),
    ...writtenReport(checkpoint, written),
    phases: phases?.report,
    backend: kernels.describe(),
  };
}

/** The files of a whole model beside its weights: copies, the plan of the bits, config.json and the index. */
export function* filesOfModel(
  { checkpoint, config, options }: Pick<QuantizeRun, "checkpoint" | "config" | "options">,
  { beside, bitPlan }: Pick<PlannedRun, "beside" | "bitPlan">,
  records: readonly LayerRecord[],
  tensorFiles: () => ReadonlyMap<string, string>,
): Generator<SmallFile> {
  yield* copies(beside, options);
  if (bitPlan !== undefined) {
    yield { name: outputName(checkpoint, PLAN_FILE), content: planText(bitPlan) };
  }
  yield {
    name: outputName(checkpoint, "config.json"),
    content: withQuantizationConfig(configText(checkpoint) ?? "{}\n", quantizationConfig(records, config)),
  };
  yield* indexFiles(checkpoint, records, tensorFiles);
}

/** What stands in the manifest: nothing that another run would not do again. */
function refinementRecord(report: PhasesReport["refinement"]): RefinementRecord | undefined {
  if (report === undefined) return undefined;
  const { iterations, reason, kept, heldOutBefore, heldOutAfter } = report;
  return { iterations, reason, kept, heldOutBefore, heldOutAfter };
}

/** The output folder that a run asks for. @throws {OutputError} when it is the input */
export async function requestOutput(
  run: QuantizeRun<Kernels | undefined>,
  { plan, bitPlan, beside }: PlannedRun,
  place: OutputPlace,
): Promise<OutputRequest> {
  const { checkpoint, config, calibration, kernels, loras, options: { signal, shard } } = run;
  const isOwn = shard !== undefined && loras.length === 0 && readsStatistics(checkpoint, config);
  const digested = isOwn ? plan.rows.map(({ name }) => name) : checkpoint.tensors.keys();
  // A solved layer depends on weights of others, by sums that every instruction set rounds in its own order.
  const solved = async () => ({
    calibration_sha256: await calibration.digest(),
    files_sha256: await digestBeside(beside),
    instruction_set: kernels?.isa,
    weights_sha256: kernels &&
      await stoppable(
        signal,
        "repeat the command",
        () => digestTensors(checkpoint, digested, () => pause(signal)),
      ),
  });
  const settings = {
    ...JSON.parse(canonicalConfig(config)),
    ...(config.chosen === undefined ? {} : { solver: "auto" }),
    ...(isCalibrated(config) ? await solved() : {}),
    ...(loras.length === 0 ? {} : { loras: loras.map(({ sha256, scale }) => ({ sha256, scale })) }),
    // A budget's plan follows from what is here already.
    ...(bitPlan === undefined || measuresBits(config)
      ? {}
      : { bit_plan_layers: JSON.parse(planText(bitPlan)).layers }),
    ...(shard === undefined ? {} : { shard: { ...shard, weights: isOwn ? "own" : "all" } }),
  };
  if (shard !== undefined) {
    const files = [...new Set(plan.rows.map(({ file }) => file))];
    const none = { copied: [], left: [] };
    const request = outputRequest(checkpoint, place, { operation: "quantize", settings }, none, files);
    return { ...request, beats: true };
  }
  const hasSidecar = wantsPhases(config) && config.enableTimeAware;
  return outputRequest(checkpoint, place, { operation: "quantize", settings }, beside, [
    ...checkpointFiles(checkpoint),
    ...(bitPlan === undefined && !measuresBits(config) ? [] : [PLAN_FILE]),
    ...(hasSidecar ? [SIDECAR_FILE] : []),
  ]);
}

/**
 * Opens the output folder of a run for `use`; a run that was stopped is gone on with where the request says
 * so.
 *
 * @throws {CheckpointError} when a file would have more tensors than readers take
 * @throws {OutputError} when the folder may not or cannot be written
 */
export async function withOutput<T>(
  run: Pick<QuantizeRun, "checkpoint" | "config" | "options">,
  planned: Pick<PlannedRun, "plan" | "bitPlan" | "beside">,
  request: OutputRequest,
  use: (output: Rewrite) => Promise<T>,
): Promise<T> {
  const { checkpoint, config, options } = run, { plan: { rows }, bitPlan, beside } = planned;
  const files = filesOf(checkpoint, planned);
  const isUnmeasured = measuresBits(config) && bitPlan === undefined;
  const chosen = sum(rows.filter(isChosen).map((row) => row.bytesAfter));
  const outputBytes = sum(rows.map((row) => row.bytesAfter)) +
    (isUnmeasured ? budgetBytes(rows, config) - chosen : 0) +
    sum(files.map((file) => file.reservedHeaderBytes + 8)) +
    (options.shard === undefined ? sum(beside.copied.map(({ bytes }) => bytes)) : 0);
  const job: RewriteJob = { request, files, outputBytes, failFast: config.failFast };
  return await withRewrite(job, options, use);
}

/**
 * The files of a plan's tensors: of a shard those that have some.
 *
 * @throws {CheckpointError} when one would have more tensors than readers take
 */
export function filesOf(checkpoint: Checkpoint, { plan }: Pick<PlannedRun, "plan">): RewriteJob["files"] {
  const byFile = Map.groupBy(plan.rows, ({ file }) => file);
  const isWhole = plan.rows.length === checkpoint.tensors.size;
  return checkpoint.files.filter(({ name }) => isWhole || byFile.has(name)).map(
    ({ name, file: { metadata } }) => {
      const rows = byFile.get(name) ?? [], specs = widestSpecs(rows);
      const reserved = reservedHeaderBytes(checkpoint, name, specs, metadata);
      return {
        name: outputName(checkpoint, name),
        metadata,
        reservedHeaderBytes: reserved,
        tensors: rows.map((row) => row.name),
      };
    },
  );
}

/** The entries that take most room in the header, whatever becomes of the tensors. */
function* widestSpecs(rows: readonly PlanRow[]): Generator<TensorSpec> {
  for (const row of rows) {
    const { name, dtype, shape } = row;
    if (row.action === "keep") yield { name, dtype, shape };
    else yield* packedTensorSpecs(name, { ...matrixSizes(shape), ...formatOf(row, 8) });
  }
}

const reportOf = (
  { checkpoint, config, kernels, loras, options: { shard } }: QuantizeRun<Kernels | undefined>,
  { plan, beside }: PlannedRun,
  output: string,
) => ({
  ...(loras.length === 0 ? {} : { loras }),
  solver: { name: config.solver, why: config.chosen?.why },
  input: checkpoint.path,
  output,
  modelKind: checkpoint.kind,
  opensIn: shard === undefined
    ? opensIn(checkpoint.kind, String(quantizationConfig(plan.rows, config)["quant_method"]))
    : `nothing yet: arrowquant merge brings the ${shard.count} shards together`,
  plan,
  shard,
  ...namesBeside(shard === undefined ? beside : { copied: [], left: [] }),
  threads: kernels?.threads ?? threadCount(config.numThreads, "native"),
});
