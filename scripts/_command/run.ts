/** Running a command: signals, exit codes, errors as messages. */
import { accessSync, constants, mkdirSync } from "node:fs";
import { dirname, join } from "node:path";
import process from "node:process";
import { inspect } from "node:util";
import { checkLibraries } from "../../lib/analysis/_libraries.ts";
import { type ErrorCode, InterruptedError, OutputError } from "../../lib/errors.ts";
import { loadConfig } from "../../lib/config/mod.ts";
import { limitsOf } from "../../lib/files/limits.ts";
import { checkReplaceable } from "../../lib/files/results.ts";
import { outputError } from "../../lib/files/whole.ts";
import type { OpenOptions } from "../../lib/native/mod.ts";
import {
  type Arguments,
  commandLine,
  environmentVariables,
  helpText,
  parseArguments,
  type Usage,
  UsageError,
  usageLine,
} from "./options.ts";
import { catchSignals, dropSignals, signalExitCode } from "./signals.ts";
import { formatBytes } from "../../lib/eval/table.ts";
import { formatSeconds, print, printError, printJson } from "./text.ts";

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

/** Things that a command is given beside its arguments. */
export interface Context {
  /** Aborted by SIGHUP, SIGINT and SIGTERM. */
  readonly signal: AbortSignal;
  /** The command line as it can be given again. */
  readonly command: string;
}

/**
 * A command as a function of its arguments and of the name that it was called by: parses them, runs `main`
 * and sets the exit code. SIGHUP, SIGINT and SIGTERM abort the signal; a second one ends the process at once.
 * An error is one message on stderr, and with `--json` an object on stdout.
 */
export const defineCommand = <U extends Usage>(
  usage: U,
  main: (parsed: Arguments<U>, context: Context) => Promise<number | void> | number | void,
) =>
async (args: readonly string[] = process.argv.slice(2), name: string = usage.name): Promise<void> => {
  const named = { ...usage, name };
  const controller = new AbortController();
  catchSignals(controller);
  try {
    const parsed = parseArguments(usage, args);
    const context = { signal: controller.signal, command: commandLine(name, args) };
    if ((parsed.flags as Record<string, boolean>)["help"]) print(helpText(named));
    else process.exitCode = await main(parsed, context) ?? 0;
  } catch (error) {
    if (error instanceof InterruptedError) await handled(controller.signal);
    if (error instanceof UsageError) error.message += `\n${usageLine(named)}\n--help says more`;
    process.exitCode = report(error, args.includes("--json"));
  } finally {
    dropSignals();
  }
};

/** A signal that stopped a kernel reaches its handler this soon, however busy the machine is. */
const HANDLED_MILLISECONDS = 5000;

/**
 * Waits until the handler of a signal has run, for without a handler Deno ends the process by a signal that
 * it has not handed on yet.
 */
function handled(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, HANDLED_MILLISECONDS);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    }, { once: true });
  });
}

/** Lets a signal in. @throws {InterruptedError} when one has come */
export async function stopIfAsked(signal: AbortSignal): Promise<void> {
  await new Promise((resolve) => setTimeout(resolve));
  if (signal.aborted) throw new InterruptedError(`Stopped by ${signal.reason}`, String(signal.reason));
}

/** Options of every command that opens the kernels. */
export const KERNEL_OPTIONS = {
  "--threads N": "0 (default) is one per core",
  "--backend NAME": "auto (default), cuda, cpu, native or wasm",
} as const;

/** Options of every command that reads a model that may have several weights. */
export const MODEL_OPTIONS = {
  "--variant NAME": "take the weights of this name in theirs, as fp16 in model.fp16.safetensors",
  "--subfolder NAME": "of a diffusers pipeline with several denoisers the one to take, as transformer_2",
} as const;

/** Of every command that writes files for people. */
export const REPLACE_OPTION = {
  "--force": "replace files that this tool did not make, where they have the names of those that are written",
} as const;

/** Options of every command that writes a checkpoint. */
export const OUTPUT_OPTIONS = {
  "--resume": "go on with a run that was stopped",
  "--force": "replace a finished output, or start over; touches only files that this tool wrote",
} as const;

/** The mode that {@linkcode OUTPUT_OPTIONS} ask for. */
export function outputMode({ resume, force }: Readonly<Record<"resume" | "force", boolean>>) {
  if (resume && force) throw new UsageError("--resume and --force exclude each other");
  return { resume, force };
}

/** Kernels as {@linkcode KERNEL_OPTIONS}, the environment and the configuration's defaults choose them. */
export async function chosenKernels(
  { threads: num_threads, backend }: Readonly<Partial<Record<"threads" | "backend", string>>>,
  onMessage: (line: string) => void,
): Promise<OpenOptions> {
  const { config } = await loadConfig({
    environment: environmentVariables(onMessage),
    overrides: { num_threads, backend },
    overrideSources: { num_threads: "--threads", backend: "--backend" },
  });
  return { backend: config.backend, threads: config.numThreads, onMessage };
}

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
  // Refusals of a library's function have the project's form of messages; anything else is a defect, and its
  // place matters.
  const isRefusal = (error instanceof TypeError || error instanceof RangeError) &&
    message.startsWith("Cannot ");
  printError(exitCode === 1 && !isRefusal ? inspect(error) : `error: ${message}`);
  return exitCode;
}

/**
 * Makes the folder that a report will lie in, and looks for the packages it takes, before the work that it
 * reports is done.
 *
 * @throws {OutputError} when the system refuses, or would refuse a file there, or one is somebody else's
 * @throws {ConfigError} when packages are missing
 */
export function prepareReport(target: string, force = false): void {
  checkLibraries();
  const names = target.endsWith(".html") ? [""] : ["run.json", "report.html", "report.txt", "report.md"];
  for (const name of names) checkReplaceable(join(target, name), force);
  const folder = target.endsWith(".html") ? dirname(target) : target;
  try {
    mkdirSync(folder, { recursive: true });
    accessSync(folder, constants.W_OK);
  } catch (cause) {
    throw outputError("write a report into", folder, cause);
  }
}

/** Limits that the system sets a command, as a line of its log. */
export function limitsText(threads: number): string {
  const { availableBytes, memoryLimit, quota, processorSeconds } = limitsOf();
  const parts = [
    `${threads} threads${
      quota === undefined ? "" : ` (quota of ${quota.processors.toPrecision(2)} processors: ${quota.path})`
    }`,
    `${formatBytes(availableBytes)} of memory available${
      memoryLimit === undefined ? "" : ` (limit of ${formatBytes(memoryLimit.bytes)}: ${memoryLimit.path})`
    }`,
    ...(processorSeconds === undefined
      ? []
      : [`${formatSeconds(processorSeconds)} of processor time at most (ulimit -t)`]),
  ];
  return `limits: ${parts.join(", ")}`;
}
