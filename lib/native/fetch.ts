/**
 * Fetches the native library of a release, for a package that was imported over HTTP and has no sources to
 * build: the release's manifest beside mod.ts says which file and what its bytes must be. Kept in the cache
 * under the hash of its bytes; a download that is short, long or different is never written there.
 */
import { Buffer } from "node:buffer";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { KernelError } from "../errors.ts";
import { sha256 } from "../files/whole.ts";
import { type BuildPlan, builtLibrary, onceAtATime, publishLibrary } from "./build.ts";
import { checkPrivateFolders } from "../files/ownership.ts";
import {
  MAX_RELEASE_MANIFEST_BYTES,
  parseReleaseManifest,
  RELEASE_MANIFEST_FILE,
  type ReleaseLibrary,
} from "./release_manifest.ts";

/** A host that does not answer must not keep a program from its WebAssembly. */
const MANIFEST_TIMEOUT_MILLISECONDS = 10_000;
/** A megabyte over a slow line. */
const LIBRARY_TIMEOUT_MILLISECONDS = 120_000;

/** What is fetched, and where it is kept. */
export interface FetchRequest {
  /** The release's folder: holds manifest.json. Ends with a slash. */
  readonly release: URL;
  readonly platform: string;
  readonly architecture: string;
  /** `AQ_ABI_VERSION` wanted. */
  readonly abi: number;
  /** Hash of the kernels' sources wanted. */
  readonly kernels: string;
  /** Names the file as a build would. */
  readonly plan: BuildPlan;
  /** The cache. */
  readonly cache: string;
}

/** Folder of the cache for what one release offers: another host's library is never taken for it. */
function folderOf({ release, platform, architecture, abi, kernels, cache }: FetchRequest): string {
  const key = sha256(JSON.stringify([release.href, abi, kernels])).slice(0, 32);
  return join(cache, `${platform}-${architecture}-fetched-${key}`);
}

/**
 * The library that was fetched before, undefined if there is none whose bytes are as they were.
 *
 * @throws {KernelError} when others can write into the cache
 */
export function fetchedLibrary(request: FetchRequest): string | undefined {
  const folder = folderOf(request);
  checkPrivateFolders(request.cache, folder);
  return builtLibrary(request.plan, folder);
}

/** Content types of web pages, which hosts send in place of files that they do not have. */
const PAGE = /^(?:text\/html|application\/xhtml\+xml)\b/i;

/**
 * A body of at most `limit` bytes.
 *
 * @param wanted its content type; a host that knows none may send another, but no page
 * @throws {KernelError} on a status, a page, a longer body, a broken connection, no answer
 */
async function download(url: URL, wanted: string, limit: number, milliseconds: number): Promise<Uint8Array> {
  const signal = AbortSignal.timeout(milliseconds);
  const fail = (reason: string, cause?: unknown) =>
    new KernelError(`Cannot fetch "${url.href}": ${reason}`, { cause });
  const chunks: Uint8Array[] = [];
  let bytes = 0;
  try {
    const response = await fetch(url, { signal, redirect: "error" });
    if (response.status !== 200) {
      await response.body?.cancel();
      throw fail(`the answer must have status 200, got ${response.status}`);
    }
    const type = response.headers.get("content-type") ?? "";
    if (PAGE.test(type)) {
      await response.body?.cancel();
      throw fail(`its content type must be ${wanted}, got ${type.slice(0, 100)}: a web page, not the file`);
    }
    for await (const chunk of response.body ?? []) {
      bytes += chunk.length;
      if (bytes > limit) throw fail(`the answer must have at most ${limit} bytes, got more`);
      chunks.push(chunk);
    }
  } catch (cause) {
    if (cause instanceof KernelError) throw cause;
    if (signal.aborted) throw fail(`it must answer within ${milliseconds / 1000} s`, cause);
    const reason = cause instanceof Error ? cause.message.split("\n")[0]! : String(cause);
    throw fail(bytes > 0 ? `the connection broke after ${bytes} bytes: ${reason}` : reason, cause);
  }
  return Buffer.concat(chunks);
}

/** The library of the manifest for this machine. */
async function chooseLibrary(request: FetchRequest): Promise<ReleaseLibrary> {
  const url = new URL(RELEASE_MANIFEST_FILE, request.release);
  const text = new TextDecoder().decode(
    await download(url, "application/json", MAX_RELEASE_MANIFEST_BYTES, MANIFEST_TIMEOUT_MILLISECONDS),
  );
  const manifest = parseReleaseManifest(text, url.href);
  const refuse = (what: string, wanted: unknown, got: unknown) => {
    throw new KernelError(
      `Cannot use the release "${request.release.href}": ${what} must be ${wanted}, got ${got}`,
    );
  };
  if (manifest.abi !== request.abi) refuse("the ABI of its libraries", request.abi, manifest.abi);
  if (manifest.kernels !== request.kernels) {
    refuse("the hash of its kernels' sources", request.kernels, manifest.kernels);
  }
  const found = manifest.libraries.find(({ platform, architecture }) =>
    platform === request.platform && architecture === request.architecture
  );
  if (found === undefined) {
    const has = manifest.libraries.map((each) => `${each.platform}-${each.architecture}`).join(", ");
    throw new KernelError(
      `Cannot use the release "${request.release.href}": it must have a library for ` +
        `${request.platform}-${request.architecture}, got ${has === "" ? "none" : has}`,
    );
  }
  return found;
}

/**
 * Fetches the library into the cache, synced and renamed into place under the hash of its bytes.
 *
 * @param onMessage called before the library is downloaded
 * @returns the library's path
 * @throws {KernelError} when the release cannot be reached, has no library for this machine, or sends other
 *   bytes than its manifest promises
 * @throws {FormatError} when the manifest is none
 */
export function fetchLibrary(request: FetchRequest, onMessage: (line: string) => void): Promise<string> {
  const folder = folderOf(request);
  return onceAtATime(folder, async () => {
    const library = await chooseLibrary(request);
    const url = new URL(library.file, request.release);
    onMessage(
      `kernels: fetching ${url.href} (${library.bytes} bytes) into ${folder}, once for this version; ` +
        "ARROWQUANT_FETCH=0 prevents that",
    );
    const bytes = await download(
      url,
      "application/octet-stream",
      library.bytes,
      LIBRARY_TIMEOUT_MILLISECONDS,
    );
    if (bytes.length !== library.bytes) {
      throw new KernelError(
        `Cannot use "${url.href}": it must have ${library.bytes} bytes, got ${bytes.length}`,
      );
    }
    const got = sha256(bytes);
    if (got !== library.sha256) {
      throw new KernelError(`Cannot use "${url.href}": its SHA-256 must be ${library.sha256}, got ${got}`);
    }
    mkdirSync(folder, { recursive: true, mode: 0o700 });
    const work = mkdtempSync(`${folder}.fetch-`);
    try {
      const file = join(work, request.plan.fileName);
      writeFileSync(file, bytes, { mode: 0o700, flag: "wx" });
      return publishLibrary(request.plan, file, folder);
    } finally {
      rmSync(work, { recursive: true, force: true });
    }
  });
}
