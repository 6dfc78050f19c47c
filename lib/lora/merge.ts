/** A checkpoint with LoRAs merged into its weights: W + Σ factor · up · down, made when rows are read. */
import { CheckpointError } from "../errors.ts";
import { quote } from "../files/positional.ts";
import type { RunEvent } from "../progress.ts";
import {
  BYTES_PER_ELEMENT,
  Checkpoint,
  isFloatDtype,
  listing,
  type TensorFile,
  type TensorInfo,
  valuesOf,
} from "../tensor/mod.ts";
import {
  type Adapter,
  floatsOf,
  type LoraModule,
  type LoraSource,
  openAdapter,
  PEFT_PREFIX,
} from "./adapter.ts";
import { isOfTextEncoder, moduleFinder, type RowPlace } from "./places.ts";

/** What became of a LoRA. */
export interface LoraReport {
  readonly path: string;
  readonly scale: number;
  /** Of what it adds; its scale not counted. */
  readonly sha256: string;
  readonly modules: number;
  readonly merged: number;
  /** Weights and biases that it changes. */
  readonly tensors: number;
  /** Modules without a place in the model. */
  readonly unmatched: readonly string[];
  /** Modules for rows that smaller ones of the same file are for: a trainer's copies in another layout. */
  readonly repeated: readonly string[];
  /** Modules of a pipeline's text encoders, which are other models. */
  readonly textEncoders: number;
  /** Entries that are no part of a LoRA. */
  readonly others: readonly string[];
  /** Nothing gives alpha: it is taken to be the rank. */
  readonly lacksAlpha: boolean;
}

/** A checkpoint whose weights have LoRAs in them; closing it closes these as well. */
export interface MergedCheckpoint extends Disposable {
  readonly checkpoint: Checkpoint;
  readonly reports: readonly LoraReport[];
}

/** What a module adds to rows of a tensor. */
interface Addition {
  readonly adapter: Adapter;
  readonly module: LoraModule;
  readonly place: RowPlace;
  readonly part: "weight" | "bias";
}

/**
 * Merges LoRAs into a checkpoint, which stays open for as long as the result. Tensors that they change read
 * as F32.
 *
 * @throws {CheckpointError} when a file is no LoRA, none of its modules is in the model, or one has another
 * shape
 * @throws {FormatError} when a file is not what its format promises
 */
export function mergeLoras(checkpoint: Checkpoint, sources: readonly LoraSource[]): MergedCheckpoint {
  const adapters: Adapter[] = [];
  const close = () => adapters.forEach((adapter) => adapter[Symbol.dispose]());
  try {
    const find = moduleFinder(checkpoint), additions = new Map<string, Addition[]>();
    const reports = sources.map((source) => {
      const adapter = openAdapter(source);
      adapters.push(adapter);
      return matched(checkpoint, adapter, find, additions);
    });
    const files = checkpoint.files.map(({ name, file }) => ({ name, file: mergedFile(file, additions) }));
    const merged = new Checkpoint({ ...checkpoint, files });
    return { checkpoint: merged, reports, [Symbol.dispose]: close };
  } catch (error) {
    close();
    throw error;
  }
}

/** Puts what an adapter adds into `additions`. */
function matched(
  checkpoint: Checkpoint,
  adapter: Adapter,
  find: (module: string) => readonly RowPlace[],
  additions: Map<string, Addition[]>,
): LoraReport {
  checkNoWhole(checkpoint, adapter);
  const unmatched: string[] = [], repeated: string[] = [], changed = new Set<string>();
  const known: RowPlace[] = [];
  let merged = 0, textEncoders = 0;
  const found = adapter.modules.map((module) => ({ module, places: find(module.name) }));
  const rowsOf = (places: readonly RowPlace[]) => places.reduce((sum, { rows }) => sum + rows, 0);
  found.sort((one, other) => rowsOf(one.places) - rowsOf(other.places)); // parts before what is fused of them
  for (const { module, places } of found) {
    const isEncoder = places.length === 0 && isOfTextEncoder(module.name);
    if (module.down !== undefined) {
      const covered = coveredRows(places, known);
      if (covered > 0 && covered < rowsOf(places)) throw doubled(adapter, module, places[0]!.tensor);
      if (covered > 0) {
        repeated.push(module.name);
        continue;
      }
      known.push(...places);
    }
    const added = places.length === 0 ? [] : additionsOf(checkpoint, adapter, module, places);
    for (const addition of added) {
      const name = tensorOf(addition);
      additions.set(name, [...additions.get(name) ?? [], addition]);
      changed.add(name);
    }
    if (isEncoder) textEncoders++;
    else if (added.length === 0) unmatched.push(module.name);
    else merged++;
    if (module.bias !== undefined && added.length > 0 && !added.some(({ part }) => part === "bias")) {
      unmatched.push(module.bias.name); // of a layer that has no bias
    }
  }
  const { path, scale, sha256, modules: { length: modules }, others, lacksAlpha } = adapter;
  if (merged === 0) {
    const weight = [...checkpoint.tensors.values()].find(({ info: { shape } }) => shape.length === 2);
    throw new CheckpointError(
      `Cannot merge ${quote(path)} into ${
        quote(checkpoint.path)
      }: a module of the LoRA must be one of the model, ` +
        `got none of ${modules}, as ${quote(adapter.modules[0]!.name)}, for names as ${
          quote(weight?.info.name ?? "")
        }`,
      { path },
    );
  }
  return {
    path,
    scale,
    sha256,
    modules,
    merged,
    tensors: changed.size,
    unmatched,
    repeated,
    textEncoders,
    others,
    lacksAlpha,
  };
}

/** Rows of some places that are also those of others. */
function coveredRows(places: readonly RowPlace[], known: readonly RowPlace[]): number {
  return places.reduce((sum, { tensor, row, rows }) =>
    known.reduce((own, other) => {
      const shared = Math.min(row + rows, other.row + other.rows) - Math.max(row, other.row);
      return other.tensor === tensor ? own + Math.max(0, shared) : own;
    }, sum), 0);
}

const doubled = ({ path }: Adapter, { name }: LoraModule, tensor: string) =>
  new CheckpointError(
    `Cannot merge ${quote(path)}: rows of ${quote(tensor)} must have one module, got ${
      quote(name)
    } and another`,
    { path, tensor: name },
  );

/** @throws {CheckpointError} when a file has whole weights, which take the place of the model's */
function checkNoWhole({ tensors }: Checkpoint, { path, others }: Adapter): void {
  const whole = others.find((name) => {
    const own = name.replace(PEFT_PREFIX, "").replace(/\.modules_to_save\.\w+(?=\.)/, "");
    return tensors.has(own);
  });
  if (whole === undefined) return;
  throw new CheckpointError(
    `Cannot merge ${quote(path)}: it must have LoRAs alone, got a weight itself, ${
      quote(whole)
    } (modules_to_save ` +
      "or bias of PEFT): merge it with the library that made it (PEFT: merge_and_unload())",
    { path, tensor: whole },
  );
}

const tensorOf = ({ place: { tensor }, part }: Addition) =>
  part === "weight" ? tensor : tensor.replace(/weight$/, "bias");

/** @throws {CheckpointError} when shapes differ */
function additionsOf(
  { tensors, path: model }: Checkpoint,
  adapter: Adapter,
  module: LoraModule,
  places: readonly RowPlace[],
): Addition[] {
  const { up, down, bias } = module, rows = places.reduce((sum, place) => sum + place.rows, 0);
  const fail = (info: TensorInfo, target: string, wanted: string, got: string) =>
    new CheckpointError(
      `Cannot merge ${quote(info.name)} of ${quote(adapter.path)} into ${quote(target)} of ${
        quote(model)
      }: ` +
        `it must have ${wanted}, got ${got}`,
      { path: adapter.path, tensor: info.name },
    );
  return places.flatMap((place): Addition[] => {
    const own = { adapter, module, place }, out: Addition[] = [];
    if (down !== undefined) {
      const { name, shape, elements, dtype } = tensors.get(place.tensor)!.info, cols = elements / shape[0]!;
      if (!isFloatDtype(dtype)) throw fail(down, name, "a matrix of floats there", dtype);
      const [height, width] = up === undefined
        ? [down.shape[0] ?? 1, down.elements / (down.shape[0] ?? 1)]
        : [up.shape[0]!, down.elements / down.shape[0]!];
      if (height !== rows || width !== cols) {
        throw fail(down, name, `${rows} rows of ${cols} weights`, `${height} rows of ${width}`);
      }
      out.push({ ...own, part: "weight" });
    }
    const target = tensors.get(place.tensor.replace(/weight$/, "bias"))?.info;
    if (bias !== undefined && target !== undefined) {
      if (bias.elements !== rows) throw fail(bias, target.name, `${rows} numbers`, `${bias.elements}`);
      out.push({ ...own, part: "bias" });
    }
    return out;
  });
}

// Reading ---------------------------------------------------------------------------------------------------

/** An addition with its matrices in memory. */
interface Loaded {
  readonly row: number;
  readonly rows: number;
  readonly from: number;
  readonly factor: number;
  /** `[rows of the module, rank]`; undefined where `down` is what is added. */
  readonly up: Float32Array | undefined;
  /** `[rank, cols]` */
  readonly down: Float32Array;
  readonly rank: number;
}

function loaded({ adapter: { file, scale }, module, place, part }: Addition): Loaded {
  const { up, down, bias, factor } = module, { row, rows, from } = place;
  const own = part === "weight" ? down! : bias!, isProduct = part === "weight" && up !== undefined;
  return {
    ...{ row, rows, from },
    factor: own.name.endsWith(".diff_b") ? scale : factor, // alpha and rank are not its
    up: isProduct ? floatsOf(file, up) : undefined,
    down: floatsOf(file, own),
    rank: isProduct ? own.shape[0]! : 1,
  };
}

/** A file whose changed tensors read as the merged ones. */
function mergedFile(file: TensorFile, additions: ReadonlyMap<string, readonly Addition[]>): TensorFile {
  const isChanged = (name: string) => additions.has(name);
  if (![...file.tensors.keys()].some(isChanged)) return file;
  const { path, fileBytes, dataOffset, metadata } = file;
  const tensors = new Map([...file.tensors].map(([name, info]): [string, TensorInfo] => {
    if (!isChanged(name)) return [name, info];
    return [name, { ...info, dtype: "F32", byteLength: info.elements * BYTES_PER_ELEMENT.F32 }];
  }));
  let known: { readonly name: string; readonly additions: readonly Loaded[] } | undefined; // read last
  const readInto = (name: string, byteStart: number, target: Uint8Array) => {
    const own = additions.get(name), info = file.tensors.get(name);
    if (own === undefined || info === undefined) return file.readInto(name, byteStart, target);
    if (known?.name !== name) known = { name, additions: own.map(loaded) };
    const first = Math.floor(byteStart / 4), end = Math.ceil((byteStart + target.length) / 4);
    const values = mergedValues(file, info, known.additions, first, end);
    target.set(
      new Uint8Array(values.buffer).subarray(byteStart - 4 * first, byteStart - 4 * first + target.length),
    );
  };
  const read = (name: string, byteStart = 0, byteEnd?: number) => {
    if (!isChanged(name)) return file.read(name, byteStart, byteEnd);
    const target = new Uint8Array((byteEnd ?? tensors.get(name)!.byteLength) - byteStart);
    readInto(name, byteStart, target);
    return target;
  };
  return { path, fileBytes, dataOffset, metadata, tensors, readInto, read, close: () => file.close() };
}

/** Elements `[first, end)` of a tensor with what is added, in float64, rounded to float32 once. */
function mergedValues(
  file: TensorFile,
  info: TensorInfo,
  additions: readonly Loaded[],
  first: number,
  end: number,
): Float32Array<ArrayBuffer> {
  const stored = valuesOf({ info, file }, first, end), out = new Float32Array(end - first);
  const cols = info.elements / info.shape[0]!, sums = new Float64Array(cols);
  for (let at = first; at < end;) {
    const row = Math.floor(at / cols), begin = at - row * cols, stop = Math.min(cols, end - row * cols);
    const target = at - first,
      own = additions.filter((each) => row >= each.row && row < each.row + each.rows);
    for (let c = begin; c < stop; c++) sums[c] = stored[target + c - begin]!;
    for (const each of own) addRow(each, row - each.row + each.from, cols, sums);
    for (let c = begin; c < stop; c++) out[target + c - begin] = sums[c]!;
    at += stop - begin;
  }
  return out;
}

/** Adds a row of factor · up · down, or of factor · down: a fixed order of sums, whatever the machine. */
function addRow({ up, down, rank, factor }: Loaded, row: number, cols: number, sums: Float64Array): void {
  if (up === undefined) {
    for (let c = 0; c < cols; c++) sums[c]! += factor * down[row * cols + c]!;
    return;
  }
  let k = 0;
  for (; k + 4 <= rank; k += 4) { // four at a time: the sums are read and written less often
    const at = row * rank + k, u0 = factor * up[at]!, u1 = factor * up[at + 1]!;
    const u2 = factor * up[at + 2]!, u3 = factor * up[at + 3]!;
    const d0 = k * cols, d1 = d0 + cols, d2 = d1 + cols, d3 = d2 + cols;
    for (let c = 0; c < cols; c++) {
      sums[c]! += u0 * down[d0 + c]! + u1 * down[d1 + c]! + u2 * down[d2 + c]! + u3 * down[d3 + c]!;
    }
  }
  for (; k < rank; k++) {
    const u = factor * up[row * rank + k]!, d = k * cols;
    for (let c = 0; c < cols; c++) sums[c]! += u * down[d + c]!;
  }
}

// Report ----------------------------------------------------------------------------------------------------

/** What became of LoRAs, as events: one a file, and warnings of what was left out. */
export function loraEvents(reports: readonly LoraReport[]): RunEvent[] {
  return reports.flatMap((report): RunEvent[] => {
    const { path, scale, modules, merged, tensors, unmatched, repeated, textEncoders, others, lacksAlpha } =
      report;
    const message = `LoRA ${
      quote(path)
    }, scale ${scale}: ${merged} of ${modules} modules merged into ${tensors} tensors`;
    const left = [
      ...(lacksAlpha
        ? ["no adapter_config.json beside it gives alpha, which is taken to be the rank (factor 1)"]
        : []),
      ...(unmatched.length > 0
        ? [`${unmatched.length} modules have no place in the model: ${listing(unmatched)}`]
        : []),
      ...(repeated.length > 0
        ? [
          `${repeated.length} modules are for rows that others are for, too, and left out: ${
            listing(repeated)
          }`,
        ]
        : []),
      ...(textEncoders > 0 ? [`${textEncoders} modules are of text encoders, which are other models`] : []),
      ...(others.length > 0 ? [`${others.length} entries are no part of a LoRA: ${listing(others)}`] : []),
    ];
    return [
      { kind: "input", message, data: { ...report } },
      ...left.map((why): RunEvent => ({ kind: "warning", message: `LoRA ${quote(path)}: ${why}` })),
    ];
  });
}
