/** The configuration as text: YAML with origins, canonical JSON, and the table of docs/configuration.md. */
import { escapeCharacter, isMapping, quoted } from "./kinds.ts";
import type { ResolvedConfig } from "./resolve.ts";
import { type Config, type Key, SCHEMA, valueAt } from "./schema.ts";

/** The configuration as YAML, every value followed by `# from` and its origin; it parses back to the same. */
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
 * The values that can change a byte of the output, as JSON with sorted key paths: the same text for the same
 * result.
 *
 * Left out are `num_threads` and `backend` (results do not depend on them), `fail_fast` (it only ends a
 * failing run sooner) and `deployment_profile` (it acts through three keys that are present).
 */
export function canonicalConfig(config: Config): string {
  const isSaid = ({ key, neutral, silent, default: value }: Key) =>
    !neutral && !(silent && JSON.stringify(valueAt(config, key)) === JSON.stringify(value));
  const entries = SCHEMA.filter(isSaid).map(({ key }): [string, unknown] => {
    const value = valueAt(config, key);
    return [key, isMapping(value) ? sortedByKey(Object.entries(value)) : value];
  });
  return JSON.stringify(sortedByKey(entries));
}

/** The schema as the Markdown table of docs/configuration.md, in the order of `formatConfig`. */
export function configTable(): string {
  const rows = SCHEMA.map(({ key, kind: { type, allowed }, unit, default: value, description, later }) => {
    const values = `${type}, ${allowed}${unit === undefined ? "" : ` (${unit})`}`;
    const meaning = description + (later ? ". _Without effect in this version_" : "");
    return `| \`${key}\` | ${values} | \`${yamlText(value)}\` | ${meaning} |`;
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

/** Code-unit order, which no locale changes. */
function sortedByKey(entries: [string, unknown][]): Record<string, unknown> {
  return Object.fromEntries(entries.sort(([a], [b]) => a < b ? -1 : a > b ? 1 : 0));
}
