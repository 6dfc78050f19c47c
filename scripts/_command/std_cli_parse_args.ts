/**
 * `@std/cli/parse-args` where JSR is out of reach: the part of `parseArgs` that the scripts use, over
 * `minimist`.
 *
 * tsconfig.json, deno.json and tests/deno/import_map.json point the name here.
 * tests/config/std_contract_test.ts pins what both do.
 */
import minimist from "minimist";

/** What the scripts pass; each field as in `@std/cli`. */
export interface ParseOptions<B extends string, S extends string, C extends string> {
  readonly boolean?: readonly B[];
  readonly string?: readonly S[];
  readonly collect?: readonly C[];
  readonly alias?: Readonly<Record<string, string>>;
  /** Called for undeclared options and for every positional; false drops the argument. */
  readonly unknown?: (arg: string, key?: string, value?: unknown) => unknown;
}

/** Parsed arguments; positionals in `_`, numbers where they look like one. */
export type Args<B extends string, S extends string, C extends string> =
  & { _: (string | number)[]; [name: string]: unknown }
  & { [name in B]: boolean }
  & { [name in Exclude<S, C | "_">]?: string }
  & { [name in C]: string[] };

/** Marks what is added to an argument; no argument can hold it. */
const MARK = "\0";

/**
 * Parses command-line arguments as `parseArgs` of `@std/cli` does, for options declared as boolean or string.
 *
 * Not the same: dotted names, `boolean: true`, collected booleans, `--no-x=value`, and undeclared options
 * that are followed by `-` or an empty argument.
 */
export function parseArgs<B extends string = never, S extends string = never, C extends string = never>(
  args: readonly string[],
  { boolean = [], string = [], collect = [], alias = {}, unknown }: ParseOptions<B, S, C> = {},
): Args<B, S, C> {
  const isList = (name: string) => (collect as readonly string[]).includes(name);
  const plain = <T>(value: T): T | string => typeof value === "string" ? value.replace(/=?\0/, "") : value;

  const end = args.indexOf("--");
  const prepared = args.map((arg, i) => {
    if (!arg.startsWith("--") || (end !== -1 && i >= end)) return arg;
    // minimist negates `x` at `--no-x`; @std/cli does so only where asked.
    if (arg.startsWith("--no-")) return `--${MARK}${arg.slice(2)}`;
    // minimist takes these as an option's value; @std/cli leaves them to be positionals.
    const next = args[i + 1];
    const isLeft = next === "" || (next?.startsWith("-") && !/^--?[^-]/.test(next) && i + 1 !== end);
    return isLeft && (string as readonly string[]).includes(arg.slice(2)) ? `${arg}=${MARK}` : arg;
  });

  const parsed = minimist(prepared, {
    boolean: boolean.map((name) => name.startsWith("no-") ? MARK + name : name),
    string: [...string],
    alias: { ...alias },
    unknown: (prepared: string) => {
      const arg = plain(prepared);
      if (!/^-./.test(arg)) return unknown?.(arg) !== false;
      const [, key, value] = /^--?([^=]+)=?(.*)$/s.exec(arg) ?? [];
      return isList(key ?? "") || unknown?.(arg, key, value) !== false;
    },
  });

  const result: { _: (string | number)[]; [name: string]: unknown } = { _: parsed._.map(plain) };
  for (const [name, value] of Object.entries(parsed)) {
    if (name === "_") continue;
    if (isList(name)) result[name] = [value].flat().map(plain);
    else result[plain(name)] = plain(Array.isArray(value) ? value.at(-1) : value);
  }
  for (const name of collect) result[name] ??= [];
  return result as Args<B, S, C>;
}
