/** `notebooks.ts`: type-checks the notebooks' cells and executes them with Jupyter and Deno's kernel. */
import { mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join, resolve } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { FormatError } from "../lib/errors.ts";
import { isJsonObject, readJsonFile } from "../lib/files/json.ts";
import { denoBinary, findProgram } from "./_command/programs.ts";
import type { Arguments, Usage } from "./_command/options.ts";
import { defineCommand } from "./_command/run.ts";
import { type Outcome, runProgram } from "./_command/run_program.ts";
import { print } from "./_command/text.ts";

const USAGE = {
  name: "notebooks.ts",
  operands: "[NOTEBOOK...]",
  about:
    `Type-checks the cells of each notebook and executes it from its first cell to its last; without NOTEBOOK, those of
notebooks/. A cell that throws fails. Nothing is written into the notebooks themselves.`,
  options: {
    "--check": "only type-check",
    "--output DIR": "keep the executed notebooks, with what their cells show, there",
  },
  notes: "Needs Deno, and to execute also jupyter-nbconvert (Debian: jupyter-nbconvert, jupyter-client).",
} as const satisfies Usage;

const ROOT = fileURLToPath(new URL("..", import.meta.url));
/** Seconds that one cell may take. */
const CELL_SECONDS = 300;

export function cellsOf(path: string): string[] {
  const { nbformat, cells } = readJsonFile(path);
  const fail = (reason: string) =>
    new FormatError(`Cannot read notebook ${JSON.stringify(path)}: ${reason}`, { path });
  if (nbformat !== 4 || !Array.isArray(cells)) throw fail(`must have nbformat 4 and cells, got ${nbformat}`);
  return cells.flatMap((cell, i) => {
    if (!isJsonObject(cell)) throw fail(`cell ${i} must be an object`);
    if (cell["cell_type"] !== "code") return [];
    const { source } = cell;
    const text = Array.isArray(source) ? source.join("") : source;
    if (typeof text !== "string") throw fail(`source of cell ${i} must be text`);
    return [text];
  });
}

const inProject = (program: string, args: readonly string[], variables: Record<string, string> = {}) =>
  runProgram(program, args, { cwd: ROOT, environment: { DENO_NO_UPDATE_CHECK: "1", ...variables } });

/** Checks all notebooks at once, the cells of each as a module from where its imports hold. */
async function typeCheck(deno: string, paths: readonly string[]): Promise<Outcome> {
  const cache = join(ROOT, ".cache");
  mkdirSync(cache, { recursive: true });
  const modules = paths.map((path) => join(cache, `notebook-${process.pid}-${basename(path, ".ipynb")}.ts`));
  try {
    paths.forEach((path, i) => writeFileSync(modules[i]!, `${cellsOf(path).join("\n\n")}\nexport {};\n`));
    return await inProject(deno, ["check", "--import-map=tests/deno/import_map.json", ...modules]);
  } finally {
    for (const module of modules) rmSync(module, { force: true });
  }
}

/** Jupyter's folders with a kernel that is this project's Deno: nothing of the user's is touched. */
function kernelFolders(deno: string, work: string): Record<string, string> {
  const kernel = join(work, "data", "kernels", "deno");
  mkdirSync(kernel, { recursive: true });
  writeFileSync(
    join(kernel, "kernel.json"),
    JSON.stringify({
      argv: [deno, "jupyter", "--kernel", "--conn", "{connection_file}"],
      display_name: "Deno",
      language: "typescript",
    }),
  );
  return {
    JUPYTER_DATA_DIR: join(work, "data"),
    JUPYTER_CONFIG_DIR: join(work, "config"),
    JUPYTER_RUNTIME_DIR: join(work, "runtime"),
    IPYTHONDIR: join(work, "ipython"),
  };
}

async function run({ positionals, flags, values }: Arguments<typeof USAGE>): Promise<number> {
  const notebooks = positionals.length > 0
    ? positionals.map((path) => resolve(path))
    : readdirSync(join(ROOT, "notebooks")).filter((name) => name.endsWith(".ipynb")).sort().map((name) =>
      join(ROOT, "notebooks", name)
    );
  const deno = denoBinary();
  const jupyter = findProgram("jupyter-nbconvert");
  const work = mkdtempSync(join(tmpdir(), "arrowquant-notebooks-"));
  const output = values.output === undefined ? join(work, "executed") : resolve(values.output);
  let failed = 0;
  const timed = async (what: string, task: () => Promise<Outcome>) => {
    const began = performance.now();
    const { code, output, errors } = await task();
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    print(`${code === 0 ? "ok    " : "FAILED"}  ${what} (${seconds} s)`);
    if (code === 0) return;
    failed++;
    print(`${output}${errors}`.trimEnd().split("\n").slice(-40).map((line) => `    ${line}`).join("\n"));
  };
  try {
    await timed(
      `types of ${notebooks.map((path) => basename(path)).join(", ")}`,
      () => typeCheck(deno, notebooks),
    );
    if (failed === 0 && !flags.check) {
      if (jupyter === undefined) print("skipped: notebooks were not executed: no jupyter-nbconvert");
      else {
        const folders = kernelFolders(deno, work);
        for (const path of notebooks) {
          await timed(`${basename(path)} executed`, () =>
            inProject(jupyter, [
              "--to=notebook",
              "--execute",
              `--ExecutePreprocessor.timeout=${CELL_SECONDS}`,
              "--ExecutePreprocessor.kernel_name=deno",
              `--output-dir=${output}`,
              path,
            ], folders));
        }
      }
    }
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
  return failed === 0 ? 0 : 1;
}

export const main = defineCommand(USAGE, run);
if (import.meta.main) await main();
