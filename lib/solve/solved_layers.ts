/** Solved layers on disk, a file each in the work folder, so that a stopped calibration goes on. */
import { join } from "node:path";
import type { PackedTensor } from "../quant/mod.ts";
import { exists, listFolder, sha256 } from "../files/whole.ts";
import { readKept, writeKept } from "../output/kept_file.ts";
import { SOLVED_PREFIX } from "../output/output_folder.ts";

/** A solved layer. */
export interface SolvedLayer {
  /** Name of its weight. */
  readonly name: string;
  readonly tensor: PackedTensor;
  /** Mean of ‖(W − Ŵ) x‖² / ‖W x‖², x of the quantized model, W the target; ‖W x‖² of 256 rows. */
  readonly relativeError: number;
  /** Error of the first quantization that was tried / that of the result. */
  readonly gain: number;
  /** What was kept of the moment of its inputs: `full`, `blocks of 1024` or `diagonal`. */
  readonly moment: string;
  readonly damping: number;
  readonly deadColumns: number;
  readonly inputs: number;
  readonly milliseconds: number;
}

/** A layer without its arrays, whose names in the tensor follow. */
interface Header {
  readonly layer: Omit<SolvedLayer, "tensor">;
  readonly tensor: Readonly<Record<string, unknown>>;
  readonly keys: readonly string[];
}

const fileName = (candidate: number, name: string) =>
  `${SOLVED_PREFIX}${candidate}-${sha256(name).slice(0, 16)}`;

/** Stores a solved layer; its name stands for all of it. @param identity of the problem */
export function saveSolvedLayer(
  folder: string,
  candidate: number,
  identity: string,
  { tensor, ...layer }: SolvedLayer,
): void {
  const entries = Object.entries(tensor), arrays = entries.filter(([, value]) => ArrayBuffer.isView(value));
  const plain = entries.filter(([, value]) => !ArrayBuffer.isView(value) && value !== undefined);
  const header: Header = { layer, tensor: Object.fromEntries(plain), keys: arrays.map(([key]) => key) };
  const path = join(folder, fileName(candidate, layer.name));
  writeKept(path, identity, { header, arrays: arrays.map(([, value]) => value) });
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
    const layer = readLayer(join(folder, name), identity);
    if (layer !== undefined) found.set(layer.name, layer);
  }
  return found;
}

/** Whether there is a file of a layer, of whatever run: for forecasts, which need not read it. */
export const hasSolvedLayer = (folder: string, candidate: number, name: string): boolean =>
  exists(join(folder, fileName(candidate, name)));

/** One of them, by name. */
export const loadSolvedLayer = (
  folder: string,
  candidate: number,
  identity: string,
  name: string,
): SolvedLayer | undefined => readLayer(join(folder, fileName(candidate, name)), identity);

function readLayer(path: string, identity: string): SolvedLayer | undefined {
  const kept = readKept<Header>(path, identity);
  if (kept === undefined) return undefined;
  const { header: { layer, tensor, keys }, arrays } = kept;
  const parts = Object.fromEntries(keys.map((key, i) => [key, arrays[i]]));
  return { ...layer, tensor: { ...tensor, ...parts } as unknown as PackedTensor };
}
