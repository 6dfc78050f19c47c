/**
 * `bun:test` for Deno: the names the tests use, over `node:test` and the `expect` package, so that one set of
 * tests runs in both runtimes. Only the import map beside this file names it.
 */
export { after as afterAll, afterEach, before as beforeAll, beforeEach, describe, it, test } from "node:test";
export { expect } from "expect";
