import { describe, expect, test } from "bun:test";
import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { CheckpointError, ConfigError, OutputError } from "../../lib/errors.ts";
import { inputError, openForReading } from "../../lib/files/positional.ts";
import { makeFolder, readOwnText, writeWhole } from "../../lib/files/whole.ts";
import { loadConfig } from "../../lib/config/mod.ts";
import { readPuzzles } from "../../lib/eval/mod.ts";
import { readJournal } from "../../lib/output/journal.ts";
import { readPlan } from "../../lib/plan/budget.ts";
import { loadTokenizer, openCheckpoint, readManifest, SafetensorsFile } from "../../mod.ts";

const work = mkdtempSync(join(tmpdir(), "arrowquant-opening-"));
process.on("exit", () => rmSync(work, { recursive: true, force: true }));
const isPosix = process.platform !== "win32";

/** A folder in which a named pipe without a writer has this name: reading it would wait for ever. */
function withPipe(name: string): string {
  const folder = mkdtempSync(join(work, "pipe-"));
  execFileSync("mkfifo", [join(folder, name)]);
  return folder;
}

describe("what is no regular file is refused at once", () => {
  const readers: [string, (folder: string) => unknown, unknown][] = [
    ["tokenizer.json", loadTokenizer, CheckpointError],
    ["config.json", openCheckpoint, CheckpointError],
    ["model.safetensors", openCheckpoint, CheckpointError],
    ["x.safetensors", (folder) => SafetensorsFile.open(join(folder, "x.safetensors")), CheckpointError],
    ["model.safetensors.index.json", openCheckpoint, CheckpointError],
    ["arrowquant.manifest.json", readManifest, OutputError],
    ["progress.jsonl", (folder) => readJournal(join(folder, "progress.jsonl")), OutputError],
    ["plan.json", (folder) => readPlan(join(folder, "plan.json"), new Set()), CheckpointError],
    ["c.yaml", (folder) => loadConfig({ path: join(folder, "c.yaml") }), ConfigError],
    ["p.jsonl", (folder) => readPuzzles(join(folder, "p.jsonl")), CheckpointError],
  ];
  for (const [name, read, Wanted] of readers) {
    test(`a pipe ${name}`, async () => {
      if (!isPosix) return console.log("skipped: no named pipes");
      const folder = withPipe(name);
      let found: unknown;
      try {
        await read(folder);
      } catch (error) {
        found = error;
      }
      expect(found).toBeInstanceOf(Wanted as typeof CheckpointError);
    });
  }

  test("a device and a folder", () => {
    if (!isPosix) return console.log("skipped: no devices");
    for (const path of ["/dev/zero", work]) {
      expect(() => openForReading(path)).toThrow("must be a regular file");
    }
  });

  test("a file of its own that is too large or not there", () => {
    const path = join(work, "own");
    expect(readOwnText(path, 4)).toBe(undefined);
    writeFileSync(path, "12345");
    expect(readOwnText(path, 5)).toBe("12345");
    expect(() => readOwnText(path, 4)).toThrow(OutputError);
    expect(() => readOwnText(path, 4)).toThrow(/must have at most 4 bytes, got 5/);
  });
});

describe("a path that cannot be written", () => {
  const file = join(work, "file"), folder = join(work, "folder.json");
  writeFileSync(file, "x");
  mkdirSync(folder);
  const cases: [string, string, RegExp][] = [
    ["through a file", join(file, "x"), /a part of the path is a file|no such file/],
    ["with a name too long", join(work, "n".repeat(300)), /too long|no such file/],
    ["with a null character", join(work, "a\0b"), /null character|invalid|null byte/i],
    ["of a folder", folder, /a folder has that name|directory/],
    ["in a folder that is not there", join(work, "no", "x"), /create the folder first/],
  ];
  for (const [name, path, message] of cases) {
    test(name, () => {
      expect(() => writeWhole(path, "text")).toThrow(OutputError);
      expect(() => writeWhole(path, "text")).toThrow(message);
    });
  }
  test("as a folder where a file is", () => expect(() => makeFolder(file)).toThrow(OutputError));
});

test("an input that may not be read is told so, with what to do, not by the system's code", () => {
  for (const code of ["EACCES", "EPERM"]) {
    const error = inputError("m.safetensors", Object.assign(new Error(`${code}: not permitted`), { code }));
    expect(error.message).toMatch(/^Cannot open "m.safetensors": no permission to read it: .*chmod a\+r/);
    expect(error.message).not.toContain(code);
  }
});
