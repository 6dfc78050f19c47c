/** Command lines: what a command takes, its help, and the mistakes in them. */
import process from "node:process";
import { parseArgs } from "@std/cli/parse-args";
import { nearestName } from "../../lib/config/nearest.ts";
import { ConfigError } from "../../lib/errors.ts";

/** Name, options and texts of a command. */
export interface Usage {
  /** Its file in scripts/, or `arrowquant COMMAND`. */
  readonly name: string;
  /** As in `MODEL OUT`. */
  readonly operands: string;
  readonly about: string;
  /**
   * Purpose of each option, under the option as the help shows it: `--flag`, `--option VALUE`, `-o, --option
   * VALUE`, or `--option VALUE …` where it may be repeated. A key without dashes heads the options behind it.
   */
  readonly options: Readonly<Record<string, string>>;
  /** Arguments as a user would give them, and what for. */
  readonly examples?: Readonly<Record<string, string>>;
  /** Stands below the options. */
  readonly notes?: string;
}

/** Keys of options without the dashes, headings left out. */
type Keys<U extends Usage> = Extract<keyof U["options"], string> extends infer K
  ? K extends `${string}--${infer Rest}` ? Rest : never
  : never;
type FlagOf<K> = K extends `${string} ${string}` ? never : K;
type ListOf<K> = K extends `${infer Name} ${string} …` ? Name : never;
type ValueOf<K> = K extends `${string} …` ? never : K extends `${infer Name} ${string}` ? Name : never;

/** Names of the options of a command that take one value. */
export type ValueName<U extends Usage> = ValueOf<Keys<U>>;

/** A mistake in the command line. */
export class UsageError extends ConfigError {
  constructor(reason: string) {
    super(`Cannot run the command: ${reason}`);
  }
}

/** A parsed command line, options by names without dashes. */
export class Arguments<U extends Usage> {
  constructor(
    readonly positionals: readonly string[],
    readonly flags: Readonly<Record<FlagOf<Keys<U>> & string, boolean>>,
    readonly values: Readonly<Partial<Record<ValueName<U>, string>>>,
    readonly lists: Readonly<Record<ListOf<Keys<U>>, readonly string[]>>,
  ) {}

  /** The operands. @throws {UsageError} unless there are as many as names */
  operands<const N extends readonly string[]>(...names: N): { readonly [I in keyof N]: string } {
    const { positionals } = this, got = positionals.length;
    if (got === names.length) return positionals as { readonly [I in keyof N]: string };
    if (names.length === 0) throw new UsageError(`unexpected argument "${positionals[0]}"`);
    throw new UsageError(
      names.length === 1
        ? `one ${names[0]} is needed, got ${got}`
        : `${names.join(" and ")} are needed, got ${got} paths`,
    );
  }

  oneOf<T extends string>(name: ValueName<U>, allowed: readonly T[]): T | undefined {
    const value: string | undefined = this.values[name];
    if (value === undefined || allowed.includes(value as T)) return value as T | undefined;
    throw new UsageError(`--${name} must be one of ${allowed.join(", ")}, got "${value}"`);
  }

  number(name: ValueName<U>): number | undefined {
    const text: string | undefined = this.values[name];
    if (text === undefined || (text.trim() !== "" && Number.isFinite(Number(text)))) {
      return text === undefined ? undefined : Number(text);
    }
    throw new UsageError(`--${name} must be a number, got "${text}"`);
  }

  whole(name: ValueName<U>, least: number, most?: number): number | undefined {
    const text: string | undefined = this.values[name];
    return text === undefined ? undefined : wholeNumber(name, text, least, most);
  }
}

/** A part of an option's value as a whole number. */
export function wholeNumber(name: string, text: string, least: number, most?: number): number {
  const value = Number(text);
  if (/^\d+$/.test(text) && Number.isSafeInteger(value) && value >= least && value <= (most ?? value)) {
    return value;
  }
  const range = most === undefined ? `≥ ${least}` : `from ${least} to ${most}`;
  throw new UsageError(`--${name} must be a whole number ${range}, got "${text}"`);
}

interface Option {
  readonly name: string;
  /** A letter. */
  readonly alias: string | undefined;
  readonly kind: "flag" | "value" | "list";
}

function optionsOf(usage: Usage): Option[] {
  return Object.keys({ ...usage.options, "--help": "" }).flatMap((key): Option[] => {
    const [, alias, name, value, repeats] = /^(?:-(\w), )?--([\w-]+)( .*?)?( …)?$/.exec(key) ?? [];
    const kind = repeats !== undefined ? "list" : value !== undefined ? "value" : "flag";
    return name === undefined ? [] : [{ name, alias, kind }];
  });
}

/**
 * Parses a command line.
 *
 * @throws {UsageError} on an option that does not exist, one without its value, or a value that none takes
 */
export function parseArguments<U extends Usage>(usage: U, args: readonly string[]): Arguments<U> {
  const options = optionsOf(usage);
  const namesOf = (...kinds: Option["kind"][]) =>
    options.filter(({ kind }) => kinds.includes(kind)).map(({ name }) => name);
  const flags = namesOf("flag"), lists = namesOf("list"), valued = namesOf("value", "list");
  const end = args.indexOf("--"), own = end < 0 ? args : args.slice(0, end);
  const assigned = own.find((arg) => flags.some((name) => arg.startsWith(`--${name}=`)));
  if (assigned !== undefined) {
    const name = assigned.slice(0, assigned.indexOf("="));
    throw new UsageError(`option "${name}" takes no value, got "${assigned}"`);
  }
  // A negative number is a value, not an option: what is wrong with it is for its key to say.
  const takesNext = (arg: string | undefined) => valued.some((name) => arg === `--${name}`);
  const isNumber = (arg: string | undefined) => arg !== undefined && /^-\d/.test(arg);
  const joined = args.flatMap((arg, i) => {
    if (end >= 0 && i >= end) return [arg];
    if (isNumber(arg) && takesNext(args[i - 1])) return [];
    return takesNext(arg) && isNumber(args[i + 1]) ? [`${arg}=${args[i + 1]}`] : [arg];
  });
  const unknown = (arg: string) => {
    if (!arg.startsWith("-") || arg === "-") return true;
    const near = nearestName(arg.replace(/^-+/, "").replace(/=.*$/s, ""), [...flags, ...valued]);
    const hint = near === undefined ? "" : `; did you mean "--${near}"?`;
    throw new UsageError(`unknown option "${arg}"${hint}`);
  };
  // The parser looks names up in plain objects, which have built-in ones.
  own.find((arg) =>
    /^-/.test(arg) && arg.split("=")[0]!.split(/[-.]/).some((part) => part in Object.prototype) &&
    unknown(arg)
  );
  const parsed = parseArgs(joined, {
    boolean: flags,
    string: ["_", ...valued],
    collect: lists,
    alias: Object.fromEntries(
      options.flatMap(({ name, alias }) => alias === undefined ? [] : [[name, alias]]),
    ),
    unknown,
  });
  const empty = valued.find((name) => [parsed[name]].flat().includes(""));
  if (empty !== undefined) throw new UsageError(`option "--${empty}" needs a value`);
  const pick = (names: readonly string[]) => Object.fromEntries(names.map((name) => [name, parsed[name]]));
  return new Arguments<U>(
    parsed._.map(String),
    pick(flags) as Arguments<U>["flags"],
    pick(namesOf("value")) as Arguments<U>["values"],
    pick(lists) as unknown as Arguments<U>["lists"],
  );
}

/** The last lines of every `--help`. */
const EXIT_CODE_HELP = `Exit codes:
  0 done    1 unexpected error    2 options or configuration    3 bad input    4 output    5 kernels    6 memory
  129, 130, 143 stopped by SIGHUP, SIGINT or SIGTERM; what was done is kept`;
/** Where what options are for begins, and how wide it may be. */
const HELP_COLUMN = 23, HELP_WIDTH = 97;

export const usageLine = ({ name, operands }: Usage): string =>
  `Usage: ${[name, operands, "[options]"].filter((part) => part !== "").join(" ")}`;

/** The text that `--help` prints. */
export function helpText(usage: Usage): string {
  const options = Object.entries({ ...usage.options, "--help": "" }).flatMap(([key, text]) => {
    if (!key.startsWith("-")) return [`${key}:`];
    const lines = text.split("\n").flatMap((line) =>
      line.match(new RegExp(`.{1,${HELP_WIDTH}}(?= |$)`, "g"))?.map((part) => part.trimStart()) ?? []
    );
    const label = `  ${key.replace(/ …$/, "")}`, indent = " ".repeat(HELP_COLUMN);
    const [first, rest] = label.length < HELP_COLUMN
      ? [`${label.padEnd(HELP_COLUMN)}${lines[0] ?? ""}`.trimEnd(), lines.slice(1)]
      : [label, lines];
    return [first, ...rest.map((line) => indent + line)];
  });
  const examples = Object.entries(usage.examples ?? {}).flatMap((
    [args, why],
  ) => [`  # ${why}`, `  ${startOf(usage.name)} ${args}`]);
  return [
    usageLine(usage),
    usage.about,
    options.join("\n"),
    usage.notes ?? [],
    examples.length === 0 ? [] : ["Examples:", ...examples].join("\n"),
    EXIT_CODE_HELP,
  ].flat().join("\n\n");
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

/** How a command is started here: as a script of a checkout, from the npm package, or from JSR. */
function startOf(name: string): string {
  const own = name.replace(/^arrowquant(?: |$)|\.ts$/g, "");
  if (import.meta.url.startsWith("http")) return `deno run -A jsr:@arrowquant/arrowquant/cli ${own}`.trim();
  const isOfNpx = !name.endsWith(".ts") && environmentVariables(() => {})["npm_command"] === "exec";
  const isInstalled = !import.meta.url.endsWith(".ts") || import.meta.url.includes("/node_modules/");
  if (isInstalled || isOfNpx) return `npx arrowquant ${own}`.trim();
  const script = name.endsWith(".ts") ? name : `arrowquant.ts ${own}`.trim();
  return `${"Deno" in globalThis ? "deno run -A" : "bun run"} scripts/${script}`;
}

/** A command line as it can be given again. */
export function commandLine(name: string, args: readonly string[]): string {
  const quoted = args.map((arg) => /^[\w@%+=:,./-]+$/.test(arg) ? arg : `'${arg.replaceAll("'", "'\\''")}'`);
  return [startOf(name), ...quoted].join(" ");
}
