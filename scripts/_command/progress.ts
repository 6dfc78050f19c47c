/** Progress on stderr: a bar on a terminal, lines or JSON objects elsewhere. */
import process from "node:process";
import type { Progress, RunEvent } from "../../lib/progress.ts";
import { formatBytes } from "../../lib/eval/table.ts";
import { formatSeconds, printable, printError, printText, visible } from "./text.ts";

const BAR_MILLISECONDS = 100;
const LINE_MILLISECONDS = 5000;
const BAR_CELLS = 24;

/** Shows how far a run is: a bar on a terminal, a line every few seconds elsewhere, nothing when quiet. */
export class ProgressDisplay {
  readonly #quiet: boolean;
  readonly #format: "text" | "json";
  readonly #isTerminal = process.stderr.isTTY === true;
  readonly #started = performance.now();
  #last = performance.now() - BAR_MILLISECONDS;
  #isDrawn = false;

  /** @param format of the log: text, or one JSON object a line, without progress */
  constructor(quiet: boolean, format: "text" | "json" = "text") {
    this.#quiet = quiet;
    this.#format = format;
  }

  readonly update = (progress: Progress): void => {
    const now = performance.now();
    const pause = this.#isTerminal ? BAR_MILLISECONDS : LINE_MILLISECONDS;
    if (this.#quiet || this.#format === "json" || now - this.#last < pause) return;
    if (!this.#isTerminal && this.#last < this.#started) {
      this.#last = now; // the first line comes after one pause: short runs print none
      return;
    }
    this.#last = now;
    const text = visible(progressText(progress, (now - this.#started) / 1000));
    if (!this.#isTerminal) {
      process.stderr.write(`${text}\n`);
      return;
    }
    const cells = Math.floor(BAR_CELLS * progress.bytesDone / Math.max(1, progress.bytes));
    const bar = "█".repeat(cells) + "░".repeat(BAR_CELLS - cells);
    const width = Math.max(20, (process.stderr.columns || 80) - 1);
    process.stderr.write(`\r\x1b[K${`${bar} ${text}`.slice(0, width)}`);
    this.#isDrawn = true;
  };

  /** Prints a line above the bar. */
  readonly log = (line: string): void => this.#print(line, { event: "log", message: line });

  /** Prints what happened in a run, with its numbers where the log is JSON. */
  readonly event = ({ kind, message, data }: RunEvent): void =>
    this.#print(`${kind}: ${printable(message)}`, { event: kind, message, data });

  #print(line: string, entry: Readonly<Record<string, unknown>>): void {
    if (this.#quiet) return;
    this.clear();
    const text = this.#format === "text"
      ? line
      : JSON.stringify({ time: new Date().toISOString(), ...entry });
    printError(text);
  }

  /** Removes the bar. */
  clear(): void {
    if (this.#isDrawn) process.stderr.write("\r\x1b[K");
    this.#isDrawn = false;
  }
}

/** What a display of states writes to; standard output is one. */
export interface StateStream {
  readonly isTTY?: boolean;
  readonly columns?: number;
}

/** Shows the states that a text goes through: in place on a terminal, a line each elsewhere. */
export class StateDisplay {
  readonly #stream: StateStream;
  readonly #write: (text: string) => void;
  #rows = 0;

  constructor(stream: StateStream = process.stdout, write: (text: string) => void = printText) {
    this.#stream = stream;
    this.#write = write;
  }

  readonly show = (line: string): void => {
    if (this.#stream.isTTY !== true) return this.#write(`${visible(line)}\n`);
    // Up to the first row of what stands there, and away with it.
    const back = this.#rows === 0 ? "" : `\r${this.#rows > 1 ? `\x1b[${this.#rows - 1}A` : ""}\x1b[J`;
    this.#write(back + visible(line));
    this.#rows = Math.max(1, Math.ceil(cells(line) / (this.#stream.columns || 80)));
  };

  /** Ends the row that stands there. */
  end(): void {
    if (this.#rows > 0) this.#write("\n");
    this.#rows = 0;
  }
}

/** Cells of a terminal that a text takes: most characters of East Asian scripts, and emoji, take two. */
function cells(text: string): number {
  let count = 0;
  for (const character of text) {
    const code = character.codePointAt(0)!;
    const isWide = (code >= 0x1100 && code <= 0x115f) || (code >= 0x2e80 && code <= 0xa4cf) ||
      (code >= 0xac00 && code <= 0xd7a3) || (code >= 0xf900 && code <= 0xfaff) ||
      (code >= 0xfe30 && code <= 0xfe6f) || (code >= 0xff00 && code <= 0xff60) || code >= 0x1f300;
    count += isWide ? 2 : 1;
  }
  return count;
}

/** A run's state as one line: share, tensors, rates, remaining time, tensor at work. */
export function progressText(progress: Progress, seconds: number): string {
  const { bytes, bytesDone, bytesResumed, weightsDone, tensorsDone, tensors, tensor } = progress;
  const bytesPerSecond = (bytesDone - bytesResumed) / Math.max(seconds, 1e-3);
  // Weights of an earlier run are not known apart from its bytes: their share is the same.
  const share = bytesDone === 0 ? 0 : (bytesDone - bytesResumed) / bytesDone;
  const weightsPerSecond = weightsDone * share / Math.max(seconds, 1e-3);
  const left = bytesPerSecond > 0 ? `${formatSeconds((bytes - bytesDone) / bytesPerSecond)} left` : "";
  const percent = Math.floor(100 * bytesDone / Math.max(1, bytes));
  return `${percent}%  ${tensorsDone}/${tensors} tensors  ${
    (weightsPerSecond / 1e6).toFixed(0)
  } M weights/s  ` +
    `${formatBytes(bytesPerSecond)}/s  ${left}  ${tensor}`;
}
