/**
 * Shards that tasks of an array have quantized, into one checkpoint: the same files, byte for byte, as one
 * run over all tensors writes. No weight is quantized again; packed bytes are copied, each read back and
 * compared.
 */
import { matrixSizes } from "../quant/mod.ts";
import { type ConfigInForce, resolveConfig } from "../config/mod.ts";
import { CheckpointError, FormatError, IntegrityError } from "../errors.ts";
import { isJsonObject } from "../files/json.ts";
import { quote } from "../files/positional.ts";
import { join } from "node:path";
import { verifyFiles } from "../output/output_folder.ts";
import { opensIn } from "../output/readers.ts";
import type { LayerRecord } from "../output/record.ts";
import type { RewriteContent, RewriteStep } from "../output/rewrite.ts";
import { identityOf, readShards, type ShardResult } from "../output/shard_folders.ts";
import { digestTensors } from "../output/source_digest.ts";
import { CHUNK_BYTES, copyTensor, type TensorSink } from "../output/tensor_sink.ts";
import { type BitPlan, planOfLayers } from "../plan/budget.ts";
import { checkPlan, formatOf, type Plan, planQuantization } from "../plan/plan.ts";
import { pause, stoppable } from "../progress.ts";
import { TRELLIS_TABLE } from "../quant/packed/checkpoint.ts";
import { packedTensorSpecs } from "../quant/packed/entries.ts";
import { type Checkpoint, openCheckpoint, SafetensorsFile, type TensorSpec } from "../tensor/mod.ts";
import { filesBeside, namesBeside } from "./beside.ts";
import { PLAN_FILE } from "./calibration_run.ts";
import {
  checkPaths,
  checkpointFiles,
  type CheckpointRun,
  growingBuffer,
  outputRequest,
} from "./checkpoint_run.ts";
import { checkPlain } from "./open_run.ts";
import { filesOf, filesOfModel, withOutput } from "./write_run.ts";
import { quantizationConfig } from "../output/config_file.ts";
import { type RunReport, writtenReport } from "./run_report.ts";

/** How to bring shards together. */
export interface MergeCheckpointOptions extends CheckpointRun {
  /** Folders of shards, or folders that hold some, in any order. */
  readonly shards: readonly string[];
  /** Weights of this name where the model's folder has several. */
  readonly variant?: string | undefined;
  /** Folder of a diffusers pipeline that was quantized, where it has several denoisers. */
  readonly subfolder?: string | undefined;
}

/** Shards that belong together, with the configuration that they were made with. */
export interface ReadShards {
  readonly shards: readonly ShardResult[];
  readonly config: ConfigInForce;
  readonly bitPlan: BitPlan | undefined;
}

/** Keys of a run's settings that are none of the configuration. */
const NOT_CONFIGURED = [
  "format_version",
  "trellis_table",
  "calibration_sha256",
  "instruction_set",
  "files_sha256",
  "weights_sha256",
  "bit_plan_layers",
  "loras",
];

/** Reads shards and their configuration. @throws {CheckpointError} naming those that do not belong */
export function openShards(paths: readonly string[]): ReadShards {
  const shards = readShards(paths), [{ settings, manifest: { solver }, path }] = shards as [ShardResult];
  checkLevels(settings, path);
  const overrides = Object.fromEntries(
    Object.entries(settings).filter(([key]) => !NOT_CONFIGURED.includes(key)),
  );
  const { config } = resolveConfig({ overrides, overrideSources: { solver: quote(path) } });
  const layers = settings["bit_plan_layers"];
  const fault = (message: string) =>
    new FormatError(`Cannot merge ${quote(path)}: its plan: ${message}`, { path });
  return {
    shards,
    config: solver === undefined ? config as ConfigInForce : {
      ...config,
      solver: solver.name as ConfigInForce["solver"],
      chosen: {
        byWeights: solver.byWeights as "round" | "clip",
        roundsEight: solver.roundsEight,
        why: solver.why,
      },
    },
    bitPlan: isJsonObject(layers) ? planOfLayers(layers, fault) : undefined,
  };
}

/**
 * Brings shards together. Any order of them and of their finishing gives the same bytes; a stopped merge can
 * be resumed.
 *
 * @throws {CheckpointError} when shards are missing, there twice, of another input, configuration or version
 * @throws {IntegrityError} when a shard's files are not as they were written
 * @throws {OutputError} when the output exists or cannot be written
 */
export async function mergeCheckpoint(options: MergeCheckpointOptions): Promise<RunReport> {
  checkPaths(options);
  const { input, output, variant, subfolder, signal, onEvent } = options, read = openShards(options.shards);
  const { config, bitPlan, shards } = read;
  using checkpoint = openCheckpoint(input, { variant, subfolder });
  checkPlain(checkpoint);
  const own = planQuantization(checkpoint, config, bitPlan), beside = filesBeside(checkpoint, options);
  checkPlan(own, checkpoint);
  const records = recordsOf(shards, own), plan = asRead(own, records);
  await stoppable(signal, "repeat the command", () => checkWeights(checkpoint, shards, options));
  const { operation, settings } = identityOf(shards[0]!);
  const identity = { operation, settings: JSON.parse(withoutVersion(settings)) };
  const files = [...(bitPlan === undefined ? [] : [PLAN_FILE]), ...checkpointFiles(checkpoint)];
  const request = outputRequest(checkpoint, options, identity, beside, files);
  checkInput(shards[0]!, JSON.stringify(request.identity.source), checkpoint);
  for (const shard of shards) {
    const [mismatch] = await verifyFiles(shard.path, shard.manifest);
    if (mismatch === undefined) continue;
    const { name, reason } = mismatch, place = join(shard.path, name);
    throw new IntegrityError(`Cannot merge shard ${shard.index}/${shard.count}: ${quote(place)} ${reason}`, {
      path: place,
    });
  }
  onEvent?.({
    kind: "shard",
    message: `${shards.length} shards with ${records.size} tensors are complete and as they were written`,
  });
  const run = { checkpoint, config, options };
  return await withOutput(run, { plan, bitPlan, beside }, request, async (out) => {
    using steps = mergeSteps(plan, records, checkpoint);
    const content: RewriteContent = {
      files: filesOf(checkpoint, { plan }),
      steps: steps.byName,
      solver: shards[0]!.manifest.solver,
      smallFiles: (own, tensorFiles) => filesOfModel(run, { beside, bitPlan }, own, tensorFiles),
    };
    const written = await out.write(content);
    const method = String(quantizationConfig(plan.rows, config)["quant_method"]);
    return {
      ...{ input: checkpoint.path, output, modelKind: checkpoint.kind, plan, threads: 1, backend: undefined },
      solver: { name: config.solver, why: config.chosen?.why },
      opensIn: opensIn(checkpoint.kind, method),
      ...namesBeside(beside),
      ...writtenReport(checkpoint, written),
    };
  });
}

/** @throws {CheckpointError} when trellis codes of the shards have other levels than this version's */
function checkLevels({ codes, trellis_table: table }: Readonly<Record<string, unknown>>, path: string): void {
  if (codes !== "trellis" || table === TRELLIS_TABLE) return;
  throw new CheckpointError(
    `Cannot merge ${quote(path)}: trellis_table must be ${TRELLIS_TABLE}, got ${
      table === undefined ? "none" : JSON.stringify(table)
    }: quantize the shards again`,
    { path },
  );
}

/** Settings without the versions of the format and of the levels, which a request adds. */
function withoutVersion(settings: string): string {
  const { format_version: _, trellis_table: __, ...own } = JSON.parse(settings) as Record<string, unknown>;
  return JSON.stringify(own);
}

/** @throws {CheckpointError} when the model is not what the shards were made of */
function checkInput(
  { manifest: { identity }, path }: ShardResult,
  source: string,
  checkpoint: Checkpoint,
): void {
  if (JSON.stringify(identity.source) === source) return;
  throw new CheckpointError(
    `Cannot merge ${quote(path)}: its shards must be of the model ${
      quote(checkpoint.path)
    }, got shards of another input`,
    { path },
  );
}

/** A tensor's record, and the file of the shard that holds it. */
interface Found {
  readonly record: LayerRecord;
  readonly path: string;
}

/** Records of all tensors. @throws {CheckpointError} when they are not those of the plan, each once */
function recordsOf(shards: readonly ShardResult[], { rows }: Plan): ReadonlyMap<string, Found> {
  const found = new Map<string, Found>(), names = new Set(rows.map(({ name }) => name));
  for (const { path, manifest: { layers, files }, index, count } of shards) {
    for (const record of layers) {
      const reason = found.has(record.name)
        ? "is in another shard as well"
        : !names.has(record.name)
        ? "is no tensor of the model"
        : !Object.hasOwn(files, record.file)
        ? `must be in a file of the shard, got ${quote(record.file)}`
        : undefined;
      if (reason !== undefined) {
        const message = `Cannot merge shard ${index}/${count}: ${quote(record.name)} ${reason}`;
        throw new CheckpointError(message, { path, tensor: record.name });
      }
      found.set(record.name, { record, path: join(path, record.file) });
    }
  }
  const missing = rows.find(({ name }) => !found.has(name));
  if (missing === undefined) return found;
  throw new CheckpointError(
    `Cannot merge: every tensor of the model must be in a shard, got none with ${quote(missing.name)}`,
    {
      tensor: missing.name,
    },
  );
}

/** The plan with element types and sizes as shards read them: merged LoRAs make them float32. */
const asRead = ({ rows, warnings }: Plan, records: ReadonlyMap<string, Found>): Plan => ({
  rows: rows.map((row) => {
    const { dtype, bytesBefore } = records.get(row.name)!.record;
    return { ...row, dtype, bytesBefore };
  }),
  warnings,
});

/**
 * Compares the model's weights with what shards read, where their settings tell none.
 *
 * @throws {CheckpointError} when the model has other weights than a shard read
 */
async function checkWeights(
  checkpoint: Checkpoint,
  shards: readonly ShardResult[],
  { signal, onEvent }: Pick<CheckpointRun, "signal" | "onEvent">,
): Promise<void> {
  if (!shards[0]!.hasOwnWeights) return;
  onEvent?.({ kind: "stage", message: "reading the model's weights" });
  const wanted = new Map(
    shards.flatMap(({ manifest: { layers } }) => layers.map((layer) => [layer.name, layer.sourceSha256])),
  );
  for (const name of checkpoint.tensors.keys()) {
    if (await digestTensors(checkpoint, [name], () => pause(signal)) === wanted.get(name)) continue;
    throw new CheckpointError(
      `Cannot merge: ${quote(name)} must have the weights that its shard read, got others`,
      {
        path: checkpoint.path,
        tensor: name,
      },
    );
  }
}

/** Entries of a tensor, in the order in which they are stored. */
function entriesOf(record: LayerRecord): TensorSpec[] {
  const { name, dtype, shape } = record;
  if (record.action === "keep") return [{ name, dtype, shape }];
  return packedTensorSpecs(name, { ...matrixSizes(shape), ...formatOf(record) });
}

/** Most files of shards that are open at once. */
const OPEN_FILES = 64;

/** Copies of the shards' tensors, with the files that they are read from. */
function mergeSteps({ rows }: Plan, records: ReadonlyMap<string, Found>, checkpoint: Checkpoint) {
  const open = new Map<string, SafetensorsFile>(), bufferOf = growingBuffer();
  const fileAt = (path: string): SafetensorsFile => {
    const known = open.get(path);
    if (known !== undefined) return known;
    const [oldest] = open.keys();
    if (open.size >= OPEN_FILES) {
      open.get(oldest!)!.close();
      open.delete(oldest!);
    }
    const file = SafetensorsFile.open(path);
    open.set(path, file);
    return file;
  };
  const stepOf = (name: string): RewriteStep => {
    const { record, path } = records.get(name)!, { info } = checkpoint.tensors.get(name)!;
    return {
      name,
      weights: record.action === "keep" ? 0 : info.elements,
      bytes: info.byteLength,
      async run(sink: TensorSink) {
        const file = fileAt(path);
        for (const spec of entriesOf(record)) {
          const stored = file.tensors.get(spec.name);
          if (
            stored === undefined || stored.dtype !== spec.dtype || stored.shape.join() !== spec.shape.join()
          ) {
            throw new FormatError(
              `Cannot merge ${quote(path)}: it must have ${quote(spec.name)} as its manifest says`,
              { path, tensor: name },
            );
          }
          await copyTensor(
            sink,
            spec,
            (start, target) => file.readInto(spec.name, start, target),
            bufferOf(CHUNK_BYTES),
          );
        }
        return record;
      },
      // The weights themselves are the shard's business: what it read stands in its record.
      digest: () => Promise.resolve(record.sourceSha256),
    };
  };
  return {
    byName: new Map(rows.map(({ name }) => [name, stepOf(name)])),
    [Symbol.dispose]() {
      for (const file of open.values()) file.close();
    },
  };
}
