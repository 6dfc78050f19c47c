/**
 * Whose the files of the cache are: native code is opened only where nobody but this user, or root, can have
 * written it. Windows has neither owners nor modes of this kind: there nothing is looked at.
 */
import {
  chmodSync,
  closeSync,
  existsSync,
  fstatSync,
  lstatSync,
  readFileSync,
  realpathSync,
  type Stats,
  statSync,
} from "node:fs";
import { basename, dirname, join } from "node:path";
import process from "node:process";
import { KernelError } from "../errors.ts";
import { openForReading } from "./positional.ts";

const GROUP_OR_OTHERS = 0o022, OTHERS = 0o002, STICKY = 0o1000;

/** This user; undefined on Windows, and in Deno without --allow-sys: modes alone are looked at then. */
function ownUser(): number | undefined {
  try {
    return process.getuid?.();
  } catch {
    return undefined;
  }
}

const hasModes = process.platform !== "win32";

const isOurs = ({ uid }: Stats): boolean => uid === 0 || uid === (ownUser() ?? uid);

/** Whether only this user, or root, could write what `stat` is of. */
const isPrivate = (stat: Stats): boolean =>
  !hasModes || (isOurs(stat) && (stat.mode & GROUP_OR_OTHERS) === 0);

const octal = ({ mode }: Stats): string => `mode 0${(mode & 0o7777).toString(8)}`;
const describe = (stat: Stats): string =>
  `${stat.isSymbolicLink() ? "a link" : stat.isDirectory() ? "one" : "a file"} of user ${stat.uid} with ${
    octal(stat)
  }`;

/** Checks the cache and a folder in it, if there. @throws {KernelError} where others can write there */
export function checkPrivateFolders(cache: string, folder: string): void {
  for (const path of [cache, folder]) {
    if (!existsSync(path)) continue;
    let stat = lstatSync(path);
    // The user may have made the cache a link to another disk.
    if (stat.isSymbolicLink() && path === cache && isOurs(stat)) stat = statSync(path);
    if (stat.isDirectory() && stat.uid === ownUser() && !isPrivate(stat)) {
      chmodSync(path, 0o700); // one's own, made with a loose umask
      stat = statSync(path);
    }
    if (stat.isDirectory() && isPrivate(stat)) continue;
    const wanted = "it must be a folder that only this user can write to";
    throw new KernelError(
      `Cannot use the cache "${path}": ${wanted}, got ${
        describe(stat)
      }: delete it, or name another with XDG_CACHE_HOME`,
    );
  }
}

/** Bytes of a file of the cache; undefined where others could have written it. */
export function readPrivate(folder: string, name: string): Uint8Array | undefined {
  const path = join(folder, name);
  if (basename(path) !== name || !lstatSync(path).isFile()) return undefined; // no link, no pipe
  const fd = openForReading(path);
  try {
    return isPrivate(fstatSync(fd)) ? readFileSync(fd) : undefined;
  } finally {
    closeSync(fd);
  }
}

/**
 * Checks a library that was named: a file that is the user's to choose, but not for everybody to write.
 *
 * @throws {KernelError} when everybody can, or it is no regular file
 */
export function checkNotWorldWritable(path: string): void {
  if (!hasModes) return;
  const real = realpathSync(path);
  for (const place of [real, dirname(real)]) {
    const stat = statIfAllowed(place);
    if (place === real && stat?.isFile() === false) { // opening a pipe would wait for ever
      throw new KernelError(`Cannot open the kernel library "${path}": it must be a regular file`);
    }
    if (stat === undefined || (stat.mode & OTHERS) === 0 || (place !== real && (stat.mode & STICKY) !== 0)) {
      continue;
    }
    const wanted = `not everybody may write to "${place}"`;
    throw new KernelError(`Cannot open the kernel library "${path}": ${wanted}, got ${octal(stat)}`);
  }
}

/** Undefined where Deno may not look. */
function statIfAllowed(path: string): Stats | undefined {
  try {
    return statSync(path);
  } catch (error) {
    if (!(error instanceof Error) || error.name !== "NotCapable") throw error;
    return undefined;
  }
}
