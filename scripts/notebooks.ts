/** `notebooks.ts`: type-checks the notebooks' cells and executes them with Jupyter and Deno's kernel. */
import { mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { homedir, tmpdir } from "node:os";
import { basename, join, resolve } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { FormatError } from "../lib/errors.ts";
import { isJsonObject, readJsonFile } from "../lib/files/json.ts";
import { writeWhole } from "../lib/files/whole.ts";
import { openKernels } from "../lib/native/mod.ts";
import { denoBinary, findProgram } from "./_command/programs.ts";
import type { Arguments, Usage } from "./_command/options.ts";
import { type Context, defineCommand, stopIfAsked } from "./_command/run.ts";
import { type Outcome, runProgram } from "./_command/run_program.ts";
import { print } from "./_command/text.ts";

const USAGE = {
  name: "notebooks.ts",
  operands: "[NOTEBOOK...]",
  about:
    `Type-checks the cells of each notebook and executes it from its first cell to its last; without NOTEBOOK, those of
notebooks/. A cell that throws fails, and so does one that shows something else than what is stored with it; times may
differ, and on processors with other instructions other digits.`,
  options: {
    "--check": "only type-check",
    "--write": "store what the cells show in the notebooks",
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

interface Output {
  readonly output_type: string;
  readonly text?: string | readonly string[];
  readonly data?: Readonly<Record<string, string | readonly string[]>>;
}

interface Notebook {
  readonly metadata: Readonly<Record<string, unknown>> & {
    readonly arrowquant?: { readonly kernels: string };
  };
  readonly cells: readonly {
    readonly cell_type: string;
    readonly outputs?: readonly Output[];
  }[];
}

const readNotebook = (path: string) => readJsonFile(path) as unknown as Notebook;
const textOf = (text: string | readonly string[] = "") => typeof text === "string" ? text : text.join("");

/** A text without paths of the machine. */
function withoutPaths(text: string): string {
  const folders = [homedir(), tmpdir()].map((path) => path.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|");
  return text.replace(new RegExp(`(?:${folders})/[^\\s"')<]*`, "g"), "…");
}

/** What is kept of a cell's outputs: a chart's picture, which every viewer shows, and all text. */
function kept({ output_type, text, data, ...rest }: Output): Output {
  if (data === undefined) return { ...rest, output_type, text: withoutPaths(textOf(text)) };
  const isChart = "image/svg+xml" in data;
  const shown = Object.entries(data).filter(([type]) => !isChart || !/html|vega/.test(type));
  return {
    ...{ ...rest, output_type },
    data: Object.fromEntries(shown.map(([type, value]) => [type, withoutPaths(textOf(value))])),
  };
}

/** A text table without its columns of seconds, other texts without times. */
function withoutTimes(text: string): string {
  const lines = text.split("\n"), rule = lines[1] ?? "";
  if (!/^-+(?: +-+)*$/.test(rule)) return text.replace(/[\d.]+(?= (?:s|ms|seconds)\b)/g, "…");
  const columns = [...rule.matchAll(/-+/g)].map(({ index, 0: dashes }) =>
    [index, index + dashes.length] as const
  )
    .filter(([from, to]) => !/seconds$/i.test(lines[0]!.slice(from, to).trim()));
  const rows = [lines[0]!, ...lines.slice(2)];
  return rows.map((line) => columns.map(([from, to]) => line.slice(from, to).trim()).join(" ")).join("\n");
}

/**
 * Cells that show something else than what is stored with them, as lines. A cell that shows nothing may have
 * lost it.
 *
 * @param isSameMachine whether digits are to be compared too
 */
export function changedOutputs(stored: Notebook, executed: Notebook, isSameMachine: boolean): string[] {
  const shown = (outputs: readonly Output[] = []) =>
    outputs.map(kept).map(({ text, data = { stream: text ?? "" } }) => {
      const plain = withoutTimes(textOf(data["text/plain"] ?? text));
      return [
        Object.keys(data).sort().join(),
        isSameMachine
          ? plain
          : plain.split("\n")[0]!.replace(/\d+/g, "#").replace(/native [\w#]+/, "native …"),
      ].join("\n");
    }).join("\n");
  return executed.cells.flatMap(({ outputs }, i) => {
    const [before, now] = [shown(stored.cells[i]?.outputs), shown(outputs)];
    return before === now || now === "" ? [] : [`cell ${i}: stored\n${before}\nbut it shows\n${now}`];
  });
}

/** A message of Deno's kernel that comes late on a busy machine is lost: what was stored stays. */
const outputsOf = (
  executed: Notebook["cells"][number] | undefined,
  { outputs = [] }: Notebook["cells"][number],
) => executed?.outputs?.length ? executed.outputs : outputs;

/** The notebook with what its cells show. */
function withOutputs(stored: Notebook, executed: Notebook, kernels: string): Notebook {
  let count = 0;
  return {
    ...stored,
    metadata: { ...stored.metadata, arrowquant: { kernels } },
    cells: stored.cells.map((cell, i) =>
      cell.cell_type === "code"
        ? {
          ...cell,
          execution_count: ++count,
          outputs: outputsOf(executed.cells[i], cell).map((output) =>
            output.output_type === "execute_result"
              ? { ...kept(output), execution_count: count }
              : kept(output)
          ),
        }
        : cell
    ),
  };
}

const inProject = (
  program: string,
  args: readonly string[],
  signal: AbortSignal,
  variables: Record<string, string> = {},
) =>
  runProgram(program, args, {
    cwd: ROOT,
    environment: { DENO_NO_UPDATE_CHECK: "1", ...variables },
    signal,
    killSignal: "SIGINT", // nbconvert ends its kernel, too
  });

/** Checks all notebooks at once, the cells of each as a module from where its imports hold. */
async function typeCheck(deno: string, paths: readonly string[], signal: AbortSignal): Promise<Outcome> {
  const cache = join(ROOT, ".cache");
  mkdirSync(cache, { recursive: true });
  const modules = paths.map((path) => join(cache, `notebook-${process.pid}-${basename(path, ".ipynb")}.ts`));
  try {
    paths.forEach((path, i) => writeFileSync(modules[i]!, `${cellsOf(path).join("\n\n")}\nexport {};\n`));
    return await inProject(deno, ["check", "--import-map=tests/deno/import_map.json", ...modules], signal);
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

/** Instructions that the cells' numbers depend on. */
async function kernelsHere(): Promise<string> {
  using kernels = await openKernels();
  return `${kernels.backend} ${kernels.isa}`;
}

async function run(
  { positionals, flags, values }: Arguments<typeof USAGE>,
  { signal }: Context,
): Promise<number> {
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
    await stopIfAsked(signal);
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    print(`${code === 0 ? "ok    " : "FAILED"}  ${what} (${seconds} s)`);
    if (code === 0) return;
    failed++;
    print(`${output}${errors}`.trimEnd().split("\n").slice(-40).map((line) => `    ${line}`).join("\n"));
  };
  try {
    await timed(
      `types of ${notebooks.map((path) => basename(path)).join(", ")}`,
      () => typeCheck(deno, notebooks, signal),
    );
    if (failed === 0 && !flags.check) {
      if (jupyter === undefined) print("skipped: notebooks were not executed: no jupyter-nbconvert");
      else {
        const folders = kernelFolders(deno, work);
        const kernels = await kernelsHere();
        for (const path of notebooks) {
          await timed(`${basename(path)} executed`, async () => {
            const outcome = await inProject(
              jupyter,
              [
                "--to=notebook",
                "--execute",
                `--ExecutePreprocessor.timeout=${CELL_SECONDS}`,
                "--ExecutePreprocessor.kernel_name=deno",
                `--output-dir=${output}`,
                path,
              ],
              signal,
              folders,
            );
            if (outcome.code !== 0) return outcome;
            const stored = readNotebook(path), executed = readNotebook(join(output, basename(path)));
            if (flags.write) {
              writeWhole(path, `${JSON.stringify(withOutputs(stored, executed, kernels), null, 1)}\n`);
              return outcome;
            }
            const changed = changedOutputs(stored, executed, stored.metadata.arrowquant?.kernels === kernels);
            if (changed.length === 0) return outcome;
            const way = "scripts/notebooks.ts --write stores what they show now";
            return { code: 1, output: "", errors: [...changed, way].join("\n") };
          });
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
