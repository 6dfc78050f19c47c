/** Memory for the values of a forward pass: with a tape, those that the backward pass reads are kept. */
import type { Kernels } from "../../native/mod.ts";
import type { Workspace } from "./workspace.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Values that a forward pass keeps, by name. */
export class Tape<Name extends string> {
  readonly #workspace: Workspace;
  readonly #bufferOf: (name: string) => string;
  readonly #kept = new Map<string, Floats>();

  /** @param bufferOf name of the buffer for each value */
  constructor(workspace: Workspace, bufferOf: (name: string) => string) {
    this.#workspace = workspace;
    this.#bufferOf = bufferOf;
  }

  /** Memory for a value, which {@linkcode get} gives until it is kept again. */
  keep(name: Name, length: number): Floats {
    const values = this.#workspace.take(this.#bufferOf(name), length);
    this.#kept.set(name, values);
    return values;
  }

  /** A value of the last forward pass. */
  get(name: Name): Floats {
    return this.#kept.get(name)!;
  }
}

/**
 * Memory for a value: kept on the tape, if there is one; else the workspace's, or `shared`, overwritten,
 * which kernels hold until the end of the pass.
 */
export function memoryFor<Name extends string>(
  { workspace, kernels: { arrays } }: { readonly workspace: Workspace; readonly kernels: Kernels },
  tape: Tape<Name> | undefined,
  name: Name,
  length: number,
  shared: string | Floats = name,
): Floats {
  if (tape !== undefined) return tape.keep(name, length);
  return typeof shared === "string" ? arrays.hold(workspace.take(shared, length), true) : arrays.hold(shared);
}
