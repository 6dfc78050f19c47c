/** The output of a run: its folder and files, every tensor written, and the report. */
import { statSync } from "node:fs";
import { join } from "node:path";
import { packedTensorSpecs } from "../quant/packed/entries.ts";
import { CODED_SCALE_BITS, OFFSET_BITS, ROTATED_SCALE_BITS } from "../quant/packed/layout.ts";
import { canonicalConfig, isCalibrated, wantsPhases } from "../config/mod.ts";
import { type Kernels, threadCount } from "../native/mod.ts";
import { opensIn } from "../output/readers.ts";
import { quantizationConfig, withQuantizationConfig } from "../output/config_file.ts";
import { CheckpointError } from "../errors.ts";
import { quote } from "../files/whole.ts";
import { type OutputRequest, TIME_STEP } from "../output/output_folder.ts";
import {
  type Rewrite,
  type RewriteContent,
  type RewriteJob,
  type SmallFile,
  withRewrite,
} from "../output/rewrite.ts";
import type { LayerRecord, RefinementRecord } from "../output/record.ts";
import { sidecarContent } from "../phases/configured.ts";
import type { PhaseResult, PhasesReport } from "../phases/mod.ts";
import type { TensorSink } from "../output/tensor_sink.ts";
import { planText } from "../plan/budget.ts";
import { formatOf, type PlanRow } from "../plan/plan.ts";
import { pause, stoppable } from "../progress.ts";
import type { SolvedModel } from "../solve/candidates.ts";
import { budgetBytes, isChosen } from "../solve/sensitivity.ts";
import type { SolvedOnDemand } from "../solve/solve_model.ts";
import { type Checkpoint, SIDECAR_FILE, type TensorSpec } from "../tensor/mod.ts";
import { configText, copies, digestBeside, indexFiles, namesBeside, outputName } from "./beside.ts";
import { PLAN_FILE } from "./calibration_run.ts";
import {
  checkpointFiles,
  growingBuffer,
  headersBytes,
  outputFile,
  type OutputPlace,
  outputRequest,
} from "./checkpoint_run.ts";
import { readsStatistics } from "./sharded_run.ts";
import { rewriteTensor } from "./quantize_tensor.ts";
import { type RunReport, sum, writtenReport } from "./run_report.ts";
import { digestTensors, HashingReader } from "../output/source_digest.ts";
import type { QuantizeRun } from "./open_run.ts";
import { measuresBits, type PlannedRun } from "./planned_run.ts";
import { matrixSizes } from "../quant/mod.ts";

/**
 * Write: every tensor read, quantized or taken from what was solved, stored and verified; then the files
 * beside them.
 *
 * @throws as {@linkcode Rewrite.write}
 */
export async function writeRun(
  run: QuantizeRun,
  planned: PlannedRun,
  { solved, onDemand, phases }: {
    readonly solved?: SolvedModel | undefined;
    /** Layers that are solved when they are written, in place of those. */
    readonly onDemand?: SolvedOnDemand | undefined;
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
  const buffer = growingBuffer();
  const context = { config, kernels, onEvent, solved: onDemand ?? layers, refined, biases, buffer };
  const content: RewriteContent = {
    files: filesOf(checkpoint, planned),
    steps: new Map(planned.plan.rows.map((row) => {
      const { info: { name, elements, byteLength: bytes }, file } = checkpoint.tensors.get(row.name)!;
      const weights = row.action === "quantize" ? elements : 0;
      const placed = { ...row, file: outputName(checkpoint, row.file) };
      const digest = (between?: () => Promise<void>) => digestTensors(checkpoint, [name], between);
      const run = async (sink: TensorSink) => {
        const reader = new HashingReader(file);
        const check = onDemand && await unchanged(file.path, name, digest);
        const record = await rewriteTensor(placed, reader, sink, context);
        const sourceSha256 = reader.digest(bytes) ?? await digest();
        if (record.solved !== undefined) check?.(sourceSha256);
        return { ...record, sourceSha256 };
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

/**
 * Of a layer that is read to be solved, and again to be written.
 *
 * @param digest of its weights, for a file so young that a change does not show in its time
 * @returns a check, with the digest of what was written, that both have read the same
 */
async function unchanged(
  path: string,
  tensor: string,
  digest: () => Promise<string>,
): Promise<(sha256: string) => void> {
  const changed = () => statSync(path).ctimeMs, before = changed();
  const first = before + TIME_STEP > Date.now() ? await digest() : undefined;
  return (sha256) => {
    if (changed() === before && sha256 === (first ?? sha256)) return;
    const wanted = `${quote(path)} must not change until it is written, and was changed`;
    throw new CheckpointError(`Cannot solve ${quote(tensor)}: ${wanted}; go on with --resume`, {
      path,
      tensor,
    });
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
  // Layers of saved statistics depend on nothing but their own weights, whose digests the records have.
  const isOwn = loras.length === 0 && !wantsPhases(config) && !measuresBits(config) &&
    readsStatistics(checkpoint, config);
  // Others depend on weights before them, by sums that every instruction set rounds in its own order.
  let weights: OutputRequest["weights"];
  if (isCalibrated(config) && !isOwn && kernels !== undefined) {
    const digest = () => weightsDigest(checkpoint, signal);
    weights = { sha256: await digest(), digest };
  }
  const solved = async () => ({
    calibration_sha256: await calibration.digest(),
    files_sha256: await digestBeside(beside),
    instruction_set: kernels?.isa,
    ...(weights === undefined ? {} : { weights_sha256: weights.sha256 }),
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
    return { ...request, weights, beats: true };
  }
  const hasSidecar = wantsPhases(config) && config.enableTimeAware;
  const request = outputRequest(checkpoint, place, { operation: "quantize", settings }, beside, [
    ...checkpointFiles(checkpoint),
    ...(bitPlan === undefined && !measuresBits(config) ? [] : [PLAN_FILE]),
    ...(hasSidecar ? [SIDECAR_FILE] : []),
  ]);
  return { ...request, weights };
}

const weightsDigest = (checkpoint: Checkpoint, signal: AbortSignal | undefined): Promise<string> =>
  stoppable(
    signal,
    "repeat the command",
    () => digestTensors(checkpoint, checkpoint.tensors.keys(), () => pause(signal)),
  );

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
    headersBytes(files) +
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
  return checkpoint.files.filter(({ name }) => isWhole || byFile.has(name)).map(({ name }) => {
    const rows = byFile.get(name) ?? [];
    return outputFile(checkpoint, name, widestSpecs(rows), rows.map((row) => row.name));
  });
}

/** The entries that take most room in the header, whatever becomes of the tensors. */
function* widestSpecs(rows: readonly PlanRow[]): Generator<TensorSpec> {
  for (const row of rows) {
    const { name, dtype, shape } = row;
    if (row.action === "keep") yield { name, dtype, shape };
    else {
      const form = { ...matrixSizes(shape), ...formatOf(row, 8) };
      // Fewer scales may become half floats, whose entries have the longer shapes.
      const halves = row.scaleBits === CODED_SCALE_BITS || row.scaleBits === ROTATED_SCALE_BITS
        ? packedTensorSpecs(name, { ...form, scaleBits: OFFSET_BITS })
        : [];
      const known = new Set(halves.map((spec) => spec.name));
      yield* halves;
      yield* packedTensorSpecs(name, form).filter((spec) => !known.has(spec.name));
    }
  }
}

export const reportOf = (
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
