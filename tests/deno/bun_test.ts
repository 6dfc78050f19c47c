/**
 * `bun:test` for Deno: the names the tests use, over `node:test` and the `expect` package, so that one set of
 * tests runs in both runtimes. Only the import map beside this file names it.
 */
import { Buffer } from "node:buffer";
export { after as afterAll, afterEach, before as beforeAll, beforeEach, describe, it, test } from "node:test";
import { expect as expectAny } from "expect";

/** Whether two arrays have one type and the same bytes: then they are equal, by any meaning. */
function haveSameBytes(a: ArrayBufferView, b: unknown): boolean {
  if (!ArrayBuffer.isView(b) || a.constructor !== b.constructor || a.byteLength !== b.byteLength) {
    return false;
  }
  const bytes = ({ buffer, byteOffset, byteLength }: ArrayBufferView) =>
    Buffer.from(buffer as ArrayBuffer, byteOffset, byteLength);
  return bytes(a).equals(bytes(b));
}

/** The package takes microseconds an element, and minutes to say how long arrays differ. */
function expectFast(actual: unknown) {
  const matchers = expectAny(actual);
  if (!ArrayBuffer.isView(actual)) return matchers;
  const { toEqual } = matchers;
  return Object.assign(matchers, {
    toEqual(expected: unknown) {
      if (!haveSameBytes(actual, expected)) toEqual(expected);
    },
  });
}

export const expect = Object.assign(expectFast, expectAny);
