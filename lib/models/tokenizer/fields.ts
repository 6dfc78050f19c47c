/** Values of a tokenizer's files, with their types: a fault is a `CheckpointError` that names the field. */
import { CheckpointError } from "../../errors.ts";
import { shown } from "../model_config.ts";

/** A value with its file and its place there, as in `added_tokens[3].id`. */
export class Field {
  constructor(readonly path: string, readonly place: string, readonly value: unknown) {}

  /** Absent and null are the same. */
  get isAbsent(): boolean {
    return this.value === undefined || this.value === null;
  }

  fault(wanted: string, found = shown(this.value)): CheckpointError {
    const message = `Cannot load ${shown(this.path)}: ${shown(this.place)} must be ${wanted}, got ${found}`;
    return new CheckpointError(message, { path: this.path });
  }

  /** A field of this object, absent where it has none. */
  at(key: string): Field {
    const { value } = this;
    if (typeof value !== "object" || value === null || Array.isArray(value)) throw this.fault("an object");
    const found = Object.hasOwn(value, key) ? (value as Record<string, unknown>)[key] : undefined;
    return new Field(this.path, this.place === "" ? key : `${this.place}.${key}`, found);
  }

  object(): Record<string, unknown> {
    this.at("");
    return this.value as Record<string, unknown>;
  }

  list(): Field[] {
    if (!Array.isArray(this.value)) throw this.fault("a list");
    return this.value.map((value, i) => new Field(this.path, `${this.place}[${i}]`, value));
  }

  text(): string {
    if (typeof this.value === "string") return this.value;
    throw this.fault("text");
  }

  flag(): boolean {
    if (typeof this.value === "boolean") return this.value;
    throw this.fault("true or false");
  }

  count(minimum: number, maximum: number): number {
    const { value } = this;
    if (typeof value === "number" && Number.isInteger(value) && value >= minimum && value <= maximum) {
      return value;
    }
    throw this.fault(`a whole number from ${minimum} to ${maximum}`);
  }

  choice(allowed: readonly string[]): string {
    if (typeof this.value === "string" && allowed.includes(this.value)) return this.value;
    throw this.fault(`one of ${allowed.join(", ")}`);
  }
}
