/**
 * `@std/cli/parse-args` where JSR is out of reach: the part of `parseArgs` that the scripts use, over `minimist`.
 *
 * tsconfig.json and tests/deno/import_map.json point the name here; Deno users get the real one.
 * tests/config/std_contract_test.ts pins what both do.
 */
import minimist from "minimist";

type Names<T extends string = string> = T | readonly T[];

/** What the scripts pass; each field as in `@std/cli`. */
export interface ParseOptions<
  B extends string = string,
  S extends string = string,
  C extends string = string,
> {
  readonly boolean?: Names<B>;
  readonly string?: Names<S>;
  readonly collect?: Names<C>;
  readonly negatable?: Names;
  readonly default?: Readonly<Record<string, unknown>>;
  readonly alias?: Readonly<Record<string, Names>>;
  readonly stopEarly?: boolean;
  readonly "--"?: boolean;
  /** Called for undeclared options and for every positional; false drops the argument. */
  readonly unknown?: (arg: string, key?: string, value?: unknown) => unknown;
}

/** Parsed arguments; positionals in `_`, numbers where they look like one. */
export type Args<B extends string = string, S extends string = string, C extends string = string> =
  & { _: (string | number)[]; [name: string]: unknown }
  & { [name in B]: boolean }
  & { [name in Exclude<S, C | "_">]?: string }
  & { [name in C]: string[] };

/** Marks what is added to an argument; no argument can hold it. */
const MARK = "\0";

/**
 * Parses command-line arguments as `parseArgs` of `@std/cli` does, for options declared as boolean or string.
 *
 * Not the same: dotted names, `boolean: true`, collected booleans, `--no-x=value`, and undeclared options that are
 * followed by `-` or an empty argument.
 */
export function parseArgs<B extends string = never, S extends string = never, C extends string = never>(
  args: readonly string[],
  options: ParseOptions<B, S, C> = {},
): Args<B, S, C> {
  const names = (value: Names | undefined): string[] => value === undefined ? [] : [value].flat() as string[];
  const groups = Object.entries(options.alias ?? {}).map(([name, others]) => [name, ...names(others)]);
  const withAliases = (name: string): string[] => groups.find((g) => g.includes(name)) ?? [name];
  const declared = (value: Names | undefined): Set<string> => new Set(names(value).flatMap(withAliases));
  const [booleans, strings] = [declared(options.boolean), declared(options.string)];
  const [collected, negatable] = [declared(options.collect), declared(options.negatable)];
  const plain = <T>(value: T): T | string => typeof value === "string" ? value.replace(/=?\0/, "") : value;

  const end = args.indexOf("--");
  const prepared = args.map((arg, i) => {
    if (!arg.startsWith("--") || (end !== -1 && i >= end)) return arg;
    // minimist negates `x` at `--no-x` whether or not it is negatable.
    if (arg.startsWith("--no-") && !negatable.has(arg.slice(5))) return `--${MARK}${arg.slice(2)}`;
    // minimist takes these as an option's value; @std/cli leaves them to be positionals.
    const next = args[i + 1];
    const isLeft = next === "" || (next?.startsWith("-") && !/^--?[^-]/.test(next) && i + 1 !== end);
    return isLeft && strings.has(arg.slice(2)) ? `${arg}=${MARK}` : arg;
  });

  const unknown = (prepared: string): boolean => {
    const arg = plain(prepared);
    if (!/^-./.test(arg)) return options.unknown?.(arg) !== false;
    const [, key, value] = /^--?([^=]+)=?(.*)$/s.exec(arg) ?? [];
    return collected.has(key ?? "") || options.unknown?.(arg, key, value) !== false;
  };
  const isBoolean = ([name]: [string, unknown]): boolean => booleans.has(name);
  const defaults = Object.entries(options.default ?? {});
  const parsed = minimist(prepared, {
    boolean: [...booleans],
    string: [...strings],
    alias: Object.fromEntries(groups.map(([name, ...others]) => [name!, others])),
    default: Object.fromEntries(defaults.filter(isBoolean)),
    stopEarly: options.stopEarly ?? false,
    "--": options["--"] ?? false,
    unknown,
  });

  const result: { _: (string | number)[]; [name: string]: unknown } = {
    _: parsed._.map(plain),
  };
  for (const [name, value] of Object.entries(parsed)) {
    if (name === "_") continue;
    if (name === "--") result[name] = value;
    else if (collected.has(name)) result[name] = [value].flat().map(plain);
    else result[plain(name)] = plain(Array.isArray(value) ? value.at(-1) : value);
  }
  for (const [name, value] of defaults) {
    if (!Object.hasOwn(result, name)) { for (const each of withAliases(name)) result[each] = value; }
  }
  for (const name of collected) {
    if (strings.has(name) && !Object.hasOwn(result, name)) result[name] = [];
  }
  return result as Args<B, S, C>;
}
