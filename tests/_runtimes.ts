/** Both runtimes of this project, whichever runs the test. */
import { spawn } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { isDeno, ROOT } from "./_checkpoints.ts";

/** Where npm put a runtime's binary; its launcher, the package's own, needs Node. */
function installed(name: "bun" | "deno"): string | undefined {
  const modules = join(ROOT, "node_modules");
  const scope = join(modules, name === "bun" ? "@oven" : "@deno");
  const packages = existsSync(scope) ? readdirSync(scope) : [];
  return [
    ...(name === "bun" ? [join(modules, "bun", "bin", "bun.exe")] : [join(modules, "deno", "deno")]),
    ...packages.flatMap((each) => [join(scope, each, "bin", name), join(scope, each, name)]),
  ].find((path) => existsSync(path));
}

/** A runtime's binary: this process's own, or the installed one. */
export function runtimeBinary(name: "bun" | "deno"): string | undefined {
  return (name === "deno") === isDeno ? process.execPath : installed(name);
}

/** Runs a file of tests/ in a runtime; resolves to what it printed. @throws Error with its messages when it fails */
export function runIn(
  name: "bun" | "deno",
  binary: string,
  file: string,
  args: readonly string[],
): Promise<string> {
  const importMap = `--import-map=${join(ROOT, "tests", "deno", "import_map.json")}`;
  const deno = ["run", "-A", "--no-prompt", "--no-check", importMap];
  const line = [...(name === "deno" ? deno : ["run"]), join(ROOT, "tests", file), ...args];
  return new Promise((resolve, reject) => {
    const child = spawn(binary, line, { cwd: ROOT, stdio: ["ignore", "pipe", "pipe"] });
    let output = "", errors = "";
    child.stdout.on("data", (chunk) => output += chunk);
    child.stderr.on("data", (chunk) => errors += chunk);
    child.on("error", reject);
    child.on(
      "close",
      (code) => code === 0 ? resolve(output) : reject(new Error(`${name}: exit ${code}\n${errors}`)),
    );
  });
}
