/** A model in the making as one number: equal bytes, equal digests. */
import { createHash, type Hash } from "node:crypto";
import type { PhaseModel } from "../lib/phases/context.ts";

/**
 * SHA-256, in hex, of everything that the pipeline stores of a model: codes, scales, zero points, biases and
 * θ with its groups' boundaries. Two runs that print the same digest chose the same bytes, whatever the
 * runtime.
 */
export function modelDigest({ weights, biases, timeParameters }: PhaseModel): string {
  const hash = createHash("sha256");
  add(hash, weights);
  add(hash, biases);
  add(hash, timeParameters && [timeParameters.groups.boundaries, timeParameters.layers]);
  if (timeParameters?.sampler !== undefined) add(hash, timeParameters.sampler);
  return hash.digest("hex");
}

/** Adds a value with its kind and length, so that nothing runs into what follows. */
function add(hash: Hash, value: unknown): void {
  if (ArrayBuffer.isView(value)) {
    const { buffer, byteOffset, byteLength } = value;
    hash.update(`${value.constructor.name} ${byteLength} `);
    hash.update(new Uint8Array(buffer, byteOffset, byteLength));
  } else if (value instanceof Map || Array.isArray(value)) {
    hash.update(`list ${value instanceof Map ? value.size : value.length} `);
    for (const each of value) add(hash, each);
  } else if (typeof value === "object" && value !== null) {
    add(
      hash,
      Object.entries(value).filter(([, own]) => own !== undefined).sort(([a], [b]) => a < b ? -1 : 1),
    );
  } else hash.update(`${typeof value} ${String(value)} `);
}
