/** C of the bench (kernels/bench), compiled when it runs; no part of the kernels' library. */
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { findCompiler } from "../native/library.ts";
import { type Declaration, type Opened, type Opener, opener } from "./ggml.ts";

/** Compiles kernels/bench/`name`.c and opens it. @returns its functions, or why there are none */
export async function openCompiled(
  folder: string,
  name: string,
  table: Readonly<Record<string, Declaration>>,
): Promise<Opened & Pick<Opener, "count"> | { readonly reason: string }> {
  if (!import.meta.url.startsWith("file:")) return { reason: "this module was not loaded from a file" };
  const file = `kernels/bench/${name}.c`, source = fileURLToPath(new URL(`../../${file}`, import.meta.url));
  if (!existsSync(source)) return { reason: `${file} is not there` };
  const [compiler, runtime] = [await findCompiler(), await opener()];
  if (compiler === undefined) return { reason: "no C compiler" };
  if (runtime === undefined) return { reason: "this runtime has no FFI, use Bun or Deno" };
  if (process.platform === "win32") return { reason: "not written for Windows" };
  const path = join(folder, `${name}.so`), libraries = process.platform === "linux" ? ["-ldl"] : [];
  const flags = ["-std=c11", "-O2", "-shared", "-fPIC", source, "-o", path, ...libraries];
  if (spawnSync(compiler.command, flags).status !== 0) {
    return { reason: `${compiler.command} refuses ${file}` };
  }
  const library = runtime.open(path, table);
  return { symbols: library.symbols, close: () => library.close(), count: runtime.count };
}

/** A path or name as C reads it. */
export const cText = (value: string): Uint8Array<ArrayBuffer> => new TextEncoder().encode(`${value}\0`);
