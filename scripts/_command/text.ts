/** Text for people, and printing it. */
import { writeSync } from "node:fs";
import process from "node:process";
import { OutputError } from "../../lib/errors.ts";
import { errorCode } from "../../lib/files/whole.ts";

/**
 * Prints a line, or several, on stdout, all of it before it returns. A reader that has gone away (`| head`) ends the
 * process quietly.
 *
 * @throws {OutputError} when the system refuses, as on a full disk
 */
export function print(text: string): void {
  printText(`${text}\n`);
}

/** {@linkcode print} without the end of the line. */
export function printText(text: string): void {
  const bytes = new TextEncoder().encode(text);
  for (let done = 0; done < bytes.length;) {
    try {
      done += writeSync(1, bytes, done);
    } catch (cause) {
      const code = errorCode(cause);
      if (code === "EPIPE") process.exit();
      if (code !== "EAGAIN") {
        const reason = cause instanceof Error ? cause.message : String(cause);
        throw new OutputError(`Cannot print on standard output: ${reason}`, { cause });
      }
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
