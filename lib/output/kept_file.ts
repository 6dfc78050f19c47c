/** Headers with arrays behind them, a file each in the work folder: whole, or as good as absent. */
import { Buffer } from "node:buffer";
import { createHash } from "node:crypto";
import { ownKind, readWhole, writeWhole } from "../files/whole.ts";
import { giveBack } from "../quant/array_memory.ts";

const ARRAYS = { Uint8Array, Uint16Array, Uint32Array, Float32Array, Float64Array } as const;
type KeptArray = InstanceType<(typeof ARRAYS)[keyof typeof ARRAYS]>;

/** Of a SHA-256 in hexadecimal. */
const DIGEST_CHARACTERS = 64;

/** Largest file: sums of a stage of 28,672 columns that adds to a stream of 8192 take 2.2 GiB. */
const MAX_KEPT_BYTES = 2 ** 32;

/** Bytes that are hashed at once. */
const HASH_BYTES = 2 ** 30;

/** SHA-256 of pieces, in hexadecimal. */
function digestOf(pieces: readonly Uint8Array[]): string {
  const hash = createHash("sha256");
  for (const piece of pieces) {
    for (let at = 0; at < piece.length; at += HASH_BYTES) hash.update(piece.subarray(at, at + HASH_BYTES));
  }
  return hash.digest("hex");
}

/** Second line of a file; the first is the SHA-256 of everything behind it, the arrays follow. */
interface Content<Header> {
  /** Of the problem: what another run has left is not taken. */
  readonly identity: string;
  readonly header: Header;
  readonly arrays: readonly { readonly type: keyof typeof ARRAYS; readonly bytes: number }[];
}

/** What a file keeps. */
export interface Kept<Header> {
  readonly header: Header;
  readonly arrays: readonly KeptArray[];
}

/**
 * Writes a file; its name stands for all of it.
 *
 * @param syncs whether it should outlive a loss of power, after which it may otherwise count as absent
 * @throws {OutputError} when the system refuses
 */
export function writeKept<Header>(
  path: string,
  identity: string,
  { header, arrays }: Kept<Header>,
  syncs = true,
): void {
  const parts = arrays.map(({ buffer, byteOffset, byteLength }) =>
    new Uint8Array(buffer, byteOffset, byteLength)
  );
  const forms = arrays.map((array) => ({
    type: array.constructor.name as keyof typeof ARRAYS,
    bytes: array.byteLength,
  }));
  const line = JSON.stringify({ identity, header, arrays: forms } satisfies Content<Header>);
  const content = [Buffer.from(`${line}\n`), ...parts];
  writeWhole(path, [`${digestOf(content)}\n`, ...content], syncs);
}

/** Reads a file; undefined where there is none of this identity, or it is not as it was written. */
export function readKept<Header>(path: string, identity: string): Kept<Header> | undefined {
  const bytes = readThere(path);
  if (bytes === undefined) return undefined;
  const file = Buffer.from(bytes.buffer), decoder = new TextDecoder();
  const content = file.subarray(DIGEST_CHARACTERS + 1);
  // What its digest does not fit was not written by this tool, or not whole: done again.
  if (decoder.decode(file.subarray(0, DIGEST_CHARACTERS)) !== digestOf([content])) return undefined;
  const end = content.indexOf(10);
  const { identity: own, header, arrays } = JSON.parse(decoder.decode(content.subarray(0, end))) as Content<
    Header
  >;
  if (own !== identity) return undefined;
  let at = end + 1;
  const copies = arrays.map(({ type, bytes }) => {
    const own = new Uint8Array(content.subarray(at, at + bytes));
    at += bytes;
    return new ARRAYS[type](own.buffer);
  });
  giveBack(bytes);
  return { header, arrays: copies };
}

/** A file's bytes; undefined where there is none, also where another task has just deleted it. */
function readThere(path: string): Uint8Array<ArrayBuffer> | undefined {
  if (ownKind(path) !== "file") return undefined;
  try {
    return readWhole(path, MAX_KEPT_BYTES);
  } catch (error) {
    if (ownKind(path) === "nothing") return undefined;
    throw error;
  }
}
