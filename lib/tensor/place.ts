/**
 * Where a checkpoint lies: which files of a folder are its weights, as transformers and diffusers choose
 * them, and what else a path may be, by name and with the way out.
 */
import { readdirSync, statSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { CheckpointError, type ErrorPlace } from "../errors.ts";
import { foreignName } from "../files/foreign.ts";
import { errorCode, quote, reading } from "../files/positional.ts";
import { readWhole } from "../files/whole.ts";
import { PARTIAL_SUFFIX } from "./safetensors_writer.ts";

/** File of time parameters that may lie beside quantized weights; not part of the checkpoint. */
export const SIDECAR_FILE = "time_parameters.safetensors";

const SUFFIX = ".safetensors";
/** A GGUF file, which is a whole checkpoint by itself. */
export const GGUF_NAME = /\.gguf$/i;
/** An index with its stem and, in one of three places, its variant: of transformers, and two of diffusers. */
const INDEX_NAME = /^(.+?)(?:\.([\w-]+))?\.safetensors(?:\.([\w-]+))?\.index(?:\.([\w-]+))?\.json$/;
const SHARD_NAME = /-\d+-of-(\d+)(?:\.[\w-]+)?\.safetensors$/;
/** Model files by library; one that has both an index and a single file in a folder takes `first`. */
const LIBRARIES = [
  { stem: "model", library: "transformers", first: "single" },
  { stem: "diffusion_pytorch_model", library: "diffusers", first: "index" },
] as const;
/** Folders of a diffusers pipeline that hold what is quantized. */
const DENOISER = /^(?:transformer|unet|prior)(?:_\d+)?$/;
/** Most subfolders that are looked into for weights, to say where they are. */
const MAX_SUBFOLDERS = 100;

/** Where a checkpoint lies: its folder with what is in it, and either an index or one file. */
export interface Place {
  readonly folder: string;
  /** Folder of the whole model: a pipeline's, otherwise the same. */
  readonly root: string;
  readonly names: readonly string[];
  readonly subfolder: string | undefined;
  readonly indexFile: string | undefined;
  /** The only file, `""` when there is an index. */
  readonly modelFile: string;
  /** Choices that were made, a sentence each. */
  readonly notes: readonly string[];
  /** An index beside the only file, which is taken before it. */
  readonly otherIndex?: string | undefined;
}

/** How to choose among several weights. */
export interface PlaceOptions {
  /** Weights of this name in theirs, as `fp16` in `model.fp16.safetensors`. */
  readonly variant?: string | undefined;
  /** Folder of a diffusers pipeline that is taken, where it has several denoisers, as `transformer_2`. */
  readonly subfolder?: string | undefined;
}

export const cannotOpen = (path: string, reason: string, place: ErrorPlace = { path }): CheckpointError =>
  new CheckpointError(`Cannot open ${quote(path)}: ${reason}`, place);

/**
 * Finds the weights at a path: a file, a folder, a diffusers pipeline, or a model in Hugging Face's cache.
 *
 * @throws {CheckpointError} when there are none, or more than one and nothing says which
 */
export function findPlace(path: string, options: PlaceOptions = {}): Place {
  const isFolder = reading(path, () => {
    try {
      return statSync(path).isDirectory();
    } catch (cause) {
      const id =
        /^(?:https?:\/\/(?:huggingface\.co|hf\.co)\/|hf:\/\/)?([\w.-]+\/[\w.-]+)\/?(?:(?:tree|blob|resolve)\/.*)?$/
          .exec(path)
          ?.[1];
      if (!["ENOENT", "ENOTDIR"].includes(errorCode(cause) ?? "") || id === undefined) throw cause;
      const download = `hf download ${id} --local-dir ${basename(id)}`;
      throw new Error(`no such file or folder; if it is a name on Hugging Face, fetch it first: ${download}`);
    }
  });
  if (!isFolder) {
    if (options.subfolder === undefined) return filePlace(path, options);
    throw cannotOpen(path, `must be a diffusers pipeline with a folder ${quote(options.subfolder)}`);
  }
  const snapshot = cachedSnapshot(path, listFolder(path));
  if (snapshot === undefined) return modelPlace(path, options);
  const found = modelPlace(snapshot, options), note = `${quote(snapshot)} is taken, of Hugging Face's cache`;
  return { ...found, notes: [note, ...found.notes] };
}

const listFolder = (folder: string): string[] => reading(folder, () => readdirSync(folder).sort());

function filePlace(path: string, { variant }: PlaceOptions): Place {
  const modelFile = basename(path);
  if (modelFile.endsWith(PARTIAL_SUFFIX)) throw unfinished(path, [modelFile]);
  if (!modelFile.endsWith(SUFFIX) && !GGUF_NAME.test(modelFile)) {
    throw cannotOpen(
      path,
      `must be a folder or a file named *${SUFFIX} or *.gguf, got ${
        foreignName(modelFile) ?? "another file"
      }`,
    );
  }
  if (variant !== undefined && !modelFile.split(".").slice(1).includes(variant)) {
    throw cannotOpen(
      path,
      `must be of the variant ${quote(variant)}: leave --variant out, or give the folder`,
    );
  }
  const folder = dirname(path), names = listFolder(folder);
  const shards = Number(SHARD_NAME.exec(modelFile)?.[1] ?? 1),
    whole = `one of ${shards} shards, which alone is read`;
  const notes = shards > 1 ? [`${quote(modelFile)} is ${whole}: for the whole model give the folder`] : [];
  return { folder, root: folder, names, subfolder: undefined, indexFile: undefined, modelFile, notes };
}

/** The weights of a diffusers pipeline's denoiser, or those of a folder. */
function modelPlace(path: string, options: PlaceOptions): Place {
  const names = listFolder(path);
  const all = names.includes("model_index.json") ? names.filter((name) => DENOISER.test(name)) : [];
  const { subfolder: asked } = options, denoisers = asked === undefined ? all : [asked];
  if (asked !== undefined && !all.includes(asked)) {
    throw cannotOpen(
      path,
      `must be a diffusers pipeline with a denoiser ${quote(asked)}, got ${listing(all)} of ${
        listing(names)
      }`,
    );
  }
  if (denoisers.length > 1) {
    const reason = `a diffusers pipeline must have one denoiser, got ${listing(denoisers)}`;
    const one = quote(join(path, denoisers[0]!));
    throw cannotOpen(
      path,
      `${reason}: choose with --subfolder, one run after the other, or give the path of one alone, as in ${one}`,
    );
  }
  const [subfolder] = denoisers;
  if (subfolder === undefined) return folderPlace(path, options);
  const found = folderPlace(join(path, subfolder), options);
  const note = `a diffusers pipeline: ${quote(subfolder)} is quantized and run, the other folders stay`;
  return { ...found, root: path, subfolder, notes: [note, ...found.notes] };
}

function folderPlace(path: string, options: PlaceOptions): Place {
  const names = listFolder(path), place = { folder: path, root: path, names, subfolder: undefined };
  const chosen = chooseWeights(path, names, options);
  if (chosen !== undefined) return { ...place, ...chosen };
  // Without an index a lone shard looks like a whole model: what a stopped run or download leaves must not
  // pass as one.
  const partials = names.filter((name) => name.endsWith(PARTIAL_SUFFIX));
  if (partials.length > 0) throw unfinished(path, partials);
  const files = modelFiles(names);
  const shards = files.filter((name) => Number(SHARD_NAME.exec(name)?.[1] ?? 1) > 1);
  if (shards.length > 0) {
    throw cannotOpen(path, `shards must have an index *${SUFFIX}.index.json, got only ${listing(shards)}`);
  }
  const modelFile = pick(path, files.length > 0 ? files : names.filter((name) => GGUF_NAME.test(name)));
  if (modelFile !== undefined) return { ...place, indexFile: undefined, modelFile, notes: [] };
  throw noWeights(path, names);
}

const modelFiles = (names: readonly string[]) =>
  names.filter((name) => name.endsWith(SUFFIX) && name !== SIDECAR_FILE);

function pick(path: string, candidates: readonly string[]): string | undefined {
  if (candidates.length < 2) return candidates[0];
  throw cannotOpen(path, `must have one model, got ${listing(candidates)}; give one file's path instead`);
}

/** Weights under a name that a library gives them. */
interface Known {
  readonly name: string;
  readonly stem: string;
  readonly variant: string | undefined;
  readonly form: "index" | "single";
}

function knownWeights(names: readonly string[]): Known[] {
  return names.flatMap((name): Known[] => {
    const index = INDEX_NAME.exec(name), single = /^([^.]+)(?:\.([\w-]+))?\.safetensors$/.exec(name);
    const [, stem, ...variants] = index ?? single ?? [];
    if (!LIBRARIES.some((library) => library.stem === stem) || SHARD_NAME.test(name)) return [];
    const variant = variants.find((text) => text !== undefined);
    return [{ name, stem: stem!, variant, form: index === null ? "single" : "index" }];
  });
}

/** The weights that a folder's libraries would load, undefined where no name is one of theirs. */
function chooseWeights(
  path: string,
  names: readonly string[],
  { variant: asked }: PlaceOptions,
): Pick<Place, "indexFile" | "modelFile" | "notes" | "otherIndex"> | undefined {
  const known = knownWeights(names), notes: string[] = [];
  let own = known.filter(({ variant }) => variant === asked);
  if (own.length === 0 && asked !== undefined) {
    throw cannotOpen(
      path,
      `must have weights of the variant ${quote(asked)}, got ${listing(known.map(({ name }) => name))}`,
    );
  }
  const variants = [...new Set(known.map(({ variant }) => variant))];
  if (own.length === 0 && variants.length > 1) {
    const reason = `must have one model, got ${listing(known.map(({ name }) => name))}`;
    throw cannotOpen(
      path,
      `${reason}; --variant chooses one of ${variants.join(", ")}, or give one file's path`,
    );
  }
  if (own.length === 0 && variants.length === 1) {
    own = known;
    notes.push(
      `${quote(own[0]!.name)} is taken: there are no weights but of the variant ${quote(variants[0]!)}`,
    );
  }
  if (own.length === 0) {
    const indexFile = pick(path, names.filter((name) => INDEX_NAME.test(name)));
    return indexFile === undefined ? undefined : { indexFile, modelFile: "", notes };
  }
  const stems = LIBRARIES.filter(({ stem }) => own.some((weights) => weights.stem === stem));
  if (stems.length > 1) pick(path, own.map(({ name }) => name));
  const { library, first } = stems[0]!;
  const taken = own.find(({ form }) => form === first) ?? own[0]!;
  const others = own.filter((weights) => weights !== taken);
  if (others.length > 0) {
    const rest = others.map(({ name }) => quote(name)).join(", ");
    notes.push(`${quote(taken.name)} is taken, as ${library} does, and not ${rest} beside it`);
  }
  const unread = known.filter((weights) => !own.includes(weights)).map(({ name }) => name);
  unread.push(...names.filter((name) => /^(?:consolidated|adapter_model)\b.*\.safetensors$/.test(name)));
  if (unread.length > 0) notes.push(`not read beside ${quote(taken.name)}: ${listing(unread)}`);
  const isIndex = taken.form === "index", otherIndex = others.find(({ form }) => form === "index")?.name;
  const modelFile = isIndex ? "" : taken.name;
  return { indexFile: isIndex ? taken.name : undefined, modelFile, notes, otherIndex };
}

/** The folder of a model in Hugging Face's cache: the snapshot of its main branch, or its only one. */
function cachedSnapshot(path: string, names: readonly string[]): string | undefined {
  if (!names.includes("snapshots") || !(names.includes("refs") || names.includes("blobs"))) return undefined;
  const snapshots = listFolder(join(path, "snapshots")), reference = join(path, "refs", "main");
  const isThere = names.includes("refs") && listFolder(join(path, "refs")).includes("main");
  const main = isThere ? new TextDecoder().decode(readWhole(reference, 1024)).trim() : undefined;
  const chosen = main !== undefined && snapshots.includes(main)
    ? main
    : snapshots.length === 1
    ? snapshots[0]
    : undefined;
  if (chosen !== undefined) return join(path, "snapshots", chosen);
  const reason = `a model in Hugging Face's cache must have one snapshot or that of refs/main`;
  throw cannotOpen(path, `${reason}, got ${listing(snapshots)}: give the path of one`);
}

/** The error of a folder without weights: what it is instead, and where weights are. */
function noWeights(path: string, names: readonly string[]): CheckpointError {
  if (names.includes("model_index.json")) {
    return cannotOpen(
      path,
      `a diffusers pipeline must have a folder "transformer" or "unet", got ${listing(names)}`,
    );
  }
  const below = names.slice(0, MAX_SUBFOLDERS).filter((name) => {
    try {
      return readdirSync(join(path, name)).some((inner) =>
        inner.endsWith(SUFFIX) || inner === "snapshots" || inner === "model_index.json"
      );
    } catch {
      return false; // no folder, or none that can be looked into
    }
  });
  if (below.length > 0) {
    const paths = below.map((name) => join(path, name));
    return cannotOpen(path, `must have weights, got them one folder lower: give ${listing(paths, " or ")}`);
  }
  const foreign = names.find((name) => foreignName(name) !== undefined);
  if (foreign !== undefined) {
    return cannotOpen(path, `must have safetensors, got ${quote(foreign)}, ${foreignName(foreign)}`);
  }
  const usual = LIBRARIES.map(({ stem }) => stem + SUFFIX).join(" or ");
  const wanted = `${usual}, one of these with .index.json and its shards, or one *${SUFFIX}`;
  const got = names.length === 0 ? "an empty folder: did the download end?" : listing(names);
  return cannotOpen(path, `must have ${wanted}, got ${got}`);
}

export function unfinished(path: string, partials: readonly string[]): CheckpointError {
  const remedy = "run the same command with --resume to finish it";
  return cannotOpen(path, `must be finished, got ${listing(partials)} of a run that was stopped; ${remedy}`);
}

/** Names for a message, the first ten of many. */
export function listing(names: readonly string[], separator = ", "): string {
  if (names.length === 0) return "nothing";
  const rest = names.length > 10 ? ` and ${names.length - 10} more` : "";
  return names.slice(0, 10).map(quote).join(separator) + rest;
}
