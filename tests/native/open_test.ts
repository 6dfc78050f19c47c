import { afterAll, describe, expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { availableParallelism, tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { buildLibrary, cudaPlan, nativePlan } from "../../lib/native/build.ts";
import { type Attempt, buildPlace, findCompiler, passing } from "../../lib/native/library.ts";
import { openKernels, withThreads } from "../../lib/native/mod.ts";
import { unchecked } from "../../lib/native/kernels.ts";
import { ABI_VERSION, SIGNATURES } from "../../lib/native/signatures.ts";

const folder = mkdtempSync(join(tmpdir(), "arrowquant-open-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const root = fileURLToPath(new URL("../..", import.meta.url));
const compiler = await findCompiler();

/** This machine's library, undefined where none can be built. */
async function ownLibrary(): Promise<string | undefined> {
  using kernels = await openKernels();
  return kernels.backend === "native" ? kernels.library : undefined;
}
const library = await ownLibrary();

/** Opens the kernels in a process of its own with the given environment and prints how that went. */
function openInChild(environment: Record<string, string>, options = "{}", flags?: string[]) {
  const program = join(folder, `open-${Math.abs(options.length)}.ts`);
  writeFileSync(
    program,
    `import { openKernels } from ${JSON.stringify(join(root, "lib/native/mod.ts"))};
    const messages: string[] = [];
    try {
      const k = await openKernels({ ...${options}, onMessage: (line) => messages.push(line) });
      console.log(JSON.stringify({ backend: k.backend, isa: k.isa, library: k.library, attempts: k.attempts, messages }));
    } catch (error) {
      console.log(JSON.stringify({ error: (error as Error).message, code: (error as { code: string }).code }));
    }`,
  );
  const deno = "Deno" in globalThis ? ["run", ...(flags ?? ["-A"]), "--no-prompt", "--no-check"] : [];
  const result = spawnSync(process.execPath, [...deno, program], {
    cwd: folder,
    env: environment,
    encoding: "utf8",
  });
  if (result.status !== 0) throw new Error(result.stderr);
  return JSON.parse(result.stdout);
}

/**
 * An empty cache, and a compiler whose objects are empty and that links this machine's library: when it is
 * asked is looked at here; that a real one takes the sources, the gate's first step sees.
 */
function buildEnvironment(cache: string, compiler: string, library: string): Record<string, string> {
  const command = join(folder, "linking");
  const script = `#!/bin/sh
for word; do [ "$before" = -o ] && output=$word; before=$word; done
case "$output" in
  "") exec ${compiler} "$@" ;;
  *.o) : > "$output" ;;
  *) cp "${library}" "$output" ;;
esac
`;
  writeFileSync(command, script, { mode: 0o755 });
  return { ...process.env, CC: command, XDG_CACHE_HOME: cache, ARROWQUANT_LIBRARY: "" } as Record<
    string,
    string
  >;
}

describe("openKernels", () => {
  test("always finds something, and says what", async () => {
    using kernels = await openKernels();
    expect(kernels.describe()).toContain(kernels.isa);
    expect(kernels.describe()).toContain(kernels.runtime);
    expect(kernels.abi).toBe(ABI_VERSION);
  });

  test("opens the embedded WebAssembly when asked", async () => {
    using kernels = await openKernels({ backend: "wasm" });
    expect([kernels.backend, kernels.isa, kernels.library]).toEqual(["wasm", "simd128", "embedded"]);
  });

  test("runs as many threads as asked, 0 being one per core, and one with WebAssembly", async () => {
    using kernels = await openKernels({ threads: 3 });
    const isNative = kernels.backend === "native";
    expect(kernels.threads).toBe(isNative ? 3 : 1);
    const one = withThreads(kernels, 1), all = withThreads(kernels, 0);
    expect([one.threads, one.isa, unchecked(one).calls]).toEqual([1, kernels.isa, unchecked(kernels).calls]);
    expect(all.threads).toBe(isNative ? Math.min(64, availableParallelism()) : 1);
    expect(withThreads(one, 1)).toBe(one);
    using wasm = await openKernels({ backend: "wasm", threads: 3 });
    expect([wasm.threads, withThreads(wasm, 2).threads]).toEqual([1, 1]);
    for (const threads of [-1, 65, 1.5, NaN]) {
      await expect(openKernels({ threads })).rejects.toThrow(/whole number from 0 to 64/);
      expect(() => withThreads(kernels, threads)).toThrow(RangeError);
    }
  });

  test("refuses what it does not know", async () => {
    await expect(openKernels({ backend: "gpu" as never })).rejects.toThrow(
      /one of auto, cuda, cpu, native, wasm, got "gpu"/,
    );
    await expect(openKernels({ isa: "sse9" as never })).rejects.toThrow(/one of scalar/);
    await expect(openKernels({ backend: "wasm", library: "x.so" })).rejects.toThrow(/has none/);
    await expect(openKernels({ backend: "wasm", isa: "avx2" })).rejects.toThrow(
      /supported here are scalar, simd128/,
    );
  });

  test("a library that was named and is not there is an error, never a fallback", async () => {
    await expect(openKernels({ library: join(folder, "none.so") })).rejects.toThrow(/no such file/);
    const named = openInChild({
      ARROWQUANT_LIBRARY: join(folder, "none.so"),
      PATH: "/nonexistent",
      HOME: folder,
    });
    expect(named.code).toBe("AQ_KERNELS");
    expect(named.error).toContain("none.so");
  });

  test("a library that is none is an error that names it", async () => {
    const path = join(folder, "text.so");
    writeFileSync(path, "not a library");
    await expect(openKernels({ library: path })).rejects.toThrow(/text\.so/);
  });

  test("without compiler and cache it takes WebAssembly and says so", () => {
    const opened = openInChild({
      PATH: "/nonexistent",
      HOME: folder,
      XDG_CACHE_HOME: join(folder, "empty-cache"),
    });
    expect(opened.backend).toBe("wasm");
    expect(opened.attempts.some((attempt: { outcome: string }) => attempt.outcome.includes("no compiler")))
      .toBe(true);
    expect(opened.messages.join()).toContain("WebAssembly");
  });

  test("without compiler, the backend native is an error with a way out", () => {
    const opened = openInChild(
      { PATH: "/nonexistent", HOME: folder, XDG_CACHE_HOME: join(folder, "empty-cache") },
      `{ backend: "native" }`,
    );
    expect(opened.code).toBe("AQ_KERNELS");
    expect(opened.error).toContain("ARROWQUANT_LIBRARY");
  });

  test("Deno without permissions gets WebAssembly and the flags that native would need", () => {
    if (!("Deno" in globalThis)) {
      console.log("skipped: permissions exist in Deno only");
      return;
    }
    const opened = openInChild({ HOME: folder }, "{}", [`--allow-read=${folder},${root}`]);
    expect(opened.backend).toBe("wasm");
    expect(opened.attempts[0].outcome).toContain("--allow-ffi");
  });

  test("builds once into an empty cache, then finds the build", () => {
    if (compiler === undefined || library === undefined) {
      console.log("skipped: no C compiler");
      return;
    }
    const cache = join(folder, "cache");
    const environment = buildEnvironment(cache, compiler.command, library);
    const first = openInChild(environment);
    expect(first.backend).toBe("native");
    expect(first.messages.join()).toContain("building");
    expect(existsSync(first.library)).toBe(true);
    const second = openInChild(environment);
    expect([second.library, second.messages]).toEqual([first.library, []]);
    expect(readdirSync(join(cache, "arrowquant")).filter((name) => name.includes(".build-"))).toEqual([]);
    const named = openInChild({ PATH: "/nonexistent", HOME: folder, ARROWQUANT_LIBRARY: first.library });
    expect(named.library).toBe(first.library);
    const explicit = openInChild(
      { PATH: "/nonexistent", HOME: folder, ARROWQUANT_LIBRARY: join(folder, "none.so") },
      `{ library: ${JSON.stringify(first.library)} }`,
    );
    expect(explicit.library).toBe(first.library);
    // opening a library that was cut short can kill the process: it must be passed over
    truncateSync(first.library, 5000);
    const again = openInChild(environment);
    expect([again.backend, again.library]).toEqual(["native", first.library]);
    expect(again.messages.join()).toContain("building");
    truncateSync(first.library, 5000);
    expect(openInChild({ ...environment, PATH: "/nonexistent", CC: "" }).backend).toBe("wasm");
  });

  test("asked for three times at once with an empty cache, it builds once", () => {
    if (compiler === undefined || library === undefined) {
      console.log("skipped: no C compiler");
      return;
    }
    const opened = openInChild(
      buildEnvironment(join(folder, "at-once"), compiler.command, library),
      `{ backend: (await Promise.all([openKernels(), openKernels(), openKernels()])).map((k) => k.backend).join() === "native,native,native" ? "native" : "wasm" }`,
    );
    expect(opened.backend).toBe("native");
  }, 300_000);

  test("a build that takes long says how far it is", async () => {
    const compiler = join(folder, "slow"), kernels = join(folder, "slow-kernels");
    // Objects and library are empty; the clock, not the compiler, is slow.
    const script = '#!/bin/sh\nfor word; do [ "$before" = -o ] && : > "$word"; before=$word; done\n';
    writeFileSync(compiler, script, { mode: 0o755 });
    for (const name of ["include", "arithmetic", "cpu"]) mkdirSync(join(kernels, name), { recursive: true });
    const plan = nativePlan("linux", "x64"), lines: string[] = [], clock = performance.now;
    let now = 0;
    performance.now = () => now += 1000;
    try {
      const onMessage = (line: string) => void lines.push(line);
      await buildLibrary(plan, kernels, compiler, join(folder, "slow-cache"), { onMessage });
    } finally {
      performance.now = clock;
    }
    const counts = lines.map((line) => Number(/^kernels: (\d+) of \d+ files compiled$/.exec(line)![1]));
    expect(lines[0]).toContain(` of ${plan.units.length} `);
    expect(counts).toEqual([...new Set(counts)].sort((a, b) => a - b));
    expect(counts.length).toBeLessThan(plan.units.length / 4);
  });

  test("a cache folder that is not absolute is not used", () => {
    const opened = openInChild({ PATH: process.env["PATH"] ?? "", HOME: "", XDG_CACHE_HOME: "relative" });
    expect(existsSync(join(folder, "relative", "arrowquant"))).toBe(false);
    expect(existsSync(join(folder, ".cache", "arrowquant"))).toBe(false);
    expect(["native", "wasm"]).toContain(opened.backend);
  });

  test("closes more than once, and refuses calls afterwards", async () => {
    for (const backend of ["auto", "wasm"] as const) {
      const kernels = await openKernels({ backend });
      kernels.close();
      kernels.close();
      expect(() => unchecked(kernels).calls).toThrow(/was closed/);
    }
  });

  test("a library of another ABI is refused", async () => {
    if (compiler === undefined) {
      console.log("skipped: no C compiler");
      return;
    }
    const source = join(folder, "other.c");
    const header = join(root, "kernels/include/arrowquant.h");
    const names = Object.keys(SIGNATURES).filter((name) => name !== "aq_abi_version");
    writeFileSync(
      source,
      `/* ${header} */ int aq_abi_version(void) { return 99; }\n${
        names.map((name) => `int ${name}(void) { return 0; }`).join("\n")
      }`,
    );
    const path = join(folder, "other.so");
    expect(spawnSync(compiler.command, ["-shared", "-fPIC", source, "-o", path]).status).toBe(0);
    await expect(openKernels({ library: path })).rejects.toThrow(
      new RegExp(`ABI is 99, wanted ${ABI_VERSION}`),
    );
  });
});

test("sources that a package lacks are said, not searched", () => {
  const attempts: Attempt[] = [];
  const plan = { ...cudaPlan(), folder: "nowhere" as "cuda" };
  expect(buildPlace("CUDA library", "cuda-", plan, passing(attempts))).toBe(undefined);
  expect(attempts.map(({ outcome }) => outcome)).toEqual([
    "the sources of the CUDA library are not beside this module: take a checkout of the project",
  ]);
});
