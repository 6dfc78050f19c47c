/** The files beside the weights: which are copied, config.json, and the index of what was written. */
import { readdirSync, realpathSync, type Stats, statSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { CheckpointError } from "../errors.ts";
import { quote, reading } from "../files/positional.ts";
import { digestFile, kindOf, readWhole, sha256 } from "../files/whole.ts";
import { foreignName } from "../files/foreign.ts";
import { readJsonFile, stringifyJson } from "../files/json.ts";
import { schedulerFile } from "../models/schedulers.ts";
import { isInside } from "../output/output_folder.ts";
import { type LayerRecord, MANIFEST_FILE } from "../output/record.ts";
import type { SmallFile } from "../output/rewrite.ts";
import type { RunOptions } from "../progress.ts";
import { type Checkpoint, SIDECAR_FILE } from "../tensor/mod.ts";
import { sum } from "./run_report.ts";

/** Files beside the weights that are part of a model and are copied, by the end of their names. */
const COPIED_SUFFIXES = [".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"];
const COPIED_NAMES = /^(?:LICENSE|LICENCE|NOTICE|COPYING|USE_POLICY)(?:[._-].*)?$/i;
/** Files about the original weights alone: what they achieve, how they were quantized, where they lie. */
const NOT_OURS =
  /(?:scores|results|metrics)[^/]*\.json$|^(?:hf_quant_config|quantize_config)\.json$|\.index(?:\.[\w-]+)?\.json$/i;
/** Largest file that is copied beside the weights: the largest published tokenizers have about 35 MB. */
const MAX_COPIED_BYTES = 64 * 2 ** 20;
/** Folders that pipelines have, also where their index does not name them. */
const COMPONENT =
  /^(?:scheduler|vae|tokenizer|(?:text|image)_encoder|feature_extractor|image_processor)(?:_\d+)?$/;
/** Deepest folder of a pipeline's component, and most files and folders of one: links may lead in circles. */
const MAX_DEPTH = 4, MAX_FILES = 10_000;

/** Files beside the weights, by their names in the output. */
export interface Beside {
  readonly copied: readonly { readonly name: string; readonly path: string; readonly bytes: number }[];
  readonly left: readonly string[];
}

/** SHA-256 of the copied files that say how a model reads, writes and is sampled, with their names. */
export async function digestBeside({ copied }: Beside): Promise<string> {
  const lines: string[] = [];
  for (
    const { name, path } of copied.filter(({ name }) => COPIED_SUFFIXES.some((end) => name.endsWith(end)))
  ) {
    lines.push(`${(await digestFile(path)).sha256} ${name}\n`);
  }
  return sha256(lines.sort().join(""));
}

/** Names of the files that are copied and of those that are left, for a report. */
export const namesBeside = ({ copied, left }: Beside) => ({ copied: copied.map(({ name }) => name), left });

/** Name in the output of a file beside the weights: of a pipeline the output is one as well. */
export const outputName = ({ subfolder, gguf }: Checkpoint, name: string): string => {
  const own = gguf !== undefined && name.endsWith(".gguf") ? "model.safetensors" : name;
  return subfolder === undefined ? own : `${subfolder}/${own}`;
};

/**
 * Looks at what lies beside the weights: small files of the model are copied, other things stay, and so do
 * links that lead out of the model, each with a warning.
 */
export function filesBeside(checkpoint: Checkpoint, { onEvent }: RunOptions): Beside {
  // A single file may lie among anything: only its folder's config.json is known to belong to it.
  if (kindOf(checkpoint.path) !== "folder") return { copied: [], left: [] };
  const { folder, root, subfolder } = checkpoint;
  const written = new Set(["config.json", MANIFEST_FILE, ...checkpoint.files.map(({ name }) => name)]);
  const copied: { name: string; path: string; bytes: number }[] = [], left: string[] = [];
  const lookAt = insideOnly(checkpoint, (path, place) => {
    const message = `${quote(path)} is left: a link out of the model, to ${quote(place)}`;
    onEvent?.({ kind: "warning", message });
  });
  const sort = (name: string, path: string, isWanted: boolean, maxBytes: number) => {
    const found = isWanted ? lookAt(path) : undefined;
    if (found?.stat.isFile() === true && found.stat.size <= maxBytes) {
      copied.push({ name, path: found.place, bytes: found.stat.size });
    } else left.push(name);
  };
  for (const name of listing(folder)) {
    if (written.has(name) || name === checkpoint.indexFile) continue;
    sort(outputName(checkpoint, name), join(folder, name), isModels(name), MAX_COPIED_BYTES);
  }
  if (subfolder === undefined) {
    const path = checkpoint.kind === "dit" ? schedulerFile(folder) : undefined,
      name = "scheduler_config.json";
    if (path !== undefined && path !== join(folder, name)) sort(name, path, true, MAX_COPIED_BYTES);
    return { copied, left };
  }
  // A pipeline draws only with its other components.
  const parts = readJsonFile(join(root, "model_index.json")), components = Object.keys(parts);
  const all = listing(root);
  const absent = components.filter((name) => isPart(parts[name]) && !all.includes(name));
  if (absent.length > 0) {
    const names = absent.map(quote).join(", ");
    onEvent?.({
      kind: "warning",
      message: `model_index.json names ${names}, which ${quote(root)} lacks, and so will the output`,
    });
  }
  for (const name of all) {
    const path = join(root, name);
    if (name === subfolder || name === MANIFEST_FILE) continue;
    if (!(components.includes(name) || COMPONENT.test(name)) || !isFolder(lookAt, path)) {
      sort(name, path, isModels(name), MAX_COPIED_BYTES);
      continue;
    }
    const files = filesBelow(lookAt, path, name);
    const hasSafetensors = files.some((file) => file.endsWith(".safetensors"));
    for (const file of files) {
      // other formats of weights that are there as safetensors
      const isWanted = !hasSafetensors || file.endsWith(".json") || foreignName(basename(file)) === undefined;
      sort(file, join(root, file), isWanted, Infinity);
    }
  }
  return { copied, left };
}

/** Whether an entry of model_index.json is a component: names of a library and of its class. */
const isPart = (value: unknown): boolean =>
  Array.isArray(value) && value.length === 2 && value.every((name) => typeof name === "string");

const isModels = (name: string): boolean =>
  !NOT_OURS.test(name) && name !== SIDECAR_FILE &&
  (COPIED_SUFFIXES.some((suffix) => name.endsWith(suffix)) || COPIED_NAMES.test(name));

const listing = (folder: string): string[] => reading(folder, () => readdirSync(folder).sort());

/** The target of a path and its place; undefined where there is nothing, or nothing of the model. */
type LookAt = (path: string) => { readonly stat: Stats; readonly place: string } | undefined;

/** A snapshot in the cache of Hugging Face: its files are links to the blobs of its repository. */
const SNAPSHOT = /^(.*[/\\]models--[^/\\]+[/\\])snapshots[/\\][^/\\]+(?:[/\\]|$)/;

/** Looks at what lies in a model, or in its repository's blobs; `outside` is told others, once each. */
function insideOnly(
  { folder, root, subfolder }: Checkpoint,
  outside: (path: string, place: string) => void,
): LookAt {
  const real = (path: string) => reading(path, () => realpathSync(path));
  const places = [real(folder), real(root)], blobs = SNAPSHOT.exec(places[1]!)?.[1];
  if (blobs !== undefined) places.push(join(blobs, "blobs"));
  // A pipeline's part that was named alone: its scheduler lies beside it.
  if (subfolder === undefined) places.push(join(dirname(places[0]!), "scheduler"));
  const told = new Set<string>();
  return (path) => {
    try {
      const place = realpathSync(path);
      if (places.some((folder) => isInside(place, folder))) return { stat: statSync(place), place };
      if (!told.has(path)) outside(path, place);
      told.add(path);
    } catch {
      // A link that leads nowhere: left where it is, and named among what is left.
    }
    return undefined;
  };
}

const isFolder = (lookAt: LookAt, path: string): boolean => lookAt(path)?.stat.isDirectory() === true;

function filesBelow(lookAt: LookAt, component: string, name: string): string[] {
  const files: string[] = [];
  let count = 0;
  const visit = (folder: string, name: string, depth: number) => {
    for (const inner of listing(folder)) {
      if (++count > MAX_FILES) {
        const reason = `a component must have at most ${MAX_FILES} files and folders, got more`;
        throw new CheckpointError(`Cannot copy ${quote(component)}: ${reason}`, { path: component });
      }
      const path = join(folder, inner);
      if (!isFolder(lookAt, path)) files.push(`${name}/${inner}`);
      else if (depth < MAX_DEPTH) visit(path, `${name}/${inner}`, depth + 1);
    }
  };
  visit(component, name, 1);
  return files;
}

/** Copies of the files beside the weights; says so where they take a while. */
export function* copies({ copied }: Beside, { onEvent }: RunOptions): Generator<SmallFile> {
  const bytes = sum(copied.map((file) => file.bytes)), size = `${(bytes / 1e9).toFixed(1)} GB`;
  if (bytes > 1e9) onEvent?.({ kind: "commit", message: `copying ${copied.length} files, ${size}` });
  for (const { name, path } of copied) yield { name, content: { copyOf: path } };
}

/** The text of config.json, undefined when there is none. */
export function configText(checkpoint: Checkpoint): string | undefined {
  if (checkpoint.config === undefined) return undefined;
  if (checkpoint.gguf !== undefined) return `${stringifyJson(checkpoint.config, 2)}\n`;
  return new TextDecoder().decode(readWhole(join(checkpoint.folder, "config.json")));
}

/** The index with the names and sizes of what was written; none where the input has none. */
export function indexFiles(
  checkpoint: Checkpoint,
  records: readonly LayerRecord[],
  tensorFiles: () => ReadonlyMap<string, string>,
): SmallFile[] {
  if (checkpoint.indexFile === undefined) return [];
  const original = readJsonFile(join(checkpoint.folder, checkpoint.indexFile));
  const { metadata } = original;
  const entries = [...tensorFiles()].map(([tensor, file]) => [tensor, basename(file)] as const);
  const index = {
    ...original,
    metadata: {
      ...(typeof metadata === "object" ? metadata : {}),
      total_size: sum(records.map(({ bytesAfter }) => bytesAfter)),
    },
    weight_map: Object.fromEntries(entries.sort(([a], [b]) => a < b ? -1 : a > b ? 1 : 0)),
  };
  const name = outputName(checkpoint, checkpoint.indexFile);
  return [{ name, content: `${stringifyJson(index, 2)}\n` }];
}
