#!/usr/bin/env bun
/** `arrowquant COMMAND …`: the commands of this project under one name. */
import process from "node:process";
import { nearestName } from "../lib/config/nearest.ts";
import { TOOL_VERSION } from "../lib/output/record.ts";
import { type Usage, UsageError } from "./_command/options.ts";
import { defineCommand } from "./_command/run.ts";
import { print } from "./_command/text.ts";

/** Purpose of each command, and its script, which is loaded when it is asked for. */
const COMMANDS = {
  quantize: ["a checkpoint in, a quantized checkpoint out", () => import("./quantize.ts")],
  merge: ["the shards of several tasks into one checkpoint", () => import("./merge.ts")],
  inspect: [
    "what a checkpoint holds; against its original, what quantizing cost",
    () => import("./inspect.ts"),
  ],
  generate: ["run a model, full precision or quantized: text or images", () => import("./generate.ts")],
  bench: [
    "measure how much accuracy a model keeps, and how fast this machine is",
    () => import("./bench.ts"),
  ],
  report: ["one page with charts and tables of runs", () => import("./report.ts")],
  dequantize: ["a quantized checkpoint back to plain safetensors", () => import("./dequantize.ts")],
  export: ["a checkpoint in the format of another program, as llama.cpp's", () => import("./export.ts")],
} as const;

const USAGE = {
  name: "arrowquant",
  operands: "COMMAND",
  about: `Makes diffusion models small: Dream, LLaDA and DiT at 2, 3, 4 or 8 bits per weight.

Commands:
${Object.entries(COMMANDS).map(([name, [about]]) => `  ${name.padEnd(12)} ${about}`).join("\n")}`,
  options: { "--version": "print the version" },
  examples: {
    "quantize MODEL OUT --bits 4": "make a model small",
    "inspect OUT --against MODEL": "see what it cost",
    'generate OUT --prompt "47+38="': "run it",
    "quantize --help": "what a command takes",
  },
} as const satisfies Usage;

const own = defineCommand(USAGE, ({ positionals: [name], flags }) => {
  if (flags.version) return print(`arrowquant ${TOOL_VERSION}`);
  if (name === undefined) throw new UsageError(`a command is needed: ${Object.keys(COMMANDS).join(", ")}`);
  const near = nearestName(name, Object.keys(COMMANDS));
  const hint = near === undefined
    ? `; there are ${Object.keys(COMMANDS).join(", ")}`
    : `; did you mean "${near}"?`;
  throw new UsageError(`unknown command "${name}"${hint}`);
});

/** Runs the command that the first argument names. */
export async function main(args: readonly string[] = process.argv.slice(2)): Promise<void> {
  const [name = "", ...rest] = args;
  if (name === "help") return await main([...rest.slice(0, 1), "--help"]);
  // What an unknown command would take is not looked at.
  if (!Object.hasOwn(COMMANDS, name)) return await own(name.startsWith("-") ? args : args.slice(0, 1));
  const script = await COMMANDS[name as keyof typeof COMMANDS][1]();
  await script.main(rest, `arrowquant ${name}`);
}

if (import.meta.main) await main();
