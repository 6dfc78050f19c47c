/**
 * Checks around every call of a kernel: of its arguments, and of its status, which becomes an error. Kernels
 * are called through functions.ts.
 */
import { constants } from "node:os";
import { InterruptedError, KernelError } from "../errors.ts";
import { stopCheck } from "../progress.ts";

/** The header's `AQ_F32`, …. */
export const DTYPE_NUMBERS = { F32: 0, F16: 1, BF16: 2, F8_E4M3: 3, F8_E5M2: 4, F64: 5 } as const;
/** Bytes of an element by those numbers. */
export const DTYPE_BYTES: readonly number[] = [4, 2, 2, 1, 1, 8];
/** The header's `AQ_ZERO_POINT_*`. */
export const ZERO_POINT_NUMBERS = { real: 0, integer: 1, symmetric: 2, offset: 3 } as const;

/** The header's `AQ_E_VALUE`, `AQ_E_NONFINITE` and `AQ_E_RANGE`. */
export const E_VALUE = -3, E_NONFINITE = -4, E_RANGE = -5;

const STATUS_TEXT: Readonly<Record<number, string>> = {
  [-1]: "a null pointer or an unknown enumerator",
  [-2]: "a size that is not allowed or too large",
  [E_VALUE]: "a value out of range",
  [E_NONFINITE]: "NaN or infinity among the values",
  [E_RANGE]: "weights too large for a half-precision scale",
  [-6]: "an instruction set that this processor or build lacks",
};

/**
 * Purpose of a call, for messages, as in `apply a linear layer`. With `explain`, a status that means
 * something else than its own text gets another error; undefined keeps the usual one.
 */
export type Doing = string | {
  readonly doing: string;
  readonly explain: (status: number) => Error | undefined;
};

/** The purpose alone. */
export const textOf = (doing: Doing): string => typeof doing === "string" ? doing : doing.doing;

/** The header's `AQ_E_STOPPED`: less the number of a signal. */
const E_STOPPED = -100;

/**
 * Throws unless a kernel succeeded.
 *
 * @throws {KernelError} or what `doing` explains the status by
 * @throws {InterruptedError} when a signal stopped it
 */
export function finish(doing: Doing, status: number): void {
  if (status === 0) return stopCheck.beat?.();
  if (status < E_STOPPED) {
    const [signal = "SIGINT"] = Object.entries(constants.signals).find(([, number]) =>
      number === E_STOPPED - status
    ) ?? [];
    throw new InterruptedError(`Stopped by ${signal}`, signal);
  }
  const explained = typeof doing === "string" ? undefined : doing.explain(status);
  if (explained !== undefined) throw explained;
  const reason = STATUS_TEXT[status] ?? `status ${status}`;
  throw new KernelError(`Cannot ${textOf(doing)}: the kernel reports ${reason}`, { status });
}

type Maybe<T> = T | null | undefined;
export type ANY = Maybe<ArrayBufferView<ArrayBufferLike>>;
export type F32 = Maybe<Float32Array>;
export type F64 = Maybe<Float64Array>;
export type I32 = Maybe<Int32Array>;
export type U8 = Maybe<Uint8Array>;
export type U16 = Maybe<Uint16Array>;
export type U32 = Maybe<Uint32Array>;
export type U64 = Maybe<BigUint64Array>;

/** Throws unless a value is a whole number from `least` to `most`. */
export function checkWhole(doing: string, name: string, value: number, least: number, most = Infinity): void {
  if (Number.isSafeInteger(value) && value >= least && value <= most) return;
  const range = most === Infinity ? `≥ ${least}` : `from ${least} to ${most}`;
  throw new RangeError(`Cannot ${doing}: ${name} must be a whole number ${range}, got ${value}`);
}

/** Throws unless a count is a whole number ≥ 0. */
export const checkCount = (doing: string, name: string, count: number): void =>
  checkWhole(doing, name, count, 0);

/** Throws unless every count, by its name, is a whole number ≥ 0. */
export function checkCounts(doing: string, counts: Readonly<Record<string, number>>): void {
  for (const name in counts) checkCount(doing, name, counts[name]!);
}

/** Throws unless a value is among those allowed. */
export function checkMember<T>(doing: string, name: string, value: T, allowed: readonly T[]): void {
  if (allowed.includes(value)) return;
  const got = JSON.stringify(value);
  throw new RangeError(`Cannot ${doing}: ${name} must be one of ${allowed.join(", ")}, got ${got}`);
}

/** Throws unless a number is from `low` to `high`. */
export function checkRange(doing: string, name: string, value: number, low: number, high: number): void {
  if (value >= low && value <= high) return;
  throw new RangeError(`Cannot ${doing}: ${name} must be from ${low} to ${high}, got ${value}`);
}

/** Kind of a value, for messages. */
export const typeName = (value: unknown): string =>
  ArrayBuffer.isView(value) ? value.constructor.name : typeof value;

const ARRAY_TYPES = {
  "float32 values": Float32Array,
  "int32 values": Int32Array,
  "half floats": Uint16Array,
  "u32 words": Uint32Array,
  "bytes": Uint8Array,
} as const;

/** Throws unless `array` has the type and the length that a kernel reads or writes. */
export function checkArray(
  doing: string,
  name: string,
  array: unknown,
  length: number,
  type: keyof typeof ARRAY_TYPES = "float32 values",
): void {
  const isOne = array instanceof ARRAY_TYPES[type];
  if (isOne && array.length === length) return;
  throw new TypeError(
    `Cannot ${doing}: ${name} must be ${length} ${type}, got ${isOne ? array.length : typeName(array)}`,
  );
}

/** Throws unless every array, by its name, holds as many float32 values as said or is undefined. */
export function checkFloats(
  doing: string,
  arrays: Readonly<Record<string, readonly [Float32Array | undefined, number]>>,
): void {
  for (const name in arrays) {
    const own = arrays[name]!, array = own[0], length = own[1]; // no destructuring: this runs for every layer
    if (array === undefined || array instanceof Float32Array && array.length === length) continue;
    checkArray(doing, name, array, length);
  }
}
