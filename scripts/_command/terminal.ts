/** What the commands share: options, exit codes, signals, progress, and text for people. */
import { accessSync, constants, mkdirSync, readFileSync, writeSync } from "node:fs";
import { dirname } from "node:path";
import process from "node:process";
import { parseArgs } from "@std/cli/parse-args";
import { checkLibraries } from "../../lib/analysis/_libraries.ts";
import { ConfigError, type ErrorCode, InterruptedError, OutputError } from "../../lib/errors.ts";
import type { Progress, RunEvent } from "../../lib/progress.ts";
import { errorCode, outputError } from "../../lib/files/whole.ts";

/** Exit codes by error code; docs/errors.md lists them. */
export const EXIT_CODES: Readonly<Record<Exclude<ErrorCode, "AQ_INTERRUPTED">, number>> = {
  AQ_CONFIG: 2,
  AQ_FORMAT: 3,
  AQ_CHECKPOINT: 3,
  AQ_WEIGHTS: 3,
  AQ_OUTPUT: 4,
  AQ_INTEGRITY: 4,
  AQ_CALIBRATION: 3,
  AQ_KERNELS: 5,
  AQ_MEMORY: 6,
};

/** The last lines of every `--help`. */
export const EXIT_CODE_HELP = `Exit codes:
  0 done    1 unexpected error    2 options or configuration    3 bad input    4 output    5 kernels    6 memory
  130, 143 stopped by SIGINT or SIGTERM; what was done is kept`;

// Options ------------------------------------------------------------------------------------------------------

/** A command's options: names without dashes. */
export interface Options<B extends string, S extends string> {
  /** First line is the usage. */
  readonly help: string;
  readonly boolean: readonly B[];
  readonly string: readonly S[];
}

/** Parsed options. */
export interface Parsed<B extends string, S extends string> {
  readonly positionals: readonly string[];
  readonly flags: Readonly<Record<B, boolean>>;
  readonly values: Readonly<Partial<Record<S, string>>>;
}

/** How options begin that leave something out. */
const NEGATION = "no-";

/**
 * Parses a command line.
 *
 * @throws {ConfigError} on an option that does not exist, one without its value, or a value that none takes
 */
export function parseOptions<B extends string, S extends string>(
  args: readonly string[],
  options: Options<B, S>,
): Parsed<B, S> {
  const known = [...options.boolean, ...options.string];
  const unknown: string[] = [];
  const end = args.indexOf("--");
  const own = end < 0 ? args : args.slice(0, end);
  const valued = own.find((arg) => options.boolean.some((name) => arg.startsWith(`--${name}=`)));
  if (valued !== undefined) {
    const name = valued.slice(0, valued.indexOf("="));
    throw usageError(`option "${name}" takes no value, got "${valued}"`, options.help);
  }
  // A negative number is a value, not an option: what is wrong with it is for its key to say.
  const joined = args.flatMap((arg, i) => {
    const isInside = end < 0 || i < end;
    const takesNext = (name: string | undefined) => options.string.some((option) => name === `--${option}`);
    if (isInside && takesNext(args[i - 1]) && /^-\d/.test(arg)) return [];
    const next = args[i + 1] ?? "";
    return isInside && takesNext(arg) && /^-\d/.test(next) ? [`${arg}=${next}`] : [arg];
  });
  // The parser reads `--no-x` as x negated.
  const negatable = options.boolean.filter((name) => name.startsWith(NEGATION)).map((name) =>
    name.slice(NEGATION.length)
  );
  const parsed = parseArgs(joined, {
    boolean: [...options.boolean.filter((name) => !name.startsWith(NEGATION)), ...negatable] as string[],
    negatable,
    default: Object.fromEntries(negatable.map((name) => [name, true])),
    string: ["_", ...options.string] as string[],
    unknown: (arg: string) => {
      if (!arg.startsWith("-") || arg === "-") return true;
      unknown.push(arg);
      return false;
    },
  });
  const [wrong] = unknown;
  if (wrong !== undefined) {
    const name = wrong.replace(/^-+/, "").replace(/=.*$/s, "");
    const near = known.find((option) => distance(option, name) <= Math.max(1, Math.floor(option.length / 3)));
    throw usageError(
      `unknown option "${wrong}"${near === undefined ? "" : `; did you mean "--${near}"?`}`,
      options.help,
    );
  }
  const values: Partial<Record<S, string>> = {};
  for (const name of options.string) {
    const value = parsed[name];
    if (value === undefined) continue;
    if (value === "") throw usageError(`option "--${name}" needs a value`, options.help);
    values[name] = String(value);
  }
  const flags = Object.fromEntries(options.boolean.map((name) => [
    name,
    name.startsWith(NEGATION)
      ? (parsed[name.slice(NEGATION.length)] as unknown) === false
      : (parsed[name] as unknown) === true,
  ]));
  return { positionals: parsed._.map(String), flags: flags as Record<B, boolean>, values };
}

/** The process's environment; empty, with a notice, where Deno may not read it. */
export function environmentVariables(
  notice: (line: string) => void,
): Readonly<Record<string, string | undefined>> {
  try {
    return { ...process.env };
  } catch (error) {
    if (!(error instanceof Error) || error.name !== "NotCapable") throw error;
    notice("notice: ARROW_QUANT_* variables are not read: no permission (--allow-env)");
    return {};
  }
}

/**
 * Makes the folder that a report will lie in, and looks for the packages it takes, before the work that it reports is done.
 *
 * @throws {OutputError} when the system refuses, or would refuse a file there
 * @throws {ConfigError} when packages are missing
 */
export function prepareReport(target: string): void {
  checkLibraries();
  const folder = target.endsWith(".html") ? dirname(target) : target;
  try {
    mkdirSync(folder, { recursive: true });
    accessSync(folder, constants.W_OK);
  } catch (cause) {
    throw outputError("write a report into", folder, cause);
  }
}

/** A command line as it can be given again. */
export function commandLine(script: string, args: readonly string[]): string {
  const runner = "Deno" in globalThis ? "deno run -A" : "bun run";
  const quoted = args.map((arg) => /^[\w@%+=:,./-]+$/.test(arg) ? arg : `'${arg.replaceAll("'", "'\\''")}'`);
  // Bundled into the npm package, scripts are its commands.
  const start = import.meta.url.endsWith(".ts")
    ? [runner, `scripts/${script}`]
    : ["npx", `arrowquant-${script.replace(/\.ts$/, "")}`];
  return [...start, ...quoted].join(" ");
}

/** A mistake in the command line. */
export function usageError(reason: string, help: string): ConfigError {
  return new ConfigError(`Cannot run the command: ${reason}\n${help.split("\n")[0]}\n--help says more`);
}

/** Levenshtein distance. */
function distance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next.push(Math.min(row[j]! + 1, next[j - 1]! + 1, row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1)));
    }
    row = next;
  }
  return row[b.length]!;
}

// Running ------------------------------------------------------------------------------------------------------

/**
 * Runs a command to its exit code. SIGINT and SIGTERM abort the signal; a second one ends the process at once.
 *
 * An error is one message on stderr, and with `--json` an object on stdout.
 */
export async function runCommand(
  main: (args: readonly string[], signal: AbortSignal) => Promise<number | void>,
): Promise<void> {
  const args = process.argv.slice(2);
  const controller = new AbortController();
  const stop = (signal: "SIGINT" | "SIGTERM") => {
    if (controller.signal.aborted) process.exit(signalExitCode(signal));
    controller.abort(signal);
    process.stderr.write(`\n${signal}: finishing the current chunk; a second signal stops at once\n`);
  };
  const [onInterrupt, onTerminate] = [() => stop("SIGINT"), () => stop("SIGTERM")];
  process.on("SIGINT", onInterrupt);
  process.on("SIGTERM", onTerminate);
  try {
    process.exitCode = await main(args, controller.signal) ?? 0;
  } catch (error) {
    process.exitCode = report(error, args.includes("--json"));
  } finally {
    process.off("SIGINT", onInterrupt);
    process.off("SIGTERM", onTerminate);
  }
}

const signalExitCode = (signal: string): number => signal === "SIGTERM" ? 143 : 130;

function report(error: unknown, asJson: boolean): number {
  const { code, path, tensor } = error as { code?: unknown; path?: unknown; tensor?: unknown };
  const exitCode = error instanceof InterruptedError
    ? signalExitCode(error.signal)
    : typeof code === "string" && Object.hasOwn(EXIT_CODES, code)
    ? EXIT_CODES[code as keyof typeof EXIT_CODES]
    : 1;
  const message = error instanceof Error ? error.message : String(error);
  if (asJson) {
    try {
      printJson({ error: { code: exitCode === 1 ? "UNEXPECTED" : code, message, path, tensor, exitCode } });
    } catch (failed) {
      // Standard output is what failed, or has failed too: standard error says so.
      if (!(failed instanceof OutputError)) throw failed;
    }
  }
  if (exitCode === 1) console.error(error); // a defect: its place matters
  else process.stderr.write(`error: ${message}\n`);
  return exitCode;
}

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
function printText(text: string): void {
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

// Progress -----------------------------------------------------------------------------------------------------

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
    const text = progressText(progress, (now - this.#started) / 1000);
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
    process.stderr.write(`${text}\n`);
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
    if (this.#stream.isTTY !== true) return this.#write(`${line}\n`);
    // Up to the first row of what stands there, and away with it.
    const back = this.#rows === 0 ? "" : `\r${this.#rows > 1 ? `\x1b[${this.#rows - 1}A` : ""}\x1b[J`;
    this.#write(back + line);
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

// Text ---------------------------------------------------------------------------------------------------------

/** Bytes for people: decimal units, three digits. */
export function formatBytes(bytes: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (bytes >= 999.5 && unit < units.length - 1) {
    bytes /= 1000;
    unit++;
  }
  return `${unit === 0 ? bytes.toFixed(0) : bytes.toPrecision(3)} ${units[unit]}`;
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

/** Rows of cells as aligned lines; columns in `right` are aligned to the right. */
export function formatTable(rows: readonly (readonly string[])[], right: readonly number[] = []): string {
  const widths: number[] = [];
  for (const row of rows) row.forEach((cell, i) => widths[i] = Math.max(widths[i] ?? 0, cell.length));
  return rows.map((row) =>
    row.map((cell, i) => right.includes(i) ? cell.padStart(widths[i]!) : cell.padEnd(widths[i]!)).join("  ")
      .trimEnd()
  ).join("\n");
}

/** A name for a terminal: control characters escaped. */
export function printable(text: string): string {
  return text.replace(/\p{C}/gu, (c) => `\\u{${c.codePointAt(0)!.toString(16)}}`);
}

/** Largest resident memory of this process so far, undefined where the system does not say. */
export function peakMemoryBytes(): number | undefined {
  try {
    const kilobytes = /^VmHWM:\s*(\d+) kB$/m.exec(readFileSync("/proc/self/status", "utf8"))?.[1];
    if (kilobytes !== undefined) return Number(kilobytes) * 1024;
  } catch {
    // Not Linux: the runtime may know.
  }
  const { maxRSS } = process.resourceUsage();
  return maxRSS > 0 ? maxRSS * 1024 : undefined;
}
