/** The native libraries of a release: one for each platform whose compiler this machine has. */
import { chmodSync, copyFileSync, mkdirSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import {
  buildHash,
  buildLibrary,
  type BuildPlan,
  builtLibrary,
  compilerVersion,
  nativePlan,
} from "../../lib/native/build.ts";
import { buildPlace, cacheFolder, compilerCandidates, openLibrary } from "../../lib/native/library.ts";
import { PACKAGE_ROOT } from "../../lib/native/location.ts";
import type { ReleaseLibrary, ReleaseManifest } from "../../lib/native/release_manifest.ts";
import { checkPrivateFolders } from "../../lib/files/ownership.ts";
import { KernelError } from "../../lib/errors.ts";
import { sha256 } from "../../lib/files/whole.ts";

/** Platforms of a release and the compilers, first choice first, that build for them elsewhere. */
const TARGETS = [
  { platform: "linux", architecture: "x64", cross: ["x86_64-linux-gnu-gcc"], machine: 62 },
  { platform: "linux", architecture: "arm64", cross: ["aarch64-linux-gnu-gcc"], machine: 183 },
] as const;

/** What could be built, and what could not. */
export type BuiltLibraries = Pick<ReleaseManifest, "libraries" | "skipped">;

/** An ELF file's machine number, undefined where the bytes are of no ELF file. */
function elfMachine(bytes: Uint8Array): number | undefined {
  const isElf = bytes.length > 20 && bytes[0] === 0x7f && bytes[1] === 0x45 && bytes[2] === 0x4c &&
    bytes[3] === 0x46;
  return isElf ? bytes[18]! | bytes[19]! << 8 : undefined;
}

/** The library that is opened here, if this compiler made it: its version stands in the file. */
function openedLibrary(plan: BuildPlan, kernels: string, version: string): string | undefined {
  const place = buildPlace("native library", "", plan, () => undefined);
  const path = place?.kernels === kernels ? builtLibrary(plan, place.folder) : undefined;
  const mark = version.replace(/^\S+ /, ""); // without the name that the compiler was called by
  return path !== undefined && readFileSync(path).includes(mark) ? path : undefined;
}

/**
 * Builds the libraries into `folder/libraries`. What was built before by the same compiler from the same
 * sources is taken from the cache. The library of this machine is opened; of others the file's header is
 * looked at.
 *
 * @param signal ends a compiler at once
 * @throws {KernelError} when a compiler refuses the sources or was ended, or what it made is not for its
 * platform
 */
export async function buildLibraries(
  folder: string,
  onMessage: (line: string) => void,
  signal?: AbortSignal,
): Promise<BuiltLibraries> {
  const kernels = fileURLToPath(new URL("kernels", PACKAGE_ROOT));
  const libraries: ReleaseLibrary[] = [];
  const skipped: ReleaseManifest["skipped"][number][] = [];
  for (const { platform, architecture, cross, machine } of TARGETS) {
    const isHere = process.platform === platform && process.arch === architecture;
    const candidates = isHere ? compilerCandidates() : cross;
    let compiler: { command: string; version: string } | undefined;
    for (const command of candidates) {
      const version = await compilerVersion(command);
      if (version !== undefined) {
        compiler = { command, version };
        break;
      }
    }
    if (compiler === undefined) {
      skipped.push({ platform, architecture, reason: `no compiler: tried ${candidates.join(", ")}` });
      continue;
    }
    const plan = nativePlan(platform, architecture);
    const cache = cacheFolder();
    const hash = buildHash(plan, kernels, compiler.version).slice(0, 16);
    const work = join(cache ?? folder, `release-${platform}-${architecture}-${hash}`);
    if (cache !== undefined) checkPrivateFolders(cache, work);
    let built = builtLibrary(plan, work) ??
      (isHere ? openedLibrary(plan, kernels, compiler.version) : undefined);
    if (built === undefined) {
      onMessage(`${platform}-${architecture}: building with ${compiler.command} (${compiler.version}) …`);
      built = await buildLibrary(plan, kernels, compiler.command, work, { signal, onMessage });
    }
    const bytes = readFileSync(built);
    if (elfMachine(bytes) !== machine) {
      throw new KernelError(
        `Cannot release the library for ${platform}-${architecture}: ${compiler.command} must make an ELF file ` +
          `for machine ${machine}, got ${elfMachine(bytes) ?? "no ELF file"}`,
      );
    }
    const file = `libraries/${platform}-${architecture}/${plan.fileName}`;
    mkdirSync(dirname(join(folder, file)), { recursive: true });
    copyFileSync(built, join(folder, file));
    chmodSync(join(folder, file), 0o755); // for everybody; the cache is not
    if (isHere) (await openLibrary(join(folder, file))).close(); // checks symbols and ABI
    libraries.push({
      platform,
      architecture,
      file,
      bytes: bytes.length,
      sha256: sha256(bytes),
      compiler: compiler.version,
    });
  }
  return { libraries, skipped };
}
