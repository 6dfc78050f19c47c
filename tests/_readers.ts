/** Python with the programs that open what is exported, as .ci/run installs it. */
import { spawn } from "node:child_process";
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

/** Runs a script of tests/interop; resolves to the JSON that it printed. @throws Error with its messages */
export function runReader(python: string, script: string, args: readonly string[]): Promise<unknown> {
  return new Promise((resolve, reject) => {
    // Nothing is fetched, one thread is enough for small models, and what is compiled is kept for the next.
    const env = { ...process.env, HF_HUB_OFFLINE: "1", OMP_NUM_THREADS: "1", PYTHONDONTWRITEBYTECODE: "" };
    const child = spawn(python, [join(ROOT, "tests", "interop", script), ...args], {
      ...{ cwd: ROOT, env, stdio: ["ignore", "pipe", "pipe"] },
    });
    let output = "", errors = "";
    child.stdout.on("data", (chunk) => output += chunk);
    child.stderr.on("data", (chunk) => errors += chunk);
    child.on("error", reject);
    child.on(
      "close",
      (code) =>
        code === 0 ? resolve(JSON.parse(output)) : reject(new Error(`${script}: exit ${code}\n${errors}`)),
    );
  });
}
