/**
 * Solved layers on disk, so that a calibration that was stopped goes on: one file a layer in the run's work folder, read again only if
 * it is whole.
 */
import { join } from "node:path";
import { FormatError } from "../errors.ts";
import type { PackedTensor } from "../quant/mod.ts";
import { exists, listFolder, quote, remove, sha256, writeWhole } from "./files.ts";
import type { SolvedLayer } from "./solve.ts";
import { readFileSync } from "node:fs";

/** What the names of these files begin with. */
export const SOLVED_PREFIX = "solved-";

const ARRAYS = { Uint8Array, Uint16Array, Uint32Array } as const;

interface Header {
  readonly version: 1;
  /** What the layer was solved with: another configuration's layers are not taken. */
  readonly identity: string;
  readonly layer: Omit<SolvedLayer, "tensor">;
  readonly tensor: Readonly<Record<string, unknown>>;
  readonly arrays: readonly {
    readonly key: string;
    readonly type: keyof typeof ARRAYS;
    readonly bytes: number;
  }[];
  readonly sha256: string;
}

const fileName = (candidate: number, name: string) =>
  `${SOLVED_PREFIX}${candidate}-${sha256(name).slice(0, 16)}`;

/** Stores a solved layer; its name stands for all of it. */
export function saveSolvedLayer(
  folder: string,
  candidate: number,
  identity: string,
  { tensor, ...layer }: SolvedLayer,
): void {
  const arrays: Header["arrays"][number][] = [], parts: Uint8Array[] = [];
  const plain: Record<string, unknown> = {};
  for (const [key, value] of Object.entries(tensor)) {
    if (ArrayBuffer.isView(value)) {
      const bytes = new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
      arrays.push({ key, type: value.constructor.name as keyof typeof ARRAYS, bytes: bytes.length });
      parts.push(bytes);
    } else if (value !== undefined) plain[key] = value;
  }
  const body = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    body.set(part, at);
    at += part.length;
  }
  const header: Header = { version: 1, identity, layer, tensor: plain, arrays, sha256: sha256(body) };
  const head = new TextEncoder().encode(`${JSON.stringify(header)}\n`);
  const file = new Uint8Array(head.length + body.length);
  file.set(head);
  file.set(body, head.length);
  writeWhole(join(folder, fileName(candidate, layer.name)), file);
}

/** The layers that an earlier run solved for a candidate; files of another identity, or broken ones, count as absent. */
export function loadSolvedLayers(
  folder: string,
  candidate: number,
  identity: string,
): Map<string, SolvedLayer> {
  const found = new Map<string, SolvedLayer>();
  if (!exists(folder)) return found;
  for (const name of listFolder(folder).filter((name) => name.startsWith(`${SOLVED_PREFIX}${candidate}-`))) {
    const layer = readSolvedLayer(join(folder, name), identity);
    if (layer !== undefined) found.set(layer.name, layer);
  }
  return found;
}

function readSolvedLayer(path: string, identity: string): SolvedLayer | undefined {
  const file = readFileSync(path);
  const end = file.indexOf(10);
  let header: Header;
  try {
    header = JSON.parse(new TextDecoder().decode(file.subarray(0, Math.max(0, end)))) as Header;
  } catch {
    return undefined; // half-written: solved again
  }
  const body = Uint8Array.from(file.subarray(end + 1));
  if (header.version !== 1 || header.identity !== identity || sha256(body) !== header.sha256) {
    return undefined;
  }
  const tensor: Record<string, unknown> = { ...header.tensor };
  let at = 0;
  for (const { key, type, bytes } of header.arrays) {
    if (!Object.hasOwn(ARRAYS, type)) {
      throw new FormatError(`Cannot read ${quote(path)}: arrays must be of known types, got ${quote(type)}`, {
        path,
      });
    }
    tensor[key] = new ARRAYS[type](body.slice(at, at + bytes).buffer);
    at += bytes;
  }
  return { ...header.layer, tensor: tensor as unknown as PackedTensor };
}

/** Removes the files of solved layers: the tensors are in the output now. */
export function removeSolvedLayers(folder: string): void {
  if (!exists(folder)) return;
  for (const name of listFolder(folder)) if (name.startsWith(SOLVED_PREFIX)) remove(join(folder, name));
}
