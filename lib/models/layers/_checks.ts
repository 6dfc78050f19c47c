/** Checks of the arguments of kernels, and of their status. */
import { KernelError } from "../../errors.ts";

/** @throws {KernelError} unless the kernel succeeded */
export function check(status: number, doing: string): void {
  if (status === 0) return;
  const reason = status === -4 ? "NaN or infinity" : `status ${status}`;
  throw new KernelError(`Cannot ${doing}: the kernel reports ${reason}`, { status });
}

/** @throws {RangeError} unless a count is a whole number ≥ 0 */
export function checkCount(doing: string, name: string, value: number): void {
  if (!Number.isSafeInteger(value) || value < 0) {
    throw new RangeError(`Cannot ${doing}: ${name} must be a whole number ≥ 0, got ${value}`);
  }
}

/** @throws {TypeError} unless an array has that many float32 values */
export function checkFloats(doing: string, name: string, array: unknown, length: number): void {
  if (!(array instanceof Float32Array) || array.length !== length) {
    const got = array instanceof Float32Array ? `${array.length}` : typeof array;
    throw new TypeError(`Cannot ${doing}: ${name} must be ${length} float32 values, got ${got}`);
  }
}
