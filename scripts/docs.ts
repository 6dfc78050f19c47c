/** Writes the API reference from the docstrings, and runs the shell examples of the documents. */
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, join, resolve } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { PACKAGE_ROOT } from "../lib/native/location.ts";
import { undocumented, writeReference } from "./_release/reference.ts";
import { bunBinary, denoBinary } from "./_command/programs.ts";
import { runProgram } from "./_command/run_program.ts";
import { type Arguments, type Usage, UsageError } from "./_command/options.ts";
import { defineCommand } from "./_command/run.ts";
import { print } from "./_command/text.ts";

const USAGE = {
  name: "docs.ts",
  operands: "[OUT]",
  about:
    "Writes the API reference of all public modules into OUT (default out/reference) as HTML pages, from the " +
    "docstrings.",
  options: {
    "--check": "write nothing; exit status 1 if a public symbol or a field of its options has no docstring",
    "--shell FILE":
      "run the ```sh blocks of a document instead, in order, in one empty folder that sees the checkout. " +
      'A block after a comment "<!-- checked: REASON -->" is not run: its scripts, paths and the packages\' ' +
      "commands must exist, and every option and option's word must be in the script's --help",
  },
} as const satisfies Usage;

const root = fileURLToPath(PACKAGE_ROOT);

/** A block of shell commands and why it is only checked, if it is. */
interface ShellBlock {
  readonly line: number;
  readonly commands: string;
  readonly checked: string | undefined;
}

/** The \`\`\`sh blocks of a document. */
export function shellBlocks(markdown: string): ShellBlock[] {
  const blocks: ShellBlock[] = [];
  for (
    const match of markdown.matchAll(
      /(?:<!-- checked: (.*?) -->\s*\n)?^```(?:sh|bash|shell)\n([\s\S]*?)^```$/gm,
    )
  ) {
    const line = markdown.slice(0, match.index).split("\n").length;
    blocks.push({ line, commands: match[2]!, checked: match[1] });
  }
  return blocks;
}

/** Words of a line of shell: quotes hold words together, a comment ends it. */
function shellWords(line: string): string[] {
  const words = line.match(/"[^"]*"|'[^']*'|[^\s"']+/g) ?? [];
  const comment = words.findIndex((word) => word.startsWith("#"));
  return comment < 0 ? words : words.slice(0, comment);
}

/** A command of the packages as the script that it is: what it takes is looked up there. */
function inCheckout(words: readonly string[]): readonly string[] {
  const [program, command, ...args] = words[0] === "npx" || words[0] === "bunx" ? words.slice(1) : words;
  if (program !== "arrowquant") return program === undefined ? [] : [program, command ?? "", ...args];
  const isOption = command?.startsWith("-") ?? true, name = command === "export" ? "dequantize" : command;
  const rest = isOption && command !== undefined ? [command, ...args] : args;
  return ["bun", "run", `scripts/${isOption ? "arrowquant" : name}.ts`, ...rest];
}

/** What cannot be right in commands that are not run; `helpOf` is what a script prints for `--help`. */
export async function wrongCommands(
  commands: string,
  helpOf: (script: string) => Promise<string>,
): Promise<string[]> {
  const { scripts } = JSON.parse(readFileSync(join(root, "package.json"), "utf8")) as {
    readonly scripts: Readonly<Record<string, string>>;
  };
  const wrong: string[] = [];
  for (const command of commands.replace(/\\\n/g, " ").split(/\n|&&/)) {
    const words = shellWords(command);
    const [program, verb, ...others] = inCheckout(words);
    if (program === undefined) continue;
    const says = (what: string) => wrong.push(`${command.trim()}: ${what}`);
    if ((program === "npm" || program === "bun") && verb === "install" && others.length === 0) continue;
    const targets = others.filter((word) => word !== "-A");
    const [target, ...args] = targets;
    const script = /^(?:bun|npm) run ([a-z]+)$/.exec([program, verb, target].join(" "))?.[1];
    const path = script === undefined ? target : /scripts\/\w+\.ts/.exec(scripts[script] ?? "")?.[0];
    if (program === "bun" && verb === "test") {
      for (const file of others) if (!existsSync(join(root, file))) says(`there is no ${file}`);
      continue;
    }
    if (!["bun", "npm", "deno"].includes(program) || verb !== "run" || path === undefined) {
      says("this command is not known");
      continue;
    }
    if (!existsSync(join(root, path))) {
      says(`there is no ${path}`);
      continue;
    }
    const help = await helpOf(path);
    const isThere = (word: string) => new RegExp(`(^|[^\\w-])${word}(?![\\w-])`, "m").test(help);
    for (const [i, word] of args.entries()) {
      const option = /^--?[a-z][\w-]*/.exec(word)?.[0];
      if (option !== undefined && !isThere(option)) says(`--help does not have ${option}`);
      // What stands behind an option as a plain word is a name that the help lists.
      const isName = /^[a-z][a-z0-9_]*$/.test(word) && (args[i - 1] ?? "").startsWith("--");
      if (isName && !isThere(word)) says(`--help does not have ${word}`);
      if (/^(?:tests|scripts|lib|docs)\//.test(word) && !existsSync(join(root, word))) {
        says(`there is no ${word}`);
      }
    }
  }
  return wrong;
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
    const helps = new Map<string, Promise<string>>();
    const helpOf = (script: string) => {
      const own = helps.get(script) ??
        runProgram(bunBinary(), ["run", script, "--help"], { cwd: work }).then(({ output }) => output);
      helps.set(script, own);
      return own;
    };
    for (const { line, commands, checked } of blocks) {
      if (checked !== undefined) {
        print(`skipped: ${path}:${line}: not run, commands and options checked: ${checked}`);
        const wrong = await wrongCommands(commands, helpOf);
        ran++;
        if (wrong.length > 0) failed++;
        for (const text of wrong) console.error(`error: ${path}:${line}: ${text}`);
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

async function run({ positionals, flags, values }: Arguments<typeof USAGE>): Promise<number> {
  if (values.shell !== undefined) return await runShell(values.shell);
  if (flags.check) {
    const missing = await undocumented();
    for (const name of missing) console.error(`error: no docstring: ${name}`);
    return missing.length === 0 ? 0 : 1;
  }
  if (positionals.length > 1) throw new UsageError(`one folder is taken, got ${positionals.length}`);
  const out = positionals[0] ?? join("out", "reference");
  await writeReference(resolve(out));
  print(`${join(out, "index.html")}`);
  return 0;
}

export const main = defineCommand(USAGE, run);
if (import.meta.main) await main();
