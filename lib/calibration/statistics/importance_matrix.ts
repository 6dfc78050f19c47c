/**
 * Importance matrices of llama.cpp as statistics: the diagonal of a second moment, and how often it was added
 * to. Both forms that `llama-imatrix` writes: GGUF (`<name>.in_sum2`, `<name>.counts`, a row an expert), and
 * the older binary one, whose numbers are sums over chunks of text (tools/imatrix/imatrix.cpp,
 * common/imatrix-loader.cpp).
 */
import { closeSync, existsSync, fstatSync } from "node:fs";
import { basename } from "node:path";
import { CalibrationError, FormatError } from "../../errors.ts";
import { openForReading, quote, readFully } from "../../files/positional.ts";
import { sha256 } from "../../files/whole.ts";
import { GgufFile, MAX_TENSORS } from "../../tensor/mod.ts";
import { CalibrationStatistics, equalTimeGroups, timestepAxis } from "../../time/mod.ts";
import { MAX_MOMENT_COLS } from "../../quant/solvers/moments.ts";

/** Endings of such files: GGUF, and the older form by its two usual names. */
const GGUF = ".gguf", OLDER = [".imatrix", ".dat"];
/** Largest file of the older form: one number a column of each layer. */
const MAX_OLDER_BYTES = 2 ** 30;
/** Longest name of a tensor, as GGUF has it. */
const MAX_NAME_BYTES = 2 ** 16;
/** Tokens of a chunk, which the older form does not say: llama.cpp's default. */
const CHUNK_TOKENS = 512;

/** An entry of an importance matrix: Σ x² by column of a layer, or of an expert of several. */
interface Entry {
  readonly name: string;
  readonly sums: Float32Array;
  /** Inputs that were added up. */
  readonly count: number;
  readonly tokens: number;
}

const fault = (path: string, reason: string, tensor?: string) =>
  new FormatError(
    `Cannot read the importance matrix ${quote(path)}: ${
      tensor === undefined ? "" : `${quote(tensor)}: `
    }${reason}`,
    tensor === undefined ? { path } : { path, tensor },
  );

/** Whether a path is named as an importance matrix is, and is one where GGUF can tell. */
export function isImportanceMatrix(path: string): boolean {
  if (!existsSync(path)) return false;
  if (OLDER.some((ending) => path.endsWith(ending))) return true;
  if (!path.endsWith(GGUF)) return false;
  const file = GgufFile.open(path);
  try {
    return file.facts.keys.get("general.type")?.value === "imatrix" ||
      file.tensors.keys().some((name) => name.endsWith(".in_sum2"));
  } finally {
    file.close();
  }
}

/**
 * Statistics of an importance matrix: diagonal moments, without means, ranges and times.
 *
 * @throws {FormatError} when the file is cut off, or holds NaN, negative or no sums
 * @throws {CheckpointError} when it cannot be opened
 */
export function readImportanceMatrix(path: string): CalibrationStatistics {
  const entries = (path.endsWith(GGUF) ? ggufEntries(path) : olderEntries(path)).filter(({ count }) =>
    count > 0
  );
  if (entries.length === 0) throw fault(path, "it must have an entry with inputs, got none");
  const names = new Set<string>();
  for (const { name } of entries) {
    if (names.has(name)) throw fault(path, "entries must have different names, got two", name);
    names.add(name);
  }
  const statistics = new CalibrationStatistics({
    fingerprint: "",
    model: { name: basename(path), layers: new Map() },
    groups: equalTimeGroups(timestepAxis(1), 1),
    inputs: new Map(
      entries.map(({ name, sums: { length } }) => [name, { cols: length, block: 1, layers: [name] }]),
    ),
    runs: [{
      identity: sha256(
        JSON.stringify(entries.map(({ name, count, sums }) => [name, count, sha256(bytesOf(sums))])),
      ),
      source: `importance matrix ${basename(path)}`,
      isSynthetic: false,
      samples: entries.reduce((most, { count }) => Math.max(most, Math.ceil(count)), 0),
    }],
  });
  for (const { name, sums, count, tokens } of entries) {
    const bad = sums.findIndex((value) => !(Number.isFinite(value) && value >= 0));
    if (bad >= 0) throw fault(path, `sums of squares must be ≥ 0, got ${sums[bad]} at ${bad}`, name);
    const input = statistics.inputs.get(name)!;
    input.second!.set(sums);
    input.squares.set(sums);
    input.weight[0] = count;
    input.tokens[0] = tokens;
    input.samples[0] = Math.ceil(count);
  }
  return statistics;
}

const bytesOf = ({ buffer, byteOffset, byteLength }: Float32Array) =>
  new Uint8Array(buffer, byteOffset, byteLength);

/** Entries of a GGUF file; experts of a layer one after the other, `<name>` with the expert's number. */
function ggufEntries(path: string): Entry[] {
  const file = GgufFile.open(path);
  try {
    return [...file.tensors.keys()].filter((name) => name.endsWith(".in_sum2")).flatMap((tensor) => {
      const name = tensor.slice(0, -".in_sum2".length), info = file.tensors.get(tensor)!;
      const counts = file.tensors.get(`${name}.counts`);
      const cols = info.shape.at(-1)!, experts = info.elements / cols;
      if (
        info.dtype !== "F32" || counts?.dtype !== "F32" || counts.elements !== experts || info.elements === 0
      ) {
        throw fault(
          path,
          `it must have F32 sums and as many F32 counts as rows, got ${counts?.elements ?? 0} counts`,
          name,
        );
      }
      if (experts > MAX_TENSORS) {
        throw fault(path, `it must have at most ${MAX_TENSORS} rows, got ${experts}`, name);
      }
      const sums = new Float32Array(file.read(tensor).buffer),
        own = new Float32Array(file.read(`${name}.counts`).buffer);
      return Array.from(own, (count, expert) => {
        checkCounts(path, name, cols, count);
        return {
          name: experts === 1 ? name : name.replace(/\.weight$/, `.${expert}.weight`),
          sums: sums.subarray(expert * cols, (expert + 1) * cols),
          count,
          tokens: Math.ceil(count),
        };
      });
    });
  } finally {
    file.close();
  }
}

function checkCounts(path: string, name: string, cols: number, count: number): void {
  if (cols < 1 || cols > MAX_MOMENT_COLS) {
    throw fault(path, `it must have 1 to ${MAX_MOMENT_COLS} columns, got ${cols}`, name);
  }
  if (!(count >= 0 && count <= Number.MAX_SAFE_INTEGER)) {
    throw fault(path, `counts must be numbers ≥ 0, got ${count}`, name);
  }
}

/** Entries of the older form: little-endian numbers, names with their lengths before them. */
function olderEntries(path: string): Entry[] {
  const bytes = wholeFile(path), view = new DataView(bytes.buffer);
  let at = 0;
  const take = (count: number, what: string) => {
    if (count < 0 || at + count > bytes.length) {
      throw fault(path, `it must not be cut off, got an end in ${what}`);
    }
    at += count;
    return at - count;
  };
  const number = (what: string) => view.getInt32(take(4, what), true);
  const entries = number("the number of entries");
  if (entries < 1 || entries > MAX_TENSORS) {
    throw fault(path, `it must have 1 to ${MAX_TENSORS} entries, got ${entries}`);
  }
  return Array.from({ length: entries }, (_, i) => {
    const length = number(`entry ${i}`);
    if (length < 1 || length > MAX_NAME_BYTES) {
      throw fault(path, `names must have 1 to ${MAX_NAME_BYTES} bytes, got ${length}`);
    }
    const from = take(length, `the name of entry ${i}`);
    const name = new TextDecoder().decode(bytes.subarray(from, from + length));
    const count = number(`entry ${i}`), cols = number(`entry ${i}`);
    checkCounts(path, name, cols, count);
    const start = take(4 * cols, `the numbers of ${name}`);
    return {
      name,
      sums: Float32Array.from({ length: cols }, (_, k) => view.getFloat32(start + 4 * k, true)),
      count,
      tokens: count * CHUNK_TOKENS,
    };
  });
}

/** @throws {CalibrationError} when a file is too large to be one of the older form */
function wholeFile(path: string): Uint8Array<ArrayBuffer> {
  const fd = openForReading(path);
  try {
    const { size } = fstatSync(fd);
    if (size > MAX_OLDER_BYTES) {
      throw new CalibrationError(
        `Cannot read the importance matrix ${
          quote(path)
        }: it must have at most ${MAX_OLDER_BYTES} bytes, got ${size}`,
        { path },
      );
    }
    const bytes = new Uint8Array(size);
    readFully(fd, bytes, 0, path);
    return bytes;
  } finally {
    closeSync(fd);
  }
}
