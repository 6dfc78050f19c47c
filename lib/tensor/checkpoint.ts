/**
 * Opening a checkpoint: which files of a folder belong to it, what kind of model it is, and all its tensors
 * under one roof. Every file's header is checked on opening; tensor bytes are read on demand.
 */
import { readdirSync, statSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { CheckpointError, type ErrorPlace, FormatError } from "../errors.ts";
import { quote, reading, show } from "../files/positional.ts";
import { isJsonObject, readJsonFile } from "../files/json.ts";
import { noTensor, SafetensorsFile, type TensorInfo } from "./safetensors.ts";
import { PARTIAL_SUFFIX } from "./safetensors_writer.ts";

/** Most files of a checkpoint: each stays open, and systems commonly allow 1024; published ones have 163. */
const MAX_SHARDS = 512;

/** File of time parameters that may lie beside quantized weights; not part of the checkpoint. */
export const SIDECAR_FILE = "time_parameters.safetensors";

/** Families whose layers and forward pass are known; `unknown` can still be quantized. */
export type ModelKind = "dream" | "llada" | "dit" | "unknown";

/** A file of a checkpoint. */
export interface CheckpointFile {
  /** File name without its folder. */
  readonly name: string;
  readonly file: SafetensorsFile;
}

/** A tensor and the file that holds it. */
export interface CheckpointTensor {
  readonly info: TensorInfo;
  readonly file: SafetensorsFile;
}

const SUFFIX = ".safetensors";
const INDEX_SUFFIX = ".safetensors.index.json";
/** File names of Hugging Face's transformers and diffusers. */
const STEMS = ["model", "diffusion_pytorch_model"];
const SHARD_NAME = /-\d+-of-(\d+)\.safetensors$/;

const cannotOpen = (path: string, reason: string, place: ErrorPlace = { path }): CheckpointError =>
  new CheckpointError(`Cannot open ${quote(path)}: ${reason}`, place);

/** An open checkpoint; {@linkcode openCheckpoint} makes one. */
export class Checkpoint {
  /** Path as it was given. */
  readonly path: string;
  /** Folder that holds the files. */
  readonly folder: string;
  /** Subfolder of a diffusers pipeline that was gone into, `"transformer"`, or undefined. */
  readonly subfolder: string | undefined;
  /** Name of the index file, undefined for a checkpoint of one file. */
  readonly indexFile: string | undefined;
  /** Content of config.json, undefined when there is none. */
  readonly config: Readonly<Record<string, unknown>> | undefined;
  readonly kind: ModelKind;
  /** Files, sorted by name. */
  readonly files: readonly CheckpointFile[];
  /** Tensors by name, sorted by file name and place in the file. */
  readonly tensors: ReadonlyMap<string, CheckpointTensor>;

  /** Takes over the files; use {@linkcode openCheckpoint}. */
  constructor(parts: Pick<Checkpoint, "path" | "folder" | "subfolder" | "indexFile" | "config" | "files">) {
    this.path = parts.path;
    this.folder = parts.folder;
    this.subfolder = parts.subfolder;
    this.indexFile = parts.indexFile;
    this.config = parts.config;
    this.kind = modelKind(parts.config);
    this.files = parts.files;
    const tensors = new Map<string, CheckpointTensor>();
    for (const { name, file } of parts.files) {
      for (const info of file.tensors.values()) {
        const other = tensors.get(info.name);
        if (other !== undefined) {
          const both = `${quote(basename(other.file.path))} and ${quote(name)}`;
          throw cannotOpen(parts.folder, `tensor ${quote(info.name)} must be in one file, got both ${both}`, {
            path: parts.folder,
            tensor: info.name,
          });
        }
        tensors.set(info.name, { info, file });
      }
    }
    this.tensors = tensors;
  }

  /**
   * Fills `target` with a tensor's bytes from `byteStart` on.
   *
   * @throws as {@linkcode SafetensorsFile.readInto}
   */
  readInto(name: string, byteStart: number, target: Uint8Array): void {
    this.#file(name).readInto(name, byteStart, target);
  }

  /**
   * Reads a tensor's bytes `[byteStart, byteEnd)`, all of them by default, into new memory.
   *
   * @throws as {@linkcode SafetensorsFile.readInto}
   */
  read(name: string, byteStart?: number, byteEnd?: number): Uint8Array<ArrayBuffer> {
    return this.#file(name).read(name, byteStart, byteEnd);
  }

  /** Closes every file, also when one of them fails to close. */
  close(): void {
    closeAll(this.files);
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #file(name: string): SafetensorsFile {
    const tensor = this.tensors.get(name);
    if (tensor !== undefined) return tensor.file;
    throw noTensor(this.path, name);
  }
}

/**
 * Opens a checkpoint: a `.safetensors` file, a folder with one or with an index and shards, or a diffusers
 * pipeline, of which `transformer/` is taken.
 *
 * In a folder the order is: `model.safetensors.index.json` (or `diffusion_pytorch_model.…`),
 * `model.safetensors` (or `diffusion_pytorch_model.…`), any other index, any other `.safetensors`; two of the
 * same rank are refused.
 *
 * @throws {CheckpointError} when files are missing, left unfinished, ambiguous, or disagree with the index
 * @throws {FormatError} when a file is not what its format promises
 *
 * @example
 * ```ts
 * using checkpoint = openCheckpoint("tests/models/dream-mini");
 * console.log(checkpoint.kind, checkpoint.files.length, checkpoint.tensors.size); // dream 2 51
 * ```
 */
export function openCheckpoint(path: string): Checkpoint {
  const isFile = !reading(path, () => statSync(path).isDirectory());
  const place = isFile ? filePlace(path) : folderPlace(path);
  const configPath = join(place.folder, "config.json");
  const config = place.names.includes("config.json") ? readJsonFile(configPath) : undefined;
  const weightMap = place.indexFile === undefined
    ? undefined
    : readIndex(join(place.folder, place.indexFile));
  const names = weightMap === undefined ? [place.modelFile] : [...new Set(weightMap.values())].sort();
  if (weightMap !== undefined) checkShards(names, place);

  const files: CheckpointFile[] = [];
  try {
    // A single file keeps the path it was given, so that messages name it as its user does.
    for (const name of names) {
      files.push({ name, file: SafetensorsFile.open(isFile ? path : join(place.folder, name)) });
    }
    const { folder, subfolder, indexFile } = place;
    const checkpoint = new Checkpoint({ path, folder, subfolder, indexFile, config, files });
    if (weightMap !== undefined) checkIndex(weightMap, checkpoint);
    return checkpoint;
  } catch (error) {
    closeAll(files);
    throw error;
  }
}

/**
 * The family a configuration names: by `model_type` or `architectures` (transformers), or `_class_name`
 * (diffusers).
 */
export function modelKind(config: Readonly<Record<string, unknown>> | undefined): ModelKind {
  if (config === undefined) return "unknown";
  const { model_type: type, architectures, _class_name: className, norm_type: norm } = config;
  const names = Array.isArray(architectures) ? architectures.filter((name) => typeof name === "string") : [];
  for (const kind of ["dream", "llada"] as const) {
    if (typeof type === "string" && type.toLowerCase() === kind) return kind;
    if (names.some((name) => name.toLowerCase().startsWith(`${kind}model`))) return kind;
  }
  if (className === "DiTTransformer2DModel") return "dit";
  if (className === "Transformer2DModel" && norm === "ada_norm_zero") return "dit";
  return "unknown";
}

/** Where a checkpoint lies: its folder with what is in it, and either an index or one file. */
interface Place {
  readonly folder: string;
  readonly names: readonly string[];
  readonly subfolder: string | undefined;
  readonly indexFile: string | undefined;
  /** The only file, `""` when there is an index. */
  readonly modelFile: string;
}

const listFolder = (folder: string): string[] => reading(folder, () => readdirSync(folder).sort());

function filePlace(path: string): Place {
  const modelFile = basename(path);
  if (modelFile.endsWith(PARTIAL_SUFFIX)) throw unfinished(path, [modelFile]);
  if (!modelFile.endsWith(SUFFIX)) {
    throw cannotOpen(path, `must be a folder or a file named *${SUFFIX}, got another file`);
  }
  const folder = dirname(path);
  return { folder, names: listFolder(folder), subfolder: undefined, indexFile: undefined, modelFile };
}

function folderPlace(path: string): Place {
  const names = listFolder(path);
  const modelFiles = names.filter((name) => name.endsWith(SUFFIX) && name !== SIDECAR_FILE);
  const indexes = names.filter((name) => name.endsWith(INDEX_SUFFIX));
  if (names.includes("model_index.json") && modelFiles.length === 0 && indexes.length === 0) {
    if (!names.includes("transformer")) {
      throw cannotOpen(path, `a diffusers pipeline must have a folder "transformer", got ${listing(names)}`);
    }
    return { ...folderPlace(join(path, "transformer")), subfolder: "transformer" };
  }
  const place = { folder: path, names, subfolder: undefined };
  const pick = (candidates: readonly string[]) => {
    if (candidates.length < 2) return candidates[0];
    throw cannotOpen(path, `must have one model, got ${listing(candidates)}; give one file's path instead`);
  };
  const known = (suffix: string) =>
    pick(STEMS.map((stem) => stem + suffix).filter((name) => names.includes(name)));

  const knownIndex = known(INDEX_SUFFIX);
  if (knownIndex !== undefined) return { ...place, indexFile: knownIndex, modelFile: "" };
  const knownFile = known(SUFFIX);
  if (knownFile !== undefined) return { ...place, indexFile: undefined, modelFile: knownFile };
  const indexFile = pick(indexes);
  if (indexFile !== undefined) return { ...place, indexFile, modelFile: "" };

  // Without an index a lone shard looks like a whole model: what a stopped run or download leaves must not
  // pass as one.
  const partials = names.filter((name) => name.endsWith(PARTIAL_SUFFIX));
  if (partials.length > 0) throw unfinished(path, partials);
  const shards = modelFiles.filter((name) => Number(SHARD_NAME.exec(name)?.[1] ?? 1) > 1);
  if (shards.length > 0) {
    throw cannotOpen(path, `shards must have an index *${INDEX_SUFFIX}, got only ${listing(shards)}`);
  }
  const modelFile = pick(modelFiles);
  if (modelFile !== undefined) return { ...place, indexFile: undefined, modelFile };
  const usual = STEMS.map((stem) => stem + SUFFIX).join(" or ");
  const wanted = `${usual}, one of these with .index.json and its shards, or one *${SUFFIX}`;
  throw cannotOpen(path, `must have ${wanted}, got ${listing(names)}`);
}

/** Reads an index: file names by tensor name. */
function readIndex(path: string): Map<string, string> {
  const fail = (reason: string, tensor?: string) =>
    new FormatError(`Cannot read ${quote(path)}: ${reason}`, { path, tensor });
  const { weight_map: weightMap } = readJsonFile(path);
  if (!isJsonObject(weightMap)) {
    throw fail(`weight_map must be an object of file names, got ${show(weightMap)}`);
  }
  const entries = Object.entries(weightMap);
  if (entries.length === 0) throw fail("weight_map must name at least one tensor, got none");
  for (const [tensor, name] of entries) {
    if (typeof name !== "string" || !name.endsWith(SUFFIX) || /[/\\\0:]/.test(name)) {
      const wanted = `weight_map must name a *${SUFFIX} file in the same folder`;
      throw fail(`tensor ${quote(tensor)}: ${wanted}, got ${show(name)}`, tensor);
    }
  }
  return new Map(entries as [string, string][]);
}

function checkShards(names: readonly string[], place: Place): void {
  const missing = names.filter((name) => !place.names.includes(name));
  const partials = missing.map((name) => name + PARTIAL_SUFFIX).filter((name) => place.names.includes(name));
  if (partials.length > 0) throw unfinished(place.folder, partials);
  if (missing.length > 0) {
    const reason = `it must have every file of ${place.indexFile}, got none named ${listing(missing)}`;
    throw cannotOpen(place.folder, reason, { path: join(place.folder, missing[0]!) });
  }
  if (names.length > MAX_SHARDS) {
    throw cannotOpen(place.folder, `it must have at most ${MAX_SHARDS} files, got ${names.length}`);
  }
}

/** Compares the index with what the files have. */
function checkIndex(
  weightMap: ReadonlyMap<string, string>,
  { folder, indexFile, tensors }: Checkpoint,
): void {
  for (const [tensor, name] of weightMap) {
    const found = tensors.get(tensor)?.file.path, path = join(folder, name);
    if (found === path) continue;
    const got = found === undefined ? "no such tensor" : `it in ${quote(basename(found))}`;
    const reason = `${indexFile} says that ${quote(name)} must have tensor ${quote(tensor)}, got ${got}`;
    throw cannotOpen(folder, reason, { path, tensor });
  }
  const extra = [...tensors].filter(([tensor]) => !weightMap.has(tensor)), [first] = extra;
  if (first === undefined) return;
  const names = listing(extra.map(([tensor, { file }]) => `${tensor} (${basename(file.path)})`));
  const place = { path: first[1].file.path, tensor: first[0] };
  throw cannotOpen(folder, `${indexFile} must name every tensor of its files, got none of ${names}`, place);
}

function unfinished(path: string, partials: readonly string[]): CheckpointError {
  const remedy = "run the same command with --resume to finish it";
  return cannotOpen(path, `must be finished, got ${listing(partials)} of a run that was stopped; ${remedy}`);
}

/** Names for a message, the first ten of many. */
function listing(names: readonly string[]): string {
  if (names.length === 0) return "nothing";
  const rest = names.length > 10 ? ` and ${names.length - 10} more` : "";
  return names.slice(0, 10).map(quote).join(", ") + rest;
}

function closeAll(files: readonly CheckpointFile[]): void {
  const errors: unknown[] = [];
  for (const { file } of files) {
    try {
      file.close();
    } catch (error) {
      errors.push(error);
    }
  }
  if (errors.length > 0) {
    throw new AggregateError(errors, `Cannot close ${errors.length} of ${files.length} files`);
  }
}
