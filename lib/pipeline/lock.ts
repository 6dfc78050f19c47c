/** One run at a time in one output folder, also after a run was killed and could not clean up. */
import { closeSync, openSync, readFileSync, rmSync, statSync, writeSync } from "node:fs";
import { hostname } from "node:os";
import process from "node:process";
import { OutputError } from "../errors.ts";
import { errorCode, outputError, quote } from "./files.ts";

/** Who holds a lock. */
interface Holder {
  readonly pid: number;
  readonly host: string;
  /** Tells a process from a later one with the same number; empty where the system does not say. */
  readonly started: string;
}

/** A lock without content is being written; older than this, its writer died on the way. */
const EMPTY_LOCK_MILLISECONDS = 5000;

/**
 * Takes the lock at `path` and returns what gives it back.
 *
 * @throws {OutputError} when another run holds it, or the system refuses
 */
export function acquireLock(path: string): () => void {
  if (!create(path)) {
    checkLock(path);
    // Two runs may find the same stale lock: who creates the guard may replace it.
    const guard = `${path}.takeover`;
    if (!create(guard)) checkLock(guard, true);
    try {
      checkLock(path);
      rmSync(path, { force: true });
      if (!create(path)) checkLock(path, true);
    } finally {
      rmSync(guard, { force: true });
    }
  }
  return () => rmSync(path, { force: true });
}

/**
 * Does nothing when no living run holds the lock at `path`.
 *
 * @throws {OutputError} when one does, or nobody can tell
 */
export function checkLock(path: string, isHeldAnyway = false): void {
  let text: string;
  let age: number;
  try {
    text = readFileSync(path, "utf8");
    age = Date.now() - statSync(path).mtimeMs;
  } catch (cause) {
    if (errorCode(cause) === "ENOENT" && !isHeldAnyway) return;
    throw outputError("read the lock", path, cause);
  }
  const holder = parse(text);
  const what = holder === undefined ? "another run" : `process ${holder.pid} on ${quote(holder.host)}`;
  const isHeld = isHeldAnyway ||
    (holder === undefined ? age < EMPTY_LOCK_MILLISECONDS : holder.host !== hostname() || isAlive(holder));
  if (!isHeld) return;
  throw new OutputError(
    `Cannot write beside ${
      quote(path)
    }: the folder must have one run at a time, got ${what} at work; wait for it, ` +
      "or delete that file when you are sure that it is gone",
    { path },
  );
}

function create(path: string): boolean {
  try {
    const fd = openSync(path, "wx");
    try {
      const holder: Holder = { pid: process.pid, host: hostname(), started: startOf(process.pid) ?? "" };
      writeSync(fd, new TextEncoder().encode(JSON.stringify(holder)));
    } finally {
      closeSync(fd);
    }
    return true;
  } catch (cause) {
    if (errorCode(cause) === "EEXIST") return false;
    throw outputError("create the lock", path, cause);
  }
}

function parse(text: string): Holder | undefined {
  try {
    const { pid, host, started } = JSON.parse(text) as Record<string, unknown>;
    if (typeof pid !== "number" || typeof host !== "string" || typeof started !== "string") return undefined;
    return { pid, host, started };
  } catch {
    return undefined; // a lock whose writer died before its content was there
  }
}

function isAlive({ pid, started }: Holder): boolean {
  const now = startOf(pid);
  if (started !== "" && now !== undefined) return now === started;
  if (started !== "" && startOf(process.pid) !== undefined) return false; // others can be read, this one is gone
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return errorCode(error) !== "ESRCH";
  }
}

/** When a process started, as Linux tells it: the machine's boot and the clock ticks since. */
function startOf(pid: number): string | undefined {
  try {
    const boot = readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim();
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    // The name in parentheses may hold spaces; the start time is the 20th field behind it.
    const ticks = stat.slice(stat.lastIndexOf(")") + 2).split(" ")[19];
    return ticks === undefined ? undefined : `${boot} ${ticks}`;
  } catch {
    return undefined; // not Linux, or no such process
  }
}
