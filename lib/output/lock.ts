/**
 * One run at a time in one folder, or for one file, also after a run was killed and could not clean up.
 *
 * Each run first puts an empty file into the folder whose name identifies the run, then looks for others: of
 * two runs at least one sees the other. No two runs share a name, and the name is there at once and complete,
 * so what a dead run left can be told and deleted by anyone at any time. Two runs that start in the same
 * instant may both give way.
 *
 * Whether a run lives can be told at once only where its processes can be looked at: one of another host,
 * boot or container (PID namespace) counts as alive, unless its lock gives signs of life, as those of shards
 * do, and has stopped to give them ({@linkcode removeGone}).
 */
import { closeSync, readFileSync, readlinkSync, rmdirSync, rmSync } from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { OutputError } from "../errors.ts";
import { createNew } from "../files/positional.ts";
import { errorCode, exists, listFolder, outputError, quote } from "../files/whole.ts";
import { pause, type RunOptions } from "../progress.ts";
import { beginBeats, hasBeats, isGone, LEASE_MILLISECONDS } from "./lock_beat.ts";
import { makeOwnFolder } from "./own_folder.ts";

export const LOCK_PREFIX = "lock-";
/** `lock-<host>-<process>-<start of the process, 0 when unknown>-<count in the process>` */
const LOCK_NAME = /^lock-(.+)-(\d+)-(0|[0-9a-f]+\.\d+(?:\.\d+)?)-\d+$/;
/** Where the system does not say, as outside Linux; such processes are looked for by their number alone. */
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

/** Gives a lock back. */
export interface Unlock {
  (): void;
  /** @throws {OutputError} where another run has taken the lock over, as this one gave no signs of life */
  check(): void;
}

/**
 * Takes the lock of a folder; returns what gives it back.
 *
 * @param beats whether the lock gives signs of life, for runs on other machines
 * @throws {OutputError} when another run holds it
 */
export function acquireLock(folder: string, beats = false): Unlock {
  const name = `${LOCK_PREFIX}${host()}-${process.pid}-${startOf("self") ?? UNKNOWN_START}-${count++}`;
  const path = join(folder, name);
  let endBeats: (() => void) | undefined;
  const unlock = () => {
    endBeats?.();
    held.delete(name);
    rmSync(path, { force: true });
  };
  const release: Unlock = Object.assign(unlock, {
    check() {
      if (exists(path)) return;
      const reason = "another run has taken it over, for this one gave no signs of life (was it suspended?)";
      throw new OutputError(`Cannot write into ${quote(folder)}: ${reason}`, { path });
    },
  });
  held.add(name);
  try {
    closeSync(createNew(path));
    if (beats) endBeats = beginBeats(path);
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
  const path = join(folder, name), [, itsHost, pid, started] = LOCK_NAME.exec(name) ?? [];
  const place = started !== undefined && isElsewhere(started)
    ? " in another container or before a restart"
    : "";
  const reason = itsHost === undefined
    ? `it must have locks of this tool alone, got ${quote(name)}`
    : `it must have one run at a time, got process ${pid} on ${quote(itsHost)}${place} at work`;
  const remedy = `wait for it, or delete ${quote(path)} when you are sure that it is gone`;
  throw new OutputError(`Cannot write into ${quote(folder)}: ${reason}; ${remedy}`, { path });
}

/** Takes the lock of a folder that `make` makes, again where a run that ended in between has removed it. */
export function makeLocked(folder: string, make: () => void, beats = false): Unlock {
  const take = () => {
    make();
    return acquireLock(folder, beats);
  };
  try {
    return take();
  } catch (error) {
    if (!(error instanceof OutputError) || errorCode(error.cause) !== "ENOENT") throw error;
    return take();
  }
}

/**
 * Removes locks of runs on other machines that give signs of life no more. Where such a lock is there, that
 * takes up to two minutes.
 *
 * @throws the signal's reason when it was aborted
 */
export async function removeGone(
  folder: string,
  { signal, onEvent }: RunOptions,
  leaseMilliseconds = LEASE_MILLISECONDS,
): Promise<void> {
  for (const name of otherLocks(folder, undefined)) {
    const path = join(folder, name), [, itsHost, pid, started] = LOCK_NAME.exec(name) ?? [];
    const isOut = started !== undefined && (itsHost !== host() || isElsewhere(started));
    if (!isOut || !hasBeats(path)) continue;
    const run = `process ${pid} on ${quote(itsHost!)}`, seconds = Math.ceil(leaseMilliseconds / 1000);
    onEvent?.({
      kind: "warning",
      message: `${run} holds ${quote(folder)}: watching it for ${seconds} s at most`,
    });
    if (!await isGone(path, () => pause(signal), leaseMilliseconds)) continue;
    rmSync(path, { force: true });
    onEvent?.({
      kind: "warning",
      message: `${run} gave no sign of life for ${seconds} s: its lock is removed`,
    });
  }
}

/** The folder that is a file's lock. */
export const fileLock = (path: string): string => `${path}.lock`;

/**
 * Takes the lock of a file that is to be written: a folder beside it; returns what gives it back.
 *
 * @throws {OutputError} when another run holds it
 */
export function acquireFileLock(path: string, beats = false): () => void {
  const folder = fileLock(path);
  const unlock = makeLocked(folder, () => makeOwnFolder(folder), beats);
  return () => {
    unlock();
    try {
      rmdirSync(folder);
    } catch {
      // It holds the next run's lock already.
    }
  };
}

function otherLocks(folder: string, own: string | undefined): string[] {
  return listFolder(folder).filter((name) => name !== own && name.startsWith(LOCK_PREFIX));
}

function isHeld(name: string): boolean {
  const [, itsHost, digits, started] = LOCK_NAME.exec(name) ?? [], pid = Number(digits);
  if (started === undefined || itsHost !== host() || isElsewhere(started)) return true; // cannot be looked at
  if (pid === process.pid) return held.has(name);
  if (started !== UNKNOWN_START && isOwnProc()) return startOf(pid) === started;
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return errorCode(error) !== "ESRCH";
  }
}

/** Whether /proc shows the processes that this one sees: in a new PID namespace it may be the one outside. */
function isOwnProc(): boolean {
  try {
    return readlinkSync("/proc/self") === String(process.pid);
  } catch {
    return false; // not Linux
  }
}

/** Whether a process is of another boot or PID namespace than this one; false where that is unknown. */
function isElsewhere(started: string): boolean {
  const own = startOf("self");
  if (started === UNKNOWN_START || own === undefined) return false;
  const [[boot, , namespace], [ownBoot, , ownNamespace]] = [started.split("."), own.split(".")];
  return boot !== ownBoot || namespace !== ownNamespace;
}

/**
 * Where and when a process started, on Linux: boot, clock ticks since, PID namespace; undefined for a dead
 * process.
 */
function startOf(pid: number | "self"): string | undefined {
  try {
    const boot = readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim().replaceAll("-", "");
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    const namespace = /\d+/.exec(readlinkSync("/proc/self/ns/pid"))![0];
    // The name in parentheses may hold spaces; the state is the first field behind it, the start time the
    // 20th.
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    const isDead = fields[0] === "Z" || fields[0] === "X"; // killed, and its parent has not looked yet
    return isDead || fields[19] === undefined ? undefined : `${boot}.${fields[19]}.${namespace}`;
  } catch {
    return undefined; // not Linux, or no such process
  }
}
