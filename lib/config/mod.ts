/**
 * Configuration: YAML text, environment variables and command-line values in, one frozen and validated `Config` out.
 *
 * `SCHEMA` of _config_schema.ts is the only list of keys; parsing, validation, overrides, `formatConfig` and the table of
 * docs/configuration.md are derived from it. What the keys do belongs to the modules that use them.
 */
import { open } from "node:fs/promises";
import {
  compilePattern,
  ENVIRONMENT_PREFIX,
  environmentName,
  escapeCharacter,
  isMapping,
  type Key,
  MAX_NAME_LENGTH,
  quoted,
  SCHEMA,
} from "./schema.ts";
import { ConfigError, type ConfigProblem } from "../errors.ts";
import type { BackendChoice } from "./backends.ts";
import {
  type BitWidth,
  defaultTwoLevelGroupSize,
  type GroupSize,
  type ScaleBits,
  TWO_LEVEL_GROUP_SIZES,
  type ZeroPointKind,
} from "./weight_grids.ts";

export type { BitWidth, GroupSize };
export { compilePattern };

/** Bits asked for one layer; 16 keeps it as it is in the checkpoint. */
export type LayerBits = BitWidth | 16;
/** Named set of `bit_width`, `num_time_groups` and `group_size`. */
export type DeploymentProfile = "edge" | "local" | "cloud";

/** The effective configuration, deeply frozen. Each field's meaning stands in docs/configuration.md. */
export interface Config {
  readonly deploymentProfile: DeploymentProfile | null;
  readonly bitWidth: BitWidth;
  readonly groupSize: GroupSize;
  /** 4 and 6: two-level scales. */
  readonly scaleBits: ScaleBits | 16;
  readonly numTimeGroups: number;
  readonly solver: "clip" | "round" | "feedback" | "best";
  readonly calibrationData: string | null;
  readonly calibrationSamples: number;
  readonly calibrationSeed: number;
  readonly calibrationMode: "blocks" | "once";
  readonly solverOptions: {
    readonly damping: number;
    readonly rounds: number;
    readonly refit: boolean;
    readonly correction: number;
    readonly residualCorrection: number;
    readonly candidates: number;
    readonly lowRank: number;
    readonly rotation: "none" | "hadamard";
  };
  readonly zeroPoint: ZeroPointKind;
  readonly minAccuracy: number;
  readonly layerBitWidths: Readonly<Record<string, LayerBits>>;
  readonly skipSensitiveLayers: boolean;
  readonly sensitiveLayerNames: readonly string[];
  readonly sensitiveLayerPatterns: readonly string[];
  readonly keepPatterns: readonly string[];
  readonly nonFinite: "fail" | "keep";
  readonly failFast: boolean;
  readonly backend: BackendChoice;
  readonly numThreads: number;
  readonly modality: "auto" | "text" | "image";
  readonly enableTimeAware: boolean;
  readonly timeGroups: "equal" | "adaptive";
  readonly perTokenLimit: number | null;
  readonly outputCorrection: boolean;
  readonly timeScales: "shared" | "per_group";
  readonly samplerCorrection: boolean;
  readonly targetModelSizeMb: number | null;
  readonly targetBitsPerWeight: number | null;
  readonly bitPlan: string | null;
  readonly thermodynamic: {
    readonly validation: {
      readonly enabled: boolean;
      readonly smoothnessThreshold: number;
      readonly logViolations: boolean;
    };
    readonly boundarySmoothing: {
      readonly enabled: boolean;
      readonly windowSize: number;
      readonly interpolation: "linear" | "cubic" | "sigmoid";
    };
    readonly transitionOptimization: {
      readonly enabled: boolean;
      readonly timeWeights: "auto" | "none" | "ddpm" | "ddim";
      readonly markovWeight: number;
      readonly entropyWeight: number;
      readonly learningRate: number;
      readonly maxIterations: number;
      readonly convergenceThreshold: number;
      readonly betaSchedule: "auto" | "linear" | "cosine";
    };
  };
}

/** A configuration and, for every key path, the place its value came from. */
export interface ResolvedConfig {
  readonly config: Config;
  /** Key path, as in `thermodynamic.validation.enabled`, to a text such as `default` or `environment ARROW_QUANT_BIT_WIDTH`. */
  readonly origins: Readonly<Record<string, string>>;
}

/** What may override the defaults and the file; later fields win over earlier ones. */
export interface ConfigOverrides {
  /** Environment variables; those that start with `ARROW_QUANT_` count. Nothing is read from the process itself. */
  readonly environment?: Readonly<Record<string, string | undefined>> | undefined;
  /** Short for `overrides.deployment_profile`. */
  readonly profile?: string | undefined;
  /** Key path to value, typed or as text; an undefined value counts as absent. */
  readonly overrides?: Readonly<Record<string, unknown>> | undefined;
  /** Key path to the name of the option that set it, for messages; `command line` where absent. */
  readonly overrideSources?: Readonly<Record<string, string>> | undefined;
}

/** One row of the schema, as text for documentation. */
export interface ConfigRow {
  readonly key: string;
  readonly type: string;
  readonly allowed: string;
  readonly unit: string;
  readonly default: string;
  readonly environment: string;
  readonly description: string;
}

/** Largest configuration read: a list of `MAX_ITEMS` tensor names of 60 characters fits. */
export const MAX_CONFIG_BYTES = 256 * 1024;
/** Where a module loaded over HTTP finds YAML: it has no import map, so the bare name would not resolve. */
const REMOTE_YAML: string = "jsr:@std/yaml@^1.0.5";

const PROFILES: Readonly<Record<DeploymentProfile, Readonly<Record<string, number>>>> = {
  edge: { bit_width: 2, num_time_groups: 5, group_size: 256 },
  local: { bit_width: 4, num_time_groups: 10, group_size: 128 },
  cloud: { bit_width: 8, num_time_groups: 20, group_size: 64 },
};

/** Keys that are accepted and validated but have no effect in this version. */
export const LATER_KEYS: readonly string[] = Object.freeze(SCHEMA.filter((k) => k.later).map((k) => k.key));

const KEYS: ReadonlyMap<string, Key> = new Map(SCHEMA.map((k) => [k.key, k]));
const VARIABLES: ReadonlyMap<string, Key> = new Map(SCHEMA.map((k) => [environmentName(k.key), k]));
const SECTIONS: ReadonlySet<string> = new Set(SCHEMA.flatMap(({ key }) => {
  const parts = key.split(".");
  return parts.slice(1).map((_, i) => parts.slice(0, i + 1).join("."));
}));

// Resolution ---------------------------------------------------------------------------------------------------

/** A value that some layer gives to a key, and the layer's name. */
interface Given {
  readonly value: unknown;
  readonly source: string;
}

/**
 * Combines the layers into one configuration: default < profile < file < environment < command line.
 *
 * Pure: nothing but the arguments is read. Every value of every layer is checked, also one that another layer hides.
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
  fitTwoLevel(effective, problems);
  checkSolverOptions(effective, problems);
  checkTimeParameters(effective, problems);
  throwProblems(problems);

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
  return deepFreeze({ config: config as unknown as Config, origins });
}

/** Two-level scales have group sizes of their own, and minima in place of zero points. */
function fitTwoLevel(effective: Map<string, Given>, problems: ConfigProblem[]): void {
  const { value: scaleBits, source } = effective.get("scale_bits")!;
  if (scaleBits === 16) return;
  const groupSize = effective.get("group_size")!, zeroPoint = effective.get("zero_point")!;
  const reason = `with scale_bits ${scaleBits} (${source})`;
  if (groupSize.source === "default" || groupSize.source.startsWith("deployment_profile")) {
    const value = defaultTwoLevelGroupSize(effective.get("bit_width")!.value as BitWidth);
    effective.set("group_size", { value, source: `default ${reason}` });
  } else if (!(TWO_LEVEL_GROUP_SIZES as readonly unknown[]).includes(groupSize.value)) {
    const expected = `one of ${TWO_LEVEL_GROUP_SIZES.join(", ")} ${reason}`;
    problems.push({ key: "group_size", value: preview(groupSize.value), expected, source: groupSize.source });
  }
  if (zeroPoint.value !== "real") {
    const expected = `real ${reason}`;
    problems.push({ key: "zero_point", value: preview(zeroPoint.value), expected, source: zeroPoint.source });
  }
}

/** Low rank and rotation are the calibrated solvers'. */
function checkSolverOptions(effective: Map<string, Given>, problems: ConfigProblem[]): void {
  const { value: solver, source: solverSource } = effective.get("solver")!;
  if (solver === "feedback" || solver === "best") return;
  for (const [key, off] of [["solver_options.low_rank", 0], ["solver_options.rotation", "none"]] as const) {
    const { value, source } = effective.get(key)!;
    if (value === off) continue;
    const expected = `${off} with solver ${solver} (${solverSource}): it needs feedback or best`;
    problems.push({ key, value: preview(value), expected, source });
  }
}

/** An output correction is made for the weights as they are at all times. */
function checkTimeParameters(effective: Map<string, Given>, problems: ConfigProblem[]): void {
  const { value, source } = effective.get("time_scales")!, correction = effective.get("output_correction")!;
  if (value !== "per_group" || correction.value !== true) return;
  const expected = `shared with output_correction true (${correction.source})`;
  problems.push({ key: "time_scales", value: preview(value), expected, source });
}

function throwProblems(problems: readonly ConfigProblem[]): void {
  if (problems.length > 0) {
    const lines = problems.map((p) => `  "${p.key}": got ${p.value}, expected ${p.expected} (${p.source})`);
    const count = problems.length === 1 ? "1 problem" : `${problems.length} problems`;
    throw new ConfigError(`Cannot use configuration: ${count}\n${lines.join("\n")}`, problems);
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
      else problems.push(unknownKey(key, value, [...KEYS.keys(), ...SECTIONS], source));
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
    else problems.push(unknownKey(name, text, [...VARIABLES.keys()], "environment"));
  }
  return given;
}

function readOverrides(options: ConfigOverrides, problems: ConfigProblem[]): Map<string, Given> {
  const given = new Map<string, Given>();
  const overrides = { deployment_profile: options.profile, ...withoutUndefined(options.overrides ?? {}) };
  for (const [key, value] of Object.entries(withoutUndefined(overrides))) {
    const source = options.overrideSources?.[key] ?? "command line";
    const found = KEYS.get(key);
    if (!found) problems.push(unknownKey(key, value, [...KEYS.keys()], source));
    else given.set(key, { value: typeof value === "string" ? found.kind.fromText(value) : value, source });
  }
  return given;
}

function unknownKey(key: string, value: unknown, known: readonly string[], source: string): ConfigProblem {
  const nearest = suggest(key, known);
  const expected = `a known key${nearest === undefined ? "" : `; did you mean "${nearest}"?`}`;
  return { key: preview(key).slice(1, -1), value: preview(value), expected, source };
}

// Reading ------------------------------------------------------------------------------------------------------

/**
 * Parses and validates YAML text.
 *
 * @param options.source Name of the text in messages and origins, such as its path.
 * @throws {ConfigError} With line and column and the parser's error as `cause` if the text is not YAML; otherwise with
 *   every fault found.
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
 * @throws {ConfigError} If the file cannot be read, is larger than `MAX_CONFIG_BYTES` or is not UTF-8, and as `parseConfig`.
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
  return await parseConfig(await readText(path), { ...options, source: path });
}

async function readText(path: string): Promise<string> {
  try {
    // Read up to one byte past the limit rather than trust the size: a pipe or device has none.
    const buffer = new Uint8Array(MAX_CONFIG_BYTES + 1);
    const file = await open(path, "r");
    let bytes = 0;
    try {
      while (bytes < buffer.length) {
        const { bytesRead } = await file.read(buffer, bytes, buffer.length - bytes, null);
        if (bytesRead === 0) break;
        bytes += bytesRead;
      }
    } finally {
      await file.close();
    }
    if (bytes > MAX_CONFIG_BYTES) throw tooLarge(path);
    return new TextDecoder("utf-8", { fatal: true }).decode(buffer.subarray(0, bytes));
  } catch (error) {
    if (error instanceof ConfigError) throw error;
    const reason = error instanceof TypeError ? "not UTF-8 text" : (error as Error).message;
    throw new ConfigError(`Cannot read configuration "${path}": ${reason}`, [], error);
  }
}

function tooLarge(source: string): ConfigError {
  return new ConfigError(`Cannot read configuration "${source}": larger than ${MAX_CONFIG_BYTES} bytes`);
}

async function parseYaml(text: string, source: string): Promise<unknown> {
  const yaml: { parse(text: string): unknown } = import.meta.url.startsWith("http")
    ? await import(REMOTE_YAML)
    : await import("@std/yaml");
  try {
    return yaml.parse(text);
  } catch (error) {
    // The parsers share no field for the place, but both end the first line with "at line L, column C".
    const message = String((error as Error).message).split("\n")[0]!.replace(/:$/, "");
    throw new ConfigError(`Cannot parse configuration "${source}": ${message}`, [], error);
  }
}

// Text ---------------------------------------------------------------------------------------------------------

/**
 * The effective configuration as YAML, every value followed by `# from` and its origin; it parses back to the same values.
 */
export function formatConfig(resolved: ResolvedConfig): string {
  const lines: string[] = [];
  let current: string[] = [];
  for (const { key } of SCHEMA) {
    const sections = key.split(".");
    const name = sections.pop()!;
    sections.forEach((section, depth) => {
      if (current[depth] === section) return;
      current = [...current.slice(0, depth), section];
      lines.push(`${"  ".repeat(depth)}${section}:`);
    });
    const entry = `${"  ".repeat(sections.length)}${name}: ${yamlText(valueAt(resolved.config, key))}`;
    lines.push(`${entry.padEnd(32)} # from ${printable(resolved.origins[key] ?? "unknown")}`);
  }
  return lines.join("\n") + "\n";
}

/**
 * The values that can change a byte of the output, as JSON with sorted key paths: the same text for the same result.
 *
 * Left out are `num_threads` and `backend` (results do not depend on them), `fail_fast` (it only ends a failing run
 * sooner) and `deployment_profile` (it acts through three keys that are present).
 */
export function canonicalConfig(config: Config): string {
  const entries = SCHEMA.filter((k) => !k.neutral).map(({ key }): [string, unknown] => {
    const value = valueAt(config, key);
    return [key, isMapping(value) ? sortedByKey(Object.entries(value)) : value];
  });
  return JSON.stringify(sortedByKey(entries));
}

/** The schema as text, one row a key, in the order of `formatConfig`. */
export function configSchema(): ConfigRow[] {
  return SCHEMA.map((k) => ({
    key: k.key,
    type: k.kind.type,
    allowed: k.kind.allowed,
    unit: k.unit ?? "",
    default: yamlText(k.default),
    environment: environmentName(k.key),
    description: k.description + (k.later ? ". _Without effect in this version_" : ""),
  }));
}

/** The schema as the Markdown table of docs/configuration.md. */
export function configTable(): string {
  const rows = configSchema().map((r) => {
    const unit = r.unit === "" ? "" : ` (${r.unit})`;
    return `| \`${r.key}\` | ${r.type}, ${r.allowed}${unit} | \`${r.default}\` | ${r.description} |`;
  });
  return ["| key | value | default | meaning |", "| --- | --- | --- | --- |", ...rows].join("\n");
}

/** Strings appear only as choices, which are plain words, or inside lists and maps, where they are quoted. */
function yamlText(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map((item) => quoted(item)).join(", ")}]`;
  if (!isMapping(value)) return String(value);
  return `{${Object.entries(value).map(([name, bits]) => `${quoted(name)}: ${bits}`).join(", ")}}`;
}

/** Text for one line of a terminal: control characters escaped. */
function printable(text: string): string {
  // deno-lint-ignore no-control-regex
  return text.replace(/[\u0000-\u001f\u007f-\u009f\u2028\u2029\ufeff\ufffe\uffff]/g, escapeCharacter);
}

/** A short text for any value found; never descends, so aliases that expand to gigabytes or to a cycle cost nothing. */
function preview(value: unknown): string {
  if (typeof value === "string") return quoted(value.length > 80 ? `${value.slice(0, 79)}…` : value);
  if (Array.isArray(value)) return `a list of ${value.length}`;
  if (value instanceof Date) return "a date";
  if (isMapping(value)) return `a mapping of ${Object.keys(value).length}`;
  if (typeof value === "object" && value !== null) return `a ${value.constructor?.name ?? "object"}`;
  return Object.is(value, -0) ? "-0" : String(value);
}

// Names --------------------------------------------------------------------------------------------------------

/** The bits `layer_bit_widths` asks for a tensor, or undefined. Its own name wins; of several patterns the most bits. */
export function layerBitWidth(config: Config, tensor: string): LayerBits | undefined {
  const widths = config.layerBitWidths;
  for (const name of [tensor, layerName(tensor)]) {
    if (Object.hasOwn(widths, name)) return widths[name];
  }
  const matching = Object.entries(widths).filter(([pattern]) => compilePattern(pattern).test(tensor));
  return matching.map(([, bits]) => bits).sort((a, b) => b - a)[0];
}

/** Whether `sensitive_layer_names` or `sensitive_layer_patterns` names a tensor; heeds no `skip_sensitive_layers`. */
export function isSensitiveLayer(config: Config, tensor: string): boolean {
  return config.sensitiveLayerNames.some((name) => name === tensor || name === layerName(tensor)) ||
    config.sensitiveLayerPatterns.some((pattern) => compilePattern(pattern).test(tensor));
}

const layerName = (tensor: string): string => tensor.replace(/\.weight$/, "");

function fieldPath(key: string): string[] {
  return key.split(".").map((name) => name.replace(/_(.)/g, (_, letter: string) => letter.toUpperCase()));
}

function valueAt(config: Config, key: string): unknown {
  return fieldPath(key).reduce<unknown>((value, name) => (value as Record<string, unknown>)[name], config);
}

/** The known name nearest to a wrong one, if near: by spelling, or the same last step in another section. */
function suggest(wrong: string, known: readonly string[]): string | undefined {
  const plain = (name: string): string => name.toLowerCase().replace(/[^a-z0-9]/g, "");
  const lastStep = (name: string): string => plain(name.slice(name.lastIndexOf(".") + 1));
  if (wrong.length > 2 * MAX_NAME_LENGTH) return undefined;
  let best: string | undefined;
  let bestDistance = Math.max(2, Math.floor(plain(wrong).length / 4)) + 1;
  for (const name of known) {
    const distance = Math.min(
      editDistance(plain(wrong), plain(name)),
      lastStep(wrong) === lastStep(name) ? 1 : Infinity,
    );
    if (distance < bestDistance) [best, bestDistance] = [name, distance];
  }
  return best;
}

/** Levenshtein distance. */
function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next.push(Math.min(row[j]! + 1, next[j - 1]! + 1, row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1)));
    }
    row = next;
  }
  return row[b.length]!;
}

// Objects ------------------------------------------------------------------------------------------------------

function withoutUndefined(record: Readonly<Record<string, unknown>>): Record<string, unknown> {
  return Object.fromEntries(Object.entries(record).filter(([, value]) => value !== undefined));
}

/** Code-unit order, which no locale changes. */
function sortedByKey(entries: [string, unknown][]): Record<string, unknown> {
  return Object.fromEntries(entries.sort(([a], [b]) => a < b ? -1 : a > b ? 1 : 0));
}

function deepFreeze<T>(value: T): T {
  if (typeof value === "object" && value !== null) Object.values(Object.freeze(value)).forEach(deepFreeze);
  return value;
}

/** The frozen configuration of an empty file. */
export const DEFAULT_CONFIG: Config = resolveConfig({}).config;
