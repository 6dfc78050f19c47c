/** The one file that names `bun:ffi`. */
import { type CallsOf, ffiTypes, type OpenedSymbols, type SymbolTable } from "./symbols.ts";

interface BunFfi {
  dlopen(
    path: string,
    symbols: Record<string, { args: string[]; returns: string }>,
  ): { symbols: Record<string, unknown>; close(): void };
}

/** Opens a library with `bun:ffi`. @throws the runtime's error if it cannot be opened or lacks a symbol. */
export async function openInBun<Table extends SymbolTable>(
  path: string,
  symbols: Table,
): Promise<OpenedSymbols<Table>> {
  // Computed, because every other runtime fails on the name itself.
  const specifier = ["bun", "ffi"].join(":");
  const { dlopen } = await import(specifier) as BunFfi;
  const table = Object.fromEntries(
    ffiTypes(symbols, "ptr", "u64").map(([name, args]) => [name, { args, returns: "i32" }]),
  );
  const library = dlopen(path, table);
  return {
    calls: library.symbols as unknown as CallsOf<Table>,
    size: (count) => count,
    close: () => library.close(),
  };
}
