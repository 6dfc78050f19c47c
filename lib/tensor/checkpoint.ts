/**
 * Opening a checkpoint: which files of a folder belong to it, what kind of model it is, and all its tensors
 * under one roof. Every file's header is checked on opening; tensor bytes are read on demand.
 */
import { basename, dirname, join } from "node:path";
import { CheckpointError, FormatError } from "../errors.ts";
import { quote, show } from "../files/positional.ts";
import { isJsonObject, readJsonFile } from "../files/json.ts";
import { type GgufFacts, GgufFile } from "./gguf/file.ts";
import {
  cannotOpen,
  findPlace,
  GGUF_NAME,
  listing,
  type Place,
  type PlaceOptions,
  unfinished,
} from "./place.ts";
import { packedCodes, unpackedFile } from "./packed_codes.ts";
import { isOurs, recognise, saysScaled } from "./recognition.ts";
import { scaledFile, scaledFp8 } from "./scaled_fp8.ts";
import { noTensor, SafetensorsFile, type TensorFile, type TensorInfo } from "./safetensors.ts";
import { PARTIAL_SUFFIX } from "./safetensors_writer.ts";

/** Most files of a checkpoint: each stays open, and systems commonly allow 1024; published ones have 163. */
const MAX_SHARDS = 512;

/** Families whose layers and forward pass are known; `unknown` can still be quantized. */
export type ModelKind = "dream" | "llada" | "llada_moe" | "sdar" | "dit" | "unknown";

/** A file of a checkpoint. */
export interface CheckpointFile {
  /** File name without its folder. */
  readonly name: string;
  readonly file: TensorFile;
}

/** A tensor and the file that holds it. */
export interface CheckpointTensor {
  readonly info: TensorInfo;
  readonly file: TensorFile;
}

/** An open checkpoint; {@linkcode openCheckpoint} makes one. */
export class Checkpoint {
  /** Path as it was given. */
  readonly path: string;
  /** Folder that holds the files. */
  readonly folder: string;
  /** Folder of the whole model: of a diffusers pipeline the one that holds `subfolder`, else `folder`. */
  readonly root: string;
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
  /** Choices made on opening, a sentence each. */
  readonly notes: readonly string[];
  /** Description of the weights, with the way out, when they are not plain and not packed by this project. */
  readonly foreign: string | undefined;
  /** Codes of others read as their values: `foreign` weights too can be dequantized. */
  readonly isDecoded: boolean;
  /** Facts of a GGUF file, whose {@linkcode config} is made of its keys. */
  readonly gguf: GgufFacts | undefined;

  /** Takes over the files; use {@linkcode openCheckpoint}. */
  constructor(
    parts:
      & Pick<Checkpoint, "path" | "folder" | "root" | "subfolder" | "indexFile" | "config" | "files">
      & Partial<Pick<Checkpoint, "notes" | "foreign" | "isDecoded" | "gguf">>,
  ) {
    this.path = parts.path;
    this.folder = parts.folder;
    this.root = parts.root;
    this.notes = parts.notes ?? [];
    this.foreign = parts.foreign;
    this.isDecoded = parts.isDecoded ?? false;
    this.gguf = parts.gguf;
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

  #file(name: string): TensorFile {
    const tensor = this.tensors.get(name);
    if (tensor !== undefined) return tensor.file;
    throw noTensor(this.path, name);
  }
}

/**
 * Opens a checkpoint: a `.safetensors` file, a folder with one or with an index and shards, a diffusers
 * pipeline, of which `transformer/` or `unet/` is taken, or a model in Hugging Face's cache.
 *
 * In a folder it takes what transformers would, `model.safetensors` before `model.safetensors.index.json`, or
 * diffusers, `diffusion_pytorch_model.safetensors.index.json` before the single file; then the only variant
 * (`fp16`), any other index, any other `.safetensors`. {@linkcode Checkpoint.notes} says so where there was a
 * choice; two of the same rank are refused. FP8 weights with scales read as their products.
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
export function openCheckpoint(path: string, options: PlaceOptions = {}): Checkpoint {
  const { names: present, modelFile, otherIndex, ...place } = findPlace(path, options);
  const { folder, indexFile } = place;
  if (GGUF_NAME.test(modelFile)) return openGguf(path, modelFile, place);
  const config = present.includes("config.json") ? readJsonFile(join(folder, "config.json")) : undefined;
  const weightMap = indexFile === undefined ? undefined : readIndex(join(folder, indexFile));
  const names = weightMap === undefined ? [modelFile] : [...new Set(weightMap.values())].sort();
  if (weightMap !== undefined) checkShards(names, { ...place, names: present });
  const isTold = indexFile === undefined && (COUNTS.test(modelFile) || otherIndex !== undefined);
  const strays = isTold ? [] : strayShards(names, present), source = indexFile ?? modelFile;
  const notes = strays.length === 0
    ? place.notes
    : [...place.notes, `not read beside ${quote(source)}: ${listing(strays)}`];

  const files: CheckpointFile[] = [];
  try {
    // A single file keeps the path it was given, so that messages name it as its user does.
    const isFile = basename(path) === modelFile && folder === dirname(path);
    for (const name of names) {
      files.push({ name, file: SafetensorsFile.open(isFile ? path : join(folder, name)) });
    }
    const stored = new Checkpoint({ path, ...place, notes, config, files });
    if (weightMap !== undefined) checkIndex(weightMap, stored);
    else if (otherIndex !== undefined) checkOtherIndex(otherIndex, modelFile, stored);
    if (isOurs(config)) return stored;
    const fp8 = scaledFp8(
      stored.tensors,
      config,
      saysScaled(config) || present.includes("hf_quant_config.json") ||
        files.some(({ file }) => Object.keys(file.metadata).some((key) => /quant/i.test(key))),
    );
    const { size: count } = fp8.tensors;
    const packed = packedCodes(stored.tensors, config);
    const isAdapter = names.some((name) => name.startsWith("adapter_model."));
    const foreign = recognise(stored.tensors, config, { count, fault: fp8.fault }, isAdapter);
    if (foreign !== undefined && packed.tensors.size > 0 && packed.fault === undefined) {
      const files = stored.files.map(({ name, file }) => ({ name, file: unpackedFile(file, packed) }));
      return new Checkpoint({ ...stored, files, foreign, isDecoded: true });
    }
    if (foreign !== undefined) {
      const unread = packed.fault === undefined ? "" : ` (which dequantizing cannot read: ${packed.fault})`;
      return new Checkpoint({ ...stored, foreign: foreign + unread });
    }
    if (count === 0) return stored;
    const [example] = fp8.tensors.values();
    const note = `${count} FP8 tensors are read times their scales, as in ${quote(example!.scale.info.name)}`;
    const scaled = files.map(({ name, file }) => ({ name, file: scaledFile(file, fp8) }));
    return new Checkpoint({ ...stored, files: scaled, notes: [...notes, note] });
  } catch (error) {
    closeAll(files);
    throw error;
  }
}

/** Codes of GGUF whose products are as good as weights: eight bits under a scale for 32 weights. */
const NEARLY_PLAIN = "Q8_0";

function openGguf(
  path: string,
  name: string,
  place: Omit<Place, "names" | "modelFile" | "otherIndex">,
): Checkpoint {
  const isFile = basename(path) === name && place.folder === dirname(path);
  const file = GgufFile.open(isFile ? path : join(place.folder, name)), codes = file.codes();
  const lossy = [...codes].find(([type]) => type !== NEARLY_PLAIN), example = codes.get(NEARLY_PLAIN);
  const foreign = lossy === undefined
    ? undefined
    : `a GGUF file with codes of ${[...codes.keys()].join(", ")} (${
      quote(lossy[1])
    }): already quantized, and quantizing ` +
      "it again would add one error to another; take a GGUF file in F32, F16, BF16 or Q8_0, or the original model";
  const note = `codes of ${NEARLY_PLAIN} are read as their values, as in ${quote(example ?? "")}`;
  const { facts: gguf } = file, { config } = gguf, files = [{ name, file }];
  const notes = [...place.notes, ...(example === undefined ? [] : [note])];
  try {
    return new Checkpoint({ path, ...place, notes, config, files, foreign, isDecoded: true, gguf });
  } catch (error) {
    file.close();
    throw error;
  }
}

/**
 * Refuses weights that are neither plain nor packed by this project.
 *
 * @param doing what cannot be done with them, as "quantize"
 * @throws {CheckpointError} when they are recognised as others' or as no model
 */
export function refuseForeign({ path, foreign, tensors, files }: Checkpoint, doing: string): void {
  if (foreign === undefined) return;
  const [tensor, place] = [...tensors].find(([name]) => isNamed(name, foreign)) ?? [];
  const weights = place === undefined || files.length === 1
    ? "weights"
    : `weights in ${quote(basename(place.file.path))}`;
  throw new CheckpointError(
    `Cannot ${doing} ${quote(path)}: ${weights} must be plain, got ${foreign}`,
    place === undefined ? { path } : { path: place.file.path, tensor: tensor! },
  );
}

/** Whether a text has the name of a tensor, or of a part of its module's codes that are read as this one. */
function isNamed(name: string, text: string): boolean {
  const module = name.replace(/(?<=\.)weight$/, "");
  return text.includes(quote(name)) || (module !== name && text.includes(quote(module).slice(0, -1)));
}

/** Language models by `model_type` and by the names of their classes; the first that fits counts. */
const LANGUAGE_MODELS: readonly (readonly [kind: ModelKind, type: RegExp, architecture: RegExp])[] = [
  ["llada_moe", /^llada[-_]?moe$/i, /^lladamoemodel/i],
  ["sdar", /^sdar$/i, /^sdarforcausallm/i],
  ["dream", /^dream$/i, /^dreammodel/i],
  ["llada", /^llada$/i, /^lladamodel/i],
];

/**
 * The family a configuration names: by `model_type` or `architectures` (transformers), or `_class_name`
 * (diffusers).
 */
export function modelKind(config: Readonly<Record<string, unknown>> | undefined): ModelKind {
  if (config === undefined) return "unknown";
  const { model_type: type, architectures, _class_name: className, norm_type: norm } = config;
  const names = Array.isArray(architectures) ? architectures.filter((name) => typeof name === "string") : [];
  for (const [kind, types, model] of LANGUAGE_MODELS) {
    if (names.some((name) => model.test(name))) return kind;
    if (typeof type === "string" && types.test(type)) return kind;
  }
  if (className === "DiTTransformer2DModel") return "dit";
  if (className === "Transformer2DModel" && norm === "ada_norm_zero") return "dit";
  return "unknown";
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
    if (typeof name !== "string" || !name.endsWith(".safetensors") || /[/\\\0:]/.test(name)) {
      const wanted = `weight_map must name a *.safetensors file in the same folder`;
      throw fail(`tensor ${quote(tensor)}: ${wanted}, got ${show(name)}`, tensor);
    }
  }
  return new Map(entries as [string, string][]);
}

/** Counts in the name of a shard. */
const COUNTS = /-\d+-of-\d+(?=\.)/;

/** Shards of the same model by their names, which no index names: left from another download. */
function strayShards(names: readonly string[], present: readonly string[]): string[] {
  const own = new Set(names.map((name) => name.replace(COUNTS, "")));
  return present.filter((name) =>
    COUNTS.test(name) && own.has(name.replace(COUNTS, "")) && !names.includes(name)
  );
}

function checkShards(
  names: readonly string[],
  place: Pick<Place, "folder" | "indexFile" | "names">,
): void {
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

/** Refuses a single file that is but a part of the model that the index beside it names. */
function checkOtherIndex(indexFile: string, modelFile: string, { folder, tensors }: Checkpoint): void {
  let weightMap: ReadonlyMap<string, string>;
  try {
    weightMap = readIndex(join(folder, indexFile));
  } catch (error) {
    if (error instanceof FormatError) return; // which a library that takes the file does not read, either
    throw error;
  }
  const missing = [...weightMap.keys()].filter((name) => !tensors.has(name));
  // An index of other tensors is of another model, and stale.
  if (missing.length === 0 || [...tensors.keys()].some((name) => !weightMap.has(name))) return;
  const reason = `${quote(modelFile)} must have every tensor that ${indexFile} beside it names, got none of`;
  throw cannotOpen(
    folder,
    `${reason} ${listing(missing)}: take one of the two away, or give the file's path`,
  );
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
