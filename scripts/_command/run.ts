/** Running a command: signals, exit codes, errors as messages. */
import { accessSync, constants, mkdirSync } from "node:fs";
import { dirname } from "node:path";
import process from "node:process";
import { checkLibraries } from "../../lib/analysis/_libraries.ts";
import { type ErrorCode, InterruptedError, OutputError } from "../../lib/errors.ts";
import { outputError } from "../../lib/files/whole.ts";
import { printJson } from "./text.ts";

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
