/** The parts of a release that others install or import: the single-file bundle and the npm package. */
import { cpSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { PACKAGE_ROOT } from "../../lib/native/location.ts";
import { VERSIONS } from "../../lib/analysis/_libraries.ts";
import { OutputError } from "../../lib/errors.ts";
import { bunBinary } from "../_command/programs.ts";
import { runProgram } from "../_command/run_program.ts";
import { doors } from "./reference.ts";

const root = fileURLToPath(PACKAGE_ROOT);

/** Programs of the npm package, and the arguments that stand before the user's. */
const NPM_COMMANDS: Readonly<Record<string, readonly string[]>> = {
  arrowquant: [],
  ...Object.fromEntries(
    ["quantize", "inspect", "dequantize", "generate", "report"].map((name) => [`arrowquant-${name}`, [name]]),
  ),
};

/** Packages that only tables, charts and reports need: whoever wants those installs them. */
const ANALYSIS_PACKAGES = Object.keys(VERSIONS);

/** Folders of kernels/ that a build of the CPU library reads. */
const KERNEL_FOLDERS = ["include", "arithmetic", "cpu"];

/** What other programs run: PyTorch, Slurm, Kubernetes. In the package they lie as in a checkout. */
const FOR_OTHERS = ["scripts/collect_statistics.py", "scripts/cluster"];

async function run(command: string, args: readonly string[], cwd: string, what: string): Promise<string> {
  const { code, output, errors } = await runProgram(command, args, { cwd });
  if (code !== 0) throw new OutputError(`Cannot ${what}: ${command} ended with ${code}: ${errors || output}`);
  return output;
}

/** Begins every bundle: an older Node would say only that a name is not defined. */
const BANNER = `if (!("Float16Array" in globalThis)) {
  throw new Error("Cannot load arrowquant: it needs Bun, Deno or Node 24 or later, got Node " + process.versions.node);
}`;

const external = ANALYSIS_PACKAGES.flatMap((name) => ["--external", name, "--external", `${name}/*`]);

/** Bundles `mod.ts` with what it imports, the WebAssembly among it, into one file. */
export async function bundle(target: string): Promise<void> {
  const args = [
    "build",
    "scripts/_release/bundle_entry.ts",
    "--target=node",
    "--format=esm",
    `--banner=${BANNER}`,
    "--outfile",
    target,
    ...external,
  ];
  await run(bunBinary(), args, root, "bundle");
  // What is required is Node's own; createRequire refuses a module that was imported from a URL.
  const text = readFileSync(target, "utf8"), required = "createRequire(import.meta.url);";
  if (text.split(required).length !== 2) {
    throw new OutputError(`Cannot bundle: ${required} must be there once`);
  }
  writeFileSync(target, text.replace(required, "(name) => globalThis.process.getBuiltinModule(name);"));
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
    "scripts/arrowquant.ts",
    "lib/analysis/table_thread.ts",
  ];
  const options = [
    ...["--target=node", "--format=esm", "--splitting", "--outdir", work],
    ...["--entry-naming", "[name].js", "--chunk-naming", "chunk-[hash].js"],
    // npm_launch.js calls them: what a bundle's entry is, each runtime says otherwise.
    ...["--define", "import.meta.main=false"],
    ...external,
  ];
  const launch = "scripts/_release/npm_launch.ts";
  await run(bunBinary(), ["build", launch, ...options], root, "bundle the launcher");
  const bundled = ["build", ...entries, `--banner=${BANNER}`, ...options];
  await run(bunBinary(), bundled, root, "bundle the npm package");
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
    bin: Object.fromEntries(Object.keys(NPM_COMMANDS).map((name) => [name, `bin/${name}.js`])),
    files: ["*.js", "bin", "*.d.ts", "lib", "kernels", ...FOR_OTHERS, "CHANGELOG.md"],
    // Older ones lack Float16Array: the commands start Bun there, imports fail.
    engines: { node: ">=24", bun: ">=1.2", deno: ">=2" },
    optionalDependencies: { bun: dependencies["bun"] },
    peerDependencies: Object.fromEntries(peers),
    peerDependenciesMeta: Object.fromEntries(peers.map(([each]) => [each, { optional: true }])),
  };
}

/**
 * Makes the npm package in the empty folder `work` and packs it into `target`. Node strips no types of files
 * under node_modules, so it holds JavaScript with declarations, and the kernels' sources, which Bun and Deno
 * build.
 *
 * @returns the tarball's name
 */
export async function packNpm(work: string, target: string): Promise<string> {
  await bundleForNpm(work);
  await writeDeclarations(work);
  mkdirSync(join(work, "bin"));
  for (const [name, args] of Object.entries(NPM_COMMANDS)) {
    const call = `await launch(${JSON.stringify(args)});`;
    const program = `#!/usr/bin/env node\nimport { launch } from "../npm_launch.js";\n${call}\n`;
    writeFileSync(join(work, "bin", `${name}.js`), program, { mode: 0o755 });
  }
  mkdirSync(join(work, "kernels"), { recursive: true });
  for (const folder of KERNEL_FOLDERS) {
    cpSync(join(root, "kernels", folder), join(work, "kernels", folder), { recursive: true });
  }
  for (const path of FOR_OTHERS) cpSync(join(root, path), join(work, path), { recursive: true });
  for (const file of ["README.md", "LICENSE", "CHANGELOG.md"]) cpSync(join(root, file), join(work, file));
  writeFileSync(join(work, "package.json"), JSON.stringify(npmManifest(), null, 2) + "\n");
  const args = ["pack", "--json", "--ignore-scripts", "--pack-destination", target];
  const [packed] = JSON.parse(await run("npm", args, work, "pack")) as [{ readonly filename: string }];
  return packed.filename;
}
