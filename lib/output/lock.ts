/**
 * One run at a time in one folder, also after a run was killed and could not clean up.
 *
 * Each run first puts an empty file into the folder whose name identifies the run, then looks for others: of two
 * runs at least one sees the other. No two runs share a name, and the name is there at once and complete, so
 * what a dead run left can be told and deleted by anyone at any time. Two runs that start in the same instant
 * may both give way.
 */
import { closeSync, openSync, readFileSync, rmSync } from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { OutputError } from "../errors.ts";
import { errorCode, listFolder, outputError, quote } from "../files/whole.ts";

/** `lock-<host>-<process>-<start of the process, 0 when unknown>-<count in the process>` */
const LOCK_NAME = /^lock-(.+)-(\d+)-([0-9a-f.]+)-\d+$/;
const UNKNOWN_START = "0";

/** Host of a run that may not know where it runs (Deno without --allow-sys). */
const UNKNOWN_HOST = "unnamed";

function host(): string {
  try {
    return hostname().replace(/[^\w.-]/g, "_");
  } catch (error) {
    if (!(error instanceof Error) || error.name !== "NotCapable") throw error; // Deno's lack of a permission
    return UNKNOWN_HOST;
  }
}

/** Names of the locks that this process holds. */
const held = new Set<string>();
let count = 0;

/** Takes the lock of a folder; returns what gives it back. @throws {OutputError} when another run holds it */
export function acquireLock(folder: string): () => void {
  const name = `lock-${host()}-${process.pid}-${startOf(process.pid) ?? UNKNOWN_START}-${count++}`;
  const path = join(folder, name);
  const release = () => {
    held.delete(name);
    rmSync(path, { force: true });
  };
  held.add(name);
  try {
    closeSync(openSync(path, "w"));
    checkLock(folder, name);
    for (const stale of otherLocks(folder, name)) rmSync(join(folder, stale), { force: true });
    return release;
  } catch (cause) {
    release();
    throw cause instanceof OutputError ? cause : outputError("create the lock", path, cause);
  }
}

/** Checks that no living run holds a folder's lock but `own`. @throws {OutputError} otherwise, or in doubt */
export function checkLock(folder: string, own?: string): void {
  const name = otherLocks(folder, own).find(isHeld);
  if (name === undefined) return;
  const [, itsHost, pid] = LOCK_NAME.exec(name)!;
  const reason = `it must have one run at a time, got process ${pid} on ${quote(itsHost!)} at work`;
  const remedy = `wait for it, or delete ${quote(name)} there when you are sure that it is gone`;
  throw new OutputError(`Cannot write into ${quote(folder)}: ${reason}; ${remedy}`, {
    path: join(folder, name),
  });
}

function otherLocks(folder: string, own: string | undefined): string[] {
  return listFolder(folder).filter((name) => name !== own && LOCK_NAME.test(name));
}

function isHeld(name: string): boolean {
  const [, itsHost, digits, started] = LOCK_NAME.exec(name)!;
  const pid = Number(digits);
  if (itsHost !== host()) return true; // another machine's processes cannot be looked at
  if (pid === process.pid) return held.has(name);
  if (started !== UNKNOWN_START && startOf(process.pid) !== undefined) return startOf(pid) === started;
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return errorCode(error) !== "ESRCH";
  }
}

/** When a process started, on Linux: the boot and the clock ticks since; undefined for a dead process. */
function startOf(pid: number): string | undefined {
  try {
    const boot = readFileSync("/proc/sys/kernel/random/boot_id", "utf8").slice(0, 8);
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    // The name in parentheses may hold spaces; the state is the first field behind it, the start time the
    // 20th.
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    const isDead = fields[0] === "Z" || fields[0] === "X"; // killed, and its parent has not looked yet
    return isDead || fields[19] === undefined ? undefined : `${boot}.${fields[19]}`;
  } catch {
    return undefined; // not Linux, or no such process
  }
}
