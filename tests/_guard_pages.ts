/** Memory that ends at a page which nobody may touch: reading or writing behind it ends the process. */
import process from "node:process";

const PAGE = 4096;
/** Bytes of addresses that are reserved; pages take memory when they are touched. */
const RESERVED = 2 ** 30;
const PROT_NONE = 0, PROT_READ_WRITE = 3, MAP_PRIVATE_ANONYMOUS = 0x22;

/** Memory of so many bytes or more, whose last byte is the last before a forbidden page; undefined when there is no more. */
export type GuardPages = (bytes: number) => ArrayBuffer | undefined;

type Address = bigint;
interface System {
  mmap(bytes: bigint): Address;
  allow(at: Address, bytes: bigint): number;
  view(at: Address, bytes: number): ArrayBuffer;
}

interface DenoFfi {
  dlopen(path: string, symbols: object): { symbols: Record<string, (...args: unknown[]) => unknown> };
  UnsafePointer: { value(pointer: unknown): bigint; create(value: bigint): unknown };
  UnsafePointerView: { getArrayBuffer(pointer: unknown, bytes: number): ArrayBuffer };
}

async function system(): Promise<System> {
  const fd = -1, none = 0;
  const { Deno: deno } = globalThis as unknown as { Deno?: DenoFfi };
  if (deno !== undefined) {
    const { symbols } = deno.dlopen("libc.so.6", {
      mmap: { parameters: ["pointer", "usize", "i32", "i32", "i32", "i64"], result: "pointer" },
      mprotect: { parameters: ["pointer", "usize", "i32"], result: "i32" },
    });
    const pointer = (at: Address) => deno.UnsafePointer.create(at);
    return {
      mmap: (bytes) =>
        BigInt(
          deno.UnsafePointer.value(symbols["mmap"]!(null, bytes, PROT_NONE, MAP_PRIVATE_ANONYMOUS, fd, 0n)),
        ),
      allow: (at, bytes) => symbols["mprotect"]!(pointer(at), bytes, PROT_READ_WRITE) as number,
      view: (at, bytes) => deno.UnsafePointerView.getArrayBuffer(pointer(at), bytes),
    };
  }
  const { dlopen, toArrayBuffer } = await import("bun:ffi");
  const { symbols } = dlopen("libc.so.6", {
    mmap: { args: ["usize", "usize", "i32", "i32", "i32", "i64"], returns: "usize" },
    mprotect: { args: ["usize", "usize", "i32"], returns: "i32" },
  });
  return {
    mmap: (bytes) => BigInt(symbols.mmap(none, bytes, PROT_NONE, MAP_PRIVATE_ANONYMOUS, fd, 0)),
    allow: (at, bytes) => symbols.mprotect(at, bytes, PROT_READ_WRITE),
    view: (at, bytes) => toArrayBuffer(Number(at) as never, 0, bytes),
  };
}

/** Guard pages; undefined where the system is not Linux. */
export async function guardPages(): Promise<GuardPages | undefined> {
  if (process.platform !== "linux") return undefined;
  const { mmap, allow, view } = await system(), begin = mmap(BigInt(RESERVED));
  let used = 0;
  return (bytes) => {
    const size = Math.max(PAGE, Math.ceil(bytes / PAGE) * PAGE), at = begin + BigInt(used);
    if (used + size + PAGE > RESERVED || allow(at, BigInt(size)) !== 0) return undefined;
    used += size + PAGE;
    return view(at, size);
  };
}
