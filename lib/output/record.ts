/** The record of one tensor, as the journal and the manifest store it, and the manifest itself. */
import { createHash } from "node:crypto";
import type { Codes } from "../config/names.ts";
import type { BitWidth, ErrorStatistics, GroupSize, ScaleBits, ZeroPointKind } from "../quant/mod.ts";
import { isJsonObject } from "../files/json.ts";
import { sha256 } from "../files/whole.ts";
import type { Dtype } from "../tensor/mod.ts";

/** Version of this project, as in deno.json. */
export const TOOL_VERSION = "0.1.0";

/** File that is written last: a folder that has it is finished. */
export const MANIFEST_FILE = "arrowquant.manifest.json";

/** How one tensor was stored. */
export interface LayerRecord {
  /** Original name. */
  readonly name: string;
  /** File that holds it. */
  readonly file: string;
  readonly action: "quantize" | "keep" | "dequantize" | "export";
  /** Rule that kept it, where its bits came from, or why it could not be quantized. */
  readonly reason: string;
  /** Element type before. */
  readonly dtype: Dtype;
  readonly shape: readonly number[];
  /** These three are undefined when kept. */
  readonly bits?: BitWidth | undefined;
  readonly groupSize?: GroupSize | undefined;
  readonly zeroPoint?: ZeroPointKind | undefined;
  /** Bits of the sub-codes of two-level scales; undefined with plain ones. */
  readonly scaleBits?: ScaleBits | undefined;
  /** `trellis`; undefined: uniform. */
  readonly codes?: Codes | undefined;
  readonly bytesBefore: number;
  /** Stored bytes of everything that belongs to it. */
  readonly bytesAfter: number;
  /** Kept although NaN or infinity is among its values. */
  readonly nonFinite?: true;
  /** Of what was written against the source; undefined when nothing changed. */
  readonly statistics?: ErrorStatistics | undefined;
  /** Of a tensor that was solved on calibration data. */
  readonly solved?: {
    /** Mean over inputs of ‖(W − Ŵ) x‖² / ‖W x‖², where W are the target weights. */
    readonly relativeError: number;
    /** Error of the first scales that were tried / error of the result. */
    readonly gain: number;
    /** What was kept of the moment of its inputs: `full`, `blocks of 1024` or `diagonal`. */
    readonly moment?: string | undefined;
    readonly damping: number;
    readonly deadColumns: number;
    readonly inputs: number;
  } | undefined;
  /** Widths that missed `min_accuracy`, with what they reached. */
  readonly tried?: readonly { readonly bits: BitWidth; readonly cosine: number }[] | undefined;
  /** SHA-256 of the bytes that were read for it. */
  readonly sourceSha256: string;
}

/** The input of a run; a resumed run must read the same. */
export interface SourceFingerprint {
  readonly files: readonly {
    readonly name: string;
    readonly bytes: number;
    /** Of the length and the header. */
    readonly headerSha256: string;
  }[];
  /** SHA-256 of config.json, null without one. */
  readonly configSha256: string | null;
}

/** Operation, settings and input of a run: equal identities give equal bytes. */
export interface Identity {
  readonly operation: "quantize" | "dequantize" | "export";
  readonly toolVersion: string;
  /** Canonical JSON of every setting that can change a byte. */
  readonly settings: string;
  readonly source: SourceFingerprint;
}

/** The solver that `auto` chose. */
export interface SolverRecord {
  readonly name: string;
  /** Solver of matrices of fewer than 8 bits whose inputs are not known. */
  readonly byWeights: string;
  readonly roundsEight: boolean;
  readonly why: string;
}

/** What a gradient refinement did. */
export interface RefinementRecord {
  readonly iterations: number;
  /** Why it ended, as a sentence. */
  readonly reason: string;
  readonly kept: boolean;
  readonly heldOutBefore: number;
  readonly heldOutAfter: number;
}

/** Contents of {@linkcode MANIFEST_FILE}. */
export interface Manifest {
  readonly formatVersion: 1;
  readonly identity: Identity;
  readonly settingsSha256: string;
  /** Every file that the run wrote, by name. */
  readonly files: Readonly<Record<string, { readonly bytes: number; readonly sha256: string }>>;
  /** Undefined where the configuration names the solver. */
  readonly solver?: SolverRecord | undefined;
  /** Undefined where none ran. */
  readonly refinement?: RefinementRecord | undefined;
  readonly layers: readonly LayerRecord[];
}

/** Keys in snake case, as in every file of the project; file names and the text of the settings stay. */
const toFileKeys = (value: unknown): unknown =>
  mapKeys(value, remembered((key) => key.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`)));

/** Layers that become text at once: a manifest may have hundreds of thousands. */
const LAYERS_PER_PIECE = 1000;

/** The end of a manifest: a digest of the text before it. */
const manifestEnd = (digest: string): string => `,\n "sha256": "${digest}"\n}\n`;

/** The manifest as it is stored, in pieces. */
export function* manifestText(manifest: Manifest): Generator<string> {
  const hash = createHash("sha256");
  for (const piece of openManifestText(manifest)) {
    hash.update(piece);
    yield piece;
  }
  yield manifestEnd(hash.digest("hex"));
}

/** The manifest's text up to its end. */
function* openManifestText(manifest: Manifest): Generator<string> {
  const { layers, ...head } = manifest;
  const indented = (value: unknown, indent: string) =>
    JSON.stringify(toFileKeys(value), null, 1).replaceAll("\n", `\n${indent}`);
  // Everything but the closing "\n}".
  yield `${indented(head, "").slice(0, -2)},\n "layers": [`;
  for (let begin = 0; begin < layers.length; begin += LAYERS_PER_PIECE) {
    const texts = layers.slice(begin, begin + LAYERS_PER_PIECE).map((layer) =>
      `\n  ${indented(layer, "  ")}`
    );
    yield (begin === 0 ? "" : ",") + texts.join(",");
  }
  yield `${layers.length === 0 ? "" : "\n "}]`;
}

/** Largest manifest, or journal, that is read: 200 000 layers of 1.3 kB. */
export const MAX_MANIFEST_BYTES = 256 * 2 ** 20;

/** Whether a value from a file has a form. */
export type Form = (value: unknown) => boolean;

export const isText: Form = (value) => typeof value === "string";
const isCount: Form = (value) => Number.isSafeInteger(value) && Number(value) >= 0;
const isAbsentOr = (form: Form): Form => (value) => value === undefined || form(value);
export const listOf = (form: Form): Form => (value) => Array.isArray(value) && value.every(form);
export const objectOf = (fields: Readonly<Record<string, Form>>): Form => (value) =>
  isJsonObject(value) && Object.entries(fields).every(([key, form]) => form(value[key]));

export const isIdentity = objectOf({
  operation: isText,
  toolVersion: isText,
  settings: isText,
  source: objectOf({ files: listOf(isJsonObject) }),
});

export const isLayerRecord = objectOf({
  ...{ name: isText, file: isText, action: isText, reason: isText, dtype: isText, shape: listOf(isCount) },
  ...{ bits: isAbsentOr(isCount), groupSize: isAbsentOr(isCount), zeroPoint: isAbsentOr(isText) },
  ...{ bytesBefore: isCount, bytesAfter: isCount, statistics: isAbsentOr(isJsonObject) },
  ...{ solved: isAbsentOr(isJsonObject), tried: isAbsentOr(listOf(isJsonObject)), sourceSha256: isText },
});

const isManifest = objectOf({
  formatVersion: (value) => value === 1,
  identity: isIdentity,
  files: (value) =>
    isJsonObject(value) && Object.values(value).every(objectOf({ bytes: isCount, sha256: isText })),
  solver: isAbsentOr(objectOf({ name: isText, byWeights: isText, why: isText })),
  refinement: isAbsentOr(objectOf({ iterations: isCount, reason: isText })),
  layers: listOf(isLayerRecord),
});

/** The manifest that a text is; undefined for one that is not as this version wrote it, to the byte. */
export function parseManifest(text: string): Manifest | undefined {
  const open = text.slice(0, -manifestEnd(sha256("")).length);
  if (text !== open + manifestEnd(sha256(open))) return undefined;
  try {
    const value = fromFileKeys(JSON.parse(text));
    return isManifest(value) ? value as Manifest : undefined;
  } catch (error) {
    if (error instanceof SyntaxError || error instanceof RangeError) return undefined; // no JSON, or nested too deep
    throw error;
  }
}

/** The inverse of `toFileKeys`. */
function fromFileKeys(value: unknown): unknown {
  return mapKeys(
    value,
    remembered((key) => key.replace(/_(.)/g, (_, letter: string) => letter.toUpperCase())),
  );
}

function remembered(rename: (key: string) => string): (key: string) => string {
  const names = new Map<string, string>();
  return (key) => {
    const name = names.get(key) ?? rename(key);
    names.set(key, name);
    return name;
  };
}

function mapKeys(value: unknown, rename: (key: string) => string): unknown {
  if (Array.isArray(value)) return value.map((item) => mapKeys(item, rename));
  if (typeof value !== "object" || value === null) return value;
  // A loop over keys, not over pairs: hundreds of thousands of layers pass here.
  const mapped: Record<string, unknown> = {};
  for (const key of Object.keys(value)) {
    const item = (value as Record<string, unknown>)[key];
    // File names are data, not keys.
    const isNames = key === "files" && !Array.isArray(item);
    const name = isNames ? key : rename(key);
    // Not assigned: `__proto__` would give the object another prototype.
    Object.defineProperty(mapped, name, {
      value: isNames ? item : mapKeys(item, rename),
      ...{ writable: true, enumerable: true, configurable: true },
    });
  }
  return mapped;
}
