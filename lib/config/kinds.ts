/** Kinds of configuration values: how each is read from text and checked. */
import { GRIDS } from "./targets.ts";
import type { LayerBits } from "./names.ts";
import { compilePattern } from "./patterns.ts";

/** Most entries of a list or map; more than any checkpoint known has layers. */
const MAX_ITEMS = 4096;
/** Longest name or pattern: a pattern is run against every tensor name, and longer ones are accidents. */
export const MAX_NAME_LENGTH = 256;

/** Notes a fault; `at` is added to the key path, `expected` replaces the kind's own text. */
type Reject = (value: unknown, at?: string, expected?: string) => void;

/** A kind of values of type `V`. */
export interface Kind<V = unknown> {
  readonly type: string;
  readonly allowed: string;
  /** Text of a variable or option as a value; text that does not convert stays, for `check` to reject. */
  fromText(text: string): unknown;
  /** The value as the configuration holds it; meaningless if `reject` was called. */
  check(value: unknown, reject: Reject): V | void;
}

const NUMBER_TEXT = /^[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?$/i;
const numberFromText = (text: string): unknown => NUMBER_TEXT.test(text) ? Number(text) : text;

function jsonFromText(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return text; // `check` rejects it and shows the text itself
  }
}

/** Numbers, or integers, that a condition holds for; `allowed` says it in words. */
function numberKind<N extends number>(
  type: "integer" | "number",
  allowed: string,
  accepts: (value: number) => boolean,
): Kind<N> {
  return {
    type,
    allowed,
    fromText: numberFromText,
    check(value, reject) {
      const ok = typeof value === "number" && Number.isFinite(value) && accepts(value) &&
        (type === "number" || Number.isInteger(value));
      if (!ok) return reject(value);
      return value + 0 as N; // -0 becomes 0
    },
  };
}

export const integer = (min: number, max: number): Kind<number> =>
  numberKind("integer", `${min} to ${max}`, (v) => v >= min && v <= max);
export const integerOf = <const N extends number>(...choices: N[]): Kind<N> =>
  numberKind("integer", `one of ${choices.join(", ")}`, (v) => choices.includes(v as N));
export const number = (min: number, max: number): Kind<number> =>
  numberKind("number", `${min} to ${max}`, (v) => v >= min && v <= max);
export const positive = (max: number): Kind<number> =>
  numberKind("number", `above 0, at most ${max}`, (v) => v > 0 && v <= max);

const BOOLEAN_TEXTS: ReadonlyMap<string, boolean> = new Map([
  ["true", true],
  ["1", true],
  ["false", false],
  ["0", false],
]);

export const boolean: Kind<boolean> = {
  type: "boolean",
  allowed: "true or false",
  fromText: (text) => BOOLEAN_TEXTS.get(text) ?? text,
  check: (value, reject) => typeof value === "boolean" ? value : reject(value),
};

export const choice = <const S extends string>(...choices: S[]): Kind<S> => ({
  type: "string",
  allowed: `one of ${choices.join(", ")}`,
  fromText: (text) => text,
  check: (value, reject) => choices.includes(value as S) ? value as S : reject(value),
});

/** Longest path. */
const MAX_PATH_LENGTH = 4096;

export const text: Kind<string> = {
  type: "text",
  allowed: `1 to ${MAX_PATH_LENGTH} characters`,
  fromText: (text) => text,
  check: (value, reject) =>
    typeof value === "string" && value.length > 0 && value.length <= MAX_PATH_LENGTH ? value : reject(value),
};

export const orNull = <V>(kind: Kind<V>): Kind<V | null> => ({
  type: `${kind.type} or null`,
  allowed: kind.allowed,
  fromText: (text) => text === "" || text === "null" ? null : kind.fromText(text),
  check: (value, reject) => value === null ? null : kind.check(value, reject),
});

function checkName(value: unknown, isPattern: boolean, at: string, reject: Reject): void {
  if (typeof value !== "string" || value.length === 0 || value.length > MAX_NAME_LENGTH) {
    return reject(value, at, `text of 1 to ${MAX_NAME_LENGTH} characters`);
  }
  if (!isPattern) return;
  try {
    compilePattern(value);
  } catch (error) {
    // Engines put the pattern into the message; the reason stands behind the last colon.
    const reason = (error as Error).message.split(": ").at(-1);
    reject(value, at, `a JavaScript regular expression, flag u (${reason})`);
  }
}

export const list = (isPattern: boolean): Kind<readonly string[]> => ({
  type: `list of ${isPattern ? "patterns" : "names"}`,
  allowed: `at most ${MAX_ITEMS}, each of 1 to ${MAX_NAME_LENGTH} characters`,
  fromText(text) {
    if (text.trimStart().startsWith("[")) return jsonFromText(text);
    return text.trim() === "" ? [] : text.split(",").map((item) => item.trim());
  },
  check(value, reject) {
    if (!Array.isArray(value) || value.length > MAX_ITEMS) return reject(value);
    value.forEach((item, i) => checkName(item, isPattern, `[${i}]`, reject));
    return [...value];
  },
});

const mapOf = <V>(what: string, kind: Kind<V>): Kind<Readonly<Record<string, V>>> => ({
  type: `map of pattern to ${what}`,
  allowed: `${what} ${kind.allowed}; at most ${MAX_ITEMS} entries`,
  fromText: jsonFromText,
  check(value, reject) {
    if (!isMapping(value) || Object.keys(value).length > MAX_ITEMS) return reject(value);
    for (const [name, item] of Object.entries(value)) {
      const at = `[${quoted(name.slice(0, MAX_NAME_LENGTH))}]`;
      checkName(name, true, at, (_, __, expected) => reject(name, at, expected));
      kind.check(item, () => reject(item, at, kind.allowed));
    }
    // Own properties only, `__proto__` included.
    return Object.fromEntries(Object.entries(value)) as Record<string, V>;
  },
});

export const layerBits: Kind<Readonly<Record<string, LayerBits>>> = mapOf("bits", integerOf(2, 3, 4, 8, 16));
export const layerTypes: Kind<Readonly<Record<string, string>>> = mapOf(
  "type",
  choice(...Object.keys(GRIDS)),
);

export function isMapping(value: unknown): value is Record<string, unknown> {
  if (typeof value !== "object" || value === null) return false;
  const prototype = Object.getPrototypeOf(value);
  return prototype === Object.prototype || prototype === null;
}

/** JSON text is YAML, except for characters that YAML does not allow unescaped. */
export function quoted(text: string): string {
  return JSON.stringify(text).replace(/[\u007f-\u009f\u2028\u2029\ufeff\ufffe\uffff]/g, escapeCharacter);
}

/** A character as `\u` and four digits, which JSON and YAML share. */
export const escapeCharacter = (c: string): string => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`;
