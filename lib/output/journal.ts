/**
 * The journal of an unfinished run: its identity, then one line for each finished tensor with the digests of
 * its bytes. Each line ends with a digest of itself and of the lines before it.
 *
 * A line is written after its tensor's bytes. Nothing is synced for it: after a loss of power the digests
 * tell which lines are true, so the journal may run ahead of the disk.
 */
import { closeSync, constants, fsyncSync, openSync, writeSync } from "node:fs";
import type { TensorSpec } from "../tensor/mod.ts";
import { WRITE_IN_PLACE, writing } from "../files/positional.ts";
import { readOwnText, sha256, writeWhole } from "../files/whole.ts";
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
  readonly #lines: ChainedLines;

  private constructor(readonly path: string, fd: number, lines: ChainedLines) {
    this.#fd = fd;
    this.#lines = lines;
  }

  /** Begins a journal in place of any that is there. @throws {OutputError} when the system refuses */
  static begin(
    path: string,
    header: Omit<JournalHeader, "journal">,
    entries: readonly JournalEntry[] = [],
  ): Journal {
    const lines = new ChainedLines();
    writeWhole(path, piecesOf(lines, [{ journal: JOURNAL_VERSION, ...header }, ...entries]));
    const fd = writing("open", path, () => openSync(path, WRITE_IN_PLACE | constants.O_APPEND));
    return new Journal(path, fd, lines);
  }

  /** Adds a finished tensor. @throws {OutputError} when the system refuses */
  append(entry: JournalEntry): void {
    const line = new TextEncoder().encode(this.#lines.write(entry));
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

function* piecesOf(lines: ChainedLines, values: readonly unknown[]): Generator<string> {
  for (let begin = 0; begin < values.length; begin += LINES_PER_PIECE) {
    yield values.slice(begin, begin + LINES_PER_PIECE).map((value) => lines.write(value)).join("");
  }
}

/** Lines of JSON objects, whose last key is a digest of the line and of all before it. */
class ChainedLines {
  #digest = "";

  write(value: unknown): string {
    const text = JSON.stringify(value);
    return `${text.slice(0, -1)},"sha256":"${this.#next(text)}"}\n`;
  }

  /** The object of the next line; undefined where it is not as it was written, or not of that form. */
  read<T>(line: string, has: Form): T | undefined {
    const [, head, digest] = /^(.*),"sha256":"([0-9a-f]{64})"\}$/s.exec(line) ?? [], text = `${head}}`;
    if (head === undefined || this.#next(text) !== digest) return undefined;
    try {
      const value: unknown = JSON.parse(text);
      return has(value) ? value as T : undefined;
    } catch {
      return undefined; // a digest can be made for anything
    }
  }

  #next(text: string): string {
    return this.#digest = sha256(this.#digest + text);
  }
}

/** Contents of a journal. */
export interface JournalContent {
  /** Undefined where there is no journal, or its first line is not as it was written. */
  readonly header: JournalHeader | undefined;
  /** Entries up to the first line that is not as it was written. */
  readonly entries: readonly JournalEntry[];
  /** Number of the first line that is not as it was written; half a line at the end is no fault. */
  readonly badLine: number | undefined;
}

/** Reads a journal. @throws {OutputError} when it is there and cannot be read */
export function readJournal(path: string): JournalContent {
  const text = readOwnText(path, MAX_MANIFEST_BYTES) ?? "";
  // Text behind the last line feed is half a line, also where it happens to parse.
  const texts = text.split("\n").slice(0, -1), lines = new ChainedLines(), entries: JournalEntry[] = [];
  const header = lines.read<JournalHeader>(texts[0] ?? "", isHeader);
  if (header === undefined) return { header, entries, badLine: text === "" ? undefined : 1 };
  for (const [i, line] of texts.entries()) {
    if (i === 0) continue;
    const entry = lines.read<JournalEntry>(line, isEntry);
    if (entry === undefined) return { header, entries, badLine: i + 1 };
    entries.push(entry);
  }
  return { header, entries, badLine: undefined };
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
