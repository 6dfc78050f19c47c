/**
 * Reading a model's config.json: every field checked, every fault a `CheckpointError` that names the key. The
 * keys of each family and what becomes of them are in configuration/.
 */
import { existsSync } from "node:fs";
import { dirname, join } from "node:path";
import { CheckpointError } from "../errors.ts";
import { readJsonFile, stringifyJson } from "../files/json.ts";
import type { Checkpoint } from "../tensor/mod.ts";

/** Most blocks of a model: published ones stay under 200, and each block costs a list of tensor names. */
export const MAX_BLOCKS = 4096;

/** Largest size in a configuration: beyond 31 bits a kernel's element count may overflow. */
const MAX_SIZE = 2 ** 31 - 1;

/** A value from a file for a message. */
export function shown(value: unknown): string {
  const text = stringifyJson(value) ?? "nothing";
  const short = text.length > 200 ? `${text.slice(0, 200)}…` : text;
  return short.replace(/\p{C}/gu, (c) => `\\u{${c.codePointAt(0)!.toString(16)}}`);
}

/** The fields of a JSON object, read with their types. Absent and `null` are the same, as in transformers. */
export class ConfigFields {
  constructor(
    readonly path: string,
    readonly fields: Readonly<Record<string, unknown>>,
    /** Whether other files in the folder belong to it. */
    readonly hasFolder = true,
  ) {}

  /** The fields of a checkpoint's config.json. @throws {CheckpointError} when there is none */
  static of(checkpoint: Checkpoint): ConfigFields {
    const path = join(checkpoint.folder, "config.json");
    if (checkpoint.config === undefined) {
      throw new CheckpointError(`Cannot load ${shown(checkpoint.path)}: must have a config.json, got none`, {
        path: checkpoint.path,
      });
    }
    // A GGUF file has its configuration in itself, and may lie among those of other models.
    if (checkpoint.gguf !== undefined) {
      return new ConfigFields(checkpoint.files[0]!.file.path, checkpoint.config, false);
    }
    return new ConfigFields(path, checkpoint.config);
  }

  /** The fields of another file in the same folder, undefined when there is none. */
  beside(name: string): ConfigFields | undefined {
    const path = join(dirname(this.path), name);
    return this.hasFolder && existsSync(path) ? new ConfigFields(path, readJsonFile(path)) : undefined;
  }

  has(key: string): boolean {
    return this.fields[key] !== undefined && this.fields[key] !== null;
  }

  fault(key: string, wanted: string, found: unknown = this.fields[key]): CheckpointError {
    return new CheckpointError(
      `Cannot load ${shown(this.path)}: "${key}" must be ${wanted}, got ${shown(found)}`,
      {
        path: this.path,
      },
    );
  }

  /** A whole number of at least `minimum`. */
  count(key: string, fallback?: number, minimum = 1, maximum = MAX_SIZE): number {
    const value = this.fields[key] ?? fallback;
    if (typeof value === "number" && Number.isInteger(value) && value >= minimum && value <= maximum) {
      return value;
    }
    throw this.fault(key, `a whole number from ${minimum} to ${maximum}`);
  }

  /** A whole number that may be missing. */
  optionalCount(key: string, minimum = 0, maximum = MAX_SIZE): number | undefined {
    return this.has(key) ? this.count(key, undefined, minimum, maximum) : undefined;
  }

  /** A number that may be missing. */
  optionalNumber(
    key: string,
    wanted: string,
    isRight: (value: number) => boolean,
  ): number | undefined {
    const value = this.fields[key] ?? undefined;
    if (value === undefined) return undefined;
    if (typeof value === "number" && Number.isFinite(value) && isRight(value)) return value;
    throw this.fault(key, wanted);
  }

  /** A finite number above 0. */
  positive(key: string, fallback?: number): number {
    const value = this.fields[key] ?? fallback;
    if (typeof value === "number" && value > 0 && value < Infinity) return value;
    throw this.fault(key, "a number above 0");
  }

  flag(key: string, fallback: boolean): boolean {
    const value = this.fields[key] ?? fallback;
    if (typeof value === "boolean") return value;
    throw this.fault(key, "true or false");
  }

  choice<T extends string>(key: string, allowed: readonly T[], fallback?: T): T {
    const value = this.fields[key] ?? fallback;
    if ((allowed as readonly unknown[]).includes(value)) return value as T;
    throw this.fault(key, allowed.map((name) => `"${name}"`).join(" or "));
  }

  /**
   * Refuses a feature that the forward pass does not have: `key` must be absent, null or one of `harmless`.
   */
  refuse(key: string, ...harmless: readonly unknown[]): void {
    if (!this.has(key) || harmless.includes(this.fields[key])) return;
    throw this.fault(
      key,
      harmless.length === 0
        ? "absent: it is not supported"
        : `${harmless.map(shown).join(" or ")}: nothing else is supported`,
    );
  }

  /** Tokens that lie in the vocabulary: a number or a list; none when absent, or -1. */
  tokens(key: string, vocabulary: number): readonly number[] {
    const value = this.fields[key] ?? [];
    const tokens: readonly unknown[] = Array.isArray(value) ? value : [value];
    const isToken = (token: unknown): token is number =>
      typeof token === "number" && Number.isInteger(token) && token >= -1 && token < vocabulary;
    if (tokens.every(isToken)) return tokens.filter((token) => token >= 0);
    throw this.fault(key, `a token from 0 to ${vocabulary - 1}, or a list of tokens`);
  }
}
