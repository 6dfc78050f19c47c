/** The one file that names `Deno.dlopen`, and the one that asks Deno what it may do. */
import { type CallsOf, ffiTypes, type OpenedSymbols, type SymbolTable } from "./symbols.ts";

export interface DenoPermission {
  name: "ffi" | "read" | "env" | "run" | "write" | "net" | "sys";
  path?: string;
  host?: string;
  kind?: string;
  variable?: string;
  command?: string;
}

interface DenoRuntime {
  dlopen(
    path: string,
    symbols: Record<string, { parameters: string[]; result: string }>,
  ): { symbols: Record<string, unknown>; close(): void };
  permissions: { querySync(permission: DenoPermission): { state: string } };
  version: { deno: string };
}

/** Deno's global, or undefined in another runtime. */
export function denoRuntime(): DenoRuntime | undefined {
  return (globalThis as { Deno?: DenoRuntime }).Deno;
}

/** Whether something may be done without asking: always true outside Deno. */
export function isAllowed(permission: DenoPermission): boolean {
  const deno = denoRuntime();
  return deno === undefined || deno.permissions.querySync(permission).state === "granted";
}

/** Opens a library with `Deno.dlopen`. @throws the runtime's error where that fails. */
export function openInDeno<Table extends SymbolTable>(path: string, symbols: Table): OpenedSymbols<Table> {
  const table = Object.fromEntries(
    ffiTypes(symbols, "buffer", "usize").map(([name, parameters]) => [name, { parameters, result: "i32" }]),
  );
  const library = denoRuntime()!.dlopen(path, table);
  return {
    calls: library.symbols as unknown as CallsOf<Table>,
    size: BigInt, // a plain number leaves Deno's fast path
    close: () => library.close(),
  };
}
