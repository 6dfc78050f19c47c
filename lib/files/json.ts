/**
 * Strict, bounded JSON: what `JSON.parse` lets through and a file from a stranger must not have. Repeated
 * keys, deep nesting and huge containers are found by a scan of the text before anything is built from it.
 * In files of others `NaN`, `Infinity` and `-Infinity` are numbers, as Python's `json` writes and reads them.
 */
import { FormatError } from "../errors.ts";
import { foreignContent, SNIFFED_BYTES } from "./foreign.ts";
import { quote, readWhole } from "./whole.ts";

/** Largest config.json or index that is read: the largest published indexes are around 10 MB. */
const MAX_JSON_FILE_BYTES = 64 * 2 ** 20;

/** Bounds on a JSON text. */
export interface JsonRules {
  /** Nested containers, the outermost counted. */
  readonly maxDepth: number;
  /** Keys of all objects together. */
  readonly maxKeys: number;
  /** Items of one array. */
  readonly maxItems: number;
  /** Whether a value that is no string or container must be an integer ≥ 0 written in digits only. */
  readonly integersOnly: boolean;
  /** The outermost object's key that may be null all the same. */
  readonly nullable?: string;
  /** Whether `NaN`, `Infinity` and `-Infinity` are values. Default no. */
  readonly pythonNumbers?: boolean;
}

/** Bounds on config.json and index files: generous for real ones, small enough to parse in bounded memory. */
const FILE_RULES: JsonRules = {
  maxDepth: 64,
  maxKeys: 2_000_000,
  maxItems: 2_000_000,
  integersOnly: false,
  pythonNumbers: true,
};

/** Begins the text that stands for a number which JSON does not have; no file can know it. */
const MARK = crypto.randomUUID();
const MARKED = new RegExp(`"${MARK}(NaN|-?Infinity)"`, "g");

/** A text broke the rules; `keys` leads from the outermost object to the place. */
export class JsonFault extends SyntaxError {
  constructor(readonly reason: string, readonly keys: readonly string[], cause?: unknown) {
    super(keys.length === 0 ? reason : `${keys.map(quote).join(" / ")}: ${reason}`, { cause });
  }
}

/**
 * Decodes UTF-8 and parses it as JSON under rules.
 *
 * @throws {JsonFault} on invalid UTF-8, invalid JSON, a repeated key at any level, or a bound exceeded
 */
export function parseJson(bytes: Uint8Array, rules: JsonRules): unknown {
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch (cause) {
    throw new JsonFault("must be valid UTF-8", [], cause);
  }
  if (text.startsWith("\ufeff")) {
    throw new JsonFault(
      "must be valid JSON, without a byte order mark at its beginning: save it as UTF-8 without one",
      [],
    );
  }
  const places = scan(text, rules);
  try {
    return places.length === 0 ? JSON.parse(text) : JSON.parse(marked(text, places), unmarked);
  } catch (cause) {
    throw new JsonFault(`must be valid JSON, got ${quote(String(cause))}`, [], cause);
  }
}

/** The text with each number that JSON does not have as a marked text. */
function marked(text: string, places: readonly Place[]): string {
  let out = "", done = 0;
  for (const { begin, value } of places) {
    out += `${text.slice(done, begin)}"${MARK}${value}"`;
    done = begin + value.length;
  }
  return out + text.slice(done);
}

const unmarked = (_key: string, value: unknown): unknown =>
  typeof value === "string" && value.startsWith(MARK) ? Number(value.slice(MARK.length)) : value;

/** `JSON.stringify`, but numbers that JSON does not have stay what they are, in Python's spelling. */
export function stringifyJson(value: unknown, indent?: number): string | undefined {
  const keep = (_key: string, each: unknown) =>
    typeof each === "number" && !Number.isFinite(each) ? `${MARK}${each}` : each;
  return JSON.stringify(value, keep, indent)?.replace(MARKED, "$1");
}

/**
 * One line of a JSONL file, with Python's numbers.
 *
 * @throws {SyntaxError} when it is not JSON
 */
export function parseJsonLine(line: string): unknown {
  try {
    return JSON.parse(line);
  } catch (error) {
    if (error instanceof RangeError) throw new JsonFault("nested too deep", [], error);
    if (!/\b(?:NaN|Infinity)\b/.test(line)) throw error;
    return parseJson(new TextEncoder().encode(line), FILE_RULES);
  }
}

/** Whether a parsed value is a JSON object. */
export function isJsonObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/**
 * Reads a file that holds one JSON object.
 *
 * @throws {FormatError} when the file is too large, not UTF-8, not JSON, repeats a key, or holds no object
 * @throws {CheckpointError} when it cannot be opened or read
 */
export function readJsonFile(path: string): Record<string, unknown> {
  const bytes = readWhole(path, MAX_JSON_FILE_BYTES);
  try {
    const value = parseJson(bytes, FILE_RULES);
    if (isJsonObject(value)) return value;
    throw new JsonFault("must be a JSON object", []);
  } catch (error) {
    if (!(error instanceof JsonFault)) throw error;
    const other = foreignContent(bytes.subarray(0, SNIFFED_BYTES));
    const reason = other === undefined ? error.message : `must be JSON, got ${other}`;
    throw new FormatError(`Cannot read ${quote(path)}: ${reason}`, { path, cause: error });
  }
}

/** An open container: an object with the keys seen so far and the newest one, or an array with its commas. */
interface Level {
  readonly keys: Set<string> | undefined;
  key: string;
  commas: number;
}

const BARE_VALUE = /[^\s,:[\]{}"]+/y;
const PYTHON_NUMBER = /^(?:NaN|-?Infinity)$/;
const DIGITS = /^(?:0|[1-9][0-9]*)$/;

/** A bare word in a text. */
interface Place {
  readonly begin: number;
  readonly value: string;
}

/**
 * Finds what `JSON.parse` would hide, and returns the numbers that it does not know, where the rules allow
 * them. Grammar is left to it: on text that is no JSON the scan may stop.
 */
function scan(text: string, rules: JsonRules): readonly Place[] {
  const levels: Level[] = [], places: Place[] = [];
  let level: Level | undefined;
  let keyIsNext = false;
  let keyCount = 0;
  const fault = (reason: string) =>
    new JsonFault(reason, levels.filter(({ keys }) => keys?.size).map(({ key }) => key));
  for (let i = 0; i < text.length;) {
    const c = text[i];
    if (c === '"') {
      const end = stringEnd(text, i);
      if (end === undefined) return places;
      if (keyIsNext && level?.keys !== undefined) {
        const key = decodeString(text.slice(i, end));
        if (key === undefined) return places;
        level.key = key;
        if (level.keys.has(key)) throw fault("key must not be repeated, got it twice");
        level.keys.add(key);
        if (++keyCount > rules.maxKeys) throw fault(`must have at most ${rules.maxKeys} keys, got more`);
      }
      i = end;
    } else if (c === "{" || c === "[") {
      if (levels.length === rules.maxDepth) {
        throw fault(`must be nested at most ${rules.maxDepth} deep, got more`);
      }
      keyIsNext = c === "{";
      level = { keys: keyIsNext ? new Set() : undefined, key: "", commas: 0 };
      levels.push(level);
      i++;
    } else if (c === "}" || c === "]") {
      levels.pop();
      level = levels.at(-1);
      keyIsNext = false;
      i++;
    } else if (c === ",") {
      keyIsNext = level?.keys !== undefined;
      if (level?.keys === undefined && level !== undefined && ++level.commas >= rules.maxItems) {
        throw fault(`array must have at most ${rules.maxItems} items, got more`);
      }
      i++;
    } else if (c === ":") {
      keyIsNext = false;
      i++;
    } else {
      BARE_VALUE.lastIndex = i;
      const value = BARE_VALUE.exec(text)?.[0];
      const isNone = value === "null" && levels.length === 1 && rules.nullable === level?.key;
      if (value !== undefined && rules.integersOnly && !DIGITS.test(value) && !isNone) {
        throw fault(`values must be strings or integers ≥ 0, got ${quote(value)}`);
      }
      const isNumber = value !== undefined && !keyIsNext && PYTHON_NUMBER.test(value);
      if (isNumber && rules.pythonNumbers === true) places.push({ begin: i, value });
      i += value?.length ?? 1;
    }
  }
  return places;
}

/** Index just behind the string literal that starts at `start`, undefined when it never ends. */
function stringEnd(text: string, start: number): number | undefined {
  for (let i = start + 1; i < text.length; i++) {
    const c = text.charCodeAt(i);
    if (c === 0x5c) i++;
    else if (c === 0x22) return i + 1;
  }
  return undefined;
}

function decodeString(literal: string): string | undefined {
  if (!literal.includes("\\")) return literal.slice(1, -1);
  try {
    return JSON.parse(literal);
  } catch {
    return undefined; // no JSON: parsing the whole text reports it
  }
}
