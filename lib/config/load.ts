/** Configuration files: read, parsed as YAML and resolved. */
import { ConfigError } from "../errors.ts";
import { quote, readWhole } from "../files/whole.ts";
import { type ConfigOverrides, resolveConfig, type ResolvedConfig } from "./resolve.ts";

/** Largest configuration read: a list of `MAX_ITEMS` tensor names of 60 characters fits. */
export const MAX_CONFIG_BYTES = 256 * 1024;
/** Where a module loaded over HTTP finds YAML: it has no import map, so the bare name would not resolve. */
const REMOTE_YAML: string = "npm:yaml@2.9.1";

/**
 * Parses and validates YAML text.
 *
 * @param options.source Name of the text in messages and origins, such as its path.
 * @throws {ConfigError} With line and column and the parser's error as `cause` if the text is not YAML;
 *   otherwise with every fault found.
 *
 * @example
 * ```ts
 * import { parseConfig } from "./mod.ts";
 * const { config } = await parseConfig("bit_width: 2\ngroup_size: 32\n", { source: "example.yaml" });
 * config.groupSize; // 32
 * ```
 */
export async function parseConfig(
  yamlText: string,
  options: ConfigOverrides & { readonly source?: string | undefined } = {},
): Promise<ResolvedConfig> {
  const source = options.source ?? "configuration text";
  if (yamlText.length > MAX_CONFIG_BYTES) throw tooLarge(source);
  return resolveConfig({ ...options, file: await parseYaml(yamlText, source), fileSource: source });
}

/**
 * Reads, parses and validates a configuration file; without `path`, only the other layers count.
 *
 * @throws {ConfigError} If the file cannot be read, is larger than `MAX_CONFIG_BYTES` or is not UTF-8, and as
 *   `parseConfig`.
 *
 * @example
 * ```ts
 * import process from "node:process";
 * import { formatConfig, loadConfig } from "./mod.ts";
 * console.log(formatConfig(await loadConfig({ environment: process.env, overrides: { bit_width: 2 } })));
 * ```
 */
export async function loadConfig(
  options: ConfigOverrides & { readonly path?: string | undefined } = {},
): Promise<ResolvedConfig> {
  const { path } = options;
  if (path === undefined) return resolveConfig(options);
  return await parseConfig(readText(path), { ...options, source: path });
}

function readText(path: string): string {
  try {
    const bytes = readWhole(path, MAX_CONFIG_BYTES, () => tooLarge(path));
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (error) {
    if (error instanceof ConfigError) throw error;
    const { cause = error, message } = error as Error;
    const reason = error instanceof TypeError ? "not UTF-8 text" : message;
    throw new ConfigError(`Cannot read configuration ${quote(path)}: ${reason}`, [], cause);
  }
}

function tooLarge(source: string): ConfigError {
  return new ConfigError(`Cannot read configuration "${source}": larger than ${MAX_CONFIG_BYTES} bytes`);
}

/** Most characters of a parser's reason in a message. */
const MAX_REASON = 300;
/** Most comparisons of a document's keys; a mapping of n keys takes n² / 2, and 4,096 names are allowed. */
const MAX_COMPARISONS = 10_000_000;

/** Most containers inside one another; keys lie three deep. */
const MAX_DEPTH = 16;
const TOO_DEEP = `nested too deep, ${MAX_DEPTH} levels at most`;

/** Whether a value has more than `MAX_DEPTH` levels; one that contains itself has. */
function isTooDeep(value: unknown, depth = 0): boolean {
  if (typeof value !== "object" || value === null) return false;
  return depth === MAX_DEPTH || Object.values(value).some((inner) => isTooDeep(inner, depth + 1));
}

/** Plain errors: a picture of the line for each of 80 000 takes gigabytes; and no warnings. */
function yamlOptions() {
  let comparisons = 0;
  const uniqueKeys = (a: { readonly value?: unknown } | null, b: typeof a) => {
    if (++comparisons > MAX_COMPARISONS) throw new RangeError("mappings of too many keys, 4096 at most");
    return a === b || (a?.value !== undefined && a.value === b?.value);
  };
  return { prettyErrors: false, logLevel: "error", uniqueKeys };
}

async function parseYaml(text: string, source: string): Promise<unknown> {
  const yaml: { parse(text: string, options: ReturnType<typeof yamlOptions>): unknown } =
    /^https?:.*\.ts\b/.test(import.meta.url) ? await import(REMOTE_YAML) : await import("@std/yaml");
  let value: unknown;
  try {
    value = yaml.parse(text, yamlOptions());
  } catch (error) {
    // The parser goes into itself for each level: where its stack ends, the limit is long passed.
    if (/call stack|too much recursion/i.test((error as Error).message)) {
      throw new ConfigError(`Cannot parse configuration ${quote(source)}: ${TOO_DEEP}`, [], error);
    }
    // One of the parsers ends the first line with "at line L, column C", the other gives the position.
    const { message, pos } = error as Error & { readonly pos?: readonly number[] };
    const before = text.slice(0, pos?.[0] ?? 0).split("\n");
    const place = pos === undefined ? "" : ` at line ${before.length}, column ${before.at(-1)!.length + 1}`;
    const reason = message.split("\n")[0]!.replace(/:$/, "").slice(0, MAX_REASON) + place;
    throw new ConfigError(`Cannot parse configuration ${quote(source)}: ${reason}`, [], error);
  }
  if (isTooDeep(value)) throw new ConfigError(`Cannot parse configuration ${quote(source)}: ${TOO_DEEP}`);
  return value;
}
