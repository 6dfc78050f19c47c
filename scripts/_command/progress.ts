/** Progress on stderr: a bar on a terminal, lines or JSON objects elsewhere. */
import process from "node:process";
import { writeSync } from "node:fs";
import { errorCode } from "../../lib/files/whole.ts";
import { type Progress, type RunEvent, stopCheck } from "../../lib/progress.ts";
import { formatBytes } from "../../lib/eval/table.ts";
import { formatSeconds, printable, printError, printText, visible } from "./text.ts";

/** Time between two states: of the bar, of lines where there is no terminal, of JSON objects. */
const PAUSES = { bar: 100, line: 30_000, json: 10_000 };
const BAR_CELLS = 24;

/**
 * Shows how far a run is: a bar on a terminal, a line or an object now and then elsewhere, nothing when
 * quiet. What is shown goes on while the thread is busy, too: {@linkcode stopCheck} calls it.
 */
export class ProgressDisplay {
  readonly #quiet: boolean;
  readonly #form: keyof typeof PAUSES;
  #stage = "starting";
  /** When each stage began; some come in turns. */
  readonly #began = new Map([["starting", performance.now()]]);
  #progress: Progress | undefined;
  #last: number;
  #isDrawn = false;

  /** @param format of the log: text, or one JSON object a line */
  constructor(quiet: boolean, format: "text" | "json" = "text") {
    this.#quiet = quiet;
    this.#form = format === "json" ? "json" : process.stderr.isTTY === true ? "bar" : "line";
    // The first line comes after one pause: short runs print none.
    this.#last = this.#form === "line" ? performance.now() : -Infinity;
  }

  readonly update = (progress: Progress): void => {
    this.#begin(progress.stage ?? "writing");
    this.#progress = progress;
    this.#draw();
  };

  #begin(stage: string): void {
    if (stage === this.#stage) return;
    if (!this.#quiet) stopCheck.beat = this.#draw;
    [this.#stage, this.#progress] = [stage, undefined];
    if (!this.#began.has(stage)) this.#began.set(stage, performance.now());
  }

  readonly #draw = (): void => {
    const now = performance.now();
    if (this.#quiet || now - this.#last < PAUSES[this.#form]) return;
    this.#last = now;
    const seconds = (now - this.#began.get(this.#stage)!) / 1000, own = this.#progress;
    const message = own === undefined
      ? `${this.#stage}  ${formatSeconds(seconds)} elapsed`
      : progressText(own, seconds);
    if (this.#form === "json") {
      return write(`${line({ event: "progress", message, ...stateOf(this.#stage, seconds, own) })}\n`);
    }
    const text = visible(message);
    if (this.#form === "line") return write(`${text}\n`);
    const cells = own === undefined ? 0 : Math.floor(BAR_CELLS * own.bytesDone / Math.max(1, own.bytes));
    const bar = "█".repeat(cells) + "░".repeat(BAR_CELLS - cells);
    const width = Math.max(20, (process.stderr.columns || 80) - 1);
    write(`\r\x1b[K${`${bar} ${text}`.slice(0, width)}`);
    this.#isDrawn = true;
  };

  /** Prints a line above the bar. */
  readonly log = (line: string): void => this.#print(line, { event: "log", message: line });

  /** Prints what happened in a run, with its numbers where the log is JSON. */
  readonly event = ({ kind, message, data }: RunEvent): void => {
    if (kind === "stage") this.#begin(message);
    // Stages are in the bar, layers in the summary.
    else if (kind !== "layer" || this.#form === "json") {
      this.#print(`${kind}: ${printable(message)}`, {
        event: kind,
        message,
        ...(kind === "layer" ? data : { data }),
      });
    }
    if (kind === "stage") this.#draw();
  };

  /** The end of a run, for machines; people get a summary. */
  result(message: string, data: Readonly<Record<string, unknown>>): void {
    if (this.#form === "json") this.#print("", { event: "result", message, ...data });
  }

  #print(text: string, entry: Readonly<Record<string, unknown>>): void {
    if (this.#quiet) return;
    this.clear();
    printError(this.#form === "json" ? line(entry) : text);
  }

  /** Removes the bar. */
  clear(): void {
    if (this.#isDrawn) write("\r\x1b[K");
    this.#isDrawn = false;
  }
}

const line = (entry: Readonly<Record<string, unknown>>) =>
  JSON.stringify({ time: new Date().toISOString(), ...entry });

/** Writes to stderr at once, however busy the thread; what the system does not take is left out. */
function write(text: string): void {
  try {
    writeSync(2, text);
  } catch (error) {
    if (errorCode(error) === undefined) throw error;
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

/** Rates of a state and the time that is left; work of an earlier run is not counted. */
function rates({ bytes, bytesDone, bytesResumed, weightsDone }: Progress, seconds: number) {
  const bytesPerSecond = (bytesDone - bytesResumed) / Math.max(seconds, 1e-3);
  // Weights of an earlier run are not known apart from its bytes: their share is the same.
  const share = bytesDone === 0 ? 0 : (bytesDone - bytesResumed) / bytesDone;
  const secondsLeft = bytesPerSecond > 0 ? (bytes - bytesDone) / bytesPerSecond : undefined;
  return { bytesPerSecond, weightsPerSecond: weightsDone * share / Math.max(seconds, 1e-3), secondsLeft };
}

/** A run's state as one line: stage, share, parts, times, rates, tensor at work. */
export function progressText(progress: Progress, seconds: number): string {
  const { stage = "writing", parts = "tensors", unit = "weights", tensorShare } = progress;
  const { bytesPerSecond, weightsPerSecond, secondsLeft } = rates(progress, seconds);
  const rate = progress.weights === 0
    ? `${(progress.tensorsDone / Math.max(seconds, 1e-3)).toPrecision(3)} ${parts}/s`
    : unit !== "weights"
    ? `${weightsPerSecond.toPrecision(3)} ${unit}/s`
    : `${(weightsPerSecond / 1e6).toFixed(weightsPerSecond < 1e7 ? 2 : 0)} M weights/s`;
  return [
    stage,
    `${Math.floor(100 * progress.bytesDone / Math.max(1, progress.bytes))}%`,
    `${progress.tensorsDone}/${progress.tensors} ${parts}${
      tensorShare === undefined ? "" : ` and ${Math.floor(100 * tensorShare)}% of one`
    }`,
    `${formatSeconds(seconds)} elapsed`,
    ...(secondsLeft === undefined ? [] : [`${formatSeconds(secondsLeft)} left`]),
    rate,
    ...(stage === "writing" ? [`${formatBytes(bytesPerSecond)}/s`] : []),
    progress.tensor,
  ].join("  ").trimEnd();
}

/** A run's state for machines. */
function stateOf(stage: string, elapsedSeconds: number, progress: Progress | undefined) {
  if (progress === undefined) return { stage, elapsedSeconds };
  const { tensor, tensorsDone, tensors, tensorShare, parts = "tensors", unit = "weights", bytes, bytesDone } =
    progress;
  const { bytesPerSecond, weightsPerSecond, secondsLeft } = rates(progress, elapsedSeconds);
  return {
    stage,
    share: bytesDone / Math.max(1, bytes),
    elapsedSeconds,
    secondsLeft,
    tensor,
    tensorShare,
    [`${parts}Done`]: tensorsDone,
    [parts]: tensors,
    ...(progress.weights === 0 ? {} : { [`${unit}PerSecond`]: weightsPerSecond }),
    ...(stage === "writing" ? { bytesPerSecond } : {}),
  };
}
