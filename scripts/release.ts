/** `release.ts OUT`: builds the release into a folder and tries it as its users will. */
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
} from "node:fs";
import { basename, dirname, join, relative, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { InterruptedError, OutputError } from "../lib/errors.ts";
import { PACKAGE_ROOT } from "../lib/native/location.ts";
import {
  parseReleaseManifest,
  RELEASE_FORMAT_VERSION,
  RELEASE_MANIFEST_FILE,
  type ReleaseManifest,
} from "../lib/native/release_manifest.ts";
import { ABI_VERSION } from "../lib/native/signatures.ts";
import { WASM_SOURCE_HASH } from "../lib/native/wasm_binary.ts";
import { TOOL_VERSION } from "../lib/pipeline/mod.ts";
import { writing } from "../lib/files/positional.ts";
import { digestFile, quote, writeWhole } from "../lib/files/whole.ts";
import { buildLibraries } from "./_release/libraries.ts";
import { bundle, packNpm } from "./_release/package.ts";
import { tryRelease } from "./_release/trials.ts";
import type { Arguments, Usage } from "./_command/options.ts";
import { type Context, defineCommand } from "./_command/run.ts";
import { formatBytes, formatCells } from "../lib/eval/table.ts";
import { print } from "./_command/text.ts";

const USAGE = {
  name: "release.ts",
  operands: "OUT",
  about:
    `Builds a release into the folder OUT and tries it: Deno imports it from a URL, Bun and Node install the npm package.
Served by any web host, OUT is what "import … from https://host/…/mod.ts" needs.

  mod.ts, lib/              the sources
  arrowquant.js             mod.ts and everything it imports in one file
  libraries/PLATFORM/       native libraries: linux-x64, and linux-arm64 by aarch64-linux-gnu-gcc
  manifest.json             bytes and SHA-256 of all files
  arrowquant-VERSION.tgz    the npm package

OUT appears when everything is done and every trial passed. A release that is there is replaced; a folder with anything
else in it is refused. Exit code 1: a trial failed.`,
  options: {
    "--skip-trials": "only build",
    "--quiet": "print nothing but errors",
  },
} as const satisfies Usage;

const root = fileURLToPath(PACKAGE_ROOT);

/** Paths of all files below a folder, with slashes, in order. */
function filesBelow(folder: string): string[] {
  return readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => !entry.isDirectory())
    .map((entry) => relative(folder, join(entry.parentPath, entry.name)).replaceAll("\\", "/"))
    .sort();
}

/**
 * Sees to it that nothing but a release would be replaced.
 *
 * @throws {OutputError} when the folder holds anything that its own manifest does not name
 */
function checkReplaceable(out: string): void {
  if (!existsSync(out)) return;
  const names = writing("release into", out, () => filesBelow(out));
  if (names.length === 0) return;
  const refused = (got: string, cause?: unknown) => {
    const message = `Cannot release into ${quote(out)}: it must be empty or a release, got ${got}`;
    return new OutputError(message, { path: out, cause });
  };
  const path = join(out, RELEASE_MANIFEST_FILE);
  if (!names.includes(RELEASE_MANIFEST_FILE)) {
    throw refused(`${names.length} files without ${RELEASE_MANIFEST_FILE}`);
  }
  let manifest: ReleaseManifest;
  try {
    manifest = parseReleaseManifest(readFileSync(path, "utf8"), path);
  } catch (cause) {
    throw refused(`a ${RELEASE_MANIFEST_FILE} of something else: ${(cause as Error).message}`, cause);
  }
  const libraries = manifest.libraries.map(({ file }) => file);
  const own = new Set([RELEASE_MANIFEST_FILE, ...Object.keys(manifest.files), ...libraries]);
  const foreign = names.find((name) => !own.has(name));
  if (foreign !== undefined) throw refused(`a file that is not of the release in it: ${quote(foreign)}`);
}

/** Builds everything of a release in a folder. @returns its manifest, and the name of the npm package */
async function buildRelease(
  work: string,
  step: (line: string) => void,
  log: (line: string) => void,
  signal: AbortSignal,
): Promise<{ readonly manifest: ReleaseManifest; readonly tarball: string }> {
  step("1 of 6: native libraries");
  const { libraries, skipped } = await buildLibraries(work, log, signal).catch((error) => {
    step("stopped"); // throws where a signal ended the compiler
    throw error;
  });
  step("2 of 6: sources");
  for (const path of ["mod.ts", ...filesBelow(join(root, "lib")).map((name) => `lib/${name}`)]) {
    if (path.endsWith(".ts")) cpSync(join(root, path), join(work, path));
  }
  for (const path of ["README.md", "LICENSE", "CHANGELOG.md"]) cpSync(join(root, path), join(work, path));
  step("3 of 6: single-file bundle");
  await bundle(join(work, "arrowquant.js"));
  step("4 of 6: npm package");
  const staging = mkdtempSync(`${work}-npm-`);
  let tarball: string;
  try {
    tarball = await packNpm(staging, work);
  } finally {
    rmSync(staging, { recursive: true, force: true });
  }
  step("5 of 6: manifest");
  const named = new Set(libraries.map(({ file }) => file));
  const files: Record<string, ReleaseManifest["files"][string]> = {};
  for (const name of filesBelow(work)) {
    if (!named.has(name)) files[name] = await digestFile(join(work, name));
  }
  const manifest: ReleaseManifest = {
    format_version: RELEASE_FORMAT_VERSION,
    version: TOOL_VERSION,
    abi: ABI_VERSION,
    kernels: WASM_SOURCE_HASH,
    libraries,
    skipped,
    files,
  };
  writeWhole(join(work, RELEASE_MANIFEST_FILE), JSON.stringify(manifest, null, 2) + "\n");
  return { manifest, tarball };
}

async function run(parsed: Arguments<typeof USAGE>, { signal }: Context): Promise<number> {
  const { flags } = parsed, out = resolve(...parsed.operands("OUT"));
  const log = (line: string) => {
    if (!flags.quiet) console.error(line);
  };
  const step = (line: string) => {
    if (signal.aborted) {
      throw new InterruptedError(`Cannot release: stopped by ${signal.reason}`, String(signal.reason));
    }
    log(line);
  };
  checkReplaceable(out);

  const work = writing("release into", out, () => {
    mkdirSync(dirname(out), { recursive: true });
    return mkdtempSync(join(dirname(out), `${basename(out)}.partial-`));
  });
  chmodSync(work, 0o755); // a temporary folder is its owner's alone, and a release is to be served
  try {
    const { manifest, tarball } = await buildRelease(work, step, log, signal);
    step(flags["skip-trials"] ? "6 of 6: trials skipped: --skip-trials" : "6 of 6: trials");
    const trials = flags["skip-trials"] ? [] : await tryRelease({
      folder: work,
      tarball: join(work, tarball),
      libraries: manifest.libraries,
      onTrial: ({ name, outcome, detail }) => log(`${outcome}: ${name}: ${detail}`),
    });
    const failed = trials.filter(({ outcome }) => outcome === "failed");
    if (failed.length > 0) {
      const list = failed.map(({ name, detail }) => `${name}: ${detail}`).join("\n");
      console.error(`error: Cannot release: every trial must pass, got ${failed.length} failed\n${list}`);
      return 1;
    }
    step(`into ${out}`);
    publish(work, out);
    if (!flags.quiet) print(summary(out, manifest, tarball));
    return 0;
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}

/** Renames the finished folder into place; what was there goes when that has succeeded. */
function publish(work: string, out: string): void {
  checkReplaceable(out); // again: minutes have passed
  const before = `${work}-before`;
  writing("release into", out, () => {
    if (existsSync(out)) renameSync(out, before);
    try {
      renameSync(work, out);
    } catch (cause) {
      if (existsSync(before)) renameSync(before, out);
      throw cause;
    }
    rmSync(before, { recursive: true, force: true });
  });
}

function summary(out: string, { libraries, files, skipped, version, abi }: ReleaseManifest, tarball: string) {
  const rows = [
    ...libraries.map(({ file, ...library }) => [file, library] as const),
    ...["arrowquant.js", tarball].map((name) => [name, { ...files[name]!, compiler: "" }] as const),
  ];
  const cells = rows.map((
    [name, { bytes, sha256, compiler }],
  ) => [name, formatBytes(bytes), sha256, compiler]);
  return [
    formatCells([["file", "size", "SHA-256", "compiler"], ...cells], [1]),
    ...skipped.map((each) => `skipped: ${each.platform}-${each.architecture}: ${each.reason}`),
    `${out}: arrowquant ${version}, ABI ${abi}, ${Object.keys(files).length} other files`,
  ].join("\n");
}

export const main = defineCommand(USAGE, run);
if (import.meta.main) await main();
