/**
 * Starts a command of the npm package. Bun and Deno run it themselves, and so does Node from version 24 on, on the
 * embedded WebAssembly; an older Node lacks Float16Array and starts Bun.
 */
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { createRequire } from "node:module";
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

/** Runs the command in the module beside this one. */
export async function launch(command: string): Promise<void> {
  const module = new URL(`./${command}.js`, import.meta.url);
  if ("Float16Array" in globalThis) {
    await import(module.href);
    return;
  }
  const bun = findBun();
  if (bun === undefined) {
    console.error(
      `Cannot run arrowquant-${command}: it needs Bun, Deno or Node 24 or later, got Node ${process.versions.node}; ` +
        `"npm install bun" brings Bun`,
    );
    process.exitCode = 5;
    return;
  }
  const child = spawn(bun, [fileURLToPath(module), ...process.argv.slice(2)], { stdio: "inherit" });
  // A terminal sends Ctrl-C to both; the command answers it, and this waits for the answer.
  const forward = (signal: "SIGINT" | "SIGTERM") => () => child.kill(signal);
  const onInterrupt = () => {}, onTerminate = forward("SIGTERM");
  process.on("SIGINT", onInterrupt);
  process.on("SIGTERM", onTerminate);
  process.exitCode = await new Promise<number>((done) => {
    child.on("error", (error) => {
      console.error(`Cannot run arrowquant-${command}: "${bun}" does not start: ${error.message}`);
      done(5);
    });
    child.on("close", (code) => done(code ?? 1));
  });
  process.off("SIGINT", onInterrupt);
  process.off("SIGTERM", onTerminate);
}
