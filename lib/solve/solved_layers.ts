/** Solved layers on disk, a file each in the work folder, so that a stopped calibration goes on. */
import { Buffer } from "node:buffer";
import { join } from "node:path";
import type { PackedTensor } from "../quant/mod.ts";
import { exists, listFolder, readWhole, sha256, writeWhole } from "../files/whole.ts";
import { SOLVED_PREFIX } from "../output/output_folder.ts";
import type { SolvedLayer } from "./solve_model.ts";

/** Of a SHA-256 in hexadecimal. */
const DIGEST_CHARACTERS = 64;

const ARRAYS = { Uint8Array, Uint16Array, Uint32Array } as const;

/** Second line of a file; the first is the SHA-256 of everything behind it, the arrays follow. */
interface Header {
  /** Of the problem: layers of another configuration are not used. */
  readonly identity: string;
  readonly layer: Omit<SolvedLayer, "tensor">;
  readonly tensor: Readonly<Record<string, unknown>>;
  readonly arrays: readonly {
    readonly key: string;
    readonly type: keyof typeof ARRAYS;
    readonly bytes: number;
  }[];
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
  const header: Header = { identity, layer, tensor: plain, arrays };
  const content = Buffer.concat([Buffer.from(`${JSON.stringify(header)}\n`), ...parts]);
  const file = Buffer.concat([Buffer.from(`${sha256(content)}\n`), content]);
  writeWhole(join(folder, fileName(candidate, layer.name)), file);
}

/** Layers that an earlier run solved; files of another identity, or broken ones, count as absent. */
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
  const file = Buffer.from(readWhole(path).buffer);
  const decoder = new TextDecoder();
  const content = file.subarray(DIGEST_CHARACTERS + 1);
  // What its digest does not fit was not written by this tool, or not whole: solved again.
  if (decoder.decode(file.subarray(0, DIGEST_CHARACTERS)) !== sha256(content)) return undefined;
  const end = content.indexOf(10);
  const header = JSON.parse(decoder.decode(content.subarray(0, end))) as Header;
  if (header.identity !== identity) return undefined;
  const body = Uint8Array.from(content.subarray(end + 1));
  const tensor: Record<string, unknown> = { ...header.tensor };
  let at = 0;
  for (const { key, type, bytes } of header.arrays) {
    tensor[key] = new ARRAYS[type](body.slice(at, at + bytes).buffer);
    at += bytes;
  }
  return { ...header.layer, tensor: tensor as unknown as PackedTensor };
}
