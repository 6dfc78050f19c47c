/** Command lines: parsing options, and the mistakes in them. */
import process from "node:process";
import { parseArgs } from "@std/cli/parse-args";
import { nearestName } from "../../lib/config/nearest.ts";
import { ConfigError } from "../../lib/errors.ts";

/** A command's options: names without dashes. */
export interface Options<B extends string, S extends string, L extends string = never> {
  /** First line is the usage. */
  readonly help: string;
  readonly boolean: readonly B[];
  readonly string: readonly S[];
  /** Options with a value that may be repeated. */
  readonly list?: readonly L[];
}

/** Parsed options. */
export interface Parsed<B extends string, S extends string, L extends string = never> {
  readonly positionals: readonly string[];
  readonly flags: Readonly<Record<B, boolean>>;
  readonly values: Readonly<Partial<Record<S, string>>>;
  readonly lists: Readonly<Record<L, readonly string[]>>;
}

/** How options begin that leave something out. */
const NEGATION = "no-";

/**
 * Parses a command line.
 *
 * @throws {ConfigError} on an option that does not exist, one without its value, or a value that none takes
 */
export function parseOptions<B extends string, S extends string, L extends string = never>(
  args: readonly string[],
  options: Options<B, S, L>,
): Parsed<B, S, L> {
  const { list = [] } = options, strings: readonly string[] = [...options.string, ...list];
  const known = [...options.boolean, ...strings];
  const unknown: string[] = [];
  const end = args.indexOf("--");
  const own = end < 0 ? args : args.slice(0, end);
  const valued = own.find((arg) => options.boolean.some((name) => arg.startsWith(`--${name}=`)));
  if (valued !== undefined) {
    const name = valued.slice(0, valued.indexOf("="));
    throw usageError(`option "${name}" takes no value, got "${valued}"`, options.help);
  }
  // A negative number is a value, not an option: what is wrong with it is for its key to say.
  const joined = args.flatMap((arg, i) => {
    const isInside = end < 0 || i < end;
    const takesNext = (name: string | undefined) => strings.some((option) => name === `--${option}`);
    if (isInside && takesNext(args[i - 1]) && /^-\d/.test(arg)) return [];
    const next = args[i + 1] ?? "";
    return isInside && takesNext(arg) && /^-\d/.test(next) ? [`${arg}=${next}`] : [arg];
  });
  // The parser reads `--no-x` as x negated.
  const negatable = options.boolean.filter((name) => name.startsWith(NEGATION)).map((name) =>
    name.slice(NEGATION.length)
  );
  const parsed = parseArgs(joined, {
    boolean: [...options.boolean.filter((name) => !name.startsWith(NEGATION)), ...negatable] as string[],
    negatable,
    default: Object.fromEntries(negatable.map((name) => [name, true])),
    string: ["_", ...strings],
    collect: [...list] as string[],
    unknown: (arg: string) => {
      if (!arg.startsWith("-") || arg === "-") return true;
      unknown.push(arg);
      return false;
    },
  });
  const [wrong] = unknown;
  if (wrong !== undefined) {
    const name = wrong.replace(/^-+/, "").replace(/=.*$/s, "");
    const near = nearestName(name, known);
    throw usageError(
      `unknown option "${wrong}"${near === undefined ? "" : `; did you mean "--${near}"?`}`,
      options.help,
    );
  }
  const values: Partial<Record<S, string>> = {};
  for (const name of options.string) {
    const value = parsed[name];
    if (value === undefined) continue;
    values[name] = String(value);
  }
  const lists = Object.fromEntries(
    list.map((name) => [name, ([parsed[name] ?? []].flat() as string[]).map(String)]),
  );
  for (
    const [name, value] of [...Object.entries(values), ...Object.entries(lists)] as [
      string,
      string | string[],
    ][]
  ) {
    if (value === "" || Array.isArray(value) && value.includes("")) {
      throw usageError(`option "--${name}" needs a value`, options.help);
    }
  }
  const flags = Object.fromEntries(options.boolean.map((name) => [
    name,
    name.startsWith(NEGATION)
      ? (parsed[name.slice(NEGATION.length)] as unknown) === false
      : (parsed[name] as unknown) === true,
  ]));
  return {
    positionals: parsed._.map(String),
    flags: flags as Record<B, boolean>,
    values,
    lists: lists as Record<L, string[]>,
  };
}

/** A mistake in the command line. */
export function usageError(reason: string, help: string): ConfigError {
  return new ConfigError(`Cannot run the command: ${reason}\n${help.split("\n")[0]}\n--help says more`);
}

/** The process's environment; empty, with a notice, where Deno may not read it. */
export function environmentVariables(
  notice: (line: string) => void,
): Readonly<Record<string, string | undefined>> {
  try {
    return { ...process.env };
  } catch (error) {
    if (!(error instanceof Error) || error.name !== "NotCapable") throw error;
    notice("notice: ARROW_QUANT_* variables are not read: no permission (--allow-env)");
    return {};
  }
}

/** A command line as it can be given again. */
export function commandLine(script: string, args: readonly string[]): string {
  const runner = "Deno" in globalThis ? "deno run -A" : "bun run";
  const quoted = args.map((arg) => /^[\w@%+=:,./-]+$/.test(arg) ? arg : `'${arg.replaceAll("'", "'\\''")}'`);
  // Bundled into the npm package, scripts are its commands.
  const start = import.meta.url.endsWith(".ts")
    ? [runner, `scripts/${script}`]
    : ["npx", `arrowquant-${script.replace(/\.ts$/, "")}`];
  return [...start, ...quoted].join(" ");
}
