/** `docs.ts`: writes the API reference from the docstrings, and runs the documents' shell examples. */
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { PACKAGE_ROOT } from "../lib/native/location.ts";
import { writeWhole } from "../lib/pipeline/files.ts";
import { apiReference } from "./_api_reference.ts";
import { bunBinary, denoBinary } from "./_programs.ts";
import { runProgram } from "./_run_program.ts";
import { EXIT_CODE_HELP, parseOptions, print, runCommand, usageError } from "./_terminal.ts";

const HELP = `Usage: docs.ts [--check] [--shell FILE]

Writes docs/api.md from the docstrings of what mod.ts exports.

  --check        write nothing; exit status 1 if docs/api.md is not what would be written
  --shell FILE   run the \`\`\`sh blocks of a document instead, in order, in one empty folder that sees the checkout; a block
                 after a comment "<!-- not run: REASON -->" is left out, and said
  --help

${EXIT_CODE_HELP}`;

const root = fileURLToPath(PACKAGE_ROOT);

/** A block of shell commands and why it is left out, if it is. */
interface ShellBlock {
  readonly line: number;
  readonly commands: string;
  readonly notRun: string | undefined;
}

/** The \`\`\`sh blocks of a document. */
export function shellBlocks(markdown: string): ShellBlock[] {
  const blocks: ShellBlock[] = [];
  for (
    const match of markdown.matchAll(
      /(?:<!-- not run: (.*?) -->\s*\n)?^```(?:sh|bash|shell)\n([\s\S]*?)^```$/gm,
    )
  ) {
    const line = markdown.slice(0, match.index).split("\n").length;
    blocks.push({ line, commands: match[2]!, notRun: match[1] });
  }
  return blocks;
}

async function runShell(path: string): Promise<number> {
  const blocks = shellBlocks(readFileSync(path, "utf8"));
  const work = mkdtempSync(join(tmpdir(), "arrowquant-docs-"));
  let failed = 0, ran = 0;
  try {
    for (const name of readdirSync(root)) {
      if (name !== "out" && !name.startsWith(".")) symlinkSync(join(root, name), join(work, name));
    }
    const tools = [join(bunBinary(), ".."), join(denoBinary(), "..")];
    const PATH = [...tools.filter((folder) => existsSync(folder)), process.env["PATH"] ?? ""].join(delimiter);
    for (const { line, commands, notRun } of blocks) {
      if (notRun !== undefined) {
        print(`skipped: ${path}:${line}: ${notRun}`);
        continue;
      }
      const args = ["-e", "-u", "-o", "pipefail", "-c", commands];
      const { code, output, errors } = await runProgram("bash", args, { cwd: work, environment: { PATH } });
      ran++;
      if (code === 0) continue;
      failed++;
      console.error(`error: ${path}:${line}: exit status ${code}\n${commands}${output}${errors}`);
    }
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
  print(`${path}\n ${ran - failed} pass\n ${failed} fail`); // as the gate counts
  return failed === 0 ? 0 : 1;
}

async function main(args: readonly string[]): Promise<number> {
  const { positionals, flags, values } = parseOptions(args, {
    help: HELP,
    boolean: ["check", "help"],
    string: ["shell"],
  });
  if (flags.help) {
    print(HELP);
    return 0;
  }
  if (positionals.length > 0) throw usageError(`no paths are taken, got ${positionals.length}`, HELP);
  if (values.shell !== undefined) return await runShell(values.shell);
  const target = join(root, "docs", "api.md");
  const page = await apiReference();
  if (flags.check) {
    if (existsSync(target) && readFileSync(target, "utf8") === page) return 0;
    console.error("error: docs/api.md is not what the docstrings say: run bun run scripts/docs.ts");
    return 1;
  }
  writeWhole(target, page);
  print(`${target}: ${page.split("\n").length} lines`);
  return 0;
}

if (import.meta.main) await runCommand(main);
