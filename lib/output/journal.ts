/**
 * The journal of an unfinished run: its identity, then one line for each finished tensor with the digests of
 * its bytes.
 *
 * A line is written after its tensor's bytes. Nothing is synced for it: after a loss of power the digests
 * tell which lines are true, so the journal may run ahead of the disk.
 */
import { closeSync, fsyncSync, openSync, writeSync } from "node:fs";
import type { TensorSpec } from "../tensor/mod.ts";
import { writing } from "../files/positional.ts";
import { readOwnText, writeWhole } from "../files/whole.ts";
import {
  type Form,
  type Identity,
  isIdentity,
  isLayerRecord,
  isText,
  type LayerRecord,
  listOf,
  MAX_MANIFEST_BYTES,
  objectOf,
} from "./record.ts";

/** Version of the journal's lines. */
const JOURNAL_VERSION = 1;

/** An entry as it was written, with the digest of its bytes. */
export interface WrittenTensor extends TensorSpec {
  readonly sha256: string;
}

/** A finished tensor: what was written for it. */
export interface JournalEntry {
  readonly record: LayerRecord;
  readonly tensors: readonly WrittenTensor[];
}

/** The journal's first line. */
interface JournalHeader {
  readonly journal: typeof JOURNAL_VERSION;
  readonly identity: Identity;
  /** When the source's files were last changed, in milliseconds; a resumed run must find the same. */
  readonly sourceTimes: readonly number[];
  /** Every name that the run gives to a file. */
  readonly files: readonly string[];
}

/** An open journal. */
export class Journal {
  #fd: number | undefined;

  private constructor(readonly path: string, fd: number) {
    this.#fd = fd;
  }

  /** Begins a journal in place of any that is there. @throws {OutputError} when the system refuses */
  static begin(
    path: string,
    header: Omit<JournalHeader, "journal">,
    entries: readonly JournalEntry[] = [],
  ): Journal {
    writeWhole(path, linesOf([{ journal: JOURNAL_VERSION, ...header }, ...entries]));
    return new Journal(path, writing("open", path, () => openSync(path, "a")));
  }

  /** Adds a finished tensor. @throws {OutputError} when the system refuses */
  append(entry: JournalEntry): void {
    const line = new TextEncoder().encode(`${JSON.stringify(entry)}\n`);
    writing("write", this.path, () => {
      for (let done = 0; done < line.length;) done += writeSync(this.#fd!, line, done);
    });
  }

  /** Makes what was added survive a crash of the machine. @throws {OutputError} when the system refuses */
  sync(): void {
    const fd = this.#fd;
    if (fd !== undefined) writing("sync", this.path, () => fsyncSync(fd));
  }

  close(): void {
    const fd = this.#fd;
    this.#fd = undefined;
    if (fd !== undefined) closeSync(fd);
  }
}

/** Lines that become text at once. */
const LINES_PER_PIECE = 1000;

function* linesOf(values: readonly unknown[]): Generator<string> {
  for (let begin = 0; begin < values.length; begin += LINES_PER_PIECE) {
    yield values.slice(begin, begin + LINES_PER_PIECE).map((value) => `${JSON.stringify(value)}\n`).join("");
  }
}

/**
 * Reads a journal: its header, undefined when there is none that can be used, and the entries up to the first
 * line that is not whole.
 *
 * @throws {OutputError} when it is there and cannot be read
 */
export function readJournal(path: string): { header: JournalHeader | undefined; entries: JournalEntry[] } {
  const text = readOwnText(path, MAX_MANIFEST_BYTES) ?? "";
  const [first, ...rest] = text.split("\n"), entries: JournalEntry[] = [];
  const header = parseLine<JournalHeader>(first!, isHeader);
  if (header === undefined) return { header, entries };
  // Text behind the last line feed is half a line, also where it happens to parse.
  for (const line of rest.slice(0, -1)) {
    const entry = parseLine<JournalEntry>(line, isEntry);
    if (entry === undefined) break;
    entries.push(entry);
  }
  return { header, entries };
}

const isHeader = objectOf({
  journal: (version) => version === JOURNAL_VERSION,
  identity: isIdentity,
  sourceTimes: listOf(Number.isSafeInteger),
  files: listOf(isText),
});
const isEntry = objectOf({
  record: isLayerRecord,
  tensors: listOf(
    objectOf({ name: isText, dtype: isText, shape: listOf(Number.isSafeInteger), sha256: isText }),
  ),
});

function parseLine<T>(line: string, has: Form): T | undefined {
  try {
    const value: unknown = JSON.parse(line);
    return has(value) ? value as T : undefined;
  } catch {
    return undefined; // the run was stopped while writing it
  }
}
