/** Files for the tests of lib/tensor: temporary folders, files with any header, and a reader of its own. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

/** The repository's reference models. */
export const MODELS = fileURLToPath(new URL("../models", import.meta.url));

/** A folder that `remove` deletes with all that is in it. */
export function temporaryFolder(): { path: string; remove: () => void } {
  const path = mkdtempSync(join(tmpdir(), "arrowquant-tensor-"));
  return { path, remove: () => rmSync(path, { recursive: true, force: true }) };
}

/** The bytes of a file with this header, a text or raw bytes, and this much data. */
export function fileBytes(header: string | Uint8Array, data: number | Uint8Array = 0): Uint8Array {
  const head = typeof header === "string" ? new TextEncoder().encode(header) : header;
  const body = typeof data === "number" ? new Uint8Array(data) : data;
  const bytes = new Uint8Array(8 + head.length + body.length);
  new DataView(bytes.buffer).setUint32(0, head.length, true);
  bytes.set(head, 8);
  bytes.set(body, 8 + head.length);
  return bytes;
}

/** Writes a file with this header and data and returns its path. */
export function writeRaw(path: string, header: string | Uint8Array, data: number | Uint8Array = 0): string {
  writeFileSync(path, fileBytes(header, data));
  return path;
}

/** A header entry as text. */
export function entry(
  name: string,
  dtype: string,
  shape: readonly number[],
  start: number,
  end: number,
): string {
  return `${JSON.stringify(name)}:{"dtype":"${dtype}","shape":${
    JSON.stringify(shape)
  },"data_offsets":[${start},${end}]}`;
}

/** What a call throws; fails when it returns. */
export function thrown(call: () => unknown): Error & { code?: string; path?: string; tensor?: string } {
  let result: unknown;
  try {
    result = call();
  } catch (error) {
    return error as Error;
  }
  throw new Error(`expected an error, got ${String(result)}`);
}

/**
 * A safetensors reader written from the format's description alone, sharing nothing with lib/tensor, with the
 * demands of the reference implementation: "{" first, length ≤ 100 MB, tensors in order of offset without
 * holes.
 */
export function readIndependently(path: string) {
  const file = readFileSync(path);
  const headerBytes = Number(file.readBigUInt64LE(0));
  const text = file.subarray(8, 8 + headerBytes).toString("utf8");
  if (!text.startsWith("{") || headerBytes > 100e6) throw new Error("bad header");
  const { __metadata__: metadata, ...entries } = JSON.parse(text);
  const size: Record<string, number> = { F64: 8, F32: 4, F16: 2, BF16: 2, I64: 8, I32: 4, U32: 4, I16: 2 };
  const tensors: Record<string, { dtype: string; shape: number[]; data: Uint8Array }> = {};
  let end = 0;
  type Entry = { dtype: string; shape: number[]; data_offsets: [number, number] };
  const sorted = (Object.entries(entries) as [string, Entry][]).sort((a, b) =>
    a[1].data_offsets[0] - b[1].data_offsets[0] || a[1].data_offsets[1] - b[1].data_offsets[1]
  );
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of sorted) {
    if (from !== end) throw new Error(`hole before ${name}`);
    if (shape.reduce((a, b) => a * b, 1) * (size[dtype] ?? 1) !== to - from) {
      throw new Error(`size of ${name}`);
    }
    tensors[name] = {
      dtype,
      shape,
      data: new Uint8Array(file.subarray(8 + headerBytes + from, 8 + headerBytes + to)),
    };
    end = to;
  }
  if (8 + headerBytes + end !== file.length) throw new Error("trailing bytes");
  return { headerBytes, metadata, tensors, text };
}

/** Deterministic random integers below a bound (mulberry32). */
export function randomIntegers(seed: number): (bound: number) => number {
  return (bound) => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return Math.floor(((t ^ (t >>> 14)) >>> 0) / 2 ** 32 * bound);
  };
}
