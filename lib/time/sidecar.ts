/**
 * Time parameters on disk: `time_parameters.safetensors` beside a quantized checkpoint, which is a whole
 * model without it.
 *
 * ```text
 * time_groups.boundaries              I32 [groups + 1]
 * <layer>.activation_scale            F32 [groups or bins]
 * <layer>.activation_zero_point       I32 [groups or bins]
 * <layer>.activation_per_token        I32 [1]: bits of per-token dynamic quantization, instead of the two
 * <layer>.output_gain, .output_bias   F32 [groups, rows]
 * <layer>.time_scale, .time_zero_point F16 [groups, rows, weight groups]
 * sampler.gain, .bias, .noise_variance F32 [groups], of an image model
 * __metadata__: format, version, axis, bins, activation_bits, fingerprint
 * ```
 */
import { createHash } from "node:crypto";
import { join } from "node:path";
import { CheckpointError, type FormatError } from "../errors.ts";
import { type Checkpoint, SafetensorsFile, SIDECAR_FILE } from "../tensor/mod.ts";
import type { ActivationBits } from "./activation_range.ts";
import type { TimeAxis } from "./axis.ts";
import type { TimeGroups } from "./groups.ts";
import {
  type LayerParameters,
  MAX_LAYER_NUMBERS,
  type SamplerParameters,
  TimeParameters,
} from "./parameters.ts";
import {
  BOUNDARIES,
  checkFormat,
  type Malformed,
  malformedIn,
  readGroups,
  readValues,
  type TensorEntry,
  type TimeDtype,
  type TimeValues,
  writeTimeFile,
} from "./time_file.ts";

/** `format` and `version` in the file's metadata. */
const FORMAT = "arrowquant time parameters";
const VERSION = "1";
/** Bytes of a tensor's start and middle that a fingerprint reads: 2 GB take well under a second. */
const SAMPLED_BYTES = 4096;

/**
 * A number that tells models apart: SHA-256, in hex, over every tensor's name, type and shape and over some
 * kB of its bytes. Two quantizations of one model differ in their scales, and so in this.
 */
export function modelFingerprint(checkpoint: Checkpoint): string {
  const hash = createHash("sha256");
  for (const name of [...checkpoint.tensors.keys()].sort()) {
    const { info } = checkpoint.tensors.get(name)!;
    hash.update(JSON.stringify([name, info.dtype, info.shape]));
    const middle = Math.floor(info.byteLength / 2);
    for (const start of [0, middle]) {
      hash.update(checkpoint.read(name, start, Math.min(info.byteLength, start + SAMPLED_BYTES)));
    }
  }
  return hash.digest("hex");
}

/** Names and types of a layer's time parameters in the file. */
const PARTS = {
  activation_scale: "F32",
  activation_zero_point: "I32",
  activation_per_token: "I32",
  output_gain: "F32",
  output_bias: "F32",
  time_scale: "F16",
  time_zero_point: "F16",
} as const satisfies Record<string, TimeDtype>;
/** The sampler's correction in the file; no layer is called so. */
const SAMPLER = {
  gain: "sampler.gain",
  bias: "sampler.bias",
  noiseVariance: "sampler.noise_variance",
} as const;
type Part = keyof typeof PARTS;

function partsOf({ activation, perToken, output, weightScales }: LayerParameters): [Part, TimeValues][] {
  const parts: [Part, TimeValues | undefined][] = [
    ["activation_scale", activation?.scale],
    ["activation_zero_point", activation?.zeroPoint],
    ["activation_per_token", perToken === undefined ? undefined : Int32Array.of(perToken)],
    ["output_gain", output?.gain],
    ["output_bias", output?.bias],
    ["time_scale", weightScales?.scale],
    ["time_zero_point", weightScales?.zeroPoint],
  ];
  return parts.filter((part): part is [Part, TimeValues] => part[1] !== undefined);
}

/**
 * Writes time parameters beside a checkpoint, in one step.
 *
 * **Shapes** weight scales of a layer with `rows` outputs become `[groups, rows, weight groups]`; `rowsOf`
 * says how many those are
 *
 * @param rowsOf outputs of a layer; needed for layers with weight scales by time
 * @returns the file's path
 * @throws {OutputError} when it cannot be written
 * @throws {RangeError} when activation widths differ between layers
 */
export function writeTimeParameters(
  folder: string,
  parameters: TimeParameters,
  rowsOf: (layer: string) => number = () => 1,
): string {
  const { groups, layers, fingerprint } = parameters;
  const widths = new Set([...layers.values()].flatMap(({ activation }) => activation?.bits ?? []));
  if (widths.size > 1) {
    throw new RangeError(
      `Cannot write time parameters: all layers' activations must have the same bits, got ${
        [...widths].join(" and ")
      }`,
    );
  }
  const metadata = {
    format: FORMAT,
    version: VERSION,
    axis: groups.axis.kind,
    bins: String(groups.axis.bins),
    activation_bits: String([...widths][0] ?? 8),
    fingerprint,
  };
  const tensors: TensorEntry[] = [];
  for (const [layer, own] of layers) {
    for (const [part, values] of partsOf(own)) {
      const each = values.length / groups.count;
      const shape = part.startsWith("activation")
        ? [values.length]
        : part.startsWith("output")
        ? [groups.count, each]
        : [groups.count, rowsOf(layer), each / rowsOf(layer)];
      tensors.push({ spec: { name: `${layer}.${part}`, dtype: PARTS[part], shape }, values: () => values });
    }
  }
  for (const key of ["gain", "bias", "noiseVariance"] as const) {
    const values = parameters.sampler?.[key];
    if (values === undefined) continue;
    tensors.push({
      spec: { name: SAMPLER[key], dtype: "F32", shape: [groups.count] },
      values: () => values,
    });
  }
  const path = join(folder, SIDECAR_FILE);
  writeTimeFile(path, groups, metadata, tensors);
  return path;
}

/** Requirements on a sidecar. */
export interface SidecarExpectation {
  /** Of the model it lies beside. */
  readonly fingerprint: string;
  /** Outputs and weight groups of the model's layers, by name. */
  readonly layers: ReadonlyMap<string, { readonly rows: number; readonly weightGroups: number }>;
  /** Wanted number of time groups; undefined: whatever the file has. */
  readonly groups?: number | undefined;
  /** Wanted axis; undefined: whatever the file has. */
  readonly axis?: Pick<TimeAxis, "kind" | "bins"> | undefined;
}

/**
 * Reads and checks a sidecar.
 *
 * @throws {FormatError} when the file is not what its format promises, or holds NaN or values out of range
 * @throws {CheckpointError} when it belongs to another model, or has another axis or number of groups than
 * wanted
 */
export function readTimeParameters(folder: string, expected: SidecarExpectation): TimeParameters {
  const path = join(folder, SIDECAR_FILE);
  using file = SafetensorsFile.open(path);
  const malformed = malformedIn(path);
  const mismatched = (reason: string) =>
    new CheckpointError(`Cannot use ${JSON.stringify(path)}: ${reason}`, { path });
  checkFormat(file, FORMAT, VERSION, malformed);
  const { axis: kind, bins: binText, activation_bits: bitText, fingerprint } = file.metadata;
  if (fingerprint !== expected.fingerprint) {
    throw mismatched(
      `it must belong to the model beside it (${
        expected.fingerprint.slice(0, 12)
      }…), got one of another model (${fingerprint?.slice(0, 12)}…)`,
    );
  }
  const groups = readGroups(file, kind, binText, malformed);
  if (expected.groups !== undefined && groups.count !== expected.groups) {
    throw mismatched(`it must have ${expected.groups} time groups, got ${groups.count}`);
  }
  const { axis } = groups;
  if (expected.axis !== undefined && (axis.kind !== expected.axis.kind || axis.bins !== expected.axis.bins)) {
    throw mismatched(
      `it must be of ${expected.axis.bins} bins of ${expected.axis.kind}, got ${axis.bins} of ${axis.kind}`,
    );
  }
  const bits = Number(bitText);
  if (bits !== 4 && bits !== 8) throw malformed(`activation_bits must be 4 or 8, got ${bitText}`);
  const byLayer = readParts(file, groups, expected, malformed);
  const layers = new Map<string, LayerParameters>();
  for (const [name, parts] of byLayer) {
    layers.set(name, layerOf(name, parts, bits, (reason) => malformed(reason, name)));
  }
  try {
    return new TimeParameters(groups, layers, fingerprint!, readSampler(file, groups.count, malformed));
  } catch (cause) {
    if (!(cause instanceof RangeError || cause instanceof TypeError)) throw cause;
    throw malformed(cause.message, undefined, cause);
  }
}

/** The parts of every layer. @throws {FormatError} when a tensor is not a part of the model's layers */
function readParts(
  file: SafetensorsFile,
  groups: TimeGroups,
  expected: SidecarExpectation,
  malformed: Malformed,
): Map<string, Map<Part, TimeValues>> {
  const byLayer = new Map<string, Map<Part, TimeValues>>();
  for (const { name, elements } of file.tensors.values()) {
    if (name === BOUNDARIES || Object.values<string>(SAMPLER).includes(name)) continue;
    const dot = name.lastIndexOf(".");
    const layer = name.slice(0, dot), part = name.slice(dot + 1);
    if (!Object.hasOwn(PARTS, part)) {
      throw malformed("every tensor must be a part of a layer, got another", name);
    }
    const model = expected.layers.get(layer);
    if (model === undefined) throw malformed(`its layer must be one of the model's, got ${layer}`, name);
    const allowed = part === "activation_per_token"
      ? [[1]]
      : part.startsWith("activation")
      ? [[groups.count], [groups.axis.bins]]
      : part.startsWith("output")
      ? [[groups.count, model.rows]]
      : [[groups.count, model.rows, model.weightGroups]];
    if (elements > MAX_LAYER_NUMBERS) {
      throw malformed(`a tensor may have ${MAX_LAYER_NUMBERS} numbers, got ${elements}`, name);
    }
    const values = readValues(file, name, PARTS[part as Part], allowed, malformed);
    const parts = byLayer.get(layer) ?? new Map<Part, TimeValues>();
    byLayer.set(layer, parts.set(part as Part, values));
  }
  return byLayer;
}

/** @throws {FormatError} as `malformed` makes it */
function readSampler(
  file: SafetensorsFile,
  count: number,
  malformed: Malformed,
): SamplerParameters | undefined {
  if (!Object.values(SAMPLER).some((name) => file.tensors.has(name))) return undefined;
  const read = (key: keyof typeof SAMPLER) =>
    readValues(file, SAMPLER[key], "F32", [[count]], malformed) as Float32Array<ArrayBuffer>;
  return { gain: read("gain"), bias: read("bias"), noiseVariance: read("noiseVariance") };
}

function layerOf(
  name: string,
  parts: ReadonlyMap<Part, TimeValues>,
  bits: ActivationBits,
  malformed: (reason: string) => FormatError,
): LayerParameters {
  const pair = (a: Part, b: Part, isSecondNeeded = true) => {
    if (parts.has(b) !== parts.has(a) && (parts.has(b) || isSecondNeeded)) {
      throw malformed(`${JSON.stringify(name)} must have both ${a} and ${b}, got one of them`);
    }
    return parts.has(a);
  };
  const activation = pair("activation_scale", "activation_zero_point");
  const output = pair("output_gain", "output_bias");
  const weights = pair("time_scale", "time_zero_point", false);
  const perToken = parts.get("activation_per_token")?.[0];
  if (perToken !== undefined && perToken !== 4 && perToken !== 8) {
    throw malformed(`${JSON.stringify(name)} must have activation_per_token 4 or 8, got ${perToken}`);
  }
  const floats = (part: Part) => parts.get(part) as Float32Array<ArrayBuffer>;
  const integers = (part: Part) => parts.get(part) as Int32Array<ArrayBuffer>;
  const halves = (part: Part) => parts.get(part) as Uint16Array<ArrayBuffer> | undefined;
  return {
    perToken,
    activation: activation
      ? { bits, scale: floats("activation_scale"), zeroPoint: integers("activation_zero_point") }
      : undefined,
    output: output ? { gain: floats("output_gain"), bias: floats("output_bias") } : undefined,
    weightScales: weights
      ? { scale: halves("time_scale")!, zeroPoint: halves("time_zero_point") }
      : undefined,
  };
}
