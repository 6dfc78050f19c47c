/**
 * `manifest.json` of a release: which native libraries lie beside its mod.ts, and what their bytes must be.
 * Written by scripts/release.ts; read, and trusted no further than checked here, by whoever imported mod.ts
 * over HTTP.
 */
import { FormatError } from "../errors.ts";
import { isJsonObject } from "../files/json.ts";

/** Name of the manifest beside mod.ts. */
export const RELEASE_MANIFEST_FILE = "manifest.json";
export const RELEASE_FORMAT_VERSION = 1;
/** Largest manifest that is read: a file entry has about 150 bytes, a release a few hundred. */
export const MAX_RELEASE_MANIFEST_BYTES = 2 ** 20;
/** Largest library that is fetched: today's have about 1 MB; debug builds tens. */
const MAX_LIBRARY_BYTES = 64 * 2 ** 20;
const MAX_LIBRARIES = 64;

/** A file of the release. */
export interface ReleaseFile {
  readonly bytes: number;
  /** In hex. */
  readonly sha256: string;
}

/** A native library of the release; platform and architecture in Node's words. */
export interface ReleaseLibrary extends ReleaseFile {
  readonly platform: string;
  readonly architecture: string;
  /** Path from the manifest, with slashes. */
  readonly file: string;
  /** What built it. */
  readonly compiler: string;
}

/** The manifest. */
export interface ReleaseManifest {
  readonly format_version: number;
  readonly version: string;
  /** `AQ_ABI_VERSION` of the libraries. */
  readonly abi: number;
  /** Hash of the kernels' sources, equal to that of the embedded WebAssembly module of the same release. */
  readonly kernels: string;
  readonly libraries: readonly ReleaseLibrary[];
  /** Platforms without a library, and why. */
  readonly skipped: readonly {
    readonly platform: string;
    readonly architecture: string;
    readonly reason: string;
  }[];
  /** Every other file of the release by its path. */
  readonly files: Readonly<Record<string, ReleaseFile>>;
}

const isText = (value: unknown): value is string => typeof value === "string" && value.length <= 200;
/** A path below the manifest: no scheme, no host, no way up. */
const isBelow = (value: unknown): value is string =>
  isText(value) && value.split("/").every((part) => /^[A-Za-z0-9_][A-Za-z0-9._-]*$/.test(part));

/**
 * Checks the part of a manifest that chooses and verifies a library; other keys are taken as they are.
 *
 * @throws {FormatError} naming what is wrong and what was found
 */
export function parseReleaseManifest(text: string, path: string): ReleaseManifest {
  const fail = (what: string, value: unknown, cause?: unknown): never => {
    const found = JSON.stringify(value)?.slice(0, 80) ?? "nothing";
    throw new FormatError(`Cannot read the release manifest "${path}": ${what}, got ${found}`, {
      path,
      cause,
    });
  };
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    fail("it must be JSON", text, cause);
  }
  if (!isJsonObject(json)) return fail("it must be an object", json);
  const { format_version, version, abi, kernels, libraries } = json;
  if (format_version !== RELEASE_FORMAT_VERSION) {
    fail(`format_version must be ${RELEASE_FORMAT_VERSION}`, format_version);
  }
  if (!isText(version)) fail("version must be a text of at most 200 characters", version);
  if (!Number.isSafeInteger(abi)) fail("abi must be a whole number", abi);
  if (!isText(kernels) || !/^[0-9a-f]{64}$/.test(kernels)) fail("kernels must be a SHA-256 in hex", kernels);
  if (!Array.isArray(libraries) || libraries.length > MAX_LIBRARIES) {
    return fail(`libraries must be a list of at most ${MAX_LIBRARIES}`, libraries);
  }
  for (const library of libraries as readonly unknown[]) {
    if (!isJsonObject(library)) return fail("a library must be an object", library);
    const { platform, architecture, file, bytes, sha256 } = library;
    if (!isText(platform) || !isText(architecture)) {
      fail("platform and architecture must be texts", library);
    }
    if (!isBelow(file)) fail("a library's file must be a path below the manifest", file);
    if (!Number.isSafeInteger(bytes) || (bytes as number) < 1 || (bytes as number) > MAX_LIBRARY_BYTES) {
      fail(`a library's bytes must lie in 1 to ${MAX_LIBRARY_BYTES}`, bytes);
    }
    if (!isText(sha256) || !/^[0-9a-f]{64}$/.test(sha256)) {
      fail("a library's sha256 must be 64 hex digits", sha256);
    }
  }
  return { skipped: [], files: {}, ...json } as unknown as ReleaseManifest;
}
