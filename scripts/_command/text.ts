/** Text for people, and printing it. */
import { writeSync } from "node:fs";
import process from "node:process";
import { OutputError } from "../../lib/errors.ts";
import { errorCode } from "../../lib/files/whole.ts";

/**
 * Prints a line, or several, on stdout, all of it before it returns. A reader that has gone away (`| head`)
 * ends the process quietly.
 *
 * @throws {OutputError} when the system refuses, as on a full disk
 */
export function print(text: string): void {
  printText(`${visible(text)}\n`);
}

/** Prints lines on stderr. Where it is full or closed nobody can be told; the exit code says it. */
export function printError(text: string): void {
  try {
    writeWhole(2, `${visible(text)}\n`);
  } catch (error) {
    if (errorCode(error) === undefined) throw error;
  }
}

/**
 * A text for a terminal, lines and tabs as they are: what would move the cursor, colour, or turn the
 * direction of reading stands as a code. Names from files are everywhere; JSON stays the same JSON.
 */
export function visible(text: string): string {
  return text.replace(
    /(?![\n\t])[\p{Cc}\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/gu,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** {@linkcode print} without the end of the line. */
export function printText(text: string): void {
  try {
    writeWhole(1, text);
  } catch (cause) {
    if (errorCode(cause) === "EPIPE") process.exit();
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new OutputError(`Cannot print on standard output: ${reason}`, { cause });
  }
}

/** Writes all of a text, waiting for a full pipe. */
function writeWhole(descriptor: number, text: string): void {
  const bytes = new TextEncoder().encode(text);
  for (let done = 0; done < bytes.length;) {
    try {
      done += writeSync(descriptor, bytes, done);
    } catch (error) {
      if (errorCode(error) !== "EAGAIN") throw error;
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, EAGAIN_MILLISECONDS);
    }
  }
}

/** Pause before a full pipe is tried again. */
const EAGAIN_MILLISECONDS = 5;

/** Prints a value as JSON on stdout. */
export function printJson(value: unknown): void {
  print(JSON.stringify(value, null, 2));
}

/** A duration as `1:02:03` or `2:03`. */
export function formatSeconds(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  if (parts[0] === 0) parts.shift();
  return parts.map((part, i) => i === 0 ? `${part}` : `${part}`.padStart(2, "0")).join(":");
}

/** A whole number with a separator every three digits. */
export function formatCount(count: number): string {
  return String(count).replace(/\B(?=(\d{3})+$)/g, ",");
}

/** A name for a terminal: control characters escaped. */
export function printable(text: string): string {
  return text.replace(/\p{C}/gu, (c) => `\\u{${c.codePointAt(0)!.toString(16)}}`);
}
