/** Where programs are that this project runs. */
import { existsSync, readdirSync } from "node:fs";
import { delimiter, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

/** The checkout; a name that is not there for a module from JSR. */
const ROOT = import.meta.url.startsWith("file:") ? fileURLToPath(new URL("../..", import.meta.url)) : "";

/** Deno's own binary: its npm package's launcher needs Node. */
export function denoBinary(): string {
  if ("Deno" in globalThis) return process.execPath;
  const installed = join(ROOT, "node_modules", "deno", "deno");
  if (existsSync(installed)) return installed;
  const platforms = join(ROOT, "node_modules", "@deno");
  for (const name of existsSync(platforms) ? readdirSync(platforms) : []) {
    const binary = join(platforms, name, "deno");
    if (existsSync(binary)) return binary;
  }
  return "deno";
}

/** Program and arguments that run a script of this project in the runtime that runs this one. */
export function commandOf(script: string, args: readonly string[]): string[] {
  const path = join(ROOT, "scripts", script);
  if (!("Deno" in globalThis)) return [process.execPath, "run", path, ...args];
  return [process.execPath, "run", "-A", path, ...args];
}

/** Bun's own binary. */
export function bunBinary(): string {
  if ("Bun" in globalThis) return process.execPath;
  const installed = join(ROOT, "node_modules", "bun", "bin", "bun.exe");
  return existsSync(installed) ? installed : "bun";
}

/** A program's path, undefined where there is none of that name. */
export function findProgram(name: string): string | undefined {
  return (process.env["PATH"] ?? "").split(delimiter).map((folder) => join(folder, name)).find((path) =>
    existsSync(path)
  );
}
