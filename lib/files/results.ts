/** Files made for people: pictures, pages, tables. They replace only files that this tool made, too. */
import { closeSync, fstatSync } from "node:fs";
import { extname } from "node:path";
import { OutputError } from "../errors.ts";
import { openForReading, quote, readFully } from "./positional.ts";
import { type FileDigest, ownKind, writeWhole } from "./whole.ts";

/** Mark in every such file, in a place that no reader minds. */
export const MADE_BY = "made by ArrowQuant";
/** That, or what tables and runs say anyway. */
const MARKS = [MADE_BY, '"format": "arrowquant-run"', "arrowquant.table"];
/** Of a file's start and of its end; marks are looked for there. */
const LOOKED_AT_BYTES = 2 ** 16;

/**
 * Checks that a file may be written: that there is none, or one that this tool made.
 *
 * @param force whether it may replace any file
 * @throws {OutputError} naming the file otherwise
 */
export function checkReplaceable(path: string, force = false): void {
  const kind = ownKind(path);
  if (force || (kind !== "file" && kind !== "link") || (kind === "file" && isOurs(path))) return;
  const got = kind === "link" ? "a link" : "one that this tool did not make";
  const remedy = "choose another name, move it away, or replace it with --force";
  throw new OutputError(
    `Cannot write ${quote(path)}: must be no file of somebody else, got ${got}: ${remedy}`,
    {
      path,
    },
  );
}

/**
 * Writes a file for people, with its mark where it is a text.
 *
 * @throws {OutputError} as {@linkcode checkReplaceable}, and when the system refuses
 */
export function writeResult(path: string, content: string | Uint8Array, force = false): FileDigest {
  checkReplaceable(path, force);
  const isText = typeof content === "string" && extname(path) !== ".json";
  const mark = extname(path) === ".txt" ? MADE_BY : `<!-- ${MADE_BY} -->`;
  return writeWhole(path, isText ? `${content.trimEnd()}\n${mark}\n` : content);
}

function isOurs(path: string): boolean {
  const fd = openForReading(path), piece = new Uint8Array(LOOKED_AT_BYTES);
  try {
    const { size } = fstatSync(fd);
    return size === 0 || [0, Math.max(0, size - LOOKED_AT_BYTES)].some((start) => {
      const text = new TextDecoder("latin1").decode(piece.subarray(0, readFully(fd, piece, start, path)));
      return MARKS.some((mark) => text.includes(mark));
    });
  } finally {
    closeSync(fd);
  }
}
