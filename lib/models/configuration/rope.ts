/**
 * Rotary positions out of config.json: `rope_theta` at the top, or inside `rope_scaling` or `rope_parameters`
 * (transformers 5), there also by type of layer. Scaled positions are not run.
 */
import type { ConfigFields } from "../model_config.ts";
import { isJsonObject } from "../../files/json.ts";

/** Kinds of scaling that change nothing at a factor of 1, up to the longest sequence of the configuration. */
const WITHOUT_EFFECT_AT_1: readonly unknown[] = ["linear", "dynamic", "yarn", "llama3"];
/** Entries that say nothing unless positions are scaled. */
const NAMES: readonly string[] = ["rope_type", "type", "rope_theta", "original_max_position_embeddings"];
/** Entries that change nothing at 1. */
const FACTORS: readonly string[] = ["factor", "attention_factor", "partial_rotary_factor"];

/**
 * The base of the rotary positions, `default` where none is given.
 *
 * @throws {CheckpointError} naming the key when positions are scaled, or two places contradict each other
 */
export function rotaryTheta(fields: ConfigFields, fallback = 10_000): number {
  let found: { readonly key: string; readonly theta: number } | undefined;
  const take = (key: string, value: unknown) => {
    if (!(typeof value === "number" && value > 0 && value < Infinity)) {
      throw fields.fault(key, "a number above 0", value);
    }
    if (found !== undefined && found.theta !== value) {
      throw fields.fault(key, `${found.theta}, as "${found.key}" says`, value);
    }
    found ??= { key, theta: value };
  };
  if (fields.has("rope_theta")) take("rope_theta", fields.fields["rope_theta"]);
  for (const key of ["rope_scaling", "rope_parameters"]) {
    if (!fields.has(key)) continue;
    for (const [path, part] of partsOf(fields, key)) {
      checkUnscaled(fields, path, part);
      const theta = part["rope_theta"];
      if (theta !== undefined && theta !== null) take(`${path}.rope_theta`, theta);
    }
  }
  return found?.theta ?? fallback;
}

type Part = Readonly<Record<string, unknown>>;

/** An entry and, where it has one for each type of layer, those of the types that there are. */
function partsOf(fields: ConfigFields, key: string): [path: string, part: Part][] {
  const value = fields.fields[key];
  if (!isJsonObject(value)) throw fields.fault(key, "an object or null");
  const entries = Object.entries(value);
  const isOwn = ([name, each]: [string, unknown]) =>
    !isJsonObject(each) || NAMES.includes(name) || FACTORS.includes(name);
  const own = entries.filter(isOwn), types = fields.fields["layer_types"];
  const nested = entries.filter((entry): entry is [string, Part] =>
    !isOwn(entry) && (!Array.isArray(types) || types.includes(entry[0]))
  );
  return [
    [key, Object.fromEntries(own)],
    ...nested.map(([name, part]): [string, Part] => [`${key}.${name}`, part]),
  ];
}

/** @throws {CheckpointError} unless the positions are those without scaling */
function checkUnscaled(fields: ConfigFields, path: string, part: Part): void {
  const said = [part["rope_type"], part["type"]].filter((type) => type !== undefined && type !== null);
  const isPlain = said.every((type) => type === "default");
  const isAtOne = said.every((type) => WITHOUT_EFFECT_AT_1.includes(type)) && part["factor"] === 1;
  const scales = Object.entries(part).some(([key, value]) =>
    value !== null && !NAMES.includes(key) && (FACTORS.includes(key) ? value !== 1 : isPlain)
  );
  if (new Set(said).size < 2 && (isPlain || isAtOne) && !scales) return;
  throw fields.fault(path, 'without scaling ("default" or null): scaled positions are not run', part);
}
