import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { createHash } from "node:crypto";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { nativePlan } from "../../lib/native/build.ts";
import { fetchedLibrary, fetchLibrary, type FetchRequest } from "../../lib/native/fetch.ts";
import { packageRoot } from "../../lib/native/location.ts";
import { ABI_VERSION, openKernels } from "../../lib/native/mod.ts";
import { parseReleaseManifest, type ReleaseManifest } from "../../lib/native/release_manifest.ts";
import { WASM_SOURCE_HASH } from "../../lib/native/wasm_binary.ts";
import { type Outcome, runProgram } from "../../scripts/_command/run_program.ts";
import { type OtherAnswer, serveFolder, type StaticServer } from "../../scripts/_release/static_server.ts";
import { ROOT } from "../_checkpoints.ts";
import { runtimeBinary } from "../_runtimes.ts";

const folder = mkdtempSync(join(tmpdir(), "arrowquant-remote-"));
const deno = runtimeBinary("deno");
const LIBRARY = "libraries/here/library.so";

/** What the host says instead of a file, by path; a test sets it. */
let answers: Record<string, OtherAnswer> = {};
let server: StaticServer;
/** This machine's library, undefined where none can be built. */
let library: Uint8Array | undefined;

beforeAll(async () => {
  using kernels = await openKernels();
  if (kernels.backend === "native") library = readFileSync(kernels.library);
  server = await serveFolder(ROOT, (path) => answers[path]);
}, 300_000); // a build

afterAll(() => {
  server.close();
  rmSync(folder, { recursive: true, force: true });
});

const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");
const json = (value: unknown): OtherAnswer => ({ status: 200, body: JSON.stringify(value) });

/** A manifest for `bytes`, with what a test wants otherwise. */
function manifestOf(bytes: Uint8Array, other: object = {}, otherLibrary: object = {}) {
  return {
    format_version: 1,
    version: "0.1.0",
    abi: ABI_VERSION,
    kernels: WASM_SOURCE_HASH,
    libraries: [{
      platform: process.platform,
      architecture: process.arch,
      file: LIBRARY,
      bytes: bytes.length,
      sha256: sha256(bytes),
      compiler: "cc",
      ...otherLibrary,
    }],
    ...other,
  };
}

/** A host with a release that has this library. */
const release = (bytes: Uint8Array, manifest: object = manifestOf(bytes)) => ({
  "/manifest.json": json(manifest),
  [`/${LIBRARY}`]: { status: 200, body: bytes },
});

let folders = 0;
function emptyFolder(): string {
  const path = join(folder, String(folders++));
  mkdirSync(path);
  return path;
}

/** Runs a program in a folder of its own, in Deno without a compiler, with a cache of modules and of libraries. */
async function runInDeno(
  source: string,
  { cwd = emptyFolder(), flags = ["-A"], environment = {}, denoFolder = join(folder, "deno") }: {
    cwd?: string;
    flags?: readonly string[];
    environment?: Record<string, string>;
    denoFolder?: string;
  } = {},
): Promise<Outcome> {
  const program = join(cwd, "program.ts");
  writeFileSync(program, source);
  return await runProgram(deno!, ["run", "-q", "--no-prompt", "--no-check", ...flags, program], {
    cwd,
    environment: {
      PATH: "/nonexistent",
      HOME: cwd,
      XDG_CACHE_HOME: join(cwd, "cache"),
      DENO_DIR: denoFolder,
      ARROWQUANT_LIBRARY: undefined,
      ARROWQUANT_FETCH: undefined,
      ...environment,
    },
  });
}

function parsed({ code, output, errors }: Outcome) {
  if (code !== 0) throw new Error(errors);
  return JSON.parse(output);
}

const openAndPrint = () => `
import { dequantize, openKernels, quantize, resolveConfig } from "${server.url}mod.ts";
const kernels = await openKernels();
const data = Float32Array.from({ length: 4096 }, (_, i) => Math.sin(i));
const packed = quantize(kernels, { data, dtype: "F32" }, 32, 128, { bits: 8 });
const restored = dequantize(kernels, packed);
const worst = Math.max(...restored.map((w, i) => Math.abs(w - data[i])));
const { backend, library, attempts } = kernels;
console.log(JSON.stringify({ backend, library, attempts, worst, bits: resolveConfig({}).config.bitWidth }));`;

describe("import from a URL", () => {
  test("with nothing permitted Deno quantizes by WebAssembly, says so, and loads no analysis", async () => {
    if (deno === undefined) return console.log("skipped: no Deno");
    answers = {};
    const before = server.requests.length;
    const outcome = await runInDeno(openAndPrint(), {
      flags: [`--allow-import=${server.host}`],
      denoFolder: join(folder, "deno-nothing"),
    });
    const result = parsed(outcome);
    expect(result.backend).toBe("wasm");
    expect(result.worst).toBeLessThan(0.005);
    expect(result.bits).toBe(4);
    expect(outcome.errors).toContain("WebAssembly");
    expect(outcome.errors).toContain(`--allow-net=${server.host}`);
    const requests = server.requests.slice(before);
    expect(requests).toContain("/mod.ts");
    expect(requests.filter((path) => path.startsWith("/lib/analysis/"))).toEqual([]);
    expect(requests).not.toContain("/manifest.json");
  });

  test("permitted, it fetches the release's library once, and finds it in the cache afterwards", async () => {
    if (deno === undefined) return console.log("skipped: no Deno");
    if (library === undefined) return console.log("skipped: no native library here");
    answers = release(library);
    const cwd = emptyFolder();
    const first = await runInDeno(openAndPrint(), { cwd });
    const result = parsed(first);
    expect(result.backend).toBe("native");
    expect(result.library.startsWith(join(cwd, "cache", "arrowquant"))).toBe(true);
    expect(sha256(readFileSync(result.library))).toBe(sha256(library));
    expect(first.errors).toContain(`kernels: fetching ${server.url}${LIBRARY}`);
    expect(result.worst).toBeLessThan(0.005);

    const before = server.requests.length;
    answers = {}; // the release is gone, the cache is not
    const second = await runInDeno(openAndPrint(), { cwd });
    expect(parsed(second)).toEqual(result);
    expect(second.errors).toBe("");
    expect(server.requests.slice(before)).toEqual([]);

    writeFileSync(result.library, library.subarray(0, 1000)); // damaged: passed over, not opened
    answers = release(library);
    expect(parsed(await runInDeno(openAndPrint(), { cwd })).backend).toBe("native");

    // Only what it needs: nothing to run, and no file but the cache's.
    const narrow = [
      `--allow-import=${server.host}`,
      `--allow-net=${server.host}`,
      "--allow-env",
      ...["ffi", "read", "write"].map((name) => `--allow-${name}=${join(cwd, "cache", "arrowquant")}`),
    ];
    expect(parsed(await runInDeno(openAndPrint(), { cwd, flags: narrow })).backend).toBe("native");
  });

  test("what is not as the manifest says is never opened: WebAssembly, and the reason", async () => {
    if (deno === undefined) return console.log("skipped: no Deno");
    const bytes = new Uint8Array(100_000).fill(7);
    const cases: [string, Record<string, OtherAnswer>, RegExp][] = [
      [
        "another SHA-256",
        release(bytes, manifestOf(bytes.slice().fill(8))),
        /SHA-256 must be [0-9a-f]{64}, got/,
      ],
      [
        "a short body",
        { ...release(bytes), [`/${LIBRARY}`]: { status: 200, body: bytes.subarray(0, 5) } },
        /must have 100000 bytes, got 5/,
      ],
      [
        "a broken connection",
        { ...release(bytes), [`/${LIBRARY}`]: { status: 200, body: bytes, breakAfter: 5000 } },
        /Cannot fetch "[^"]*library\.so"/,
      ],
      ["no manifest", {}, /manifest\.json": the answer must have status 200, got 404/],
      [
        "a page in place of the manifest",
        { "/manifest.json": { status: 200, body: "<html>", type: "text/html; charset=utf-8" } },
        /fetch "http[^"]*manifest\.json": its content type must be application\/json, got text\/html; charset=utf-8/,
      ],
      [
        "a page in place of the library",
        { ...release(bytes), [`/${LIBRARY}`]: { status: 200, body: "<html>", type: "text/html" } },
        /fetch "http[^"]*library\.so": its content type must be application\/octet-stream, got text\/html/,
      ],
    ];
    for (const [name, given, reason] of cases) {
      answers = given;
      const cwd = emptyFolder();
      const outcome = await runInDeno(openAndPrint(), { cwd });
      expect([name, parsed(outcome).backend]).toEqual([name, "wasm"]);
      expect(outcome.errors).toMatch(reason);
      expect(outcome.errors).toContain("WebAssembly");
      const cache = join(cwd, "cache", "arrowquant");
      const kept = existsSync(cache) ? readdirSync(cache, { recursive: true }) : [];
      expect([name, kept]).toEqual([name, []]);
    }
  });

  test("ARROWQUANT_FETCH=0 keeps it from fetching; another value is refused", async () => {
    if (deno === undefined) return console.log("skipped: no Deno");
    answers = {};
    const before = server.requests.filter((path) => path === "/manifest.json").length;
    const off = await runInDeno(openAndPrint(), { environment: { ARROWQUANT_FETCH: "0" } });
    expect(parsed(off).backend).toBe("wasm");
    expect(off.errors).toContain("ARROWQUANT_FETCH is 0");
    expect(server.requests.filter((path) => path === "/manifest.json").length).toBe(before);
    const wrong = await runInDeno(openAndPrint(), { environment: { ARROWQUANT_FETCH: "never" } });
    expect(wrong.code).not.toBe(0);
    expect(wrong.errors).toContain('ARROWQUANT_FETCH must be 0 or 1, got "never"');
  });

  test("without a network the modules come from Deno's cache and WebAssembly runs", async () => {
    if (deno === undefined) return console.log("skipped: no Deno");
    const other = await serveFolder(ROOT, () => undefined);
    const source = openAndPrint().replace(server.url, other.url);
    const denoFolder = join(folder, "deno-offline");
    parsed(await runInDeno(source, { denoFolder, environment: { ARROWQUANT_FETCH: "0" } }));
    other.close();
    const outcome = await runInDeno(source, { denoFolder });
    expect(parsed(outcome).backend).toBe("wasm");
    expect(outcome.errors).toContain(`Cannot fetch "${other.url}manifest.json"`);
  });

  test("a program in an empty folder quantizes a file, makes a table and draws it", async () => {
    if (deno === undefined) return console.log("skipped: no Deno");
    answers = library === undefined ? {} : release(library);
    const cwd = emptyFolder();
    const outcome = await runInDeno(
      `
import { readFileSync, writeFileSync } from "node:fs";
import { DEFAULT_CONFIG, loadAnalysis, openKernels, quantizeCheckpoint, SafetensorsWriter } from "${server.url}mod.ts";
const weights = Float32Array.from({ length: 64 * 128 }, (_, i) => Math.sin(i * i));
const names = ["block.0.attn.weight", "block.1.mlp.weight"];
const specs = names.map((name) => ({ name, dtype: "F32", shape: [64, 128] }));
const writer = SafetensorsWriter.create("model.safetensors", {
  reservedHeaderBytes: SafetensorsWriter.headerBytes(specs),
});
writer.add(specs);
for (const name of names) writer.write(name, 0, new Uint8Array(weights.buffer));
writer.finish();
using kernels = await openKernels();
const report = await quantizeCheckpoint({ input: "model.safetensors", output: "packed", config: DEFAULT_CONFIG, kernels });
const { errorByLayer, layerRowsOf, renderSvg, tableFromRows } = await loadAnalysis();
const table = await tableFromRows("layers", layerRowsOf(report.layers, [], { model: "m", setting: "4" }));
const svg = await renderSvg(errorByLayer(table));
writeFileSync("chart.svg", svg);
console.log(JSON.stringify({ backend: kernels.backend, names: table.array("name"), errors: table.array("relativeRmsError") }));
`,
      { cwd, denoFolder: join(folder, "deno-analysis") },
    );
    if (outcome.code !== 0 && /registry|error sending request|dns error/i.test(outcome.errors)) {
      return console.log(`skipped: no package registry: ${outcome.errors.trim().split("\n")[0]}`);
    }
    const { backend, names, errors } = parsed(outcome);
    expect(backend).toBe(library === undefined ? "wasm" : "native");
    expect(names).toEqual(["block.0.attn.weight", "block.1.mlp.weight"]);
    for (const error of errors) expect(error > 0 && error < 0.1).toBe(true);
    const svg = readFileSync(join(cwd, "chart.svg"), "utf8");
    expect(svg).toMatch(/^<svg[\s\S]*block\.0\.attn[\s\S]*<\/svg>\s*$/);
  }, 120_000); // downloads

  test("how long the import takes is printed", async () => {
    const source = (specifier: string) => `
const started = performance.now();
await import(${JSON.stringify(specifier)});
console.log(performance.now() - started);`;
    const cwd = emptyFolder();
    const median = async (run: () => Promise<Outcome>) => {
      await run(); // fills the caches
      const times: number[] = [];
      for (let i = 0; i < 3; i++) times.push(Number(parsed(await run())));
      expect(times.every((time) => time > 0)).toBe(true);
      return times.sort((a, b) => a - b)[1]!.toFixed(0);
    };
    const bun = runtimeBinary("bun");
    if (bun !== undefined) {
      const program = join(cwd, "start.ts");
      writeFileSync(program, source(join(ROOT, "mod.ts")));
      console.log(
        `import of mod.ts in Bun: ${await median(() => runProgram(bun, ["run", program], { cwd }))} ms`,
      );
    }
    if (deno !== undefined) {
      for (
        const [name, specifier] of [["a file", join(ROOT, "mod.ts")], [
          "a URL",
          `${server.url}mod.ts`,
        ]] as const
      ) {
        const milliseconds = await median(() => runInDeno(source(specifier), { cwd }));
        console.log(`import of mod.ts in Deno from ${name}: ${milliseconds} ms`);
      }
    }
  }, 120_000);
});

describe("fetchLibrary", () => {
  const request = (cache: string): FetchRequest => ({
    release: new URL(server.url),
    platform: process.platform,
    architecture: process.arch,
    abi: ABI_VERSION,
    kernels: WASM_SOURCE_HASH,
    plan: nativePlan(process.platform, process.arch),
    cache,
  });
  const bytes = new Uint8Array(70_000).map((_, i) => i);

  test("asked for three times at once it fetches once; another host's library is not taken for it", async () => {
    answers = release(bytes);
    const cache = emptyFolder(), messages: string[] = [];
    expect(fetchedLibrary(request(cache))).toBe(undefined);
    const before = server.requests.length;
    const paths = await Promise.all(
      [1, 2, 3].map(() => fetchLibrary(request(cache), (line) => messages.push(line))),
    );
    expect(new Set(paths).size).toBe(1);
    expect(server.requests.slice(before)).toEqual(["/manifest.json", `/${LIBRARY}`]);
    expect(messages.length).toBe(1);
    expect(new Uint8Array(readFileSync(paths[0]!))).toEqual(bytes);
    expect(fetchedLibrary(request(cache))).toBe(paths[0]!);
    for (
      const other of [
        { release: new URL("https://example.org/") },
        { kernels: "0".repeat(64) },
        { abi: ABI_VERSION + 1 },
      ]
    ) expect(fetchedLibrary({ ...request(cache), ...other })).toBe(undefined);
  });

  test("refuses a release that is not for this machine or these sources", async () => {
    const cases: [object, RegExp][] = [
      [manifestOf(bytes, { abi: ABI_VERSION + 1 }), /ABI of its libraries must be/],
      [manifestOf(bytes, { kernels: "0".repeat(64) }), /hash of its kernels' sources must be/],
      [manifestOf(bytes, {}, { architecture: "s390" }), /must have a library for .*, got .*-s390/],
      [manifestOf(bytes, { libraries: [] }), /must have a library for .*, got none/],
      [manifestOf(bytes, {}, { file: "../library.so" }), /path below the manifest, got "\.\.\/library\.so"/],
      [manifestOf(bytes, {}, { file: "https://example.org/x.so" }), /path below the manifest/],
      [manifestOf(bytes, {}, { file: "//example.org/x.so" }), /path below the manifest/],
      [manifestOf(bytes, {}, { bytes: 2 ** 40 }), /bytes must lie in 1 to 67108864, got 1099511627776/],
      [manifestOf(bytes, { format_version: 2 }), /format_version must be 1, got 2/],
    ];
    for (const [manifest, message] of cases) {
      answers = release(bytes, manifest);
      await expect(fetchLibrary(request(emptyFolder()), () => {})).rejects.toThrow(message);
    }
    answers = { "/manifest.json": { status: 200, body: "x".repeat(2 ** 20 + 1) } };
    await expect(fetchLibrary(request(emptyFolder()), () => {})).rejects.toThrow(/at most 1048576 bytes/);
    answers = { "/manifest.json": { status: 200, body: "<html>" } };
    await expect(fetchLibrary(request(emptyFolder()), () => {})).rejects.toThrow(/must be JSON/);
  });

  test("a cache that cannot be written is an error, and nothing is left", async () => {
    answers = release(bytes);
    const cache = join(emptyFolder(), "file");
    writeFileSync(cache, "");
    await expect(fetchLibrary(request(cache), () => {})).rejects.toThrow();
    expect(readFileSync(cache, "utf8")).toBe("");
  });
});

describe("parseReleaseManifest", () => {
  test("names what is wrong with each field", () => {
    const good = manifestOf(new Uint8Array(10)) as unknown as ReleaseManifest;
    expect(parseReleaseManifest(JSON.stringify(good), "m").libraries.length).toBe(1);
    const wrong: [unknown, RegExp][] = [
      [null, /must be an object, got null/],
      [[], /must be an object/],
      [{ ...good, version: 1 }, /version must be a text/],
      [{ ...good, abi: "3" }, /abi must be a whole number, got "3"/],
      [{ ...good, kernels: "abc" }, /kernels must be a SHA-256 in hex/],
      [{ ...good, libraries: {} }, /libraries must be a list/],
      [{ ...good, libraries: [1] }, /a library must be an object, got 1/],
      [{ ...good, libraries: [{ ...good.libraries[0], platform: 1 }] }, /platform and architecture/],
      [{ ...good, libraries: [{ ...good.libraries[0], sha256: "A".repeat(64) }] }, /64 hex digits/],
    ];
    for (const [value, message] of wrong) {
      expect(() => parseReleaseManifest(JSON.stringify(value), "m")).toThrow(message);
    }
  });
});

test("the package's folder is found from a source and from a bundle", () => {
  const of = (url: string) => packageRoot(url).href;
  expect(of("https://host/a/lib/native/location.ts")).toBe("https://host/a/");
  expect(of("https://host/a/arrowquant.js")).toBe("https://host/a/");
  expect(of("file:///home/lib/native/location.ts")).toBe("file:///home/");
});
