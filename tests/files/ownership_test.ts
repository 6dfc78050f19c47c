import { afterAll, describe, expect, test } from "bun:test";
import { chmodSync, chownSync, lstatSync, mkdirSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { sha256 } from "../../lib/files/whole.ts";
import { builtLibrary, nativePlan } from "../../lib/native/build.ts";
import { checkNotWorldWritable, checkPrivateFolders } from "../../lib/files/ownership.ts";
import { workplace } from "../_checkpoints.ts";

const place = workplace();
afterAll(() => place.remove());
const plan = nativePlan(process.platform, process.arch), [stem, extension] = plan.fileName.split(".");
const isRoot = process.getuid?.() === 0;

/** A cache with a folder in it that holds a file under the hash of its bytes, as a build leaves one. */
function cacheWith(content: string) {
  const cache = place.fresh("cache"), folder = join(cache, "build");
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  const file = join(folder, `${stem}-${sha256(content).slice(0, 32)}.${extension}`);
  writeFileSync(file, content, { mode: 0o700 });
  return { cache, folder, file };
}

describe("a cache of native code, where files have owners and modes,", () => {
  test("of one's own is used, and made one's own alone where the umask was loose", () => {
    const { cache, folder, file } = cacheWith("a");
    for (const path of [cache, folder]) chmodSync(path, 0o777);
    checkPrivateFolders(cache, folder);
    for (const path of [cache, folder]) expect(lstatSync(path).mode & 0o777).toBe(0o700);
    expect(builtLibrary(plan, folder)).toBe(file);
  });

  test("gives no file that others could have written, none by way of a link, none with other bytes", () => {
    for (const mode of [0o720, 0o702, 0o777]) {
      const { folder, file } = cacheWith("b");
      chmodSync(file, mode);
      expect(builtLibrary(plan, folder)).toBe(undefined);
    }
    const { folder, file } = cacheWith("c"), other = place.fresh("other");
    mkdirSync(other);
    symlinkSync(file, join(other, file.slice(folder.length + 1)));
    expect(builtLibrary(plan, other)).toBe(undefined);
    writeFileSync(file, "d");
    expect(builtLibrary(plan, folder)).toBe(undefined);
  });

  test("of another user, or in a link's place, is refused with the reason", () => {
    const { cache, folder } = cacheWith("e"), linked = join(cache, "linked");
    symlinkSync(folder, linked);
    expect(() => checkPrivateFolders(cache, linked)).toThrow("got a link of user");
    if (!isRoot) return console.log("skipped: only root can give a folder away");
    const strangers = cacheWith("f");
    chownSync(strangers.file, 12345, 12345);
    expect(builtLibrary(plan, strangers.folder)).toBe(undefined);
    for (const path of [strangers.folder, strangers.cache]) {
      chownSync(path, 12345, 12345);
      const call = () => checkPrivateFolders(strangers.cache, strangers.folder);
      expect(call).toThrow("only this user can write to, got one of user 12345 with mode 0700");
      chownSync(path, 0, 0);
    }
  });

  test("is not needed for a library that is named, unless everybody could write it", () => {
    const { folder, file } = cacheWith("g");
    chmodSync(file, 0o775);
    checkNotWorldWritable(file);
    chmodSync(file, 0o777);
    expect(() => checkNotWorldWritable(file)).toThrow("got mode 0777");
    chmodSync(file, 0o755);
    chmodSync(folder, 0o777);
    expect(() => checkNotWorldWritable(file)).toThrow(`not everybody may write to "${folder}"`);
    chmodSync(folder, 0o1777); // as /tmp
    checkNotWorldWritable(file);
    expect(() => checkNotWorldWritable(folder)).toThrow("must be a regular file"); // a pipe would never open
  });
});
