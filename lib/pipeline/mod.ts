/**
 * Checkpoint in, quantized checkpoint out, and back: the one way through. Plan, then tensor by tensor read, quantize,
 * write, verify; bounded memory; a stopped run can be resumed. What the files hold is docs/format.md's.
 */
import { closeSync, openSync, readdirSync, readFileSync, readSync, statSync } from "node:fs";
import { availableParallelism } from "node:os";
import { basename, join } from "node:path";
import { canonicalConfig, type Config } from "../config/mod.ts";
import { CheckpointError, OutputError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import { planText } from "../plan/budget.ts";
import { checkCalibratedConfig, type SaveCalibration, wantsPhases } from "../calibration/source.ts";
import { bitPlanOf, calibrationOf, calibrationWarnings, PLAN_FILE } from "./calibration_run.ts";
import { solvePlan } from "../solve/candidates.ts";
import type { SolvedLayer } from "../solve/solve_model.ts";
import { CALIBRATED_SOLVERS } from "../quant/solvers/solve_layer.ts";
import {
  quantizationConfig,
  withoutQuantizationConfig,
  withQuantizationConfig,
} from "../output/config_file.ts";
import { runConfiguredPhases, sidecarContent, withPhaseSolver } from "../phases/configured.ts";
import type { PhaseResult, PhasesReport } from "../phases/mod.ts";
import { rewriteDequantized } from "./dequantize_tensor.ts";
import { inputError, quote, sha256 } from "../files/whole.ts";
import { checkNotInput, checkOutput, type OutputRequest } from "../output/output_folder.ts";
import { type Plan, planQuantization, type PlanRow, scaleBitsOf } from "../plan/plan.ts";
import { rewriteTensor } from "./quantize_tensor.ts";
import {
  type Identity,
  type LayerRecord,
  type Manifest,
  MANIFEST_FILE,
  type SourceFingerprint,
  TOOL_VERSION,
} from "../output/record.ts";
import {
  CHUNK_BYTES,
  rewriteCheckpoint,
  type RewriteFile,
  type RewriteJob,
  type SmallFile,
} from "../output/rewrite.ts";
import type { RunOptions } from "../progress.ts";
import { addStatistics, cosine, type ErrorStatistics, MAX_THREADS, relativeRmsError } from "../quant/mod.ts";
import {
  allPackedNames,
  CONFIG_KEY,
  FORMAT_VERSION,
  type PackedLayer,
  packedLayers,
  packedNames,
  packedTensorSpecs,
} from "../quant/packed/checkpoint.ts";
import {
  BYTES_PER_ELEMENT,
  type Checkpoint,
  elementCount,
  MAX_NAME_LENGTH,
  MAX_TENSORS,
  openCheckpoint,
  type SafetensorsFile,
  SafetensorsWriter,
  SIDECAR_FILE,
  type TensorSpec,
} from "../tensor/mod.ts";

export { KEEP_RULES, type KeepRule, type Plan, planQuantization, type PlanRow } from "../plan/plan.ts";
export { type Mismatch, readManifest, verifyFiles, WORK_FOLDER } from "../output/output_folder.ts";
export {
  type Identity,
  type LayerRecord,
  type Manifest,
  MANIFEST_FILE,
  TOOL_VERSION,
} from "../output/record.ts";
export type { SaveCalibration } from "../calibration/source.ts";
export type { Progress, RunEvent, RunOptions } from "../progress.ts";
export type { LayerViolation, PhasesReport } from "../phases/mod.ts";

/** Files beside the weights that are part of a model and are copied, by the end of their names. */
const COPIED_SUFFIXES = [".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"];
const COPIED_NAMES = /^(?:LICENSE|LICENCE|NOTICE|COPYING|USE_POLICY)(?:[._-].*)?$/i;
/** Files that say what the original weights achieve: beside quantized weights nobody would have measured it. */
const SCORES = /(?:scores|results|metrics)[^/]*\.json$/i;
/** Largest file that is copied beside the weights: the largest published tokenizers have about 35 MB. */
const MAX_COPIED_BYTES = 64 * 2 ** 20;

/** What both directions have in common. */
interface CheckpointRun extends RunOptions {
  /** A checkpoint: a folder or a `.safetensors` file. */
  readonly input: string;
  /** Folder that gets the result. */
  readonly output: string;
  /** Go on with a run that was stopped. */
  readonly resume?: boolean | undefined;
  /** Replace an output of this tool. Files that it did not write are never touched. */
  readonly force?: boolean | undefined;
}

/** How to quantize a checkpoint. */
export type QuantizeCheckpointOptions =
  & CheckpointRun
  & {
    readonly config: Config;
    /** Save what calibration sees of the full-precision model's inputs; also where the solver needs no calibration. */
    readonly saveCalibration?: SaveCalibration | undefined;
  }
  & (
    | { readonly kernels: Kernels; readonly dryRun?: false | undefined }
    /** Only plan; write nothing. */
    | { readonly kernels?: Kernels | undefined; readonly dryRun: true }
  );

/** How to dequantize a checkpoint. */
export interface DequantizeCheckpointOptions extends CheckpointRun {
  readonly kernels: Kernels;
  /** Element type of the result; by default each tensor's own before it was quantized. */
  readonly dtype?: "F32" | "F16" | "BF16" | undefined;
  /** Threads of the kernels; 0, the default, is one per core. */
  readonly threads?: number | undefined;
}

/** Sums over a run. */
export interface Totals {
  /** Tensors that were quantized (or dequantized), and their weights. */
  readonly tensors: number;
  readonly weights: number;
  readonly tensorsKept: number;
  /** Bytes of the packed form of those tensors · 8 / weights. */
  readonly bitsPerWeight: number;
  /** Bytes of all safetensors files. */
  readonly fileBytesBefore: number;
  readonly fileBytesAfter: number;
  /** Of all quantized weights together; undefined when there is nothing to compare. */
  readonly relativeRmsError: number | undefined;
  readonly cosine: number | undefined;
}

/** What a run did, or would do. */
export interface RunReport {
  readonly input: string;
  readonly output: string;
  readonly modelKind: Checkpoint["kind"];
  readonly dryRun: boolean;
  readonly plan: Plan;
  /** What became of each tensor; empty on a dry run. */
  readonly layers: readonly LayerRecord[];
  /** What each of them took: read, quantize, verify, write; null where an earlier run had done it. */
  readonly layerMilliseconds: readonly (number | null)[];
  readonly totals: Totals;
  /** Files beside the weights that were copied, and those that were not. */
  readonly copied: readonly string[];
  readonly left: readonly string[];
  /** Tensors that an earlier run had finished. */
  readonly tensorsResumed: number;
  /** The kernels that ran, as they describe themselves; undefined on a dry run. */
  readonly backend: string | undefined;
  readonly threads: number;
  /** What the phases did; undefined where none was asked for, or an earlier run had finished. */
  readonly phases?: PhasesReport | undefined;
}

/**
 * Quantizes a checkpoint into a folder.
 *
 * Equal input, configuration and version give equal bytes, whatever the threads, the backend and the runtime, and
 * however often the run was stopped.
 *
 * @throws {CheckpointError | FormatError} when the input is incomplete, broken or quantized already
 * @throws {WeightsError} when weights are NaN, infinite or too large; nothing is left behind
 * @throws {OutputError} when the output exists, is the input, or cannot be written
 * @throws {IntegrityError} when what is read back is not what was written
 * @throws {InterruptedError} when `signal` stopped it; `resume` goes on
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
  const options = { ...given, config: withPhaseSolver(given.config) };
  const { input, output, config } = options;
  checkPaths(options);
  checkCalibratedConfig(config);
  using checkpoint = openCheckpoint(input);
  const quantized = checkpoint.config?.[CONFIG_KEY];
  if (quantized !== undefined && quantized !== null) {
    throw new CheckpointError(
      `Cannot quantize ${
        quote(input)
      }: weights must be plain, got config.json with a ${CONFIG_KEY}: dequantize it first`,
      { path: join(checkpoint.folder, "config.json") },
    );
  }
  const threads = threadCount(config.numThreads, options.kernels);
  const calibration = await calibrationOf(checkpoint, options, threads);
  const bitPlan = await bitPlanOf(checkpoint, options, calibration.open, threads);
  const plan = planQuantization(checkpoint, config, bitPlan);
  const rows = new Map(plan.rows.map((row) => [row.name, row]));
  checkNames(plan, checkpoint, config);
  const beside = filesBeside(checkpoint);
  const request = outputRequest(options, checkpoint, beside.copied, {
    operation: "quantize",
    settings: JSON.stringify({
      ...JSON.parse(canonicalConfig(config)),
      ...(calibration.digest === undefined ? {} : { calibration_sha256: calibration.digest }),
      ...(bitPlan === undefined ? {} : { bit_plan_layers: JSON.parse(planText(bitPlan)).layers }),
    }),
  }, [
    ...(bitPlan === undefined ? [] : [PLAN_FILE]),
    ...(wantsPhases(config) && config.enableTimeAware ? [SIDECAR_FILE] : []),
  ]);
  checkNotInput(checkpoint, output);
  const common = { input, output, modelKind: checkpoint.kind, plan, ...names(beside), threads };
  const bytesBefore = sum(checkpoint.files.map(({ file }) => file.fileBytes));
  if (options.dryRun) {
    checkOutput(request);
    const planned = plan.rows.filter(({ action }) => action === "quantize");
    const totals = sumUp(
      planned,
      plan.rows.length - planned.length,
      bytesBefore,
      sum(plan.rows.map((r) => r.bytesAfter)),
    );
    return {
      ...common,
      dryRun: true,
      layers: [],
      layerMilliseconds: [],
      totals,
      tensorsResumed: 0,
      backend: undefined,
    };
  }

  const { kernels, onEvent } = options;
  if (options.saveCalibration !== undefined) {
    checkOutput(request); // before minutes of work that it would make useless
    await calibration.open();
  }
  if (config.solver !== given.config.solver) {
    onEvent?.({
      kind: "phase",
      message: `phase 3 is of calibrated codes: solver ${config.solver} in place of ${given.config.solver}`,
    });
  }
  for (const message of [...plan.warnings, ...calibrationWarnings(plan, config, bitPlan)]) {
    onEvent?.({ kind: "warning", message });
  }
  let solved: ReadonlyMap<string, SolvedLayer> | undefined, phases: PhaseResult | undefined, workFolder = "";
  const context = {
    config,
    kernels,
    threads,
    onEvent,
    buffer: growingBuffer(),
    get solved() {
      return solved;
    },
    get biases() {
      return phases?.model.biases;
    },
  };
  const files = checkpoint.files.map(({ name, file }): RewriteFile => ({
    name,
    metadata: file.metadata,
    reservedHeaderBytes: reservedHeaderBytes(
      checkpoint,
      name,
      widestSpecs([...file.tensors.keys()].map((tensor) => rows.get(tensor)!)),
      file.metadata,
    ),
    steps: [...file.tensors.values()].map((info) => {
      const row = rows.get(info.name)!;
      const weights = row.action === "quantize" ? info.elements : 0;
      return {
        name: info.name,
        weights,
        bytes: info.byteLength,
        run: (sink) => rewriteTensor(row, file, sink, context),
      };
    }),
  }));
  const job: RewriteJob = {
    request,
    files,
    outputBytes: sum(plan.rows.map((row) => row.bytesAfter)) +
      sum(files.map((file) => file.reservedHeaderBytes + 8)) +
      sum(beside.copied.map(({ bytes }) => bytes)),
    failFast: config.failFast,
    async prepare(work, isDone) {
      workFolder = work;
      if (wantsPhases(config) && !plan.rows.some(({ action }) => action === "quantize")) {
        onEvent?.({ kind: "warning", message: "the phases have nothing to do: no layer is quantized" });
        return;
      }
      const toSolve = plan.rows.filter(({ action, name }) => action === "quantize" && !isDone(name));
      if (toSolve.length > 0 || wantsPhases(config)) await solve(work);
      if (!wantsPhases(config)) return;
      phases = await runConfiguredPhases(
        { checkpoint, calibrated: await calibration.open(), plan, config, kernels, threads, solved },
        options,
      );
      if (solved === undefined) return;
      const refined = phases.model.weights;
      solved = new Map(
        [...solved].map(([name, layer]) => [name, { ...layer, tensor: refined.get(name) ?? layer.tensor }]),
      );
    },
    *smallFiles(records, tensorFiles) {
      yield* copies(checkpoint, beside);
      if (bitPlan !== undefined) yield { name: PLAN_FILE, content: planText(bitPlan) };
      yield {
        name: "config.json",
        content: withQuantizationConfig(
          configText(checkpoint) ?? "{}\n",
          quantizationConfig(records, config),
        ),
      };
      yield* indexFiles(checkpoint, records, tensorFiles);
      // Last: it carries the fingerprint of what is beside it.
      if (phases?.model.timeParameters !== undefined) {
        yield { name: SIDECAR_FILE, content: sidecarContent(workFolder, phases.model) };
      }
    },
  };
  async function solve(work: string): Promise<void> {
    if (!CALIBRATED_SOLVERS.includes(config.solver)) return;
    const model = await solvePlan(
      await calibration.open(),
      plan,
      config,
      kernels,
      threads,
      work,
      JSON.stringify([request.identity, kernels.isa]),
      options,
    );
    solved = model.layers;
  }
  const { manifest, tensorsResumed, milliseconds } = await rewriteCheckpoint(job, options);
  return {
    ...common,
    dryRun: false,
    ...summary(manifest, bytesBefore),
    layerMilliseconds: milliseconds,
    tensorsResumed,
    phases: phases?.report,
    backend: kernels.describe(),
  };
}

/**
 * Turns a quantized checkpoint of ours back into a plain one, which any safetensors reader understands.
 *
 * @throws as {@linkcode quantizeCheckpoint}; {@linkcode CheckpointError} when nothing in it is quantized
 */
export async function dequantizeCheckpoint(options: DequantizeCheckpointOptions): Promise<RunReport> {
  const { input, output, kernels } = options;
  checkPaths(options);
  using checkpoint = openCheckpoint(input);
  const layers = packedLayers(checkpoint);
  if (layers.size === 0) {
    throw new CheckpointError(`Cannot dequantize ${quote(input)}: must hold quantized tensors, got none`, {
      path: input,
    });
  }
  const threads = threadCount(options.threads ?? 0, kernels);
  const beside = filesBeside(checkpoint);
  const request = outputRequest(options, checkpoint, beside.copied, {
    operation: "dequantize",
    settings: JSON.stringify({ dtype: options.dtype ?? "original" }),
  });
  checkNotInput(checkpoint, output);
  const context = { checkpoint, kernels, threads, buffer: growingBuffer() };
  const parts = new Map([...layers.values()].flatMap((layer) => {
    const { packed, ...others } = layer.tensors;
    return [
      [packed, layer] as const,
      ...Object.values(others).map((name) => [name as string | undefined, undefined] as const),
    ];
  }));
  const files = checkpoint.files.map(({ name, file }): RewriteFile => {
    // The plain tensor takes the place of its codes; its other parts vanish.
    type Target = { readonly spec: TensorSpec; readonly layer: PackedLayer | undefined };
    const targets = [...file.tensors.values()].flatMap((info): Target[] => {
      if (!parts.has(info.name)) return [{ spec: info, layer: undefined }];
      const layer = parts.get(info.name);
      if (layer === undefined) return [];
      const dtype = options.dtype ?? plainDtype(layer.dtype);
      return [{
        spec: { name: layer.name, dtype, shape: [layer.rows, layer.cols] } satisfies TensorSpec,
        layer,
      }];
    });
    return {
      name,
      metadata: file.metadata,
      reservedHeaderBytes: reservedHeaderBytes(
        checkpoint,
        name,
        targets.map(({ spec }) => spec),
        file.metadata,
      ),
      steps: targets.map(({ spec, layer }) => ({
        name: spec.name,
        weights: layer === undefined ? 0 : layer.rows * layer.cols,
        bytes: bytesOf(spec),
        run: (sink) => rewriteDequantized(spec, layer, name, sink, context),
      })),
    };
  });
  const job: RewriteJob = {
    request,
    files,
    outputBytes: sum(files.map((f) => f.reservedHeaderBytes + 8 + sum(f.steps.map(({ bytes }) => bytes)))) +
      sum(beside.copied.map(({ bytes }) => bytes)),
    failFast: true,
    *smallFiles(records, tensorFiles) {
      yield* copies(checkpoint, beside);
      yield { name: "config.json", content: withoutQuantizationConfig(configText(checkpoint)!) };
      yield* indexFiles(checkpoint, records, tensorFiles);
    },
  };
  const { manifest, tensorsResumed, milliseconds } = await rewriteCheckpoint(job, options);
  return {
    input,
    output,
    modelKind: checkpoint.kind,
    dryRun: false,
    plan: { rows: [], warnings: [] },
    ...summary(manifest, sum(checkpoint.files.map(({ file }) => file.fileBytes))),
    layerMilliseconds: milliseconds,
    ...names(beside),
    tensorsResumed,
    backend: kernels.describe(),
    threads,
  };
}

/** Refuses empty paths: joined with a file's name they would mean the current folder. */
function checkPaths({ input, output }: CheckpointRun): void {
  if (input === "") {
    throw new CheckpointError('Cannot open "": input must be a path, got an empty text', { path: input });
  }
  if (output === "") {
    throw new OutputError('Cannot write "": output must be a path, got an empty text', { path: output });
  }
}

/** Refuses a checkpoint that has an entry under a name that a quantized tensor needs, or whose names leave no room. */
function checkNames(plan: Plan, checkpoint: Checkpoint, config: Config): void {
  for (const { name, action } of plan.rows) {
    if (action === "keep") continue;
    const names = packedNames(name, config.zeroPoint, scaleBitsOf(config), config.solverOptions.lowRank);
    const parts = Object.values(names).map((part: string | undefined) => part?.length ?? 0);
    const longest = Math.max(...parts);
    if (longest > MAX_NAME_LENGTH) {
      throw new CheckpointError(
        `Cannot quantize ${quote(name)} of ${quote(checkpoint.path)}: name must have at most ${
          MAX_NAME_LENGTH - (longest - name.length)
        } characters, because the names of its parts are longer, got ${name.length}; keep_patterns can keep such ` +
          "tensors as they are",
        { path: checkpoint.tensors.get(name)!.file.path, tensor: name },
      );
    }
    const taken = allPackedNames(name).find((part) => checkpoint.tensors.has(part));
    if (taken === undefined) continue;
    throw new CheckpointError(
      `Cannot quantize ${quote(name)} of ${quote(checkpoint.path)}: weights must be plain, got ${
        quote(taken)
      } beside ` +
        "them, as quantized checkpoints have it; keep_patterns can keep such tensors as they are",
      { path: checkpoint.tensors.get(taken)!.file.path, tensor: name },
    );
  }
}

/** Room for a file's header; refuses a file that no reader would take. */
function reservedHeaderBytes(
  { folder }: Checkpoint,
  name: string,
  specs: Iterable<TensorSpec>,
  metadata: Readonly<Record<string, string>>,
): number {
  const path = join(folder, name);
  try {
    return SafetensorsWriter.headerBytes(atMost(MAX_TENSORS, specs), metadata);
  } catch (cause) {
    if (!(cause instanceof RangeError)) throw cause;
    throw new CheckpointError(
      `Cannot write the tensors of ${quote(path)}: ${cause.message}; split the file into shards`,
      { path, cause },
    );
  }
}

function* atMost(most: number, specs: Iterable<TensorSpec>): Generator<TensorSpec> {
  let count = 0;
  for (const spec of specs) {
    if (++count > most) throw new RangeError(`a file must have at most ${most} tensors, got more`);
    yield spec;
  }
}

/** Type that a dequantized tensor gets: its own, or the nearest one that the kernels write. */
function plainDtype(dtype: string): "F32" | "F16" | "BF16" {
  if (dtype === "F16" || dtype === "BF16") return dtype;
  return dtype.startsWith("F8") ? "F16" : "F32";
}

const sum = (values: readonly number[]): number => values.reduce((total, value) => total + value, 0);

const bytesOf = ({ dtype, shape }: TensorSpec): number =>
  (elementCount(shape) ?? 0) * BYTES_PER_ELEMENT[dtype];

/** Threads that will run: what was asked for, or one per core; WebAssembly has one. */
function threadCount(asked: number, kernels: Kernels | undefined): number {
  if (kernels?.backend === "wasm") return 1;
  return asked > 0 ? asked : Math.min(MAX_THREADS, availableParallelism());
}

/** Memory that is used again for each chunk, grown when a row is longer. */
function growingBuffer(): (bytes: number) => Uint8Array<ArrayBuffer> {
  let buffer = new Uint8Array(CHUNK_BYTES);
  return (bytes) => {
    if (buffer.length < bytes) buffer = new Uint8Array(bytes);
    return buffer;
  };
}

/** The entries that take most room in the header, whatever becomes of the tensors. */
function* widestSpecs(rows: readonly PlanRow[]): Generator<TensorSpec> {
  for (const { name, dtype, shape, action, groupSize, zeroPoint, scaleBits, rank } of rows) {
    const [height, width] = shape as [number, number];
    if (action === "keep") yield { name, dtype, shape };
    else {yield* packedTensorSpecs(
        name,
        height,
        width,
        8,
        groupSize!,
        zeroPoint!,
        scaleBits,
        rank,
      );}
  }
}

// Files beside the weights -------------------------------------------------------------------------------------

interface Beside {
  readonly copied: readonly { readonly name: string; readonly bytes: number }[];
  readonly left: readonly string[];
}

const names = ({ copied, left }: Beside) => ({ copied: copied.map(({ name }) => name), left });

/** What lies beside the weights: a model's own small files are copied, other things stay. */
function filesBeside(checkpoint: Checkpoint): Beside {
  // A single file may lie among anything: only its folder's config.json is known to belong to it.
  if (!statSync(checkpoint.path).isDirectory()) return { copied: [], left: [] };
  const written = new Set([
    "config.json",
    MANIFEST_FILE,
    checkpoint.indexFile,
    ...checkpoint.files.map(({ name }) => name),
  ]);
  const copied: { name: string; bytes: number }[] = [];
  const left: string[] = [];
  for (const name of readdirSync(checkpoint.folder).sort()) {
    if (written.has(name)) continue;
    const isModels = !SCORES.test(name) &&
      (COPIED_SUFFIXES.some((suffix) => name.endsWith(suffix)) || COPIED_NAMES.test(name));
    const stat = statSync(join(checkpoint.folder, name), { throwIfNoEntry: false });
    const fits = stat?.isFile() === true && stat.size <= MAX_COPIED_BYTES;
    if (isModels && fits && name !== SIDECAR_FILE) copied.push({ name, bytes: stat.size });
    else left.push(name);
  }
  return { copied, left };
}

function* copies(checkpoint: Checkpoint, { copied }: Beside): Generator<SmallFile> {
  for (const { name } of copied) yield { name, content: readWhole(join(checkpoint.folder, name)) };
}

function readWhole(path: string): Uint8Array {
  try {
    return readFileSync(path);
  } catch (cause) {
    throw inputError(path, cause);
  }
}

function configText(checkpoint: Checkpoint): string | undefined {
  if (checkpoint.config === undefined) return undefined;
  return new TextDecoder().decode(readWhole(join(checkpoint.folder, "config.json")));
}

/** The index with the names and sizes of what was written; none where the input has none. */
function indexFiles(
  checkpoint: Checkpoint,
  records: readonly LayerRecord[],
  tensorFiles: () => ReadonlyMap<string, string>,
): SmallFile[] {
  if (checkpoint.indexFile === undefined) return [];
  const original = JSON.parse(
    new TextDecoder().decode(readWhole(join(checkpoint.folder, checkpoint.indexFile))),
  ) as Record<string, unknown>;
  const { metadata } = original;
  const index = {
    ...original,
    metadata: {
      ...(typeof metadata === "object" ? metadata : {}),
      total_size: sum(records.map(({ bytesAfter }) => bytesAfter)),
    },
    weight_map: Object.fromEntries([...tensorFiles()].sort(([a], [b]) => a < b ? -1 : a > b ? 1 : 0)),
  };
  return [{ name: checkpoint.indexFile, content: `${JSON.stringify(index, null, 2)}\n` }];
}

// Identity and sums --------------------------------------------------------------------------------------------

function outputRequest(
  { output, resume = false, force = false }: CheckpointRun,
  checkpoint: Checkpoint,
  copied: Beside["copied"],
  { operation, settings }: Pick<Identity, "operation" | "settings">,
  more: readonly string[] = [],
): OutputRequest {
  if (resume && force) {
    throw new RangeError(
      `Cannot write ${quote(output)}: give resume (go on) or force (start over), got both`,
    );
  }
  const config = configText(checkpoint);
  const source: SourceFingerprint = {
    files: checkpoint.files.map(({ name, file }) => ({
      name: basename(name),
      bytes: file.fileBytes,
      headerSha256: sha256(headerBytes(file)),
    })),
    configSha256: config === undefined ? null : sha256(config),
  };
  const settingsWithFormat = JSON.stringify({ ...JSON.parse(settings), format_version: FORMAT_VERSION });
  return {
    path: output,
    identity: { operation, toolVersion: TOOL_VERSION, settings: settingsWithFormat, source },
    sourceTimes: checkpoint.files.map(({ file }) => Math.floor(statSync(file.path).mtimeMs)),
    files: [
      ...checkpoint.files.map(({ name }) => name),
      ...(checkpoint.indexFile === undefined ? [] : [checkpoint.indexFile]),
      "config.json",
      ...copied.map(({ name }) => name),
      ...more,
    ],
    resume,
    force,
  };
}

/** The length and the header of a file, as they are. */
function headerBytes({ path, tensors, fileBytes }: SafetensorsFile): Uint8Array {
  const first = tensors.values().next().value;
  const bytes = new Uint8Array(first?.byteOffset ?? fileBytes);
  const fd = openSync(path, "r");
  try {
    for (let done = 0; done < bytes.length;) {
      const got = readSync(fd, bytes, done, bytes.length - done, done);
      if (got === 0) throw new Error("the file became shorter");
      done += got;
    }
  } catch (cause) {
    throw inputError(path, cause);
  } finally {
    closeSync(fd);
  }
  return bytes;
}

function summary(manifest: Manifest, fileBytesBefore: number): Pick<RunReport, "layers" | "totals"> {
  const { layers, files } = manifest;
  const changed = layers.filter(({ action }) => action !== "keep");
  const bytesAfter = Object.entries(files).filter(([name]) => name.endsWith(".safetensors"));
  const totals = sumUp(
    changed,
    layers.length - changed.length,
    fileBytesBefore,
    sum(bytesAfter.map(([, { bytes }]) => bytes)),
  );
  return { layers, totals };
}

function sumUp(
  changed: readonly (PlanRow | LayerRecord)[],
  tensorsKept: number,
  fileBytesBefore: number,
  fileBytesAfter: number,
): Totals {
  const weights = sum(changed.map(({ shape }) => elementCount(shape) ?? 0));
  const packed = sum(changed.map((row) => row.action === "dequantize" ? row.bytesBefore : row.bytesAfter));
  const all = changed.flatMap((row) =>
    "statistics" in row && row.statistics !== undefined ? [row.statistics] : []
  );
  const statistics = all.length === 0 ? undefined : all.reduce<ErrorStatistics>(addStatistics, {
    sumSquares: 0,
    sumSquaresOther: 0,
    dot: 0,
    sumSquaredError: 0,
    maxError: 0,
    maxMagnitude: 0,
  });
  return {
    tensors: changed.length,
    weights,
    tensorsKept,
    bitsPerWeight: weights === 0 ? 0 : packed * 8 / weights,
    fileBytesBefore,
    fileBytesAfter,
    relativeRmsError: statistics === undefined ? undefined : relativeRmsError(statistics),
    cosine: statistics === undefined ? undefined : cosine(statistics),
  };
}
