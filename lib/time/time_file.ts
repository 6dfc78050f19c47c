/** Common parts of the files of time: time groups as a tensor, faults, and writing in one step. */
import { FormatError } from "../errors.ts";
import { giveBack, takeMemory } from "../quant/array_memory.ts";
import { type Dtype, type SafetensorsFile, SafetensorsWriter, type TensorSpec } from "../tensor/mod.ts";
import { maskRatioAxis, timestepAxis } from "./axis.ts";
import { MAX_TIME_GROUPS, TimeGroups } from "./groups.ts";

/** Tensor of a file's time groups, I32 [groups + 1]. */
export const BOUNDARIES = "time_groups.boundaries";

/** Makes the error of a file that is not what its format promises. */
export type Malformed = (reason: string, tensor?: string, cause?: unknown) => FormatError;

export const malformedIn = (path: string): Malformed => (reason, tensor, cause) =>
  new FormatError(
    `Cannot read ${JSON.stringify(path)}: ${
      tensor === undefined || reason.includes(tensor) ? "" : `${JSON.stringify(tensor)}: `
    }${reason}`,
    tensor === undefined ? { path, cause } : { path, tensor, cause },
  );

/** @throws {FormatError} when a file's metadata name another format or version */
export function checkFormat(
  { metadata }: SafetensorsFile,
  format: string,
  version: string,
  malformed: Malformed,
): void {
  if (metadata["format"] === format && metadata["version"] === version) return;
  const wanted = JSON.stringify(`${format} ${version}`);
  throw malformed(`metadata must say ${wanted}, got ${metadata["format"]} ${metadata["version"]}`);
}

/** Arrays of the types in these files; half floats are read as their bits. */
const ARRAYS = { F64: Float64Array, F32: Float32Array, I32: Int32Array, F16: Uint16Array } as const;
/** A type in these files. */
export type TimeDtype = keyof typeof ARRAYS & Dtype;
/** Values of a tensor. */
export type TimeValues = InstanceType<typeof ARRAYS[TimeDtype]> & { readonly buffer: ArrayBuffer };

/** A tensor to write. */
export interface TensorEntry {
  readonly spec: TensorSpec & { readonly dtype: TimeDtype };
  readonly values: () => ArrayBufferView<ArrayBuffer>;
  /** Whether nothing else has the values: their memory is given back once they are written. */
  readonly isFresh?: boolean | undefined;
}

/** Writes time groups and other tensors; an old file is replaced when it is whole. @throws {OutputError} */
export function writeTimeFile(
  path: string,
  groups: TimeGroups,
  metadata: Readonly<Record<string, string>>,
  tensors: readonly TensorEntry[],
): void {
  const { boundaries, count } = groups;
  const entries: TensorEntry[] = [
    { spec: { name: BOUNDARIES, dtype: "I32", shape: [count + 1] }, values: () => boundaries },
    ...tensors,
  ];
  const specs = entries.map(({ spec }) => spec);
  using writer = SafetensorsWriter.create(path, {
    reservedHeaderBytes: SafetensorsWriter.headerBytes(specs, metadata),
    metadata,
  });
  writer.add(specs);
  for (const { spec, values, isFresh } of entries) {
    const array = values(), { buffer, byteOffset, byteLength } = array;
    writer.write(spec.name, 0, new Uint8Array(buffer, byteOffset, byteLength));
    if (isFresh === true) giveBack(array);
  }
  writer.finish();
}

/** Reads a tensor. @throws {FormatError} unless it is of this type and one of these shapes */
export function readValues(
  file: SafetensorsFile,
  name: string,
  dtype: TimeDtype,
  shapes: readonly (readonly number[])[],
  malformed: Malformed,
): TimeValues {
  const info = file.tensors.get(name), texts = shapes.map((shape) => `[${shape.join(", ")}]`);
  const got = info && `[${info.shape.join(", ")}]`;
  if (info?.dtype === dtype && texts.includes(got!)) {
    const memory = takeMemory(info.byteLength);
    file.readInto(name, 0, new Uint8Array(memory));
    return new ARRAYS[dtype](memory);
  }
  const wanted = `${JSON.stringify(name)} must be ${dtype} ${texts.join(" or ")}`;
  throw malformed(`${wanted}, got ${info === undefined ? "none" : `${info.dtype} ${got}`}`, name);
}

/** The time groups of a file. @throws {FormatError} as `malformed` makes it */
export function readGroups(
  file: SafetensorsFile,
  kind: string | undefined,
  binText: string | undefined,
  malformed: Malformed,
): TimeGroups {
  const info = file.tensors.get(BOUNDARIES);
  if (
    info === undefined || info.dtype !== "I32" || info.shape.length !== 1 || info.elements < 2 ||
    info.elements > MAX_TIME_GROUPS + 1
  ) {
    throw malformed(`${BOUNDARIES} must be I32 of 2 to ${MAX_TIME_GROUPS + 1} numbers`, BOUNDARIES);
  }
  if ((kind !== "timesteps" && kind !== "mask_ratio") || !/^\d{1,6}$/.test(binText ?? "")) {
    throw malformed(
      `axis must be "timesteps" or "mask_ratio" with a number of bins, got ${kind} and ${binText}`,
    );
  }
  try {
    const bins = Number(binText);
    const axis = kind === "timesteps" ? timestepAxis(bins) : maskRatioAxis(bins);
    return new TimeGroups(axis, new Int32Array(file.read(BOUNDARIES).buffer));
  } catch (cause) {
    if (!(cause instanceof RangeError)) throw cause;
    throw malformed(cause.message, BOUNDARIES, cause);
  }
}
