/** Runs another program to its end. */
import { spawn } from "node:child_process";
import process from "node:process";

/** How it ended: its exit status and what it printed. */
export interface Outcome {
  readonly code: number;
  readonly output: string;
  readonly errors: string;
}

/** How it is run. */
export interface RunProgramOptions {
  readonly cwd: string;
  /** Replaces the environment's variables of these names; undefined takes one away. */
  readonly environment?: Readonly<Record<string, string | undefined>> | undefined;
  /** Its abort ends the program by `killSignal`, default SIGTERM. */
  readonly signal?: AbortSignal | undefined;
  readonly killSignal?: NodeJS.Signals | undefined;
}

/** Runs a program; one that does not start has the status 127. */
export function runProgram(
  command: string,
  args: readonly string[],
  { cwd, environment = {}, signal, killSignal }: RunProgramOptions,
): Promise<Outcome> {
  const env: Record<string, string | undefined> = { ...process.env, NO_COLOR: "1" };
  delete env["FORCE_COLOR"]; // Deno heeds it with any value
  for (const [name, value] of Object.entries(environment)) {
    if (value === undefined) delete env[name];
    else env[name] = value;
  }
  return new Promise((resolve) => {
    const child = spawn(command, args, { cwd, env, stdio: ["ignore", "pipe", "pipe"], signal, killSignal });
    let output = "", errors = "";
    child.stdout.on("data", (chunk) => output += chunk);
    child.stderr.on("data", (chunk) => errors += chunk);
    child.on(
      "error",
      (error) => resolve({ code: 127, output, errors: `${errors}${command}: ${error.message}` }),
    );
    child.on("close", (code) => resolve({ code: code ?? 1, output, errors }));
  });
}
