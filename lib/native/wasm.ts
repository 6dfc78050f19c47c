/**
 * The kernels as WebAssembly: the same C, built for 128-bit vectors, embedded in wasm_binary.ts. Needs no
 * compiler, no permission and no file. A call copies its buffers into the module's memory and its outputs
 * back.
 */
import { MemoryError } from "../errors.ts";
import { SIGNATURES } from "./signatures.ts";
import { kindsOf, type NativeBuffer, type NativeCalls, type OpenedLibrary } from "./symbols.ts";
import { WASM_BASE64 } from "./wasm_binary.ts";

const PAGE_BYTES = 65536;
/** Vector loads want 16; a cache line keeps rows of different buffers apart. */
const ALIGNMENT = 64;

interface WasmExports {
  memory: WebAssembly.Memory;
  __heap_base: WebAssembly.Global;
  [name: string]: unknown;
}

const align = (offset: number) => Math.ceil(offset / ALIGNMENT) * ALIGNMENT;

const bytesOf = (view: ArrayBufferView<ArrayBufferLike>) =>
  new Uint8Array(view.buffer, view.byteOffset, view.byteLength);

/** @throws {MemoryError} where the module cannot have so much more memory */
function grow(memory: WebAssembly.Memory, pages: number): void {
  try {
    memory.grow(pages);
  } catch (cause) {
    const have = memory.buffer.byteLength, needed = have + pages * PAGE_BYTES;
    const message =
      `Cannot run a kernel in WebAssembly: its arrays must fit into memory, 4 GiB at most, got ${needed} ` +
      'bytes; use the backend "native"';
    throw new MemoryError(message, needed, have, { cause });
  }
}

/** Instantiates the embedded module. @throws WebAssembly.CompileError without 128-bit vectors. */
export function openWasm(): OpenedLibrary {
  const bytes = Uint8Array.from(atob(WASM_BASE64), (character) => character.charCodeAt(0));
  const instance = new WebAssembly.Instance(new WebAssembly.Module(bytes));
  const exports = instance.exports as unknown as WasmExports;
  const heapBase = align(exports.__heap_base.value as number);

  function wrap(name: string, signature: string) {
    const parameters = kindsOf(signature);
    const call = exports[name] as (...args: number[]) => number;
    // Calls carry whole tensors, so copying them outweighs what a rest parameter costs.
    return (...args: (NativeBuffer | number | bigint)[]): number => {
      let end = heapBase;
      const raw = args.map((argument, i) => {
        const kind = parameters[i];
        if (kind !== "in" && kind !== "out" && kind !== "inout") return Number(argument);
        if (argument === null) return 0;
        const at = end;
        end = align(end + (argument as ArrayBufferView).byteLength);
        return at;
      });
      const missing = end - exports.memory.buffer.byteLength;
      if (missing > 0) grow(exports.memory, Math.ceil(missing / PAGE_BYTES));
      const memory = new Uint8Array(exports.memory.buffer);
      parameters.forEach((kind, i) => {
        if ((kind === "in" || kind === "inout") && args[i] !== null) {
          memory.set(bytesOf(args[i] as ArrayBufferView), raw[i]!);
        }
      });
      const status = call(...raw);
      parameters.forEach((kind, i) => {
        if ((kind !== "out" && kind !== "inout") || args[i] === null) return;
        const target = bytesOf(args[i] as ArrayBufferView);
        target.set(memory.subarray(raw[i]!, raw[i]! + target.length));
      });
      return status;
    };
  }

  const calls = Object.fromEntries(
    Object.entries(SIGNATURES).map(([name, signature]) => [name, wrap(name, signature)]),
  );
  return { calls: calls as unknown as NativeCalls, size: (count) => count, close: () => {} };
}
