/** Python with the programs that open what is exported, as .ci/run installs it. */
import { type ChildProcess, spawn } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { ROOT } from "./_checkpoints.ts";

/**
 * Path of a Python that has the packages of tests/interop/requirements.txt: `READERS_PYTHON`, or the one that
 * .ci/run made. Undefined without one, which is printed with the reason.
 */
export function readersPython(): string | undefined {
  if (process.env["READERS_PYTHON"]) return process.env["READERS_PYTHON"];
  const folder = join(process.env["XDG_CACHE_HOME"] ?? join(homedir(), ".cache"), "arrowquant", "readers");
  const list = join(folder, "requirements.txt"), wanted = join(ROOT, "tests", "interop", "requirements.txt");
  const isThere = existsSync(list) && readFileSync(list, "utf8") === readFileSync(wanted, "utf8");
  if (isThere) return join(folder, "bin", "python3");
  console.log(`skipped: no Python with the packages of tests/interop/requirements.txt in ${folder}`);
  return undefined;
}

/** How a script ended. */
interface Answer {
  readonly code: number;
  readonly output: string;
  readonly errors: string;
}

/** A Python that answers one request after the other: tests/_readers.py. */
class Server {
  readonly #child: ChildProcess;
  readonly #waiting: { resolve(answer: Answer): void; reject(error: Error): void }[] = [];

  constructor(python: string) {
    // Nothing is fetched, one thread is enough for small models, and what is compiled is kept for the next.
    const env = { ...process.env, HF_HUB_OFFLINE: "1", OMP_NUM_THREADS: "1", PYTHONDONTWRITEBYTECODE: "" };
    this.#child = spawn(python, [join(ROOT, "tests", "_readers.py")], {
      cwd: ROOT,
      env,
      stdio: "pipe",
    });
    let line = "", errors = "";
    this.#child.stderr!.on("data", (chunk) => errors += chunk);
    this.#child.stdout!.setEncoding("utf8").on("data", (chunk: string) => {
      const lines = (line + chunk).split("\n");
      line = lines.pop()!;
      for (const each of lines) this.#waiting.shift()!.resolve(JSON.parse(each));
      if (this.#waiting.length === 0) this.#hold(false);
    });
    const end = (error: Error) => this.#waiting.splice(0).forEach(({ reject }) => reject(error));
    this.#child.on("error", end);
    this.#child.on("close", (code) => end(new Error(`_readers.py: exit ${code}\n${errors}`)));
  }

  /** While nothing is asked of it, it does not keep this process alive; its input's end ends it. */
  #hold(isHeld: boolean): void {
    for (const each of [this.#child, this.#child.stdin, this.#child.stdout, this.#child.stderr]) {
      const handle = each as { ref?(): void; unref?(): void };
      if (isHeld) handle.ref?.();
      else handle.unref?.();
    }
  }

  ask(script: string, args: readonly string[]): Promise<Answer> {
    this.#hold(true);
    return new Promise((resolve, reject) => {
      this.#waiting.push({ resolve, reject });
      this.#child.stdin!.write(`${JSON.stringify({ script, args })}\n`);
    });
  }
}

/** One for all files of tests in this process, each of which has modules of its own: its packages load in seconds. */
const servers = (globalThis as { [key: symbol]: Map<string, Server> | undefined })[
  Symbol.for("arrowquant tests: Python")
] ??= new Map();

/** Runs a script of tests/interop; resolves to the JSON that it printed. @throws Error with its messages */
export async function runReader(python: string, script: string, args: readonly string[]): Promise<unknown> {
  let server = servers.get(python);
  if (server === undefined) servers.set(python, server = new Server(python));
  const { code, output, errors } = await server.ask(script, args);
  if (code !== 0) throw new Error(`${script}: exit ${code}\n${errors}`);
  return JSON.parse(output);
}
