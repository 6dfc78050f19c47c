/** Deno's binary, for tests that start it. */
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

/** This process, or the one that npm brought; undefined where there is none. */
export function denoBinary(): string | undefined {
  if ("Deno" in globalThis) return process.execPath;
  const platforms = fileURLToPath(new URL("../node_modules/@deno", import.meta.url));
  for (const name of existsSync(platforms) ? readdirSync(platforms) : []) {
    if (existsSync(join(platforms, name, "deno"))) return join(platforms, name, "deno");
  }
  return undefined;
}
