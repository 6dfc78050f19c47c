/** What of a release others install or import: the single-file bundle and the npm package. */
import { cpSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { PACKAGE_ROOT } from "../../lib/native/location.ts";
import { VERSIONS } from "../../lib/analysis/_libraries.ts";
import { OutputError } from "../../lib/errors.ts";
import { bunBinary } from "../_command/programs.ts";
import { runProgram } from "../_command/run_program.ts";

const root = fileURLToPath(PACKAGE_ROOT);

/** Commands of the npm package, each a script. */
export const NPM_COMMANDS = ["quantize", "inspect", "dequantize", "generate", "report"] as const;

/** Packages that only tables, charts and reports need: whoever wants those installs them. */
const ANALYSIS_PACKAGES = Object.keys(VERSIONS);

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

/**
 * Makes the npm package in the empty folder `work` and packs it into `target`. Node strips no types of files under
 * node_modules, so it holds JavaScript with declarations, and the kernels' sources, which Bun and Deno build.
 *
 * @returns the tarball's name
 */
export async function packNpm(work: string, target: string): Promise<string> {
  const { name, version, description, license, dependencies } = JSON.parse(
    readFileSync(join(root, "package.json"), "utf8"),
  ) as PackageJson;
  const bun = bunBinary();
  const entries = [
    "scripts/_release/bundle_entry.ts",
    ...NPM_COMMANDS.map((command) => `scripts/${command}.ts`),
    "scripts/_release/npm_launch.ts",
  ];
  await run(
    bun,
    [
      "build",
      ...entries,
      ...["--target=node", "--format=esm", "--splitting", "--outdir", work],
      ...["--entry-naming", "[name].js", "--chunk-naming", "chunk-[hash].js"],
      // A bundle's entry is the program: the scripts ask.
      ...["--define", "import.meta.main=true"],
      ...external,
    ],
    root,
    "bundle the npm package",
  );
  const compiler = join(root, "node_modules", "typescript", "bin", "tsc");
  await run(
    bun,
    [
      compiler,
      ...["-p", root, "--noEmit", "false", "--declaration", "--emitDeclarationOnly"],
      ...["--rewriteRelativeImportExtensions", "--outDir", join(work, ".types")],
    ],
    root,
    "write the declarations",
  );
  cpSync(join(work, ".types", "mod.d.ts"), join(work, "mod.d.ts"));
  cpSync(join(work, ".types", "lib"), join(work, "lib"), { recursive: true });
  for (const command of NPM_COMMANDS) {
    writeFileSync(
      join(work, `arrowquant-${command}.js`),
      `#!/usr/bin/env node\nimport { launch } from "./npm_launch.js";\nawait launch("${command}");\n`,
      { mode: 0o755 },
    );
  }
  for (const folder of ["include", "cpu"]) {
    mkdirSync(join(work, "kernels"), { recursive: true });
    cpSync(join(root, "kernels", folder), join(work, "kernels", folder), { recursive: true });
  }
  for (const file of ["README.md", "LICENSE", "CHANGELOG.md"]) cpSync(join(root, file), join(work, file));
  const optional = Object.fromEntries(
    ANALYSIS_PACKAGES.flatMap((each) => dependencies[each] === undefined ? [] : [[each, dependencies[each]]]),
  );
  writeFileSync(
    join(work, "package.json"),
    JSON.stringify(
      {
        name,
        version,
        description,
        license,
        type: "module",
        exports: {
          ".": { types: "./mod.d.ts", default: "./bundle_entry.js" },
          "./package.json": "./package.json",
        },
        bin: Object.fromEntries(
          NPM_COMMANDS.map((command) => [`arrowquant-${command}`, `arrowquant-${command}.js`]),
        ),
        files: ["*.js", "*.d.ts", "lib", "kernels", "CHANGELOG.md"],
        // Older ones lack Float16Array; the commands start Bun there.
        engines: { node: ">=20", bun: ">=1.2", deno: ">=2" },
        optionalDependencies: { bun: dependencies["bun"] },
        peerDependencies: optional,
        peerDependenciesMeta: Object.fromEntries(
          Object.keys(optional).map((each) => [each, { optional: true }]),
        ),
      },
      null,
      2,
    ) + "\n",
  );
  const args = ["pack", "--json", "--ignore-scripts", "--pack-destination", target];
  const [packed] = JSON.parse(await run("npm", args, work, "pack")) as [{ readonly filename: string }];
  return packed.filename;
}
