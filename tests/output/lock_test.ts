/** Locks of runs on other machines: those that give signs of life stay, those that stopped are removed. */
import { afterAll, describe, expect, test } from "bun:test";
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { acquireLock, removeGone } from "../../lib/output/lock.ts";
import { beginBeats, isGone } from "../../lib/output/lock_beat.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { workplace } from "../_checkpoints.ts";
import { configOf, DREAM } from "../pipeline/_runs.ts";

const place = workplace();
afterAll(() => place.remove());

/** A folder with the lock of a process on another host. */
function foreignLock(content: string) {
  const folder = place.fresh(), path = join(folder, "lock-node-7-123-0-0");
  mkdirSync(folder, { recursive: true });
  writeFileSync(path, content);
  return { folder, path };
}
const LEASE = 500;

describe("a lock of another host", () => {
  for (const [clock, shift] of [["ahead", 86_400], ["behind", -86_400]] as const) {
    test(`that has stopped to grow is removed, on a file server whose clock is a day ${clock}`, async () => {
      const { folder, path } = foreignLock("...");
      utimesSync(path, Date.now() / 1000 + shift, Date.now() / 1000 + shift);
      const messages: string[] = [];
      await removeGone(folder, { onEvent: ({ message }) => messages.push(message) }, LEASE);
      expect(readdirSync(folder)).toEqual([]);
      expect(messages.join("\n")).toMatch(/process 123 on "node-7" gave no sign of life/);
      acquireLock(folder)();
    });
  }
  test("that grows stays, and its folder is refused", async () => {
    const { folder, path } = foreignLock(".");
    const timer = setInterval(() => appendFileSync(path, "."), 20);
    await removeGone(folder, {}, LEASE).finally(() => clearInterval(timer));
    expect(existsSync(path)).toBe(true);
    expect(() => acquireLock(folder)).toThrow("one run at a time");
  });
  test("that never gave signs of life stays", async () => {
    const { folder, path } = foreignLock("");
    await removeGone(folder, {}, LEASE);
    expect(existsSync(path)).toBe(true);
  });
  test("that cannot be read is not gone", async () => {
    const path = place.fresh();
    mkdirSync(path); // what stands there is no file: reading it fails otherwise than where nothing is
    await expect(isGone(path, () => Promise.resolve(), 50)).rejects.toThrow("Cannot read the lock");
    await expect(isGone(`${path}-none`, () => Promise.resolve(), 50)).resolves.toBe(true);
  });
  test("is watched no longer than a signal allows", async () => {
    const { folder, path } = foreignLock("."), controller = new AbortController();
    setTimeout(() => controller.abort("SIGTERM"), 50);
    await expect(removeGone(folder, { signal: controller.signal }, 60_000)).rejects.toBe("SIGTERM");
    expect(existsSync(path)).toBe(true);
  });
});

describe("signs of life", () => {
  test("go on while the process computes, and end with the lock", async () => {
    const { path } = foreignLock(""), end = beginBeats(path, 20);
    const sizeAt = () => statSync(path).size,
      pause = () => new Promise((resolve) => setTimeout(resolve, 100));
    const first = sizeAt();
    for (let i = 0; i < 300 && sizeAt() === first; i++) await pause(); // the thread starts
    const before = sizeAt();
    const turn = new Int32Array(new SharedArrayBuffer(4));
    for (let i = 0; i < 100 && sizeAt() === before; i++) Atomics.wait(turn, 0, 0, 100);
    expect(sizeAt()).toBeGreaterThan(before);
    end();
    let after = -1;
    for (let i = 0; i < 100 && after !== sizeAt(); i++) {
      after = sizeAt();
      await pause();
    }
    expect(sizeAt()).toBe(after);
  });
  test("of a lock that was taken over do not bring it back, and its run may not write", async () => {
    const folder = place.fresh();
    mkdirSync(folder);
    const unlock = acquireLock(folder, true), [name] = readdirSync(folder);
    unlock.check();
    rmSync(join(folder, name!));
    expect(() => unlock.check()).toThrow("another run has taken it over");
    await new Promise((resolve) => setTimeout(resolve, 100));
    expect(readdirSync(folder)).toEqual([]);
    unlock();
  });
  test("are given by a shard's lock", async () => {
    using kernels = await openKernels({ threads: 1 });
    const output = place.fresh(), shard = { index: 1, count: 2 };
    const work = join(output, "shard-1-of-2", "arrowquant.partial"), sizes: number[] = [];
    const onProgress = () => {
      for (const name of readdirSync(work).filter((name) => name.startsWith("lock-"))) {
        sizes.push(statSync(join(work, name)).size);
      }
    };
    await quantizeCheckpoint({ input: DREAM, output, config: configOf(), kernels, shard, onProgress });
    expect(Math.min(...sizes)).toBeGreaterThan(0);
  });
});
