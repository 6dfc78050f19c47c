/** Folders that a run makes for itself: no link to others', and nobody else's to write to. */
import { mkdirSync } from "node:fs";
import { basename, dirname } from "node:path";
import { OutputError } from "../errors.ts";
import { errorCode, outputError, ownKind, quote } from "../files/whole.ts";

/** @throws {OutputError} where a folder's name stands for something else, a link to a folder as well */
export function checkOwnFolder(path: string): void {
  const kind = ownKind(path), parent = quote(dirname(path));
  if (kind === "nothing" || kind === "folder") return;
  throw new OutputError(
    `Cannot write ${parent}: must have ${quote(basename(path))} as a folder, got a ${kind}`,
    { path },
  );
}

/** Makes a folder that only this user may write to; undefined where it was there. */
export function makeOwnFolder(path: string): string | undefined {
  try {
    mkdirSync(path, { mode: 0o700 });
    return path;
  } catch (cause) {
    if (errorCode(cause) !== "EEXIST") throw outputError("create", path, cause);
    checkOwnFolder(path);
    return undefined;
  }
}
