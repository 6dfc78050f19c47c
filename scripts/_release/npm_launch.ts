/**
 * Starts a command of the npm package. Bun and Deno run it themselves, and so does Node from version 24 on,
 * on the embedded WebAssembly; an older Node lacks Float16Array and starts Bun.
 */
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { constants } from "node:os";
import { delimiter, dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

/** Bun's binary: the one of the npm package `bun`, or one on PATH. */
function findBun(): string | undefined {
  const candidates: string[] = [];
  try {
    const folder = dirname(createRequire(import.meta.url).resolve("bun/package.json"));
    candidates.push(join(folder, "bin", "bun.exe"));
  } catch {
    // That package is optional.
  }
  for (const folder of (process.env["PATH"] ?? "").split(delimiter)) {
    if (folder !== "") candidates.push(join(folder, "bun"), join(folder, "bun.exe"));
  }
  return candidates.find((path) => existsSync(path));
}

/** Runs `arrowquant` with these arguments before those of the command line. */
export async function launch(before: readonly string[]): Promise<void> {
  const args = [...before, ...process.argv.slice(2)];
  if ("Float16Array" in globalThis) {
    const module = new URL("./arrowquant.js", import.meta.url); // computed: an older Node must not load it
    const { main } = await import(module.href) as typeof import("../arrowquant.ts");
    return await main(args);
  }
  const bun = findBun();
  if (bun === undefined) {
    console.error(
      `Cannot run arrowquant: it needs Bun, Deno or Node 24 or later, got Node ${process.versions.node}; ` +
        `"npm install bun" brings Bun`,
    );
    process.exitCode = 5;
    return;
  }
  const program = fileURLToPath(new URL("./bin/arrowquant.js", import.meta.url));
  const child = spawn(bun, [program, ...args], { stdio: "inherit" });
  // The command answers signals, and this waits for the answer; what a terminal sends to both counts once.
  const forward = (signal: NodeJS.Signals) => void child.kill(signal);
  const signals = ["SIGHUP", "SIGINT", "SIGTERM"] as const;
  for (const signal of signals) process.on(signal, forward);
  process.exitCode = await new Promise<number>((done) => {
    child.on("error", (error) => {
      console.error(`Cannot run arrowquant: "${bun}" does not start: ${error.message}`);
      done(5);
    });
    child.on("close", (code, signal) => done(code ?? 128 + constants.signals[signal ?? "SIGHUP"]));
  });
  for (const signal of signals) process.off(signal, forward);
}
