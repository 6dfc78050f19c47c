/**
 * Signs of life of a lock, for runs on other machines. A thread of its own adds a byte to the lock's file
 * every few seconds, also while the process computes. Whoever finds the lock watches the file by a clock of
 * its own: where it does not grow for {@linkcode LEASE_MILLISECONDS}, the run is gone. Clocks of different
 * machines are never compared.
 */
import { closeSync, constants, openSync, readFileSync, writeSync } from "node:fs";
import { setTimeout as wait } from "node:timers/promises";
import { Worker } from "node:worker_threads";
import { errorCode, outputError } from "../files/whole.ts";

/** Time between two signs of life. */
const BEAT_MILLISECONDS = 10_000;
/** Time without one after which a run counts as gone: network file systems show growth a minute late. */
export const LEASE_MILLISECONDS = 120_000;
/** Time between two looks. */
const LOOK_MILLISECONDS = 1000;

/** Adds a byte to a file that is there; one that was taken away is not made again. */
function beat(path: string): void {
  const fd = openSync(path, constants.O_WRONLY | constants.O_APPEND);
  try {
    writeSync(fd, ".");
  } finally {
    closeSync(fd);
  }
}

/** The thread's program: it may import nothing of the project, which a package bundles. */
const THREAD = `
const { closeSync, constants, openSync, writeSync } = require("node:fs");
const { workerData: { path, milliseconds } } = require("node:worker_threads");
const timer = setInterval(() => {
  try {
    const fd = openSync(path, constants.O_WRONLY | constants.O_APPEND);
    try {
      writeSync(fd, ".");
    } finally {
      closeSync(fd);
    }
  } catch (error) {
    if (error.code === "ENOENT") clearInterval(timer); // given back, or taken over
  }
}, milliseconds);
`;

/** Begins signs of life in a lock's file; returns what ends them. */
export function beginBeats(path: string, milliseconds = BEAT_MILLISECONDS): () => void {
  beat(path);
  const thread = new Worker(THREAD, { eval: true, workerData: { path, milliseconds } });
  thread.unref();
  return () => void thread.terminate();
}

/**
 * Bytes of signs of life in a lock's file; 0 for one that gives none, undefined for one that is gone.
 *
 * @throws {OutputError} where that cannot be told: a lock that cannot be read is not gone
 */
function beatsOf(path: string): number | undefined {
  try {
    return readFileSync(path).length; // not its size alone: opening it asks the file's server
  } catch (error) {
    if (errorCode(error) === "ENOENT") return undefined;
    throw outputError("read the lock", path, error);
  }
}

/** Whether a lock's file gives signs of life at all, or might. */
export const hasBeats = (path: string): boolean => (beatsOf(path) ?? 0) > 0;

/**
 * Watches a lock's file until it grows, is gone, or has done neither for as long as the lease.
 *
 * @param breathe runs between looks and may stop it
 * @returns whether the run is gone
 * @throws {OutputError} where the file cannot be read
 */
export async function isGone(
  path: string,
  breathe: () => Promise<void>,
  leaseMilliseconds = LEASE_MILLISECONDS,
): Promise<boolean> {
  const first = beatsOf(path), begun = performance.now();
  while (performance.now() - begun < leaseMilliseconds) {
    await wait(Math.min(LOOK_MILLISECONDS, leaseMilliseconds / 10));
    await breathe();
    const now = beatsOf(path);
    if (now === undefined) return true;
    if (now !== first) return false;
  }
  return true;
}
