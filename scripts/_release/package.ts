/** The parts of a release that others install or import: the single-file bundle and the npm package. */
import { cpSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { PACKAGE_ROOT } from "../../lib/native/location.ts";
import { VERSIONS } from "../../lib/analysis/_libraries.ts";
import { OutputError } from "../../lib/errors.ts";
import { bunBinary } from "../_command/programs.ts";
import { runProgram } from "../_command/run_program.ts";
import { doors } from "../_reference.ts";

const root = fileURLToPath(PACKAGE_ROOT);

/** Commands of the npm package, each a script. */
export const NPM_COMMANDS = ["quantize", "inspect", "dequantize", "generate", "report"] as const;

/** Packages that only tables, charts and reports need: whoever wants those installs them. */
const ANALYSIS_PACKAGES = Object.keys(VERSIONS);

/** Folders of kernels/ that a build of the CPU library reads. */
const KERNEL_FOLDERS = ["include", "arithmetic", "cpu"];

async function run(command: string, args: readonly string[], cwd: string, what: string): Promise<string> {
  const { code, output, errors } = await runProgram(command, args, { cwd });
  if (code !== 0) throw new OutputError(`Cannot ${what}: ${command} ended with ${code}: ${errors || output}`);
  return output;
}

const external = ANALYSIS_PACKAGES.flatMap((name) => ["--external", name, "--external", `${name}/*`]);

/** Bundles `mod.ts` with what it imports, the WebAssembly among it, into one file. */
export async function bundle(target: string): Promise<void> {
  const args = [
    "build",
    "scripts/_release/bundle_entry.ts",
    "--target=node",
    "--format=esm",
    "--outfile",
    target,
    ...external,
  ];
  await run(bunBinary(), args, root, "bundle");
}

interface PackageJson {
  readonly name: string;
  readonly version: string;
  readonly description: string;
  readonly license: string;
  readonly dependencies: Readonly<Record<string, string>>;
}

/** Public modules beside `.`: their names, and the modules of the checkout by path. */
const innerDoors = () =>
  Object.entries(doors()).filter(([door]) => door !== ".").map(([door, path]) => ({
    door,
    path,
    name: door.slice(2),
  }));

/** One small module a door, so that each bundle has the name of its door. */
function doorEntries(work: string): string[] {
  const folder = join(work, ".doors");
  mkdirSync(folder);
  return innerDoors().map(({ path, name }) => {
    const entry = join(folder, `${name}.ts`);
    writeFileSync(entry, `export * from ${JSON.stringify(join(root, path))};\n`);
    return entry;
  });
}

/** The bundles, one an entry, with what they share in chunks. */
async function bundleForNpm(work: string): Promise<void> {
  const entries = [
    "scripts/_release/bundle_entry.ts",
    ...doorEntries(work),
    ...NPM_COMMANDS.map((command) => `scripts/${command}.ts`),
    "scripts/_release/npm_launch.ts",
    "lib/analysis/table_thread.ts",
  ];
  const options = [
    ...["--target=node", "--format=esm", "--splitting", "--outdir", work],
    ...["--entry-naming", "[name].js", "--chunk-naming", "chunk-[hash].js"],
    // A bundle's entry is the program: the scripts ask.
    ...["--define", "import.meta.main=true"],
    ...external,
  ];
  await run(bunBinary(), ["build", ...entries, ...options], root, "bundle the npm package");
}

async function writeDeclarations(work: string): Promise<void> {
  const compiler = join(root, "node_modules", "typescript", "bin", "tsc");
  const args = [
    compiler,
    ...["-p", root, "--noEmit", "false", "--declaration", "--emitDeclarationOnly"],
    ...["--rewriteRelativeImportExtensions", "--outDir", join(work, ".types")],
  ];
  await run(bunBinary(), args, root, "write the declarations");
  cpSync(join(work, ".types", "mod.d.ts"), join(work, "mod.d.ts"));
  cpSync(join(work, ".types", "lib"), join(work, "lib"), { recursive: true });
}

function npmManifest(): unknown {
  const { name, version, description, license, dependencies } = JSON.parse(
    readFileSync(join(root, "package.json"), "utf8"),
  ) as PackageJson;
  const peers = ANALYSIS_PACKAGES.flatMap((each) =>
    dependencies[each] === undefined ? [] : [[each, dependencies[each]]]
  );
  const types = (path: string) => path.replace(/\.ts$/, ".d.ts");
  return {
    name,
    version,
    description,
    license,
    type: "module",
    exports: {
      ".": { types: "./mod.d.ts", default: "./bundle_entry.js" },
      ...Object.fromEntries(
        innerDoors().map(({ door, path }) => [door, { types: types(path), default: `${door}.js` }]),
      ),
      "./package.json": "./package.json",
    },
    bin: Object.fromEntries(
      NPM_COMMANDS.map((command) => [`arrowquant-${command}`, `arrowquant-${command}.js`]),
    ),
    files: ["*.js", "*.d.ts", "lib", "kernels", "CHANGELOG.md"],
    // Older ones lack Float16Array; the commands start Bun there.
    engines: { node: ">=20", bun: ">=1.2", deno: ">=2" },
    optionalDependencies: { bun: dependencies["bun"] },
    peerDependencies: Object.fromEntries(peers),
    peerDependenciesMeta: Object.fromEntries(peers.map(([each]) => [each, { optional: true }])),
  };
}

/**
 * Makes the npm package in the empty folder `work` and packs it into `target`. Node strips no types of files under
 * node_modules, so it holds JavaScript with declarations, and the kernels' sources, which Bun and Deno build.
 *
 * @returns the tarball's name
 */
export async function packNpm(work: string, target: string): Promise<string> {
  await bundleForNpm(work);
  await writeDeclarations(work);
  for (const command of NPM_COMMANDS) {
    writeFileSync(
      join(work, `arrowquant-${command}.js`),
      `#!/usr/bin/env node\nimport { launch } from "./npm_launch.js";\nawait launch("${command}");\n`,
      { mode: 0o755 },
    );
  }
  mkdirSync(join(work, "kernels"), { recursive: true });
  for (const folder of KERNEL_FOLDERS) {
    cpSync(join(root, "kernels", folder), join(work, "kernels", folder), { recursive: true });
  }
  for (const file of ["README.md", "LICENSE", "CHANGELOG.md"]) cpSync(join(root, file), join(work, file));
  writeFileSync(join(work, "package.json"), JSON.stringify(npmManifest(), null, 2) + "\n");
  const args = ["pack", "--json", "--ignore-scripts", "--pack-destination", target];
  const [packed] = JSON.parse(await run("npm", args, work, "pack")) as [{ readonly filename: string }];
  return packed.filename;
}
