/** The files beside the weights: which are copied, config.json, and the index of what was written. */
import { readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { readWhole } from "../files/whole.ts";
import { type LayerRecord, MANIFEST_FILE } from "../output/record.ts";
import type { SmallFile } from "../output/rewrite.ts";
import { type Checkpoint, SIDECAR_FILE } from "../tensor/mod.ts";
import { sum } from "./run_report.ts";

/** Files beside the weights that are part of a model and are copied, by the end of their names. */
const COPIED_SUFFIXES = [".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"];
const COPIED_NAMES = /^(?:LICENSE|LICENCE|NOTICE|COPYING|USE_POLICY)(?:[._-].*)?$/i;
/** Files that say what the original weights achieve, which says nothing about quantized ones. */
const SCORES = /(?:scores|results|metrics)[^/]*\.json$/i;
/** Largest file that is copied beside the weights: the largest published tokenizers have about 35 MB. */
const MAX_COPIED_BYTES = 64 * 2 ** 20;

/** Files beside the weights. */
export interface Beside {
  readonly copied: readonly { readonly name: string; readonly bytes: number }[];
  readonly left: readonly string[];
}

/** Names of the files that are copied and of those that are left, for a report. */
export const namesBeside = ({ copied, left }: Beside) => ({ copied: copied.map(({ name }) => name), left });

/** Looks at what lies beside the weights: small files of the model are copied, other things stay. */
export function filesBeside(checkpoint: Checkpoint): Beside {
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

/** Copies of the small files. */
export function* copies(checkpoint: Checkpoint, { copied }: Beside): Generator<SmallFile> {
  for (const { name } of copied) yield { name, content: readWhole(join(checkpoint.folder, name)) };
}

/** The text of config.json, undefined when there is none. */
export function configText(checkpoint: Checkpoint): string | undefined {
  if (checkpoint.config === undefined) return undefined;
  return new TextDecoder().decode(readWhole(join(checkpoint.folder, "config.json")));
}

/** The index with the names and sizes of what was written; none where the input has none. */
export function indexFiles(
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
