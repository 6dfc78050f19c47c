/** Combines layers of settings: default < profile < file < environment < command line. */
import type { ConfigProblem } from "../errors.ts";
import { checkConfig, preview, throwProblems } from "./checks.ts";
import { isMapping } from "./kinds.ts";
import { type BitWidth, defaultTwoLevelGroupSize, ROTATED_SCALE_BITS } from "./names.ts";
import { nearestName } from "./nearest.ts";
import {
  type Config,
  type DeploymentProfile,
  ENVIRONMENT_PREFIX,
  environmentName,
  fieldPath,
  type Key,
  SCHEMA,
} from "./schema.ts";
import { GRIDS, TARGETS } from "./targets.ts";

/** A configuration and, for every key path, the place its value came from. */
export interface ResolvedConfig {
  readonly config: Config;
  /** Key path to a text such as `default` or `environment ARROW_QUANT_BIT_WIDTH`. */
  readonly origins: Readonly<Record<string, string>>;
}

/** Layers above the defaults and the file; later fields win over earlier ones. */
export interface ConfigOverrides {
  /** Environment variables; those that start with `ARROW_QUANT_` count. The process is not asked. */
  readonly environment?: Readonly<Record<string, string | undefined>> | undefined;
  /** Short for `overrides.deployment_profile`. */
  readonly profile?: string | undefined;
  /** Key path to value, typed or as text; an undefined value counts as absent. */
  readonly overrides?: Readonly<Record<string, unknown>> | undefined;
  /** Key path to the name of the option that set it, for messages; `command line` where absent. */
  readonly overrideSources?: Readonly<Record<string, string>> | undefined;
}

const PROFILES: Readonly<Record<DeploymentProfile, Readonly<Record<string, number>>>> = {
  edge: { bit_width: 2, num_time_groups: 5, group_size: 256 },
  local: { bit_width: 4, num_time_groups: 10, group_size: 128 },
  cloud: { bit_width: 8, num_time_groups: 20, group_size: 64 },
};

const KEYS: ReadonlyMap<string, Key> = new Map(SCHEMA.map((k) => [k.key, k]));
const VARIABLES: ReadonlyMap<string, Key> = new Map(SCHEMA.map((k) => [environmentName(k.key), k]));
const SECTIONS: ReadonlySet<string> = new Set(SCHEMA.flatMap(({ key }) => {
  const parts = key.split(".");
  return parts.slice(1).map((_, i) => parts.slice(0, i + 1).join("."));
}));

/** A value that some layer gives to a key, and the layer's name. */
interface Given {
  readonly value: unknown;
  readonly source: string;
}

/**
 * Combines the layers into one configuration: default < profile < file < environment < command line.
 *
 * Pure: nothing but the arguments is read. Every value of every layer is checked, also one that another layer
 * hides.
 *
 * @param layers.file The parsed YAML document; undefined or null for none.
 * @param layers.fileSource Name of the file in messages and origins.
 * @throws {ConfigError} With every fault of every layer.
 *
 * @example
 * ```ts
 * import { resolveConfig } from "./mod.ts";
 * const { config, origins } = resolveConfig({
 *   file: { deployment_profile: "edge", group_size: 64 },
 *   environment: { ARROW_QUANT_NUM_THREADS: "2" },
 * });
 * config.bitWidth; // 2
 * origins["bit_width"]; // "deployment_profile edge"
 * ```
 */
export function resolveConfig(
  layers: ConfigOverrides & { readonly file?: unknown; readonly fileSource?: string | undefined },
): ResolvedConfig {
  const problems: ConfigProblem[] = [];
  const given = [
    new Map<string, Given>(SCHEMA.map((k) => [k.key, { value: k.default, source: "default" }])),
    readDocument(layers.file, layers.fileSource ?? "configuration file", problems),
    readEnvironment(layers.environment ?? {}, problems),
    readOverrides(layers, problems),
  ];

  const checked = given.map((layer) => {
    const values = new Map<string, Given>();
    for (const [key, { value, source }] of layer) {
      const { kind } = KEYS.get(key)!;
      const before = problems.length;
      const result = kind.check(value, (found, at = "", expected = `${kind.type}, ${kind.allowed}`) => {
        problems.push({ key: key + at, value: preview(found), expected, source });
      });
      if (problems.length === before) values.set(key, { value: result, source });
    }
    return values;
  });
  throwProblems(problems);

  const effective = new Map(checked.flatMap((layer) => [...layer]));
  const profile = effective.get("deployment_profile")!.value as DeploymentProfile | null;
  for (const [key, value] of Object.entries(profile === null ? {} : PROFILES[profile])) {
    if (effective.get(key)!.source !== "default") continue;
    effective.set(key, { value, source: `deployment_profile ${profile}` });
  }
  fitGroups(effective);

  const config: Record<string, unknown> = {};
  const origins: Record<string, string> = {};
  for (const [key, { value, source }] of effective) {
    const path = fieldPath(key);
    const last = path.pop()!;
    let section = config;
    for (const name of path) section = (section[name] ??= {}) as Record<string, unknown>;
    section[last] = value;
    origins[key] = source;
  }
  const resolved = deepFreeze({ config: config as unknown as Config, origins });
  checkConfig(resolved.config, origins);
  return resolved;
}

/** Two-level scales, and the types of a target, have group sizes of their own where none is asked for. */
function fitGroups(effective: Map<string, Given>): void {
  const of = (key: string) => effective.get(key)!, bits = of("bit_width").value as BitWidth;
  const { source } = of("group_size");
  if (source !== "default" && !source.startsWith("deployment_profile")) return;
  const set = (value: number, key: string) => {
    const why = `default with ${key} ${String(of(key).value)} (${of(key).source})`;
    effective.set("group_size", { value, source: why });
  };
  const target = of("target").value as string | null, asked = of("target_type").value as string | null;
  const type = target === null ? undefined : asked ?? TARGETS[target]!.types[bits];
  if (type !== undefined) set(GRIDS[type]!.usual ?? GRIDS[type]!.groupSize, "target");
  else if (of("scale_bits").value === ROTATED_SCALE_BITS) set(0, "scale_bits");
  else if (![3, 16].includes(of("scale_bits").value as number)) {
    set(defaultTwoLevelGroupSize(bits), "scale_bits");
  }
}

function readDocument(document: unknown, source: string, problems: ConfigProblem[]): Map<string, Given> {
  const given = new Map<string, Given>();
  const walk = (section: unknown, prefix: string): void => {
    if (section === undefined || section === null) return; // an empty document or section
    if (!isMapping(section)) {
      const key = prefix === "" ? "(document)" : prefix.slice(0, -1);
      problems.push({ key, value: preview(section), expected: "a mapping of keys to values", source });
      return;
    }
    for (const [name, value] of Object.entries(section)) {
      const key = prefix + name;
      const isOneStep = !name.includes("."); // "a.b: 1" is not "a: {b: 1}"
      if (isOneStep && SECTIONS.has(key)) walk(value, `${key}.`);
      else if (isOneStep && KEYS.has(key)) given.set(key, { value, source });
      else problems.push(unknownKey(key, value, [...KEYS.keys(), ...SECTIONS], source, problems.length));
    }
  };
  walk(document, "");
  return given;
}

function readEnvironment(
  environment: Readonly<Record<string, string | undefined>>,
  problems: ConfigProblem[],
): Map<string, Given> {
  const given = new Map<string, Given>();
  for (const [name, text] of Object.entries(environment)) {
    if (!name.startsWith(ENVIRONMENT_PREFIX) || text === undefined) continue;
    const found = VARIABLES.get(name);
    if (found) given.set(found.key, { value: found.kind.fromText(text), source: `environment ${name}` });
    else problems.push(unknownKey(name, text, [...VARIABLES.keys()], "environment", problems.length));
  }
  return given;
}

function readOverrides(options: ConfigOverrides, problems: ConfigProblem[]): Map<string, Given> {
  const given = new Map<string, Given>();
  const overrides = { deployment_profile: options.profile, ...withoutUndefined(options.overrides ?? {}) };
  for (const [key, value] of Object.entries(withoutUndefined(overrides))) {
    const source = options.overrideSources?.[key] ?? "command line";
    const found = KEYS.get(key);
    if (!found) problems.push(unknownKey(key, value, [...KEYS.keys()], source, problems.length));
    else given.set(key, { value: typeof value === "string" ? found.kind.fromText(value) : value, source });
  }
  return given;
}

/** Most wrong keys of a layer for which the right one is looked for. */
const MAX_GUESSES = 100;

function unknownKey(
  key: string,
  value: unknown,
  known: readonly string[],
  source: string,
  before: number,
): ConfigProblem {
  const nearest = before < MAX_GUESSES ? nearestName(key, known) : undefined;
  const expected = `a known key${nearest === undefined ? "" : `; did you mean "${nearest}"?`}`;
  return { key: preview(key).slice(1, -1), value: preview(value), expected, source };
}

function withoutUndefined(record: Readonly<Record<string, unknown>>): Record<string, unknown> {
  return Object.fromEntries(Object.entries(record).filter(([, value]) => value !== undefined));
}

function deepFreeze<T>(value: T): T {
  if (typeof value === "object" && value !== null) Object.values(Object.freeze(value)).forEach(deepFreeze);
  return value;
}

/** The frozen configuration of an empty file. */
export const DEFAULT_CONFIG: Config = resolveConfig({}).config;
