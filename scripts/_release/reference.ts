/** The API reference of the public doors: pages by `deno doc --html`, and a check of the docstrings. */
import { mkdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { OutputError } from "../../lib/errors.ts";
import { PACKAGE_ROOT } from "../../lib/native/location.ts";
import { denoBinary } from "../_command/programs.ts";
import { runProgram } from "../_command/run_program.ts";

const root = fileURLToPath(PACKAGE_ROOT);

/** A documented thing of `deno doc --json`, as far as it is read. */
interface Documented {
  readonly name?: string;
  readonly jsDoc?: { readonly doc?: string };
}
interface Declaration extends Documented {
  readonly def?: { readonly properties?: readonly Documented[] };
}
interface DocPages {
  readonly nodes: Readonly<
    Record<string, { readonly symbols: readonly { name: string; declarations: readonly Declaration[] }[] }>
  >;
}

/** The public doors: names as they are imported, and their modules by path from the project's folder. */
export function doors(): Record<string, string> {
  const { exports: { "./cli": _command, ...doors } } = JSON.parse(
    readFileSync(join(root, "deno.json"), "utf8"),
  ) as { exports: Record<string, string> };
  return doors;
}

async function denoDoc(...options: readonly string[]): Promise<string> {
  const args = [
    "doc",
    "--quiet",
    "--import-map=tests/deno/import_map.json",
    ...options,
    ...Object.values(doors()),
  ];
  const { code, output, errors } = await runProgram(denoBinary(), args, { cwd: root });
  if (code !== 0) throw new OutputError(`Cannot read the docstrings: deno doc ended with ${code}: ${errors}`);
  return output;
}

/** Writes the reference as HTML pages into a folder. */
export async function writeReference(folder: string): Promise<void> {
  mkdirSync(folder, { recursive: true });
  await denoDoc("--html", "--name=ArrowQuant", `--output=${folder}`);
}

/** Public symbols without a docstring, and fields of public `…Options` and `…Settings` without one. */
export async function undocumented(): Promise<string[]> {
  const { nodes } = JSON.parse(await denoDoc("--json")) as DocPages;
  const has = ({ jsDoc }: Documented) => (jsDoc?.doc ?? "") !== "";
  return Object.entries(nodes).flatMap(([url, { symbols }]) => {
    const door = url.slice(PACKAGE_ROOT.href.length);
    return symbols.flatMap(({ name, declarations }) => {
      const fields = /(?:Options|Settings)$/.test(name)
        ? declarations.flatMap(({ def }) => def?.properties ?? []).filter((field) => !has(field))
        : [];
      const missing = declarations.some(has) ? [] : [`${door}: ${name}`];
      return [...missing, ...fields.map((field) => `${door}: ${name}.${field.name}`)];
    });
  });
}
