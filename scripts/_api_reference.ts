/** docs/api.md from the docstrings of what mod.ts exports, as `deno doc` reads them. */
import { readFileSync } from "node:fs";
import { dirname, join, relative, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { OutputError } from "../lib/errors.ts";
import { PACKAGE_ROOT } from "../lib/native/location.ts";
import { denoBinary } from "./_command/programs.ts";
import { runProgram } from "./_command/run_program.ts";

const root = fileURLToPath(PACKAGE_ROOT);

/** Sections by where a symbol comes from, in the order of the page. */
const SECTIONS: readonly (readonly [title: string, path: RegExp])[] = [
  ["Kernels", /^lib\/native\//],
  ["Quantizing matrices", /^lib\/quant\//],
  ["Whole checkpoints", /^lib\/pipeline/],
  ["Configuration", /^lib\/_?config/],
  ["Tensors and files", /^lib\/tensor\//],
  ["Models", /^lib\/models\//],
  ["Time and phases", /^lib\/(?:time|thermo)\//],
  ["Tables and charts", /^(?:mod\.ts|lib\/analysis\/)/],
  ["Errors", /^lib\/errors/],
  ["Other", /./],
];

interface DocTag {
  readonly kind: string;
  readonly name?: string;
  readonly doc?: string;
  readonly tsType?: { readonly repr?: string };
}
interface JsDoc {
  readonly doc?: string;
  readonly tags?: readonly DocTag[];
}
interface Member {
  readonly name?: string;
  readonly accessibility?: string;
}
interface Declaration {
  readonly location: { readonly filename: string; readonly line: number };
  readonly jsDoc?: JsDoc;
  readonly kind: string;
  readonly def?: {
    readonly properties?: readonly Member[];
    readonly methods?: readonly Member[];
    readonly constructors?: readonly Member[];
  };
}
interface DocSymbol {
  readonly name: string;
  readonly declarations: readonly Declaration[];
}

const pathOf = ({ location }: Declaration) =>
  relative(root, fileURLToPath(location.filename)).replaceAll("\\", "/");

async function denoDoc(args: readonly string[]): Promise<string> {
  const { code, output, errors } = await runProgram(denoBinary(), ["doc", ...args, "mod.ts"], { cwd: root });
  if (code !== 0) throw new OutputError(`Cannot read the docstrings: deno doc ended with ${code}: ${errors}`);
  return output;
}

/** What `deno doc` prints of each declaration, by `path:line`. */
function printedBlocks(text: string): Map<string, string[]> {
  const blocks = new Map<string, string[]>();
  let lines: string[] | undefined;
  for (const line of text.split("\n")) {
    const place = /^Defined in (file:.*):(\d+):\d+$/.exec(line);
    if (place !== null) {
      const key = `${place[1]}:${place[2]}`;
      lines = blocks.get(key) ?? [];
      blocks.set(key, lines);
    } else lines?.push(line);
  }
  return blocks;
}

/** The lines of a declaration's block that are code: its heads, and of a class or interface its members. */
function signature(declaration: Declaration, name: string, lines: readonly string[]): string {
  const { properties = [], methods = [], constructors = [] } = declaration.def ?? {};
  const members = [...properties, ...methods, ...constructors]
    .filter(({ accessibility }) => accessibility !== "private").map((member) => member.name ?? "constructor");
  const escaped = members.map((each) => each.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  const member = new RegExp(
    `^  (?:(?:static|readonly|override|abstract|async|get|set) )*\\[?(?:${escaped.join("|")})[\\](<:?]`,
  );
  const isHead = (line: string) => new RegExp(`^\\S.*\\b${name}\\b`).test(line);
  return lines.filter((line) =>
    isHead(line) || (members.length > 0 && member.test(line) && !line.startsWith("  private "))
  ).join("\n");
}

const prose = (text: string) => text.replace(/\{@link(?:code)? ([^}]+)\}/g, "`$1`").trim();

/** Names that a source file exports. */
function exportsOf(path: string): Set<string> {
  const text = readFileSync(join(root, path), "utf8");
  return new Set(
    [...text.matchAll(/^export (?:async )?(?:function|class|const|interface|type) (\w+)/gm)].map((m) =>
      m[1]!
    ),
  );
}

/** An example of a docstring as a program of its own beside docs/api.md: what it takes from the project it imports. */
function standalone(example: string, path: string, exported: ReadonlySet<string>): string {
  const imports = new Map<string, Set<string>>();
  const take = (name: string, from: string) => {
    const plain = name.replace(/^type /, "");
    const specifier = exported.has(plain)
      ? "../mod.ts"
      : relative(join(root, "docs"), from).replaceAll("\\", "/");
    imports.set(specifier, (imports.get(specifier) ?? new Set()).add(name));
  };
  const body = example.replace(
    /^import (type )?\{([^}]*)\} from "(\.[^"]*)";\n/gm,
    (_, type, names, specifier) => {
      for (
        const name of (names as string).split(",").map((each) => each.trim()).filter((each) => each !== "")
      ) {
        take(
          type === undefined ? name : `type ${name}`,
          resolve(dirname(join(root, path)), specifier as string),
        );
      }
      return "";
    },
  );
  const taken = new Set([...imports.values()].flatMap((names) => [...names]));
  for (const name of exportsOf(path)) {
    const isUsed = new RegExp(`(?<![.\\w"'])${name}\\b(?!["'\\w])`).test(body);
    const isOwn = new RegExp(`\\b(?:const|let|function|import) (?:\\{[^}]*)?\\b${name}\\b`).test(body);
    if (isUsed && !isOwn && !taken.has(name)) take(name, join(root, path));
  }
  const lines = [...imports].sort(([a], [b]) => a < b ? -1 : 1).map(([specifier, names]) =>
    `import { ${[...names].sort().join(", ")} } from "${specifier}";`
  );
  return [...lines, body.trim()].join("\n");
}

function describe(
  { name, declarations }: DocSymbol,
  blocks: Map<string, string[]>,
  exported: Set<string>,
): string {
  const first = declarations.find(({ jsDoc }) => jsDoc !== undefined) ?? declarations[0]!;
  const path = pathOf(first);
  const code = [
    ...new Set(
      declarations.map((each) =>
        signature(each, name, blocks.get(`${each.location.filename}:${each.location.line}`) ?? [])
      ),
    ),
  ].filter((text) => text !== "").join("\n");
  const parts = [`### ${name}`, "```text\n" + code + "\n```"];
  const { doc = "", tags = [] } = first.jsDoc ?? {};
  if (doc !== "" && !tags.some(({ kind }) => kind === "module")) parts.push(prose(doc));
  const facts = tags.flatMap((tag) => {
    const text = prose(tag.doc ?? "");
    if (tag.kind === "param") return [`- \`${tag.name}\`: ${text}`];
    if (tag.kind === "return" || tag.kind === "returns") return [`- returns ${text}`];
    if (tag.kind === "throws") return [`- throws \`${tag.tsType?.repr ?? "Error"}\` ${text}`];
    return [];
  });
  if (facts.length > 0) parts.push(facts.join("\n"));
  for (const { kind, doc: example = "" } of tags) {
    const block = /```ts\n([\s\S]*?)```/.exec(example)?.[1];
    if (kind === "example" && block !== undefined) {
      parts.push("```ts\n" + standalone(block, path, exported) + "\n```");
    }
  }
  parts.push(`[${path}](../${path})`);
  return parts.join("\n\n");
}

/**
 * The page.
 *
 * @throws {OutputError} when `deno doc` fails
 */
export async function apiReference(): Promise<string> {
  const { nodes } = JSON.parse(await denoDoc(["--json"])) as {
    readonly nodes: Readonly<Record<string, { readonly symbols: readonly DocSymbol[] }>>;
  };
  const blocks = printedBlocks(await denoDoc([]));
  const symbols = Object.values(nodes)[0]!.symbols;
  const exported = new Set(symbols.map(({ name }) => name));
  const sections = SECTIONS.map(([title]) => ({ title, symbols: [] as DocSymbol[] }));
  for (const symbol of symbols) {
    const path = pathOf(symbol.declarations[0]!);
    sections[SECTIONS.findIndex(([, pattern]) => pattern.test(path))]!.symbols.push(symbol);
  }
  const pages = sections.filter((section) => section.symbols.length > 0).map((section) => {
    const sorted = section.symbols.sort((a, b) => a.name < b.name ? -1 : a.name > b.name ? 1 : 0);
    const texts = sorted.map((symbol) => describe(symbol, blocks, exported));
    return [`## ${section.title}`, ...texts].join("\n\n");
  });
  return [
    "<!-- Generated by `bun run scripts/docs.ts` from the docstrings; do not edit. -->",
    "# API reference",
    "What `mod.ts` exports. Tables and charts come from `loadAnalysis()`; [tables.md](tables.md) has their columns.",
    ...pages,
    "",
  ].join("\n\n").replace(/\n+$/, "\n");
}
